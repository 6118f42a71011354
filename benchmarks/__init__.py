"""Measurements run by hand: `python -m benchmarks.train_step`."""
