"""The shapes that benchmarks run on: expert layers of real models, and the floors of one H200."""

from octavo.bench.shapes import MODELS

TOKENS = (2048, 8192, 32768)
# forward + input gradient of one layer in bf16 on an H200: 790 TFLOP/s measured, or the bytes at 4.3 TB/s measured
FLOOR_MS = {
    ("glm", 2048): 0.39, ("glm", 8192): 1.57, ("glm", 32768): 6.26,
    ("qwen3", 2048): 0.41, ("qwen3", 8192): 1.57, ("qwen3", 32768): 6.26,
}  # fmt: skip

__all__ = ["FLOOR_MS", "MODELS", "TOKENS"]
