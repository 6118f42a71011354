"""What `medsynth evaluate` does."""
