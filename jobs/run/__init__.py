"""What commands share about one run."""
