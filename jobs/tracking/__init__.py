"""What a run tells MLflow, and how it gets there."""
