"""Medsynth: train, launch, score and compare generators of medical images."""

__version__ = "0.1.0"
