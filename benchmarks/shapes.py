"""The shapes that benchmarks run on: expert layers of real models, and the floors of one H200."""

from dataclasses import dataclass

from octavo.formats.scheme import ScaleLayout


@dataclass(frozen=True)
class Model:
    """One MoE layer. ``layout``: the scale layout of the checkpoint that people use."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    layout: ScaleLayout

    def flops(self, tokens: int) -> float:
        """Of forward and input gradient: the base is frozen, so there is no weight gradient."""
        return 2 * 2 * tokens * self.top_k * 3 * self.hidden * self.intermediate


MODELS = {
    "glm": Model("glm", 64, 4, 2048, 1536, ScaleLayout("channel")),
    "qwen3": Model("qwen3", 128, 8, 2048, 768, ScaleLayout("block", (128, 128))),
}
TOKENS = (2048, 8192, 32768)
# forward + input gradient of one layer in bf16 on an H200: 790 TFLOP/s measured, or the bytes at 4.3 TB/s measured
FLOOR_MS = {
    ("glm", 2048): 0.39, ("glm", 8192): 1.57, ("glm", 32768): 6.26,
    ("qwen3", 2048): 0.41, ("qwen3", 8192): 1.57, ("qwen3", 32768): 6.26,
}  # fmt: skip
