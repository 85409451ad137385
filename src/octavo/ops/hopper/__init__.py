"""Grouped FP8 products for Hopper in CUDA C++, compiled by NVRTC at first use."""
