"""``Float8Linear``: a linear layer whose weight stays in FP8."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from octavo.formats.scheme import ScaleLayout
from octavo.nn import storage
from octavo.nn.settings import Chosen, Settings
from octavo.ops.choice import Layer, Request, linear_layer
from octavo.ops.engines import Engine
from octavo.ops.linear import float8_linear
from octavo.ops.weights import WeightSpec


class Float8Linear(nn.Linear):
    """``y = x · (codes × scales)ᵀ + bias`` with frozen E4M3 codes.

    ``weight`` [out, in] holds codes (uint8), ``weight_scale`` their grid (float32 bits in int32), ``input_scale`` a
    static activation scale where the checkpoint has one. Output in the dtype of the input, or of autocast.
    """

    _chosen: Chosen | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layout: ScaleLayout,
        bias: bool,
        static_input: bool,
        settings: Settings,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.layout, self.settings = in_features, out_features, layout, settings
        self.spec = WeightSpec(True, 1, layout.block_of(out_features, in_features))
        storage.declare(self, "weight", (out_features, in_features), storage.CODES)
        storage.declare(self, "weight_scale", layout.grid(out_features, in_features), torch.float32)
        if static_input:
            storage.declare(self, "input_scale", (1, 1), torch.float32)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device="meta"))
        else:
            self.register_parameter("bias", None)

    @property
    def scale_names(self) -> list[str]:
        return [name for name in ("weight_scale", "input_scale") if name in self._parameters]

    def seal(self) -> None:
        """Freeze codes and scales in their stored dtypes, after loading."""
        storage.seal(self, ["weight"], self.scale_names)

    def forward(self, x: Tensor) -> Tensor:
        storage.refuse_parametrization(self)
        storage.check_codes_dtype(self, "weight", self.weight)
        storage.check_activations(self, x)
        x = autocast(x)
        scales = storage.opened_scales(self.get_parameter("weight_scale"))
        y = float8_linear(x, self.weight, scales, self.spec, self._engine(x))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def layer(self, dtype: torch.dtype | None) -> Layer:
        """What the choice of an engine depends on, for activations in ``dtype``."""
        return linear_layer(self.weight.device, dtype, self.spec, self.weight.shape)

    def _engine(self, x: Tensor) -> Engine | Request:
        if torch.compiler.is_compiling():
            return self.settings.request
        key = (self.settings, x.device, x.dtype)
        if self._chosen is None or self._chosen.key != key:
            self._chosen = Chosen(key, self.settings.choose(self.layer(x.dtype)))
        return self._chosen.choice.at(x.numel() // max(1, x.shape[-1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``codes × scales`` [out, in], rounded once to ``dtype``."""
        return self.spec.assemble(self.weight, storage.opened_scales(self.get_parameter("weight_scale"))).dequantize(
            dtype
        )[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        super()._apply(storage.apply_guarded(self, ["weight", *self.scale_names], fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, FP8 {self.layout}, {self.settings.shown(self.layer(None))}"


def autocast(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype where autocast is on: a frozen FP8 weight has no dtype of its own to follow."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
