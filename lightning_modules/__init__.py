"""How each method learns and samples."""
