"""What the bytes of a checkpoint mean: schemes read from ``config.json``, and FP8 weights with their scale grid.

Modules here import torch and the standard library only, and everything but ``weight`` no torch either, so that a
command that reads headers starts at once.
"""
