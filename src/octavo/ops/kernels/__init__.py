"""Triton kernels and their launchers. Importing a module of this package imports triton; nothing else here does."""
