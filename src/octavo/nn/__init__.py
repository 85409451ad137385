"""Modules: the storage mixin over a model's own experts class, and the FP8 linear layer."""
