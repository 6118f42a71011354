"""How images are scored."""
