"""Time and memory on the shapes of real models: ``python -m benchmarks``."""
