"""What several methods derive from."""
