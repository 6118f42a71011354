"""How a file is read."""
