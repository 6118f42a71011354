"""Data sets that are drawn, with known truth."""
