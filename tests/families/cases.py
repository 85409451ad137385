"""One experts module on octavo's forward and on its own: the same weights, the same inputs, every gradient by name.

Legend: ``T`` tokens, ``K`` top-k, ``E`` experts, ``H`` hidden size, ``R`` LoRA rank.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.formats.facts import ScaleLayout
from octavo.formats.weight import Float8Weight, quantize
from octavo.integrations.experts import experts_layout, gate_of
from octavo.nn.experts import DenseExperts, Float8Experts, LoraFactors, OctavoExperts, adopt_dense, adopt_float8
from octavo.nn.settings import Settings
from octavo.ops.weights import storage

LAYOUTS = (ScaleLayout("channel"), ScaleLayout("tensor"), ScaleLayout("block", (32, 32)))
RANK = 3
TOKENS = 14


@dataclass(frozen=True)
class Batch:
    """``x_TH``, ``index_TK``, ``p_TK`` and the incoming gradient ``dy_TH``; ``on_rank_TK``: 0 for ids past the last
    expert.
    """

    x_TH: Tensor
    index_TK: Tensor
    p_TK: Tensor
    dy_TH: Tensor

    def to(self, dtype: torch.dtype) -> "Batch":
        """The activations in ``dtype``; the router's weights stay what they are."""
        return Batch(self.x_TH.to(dtype), self.index_TK, self.p_TK, self.dy_TH.to(dtype))


def batch_for(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Expert 0 gets no token, expert 1 one, expert 2 all of them, the others the rest."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, hidden = experts_of(module), hidden_of(module)
    index_TK = torch.full((TOKENS, 2), 2)
    index_TK[:, 1] = torch.randint(3, num_experts, (TOKENS,), generator=generator)
    index_TK[5, 1] = 1
    # which slot names the busy expert does not matter to it, and should not to us
    index_TK[1::2] = index_TK[1::2].flip(-1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    # large enough for the clamps of some gates to bind
    return Batch(draw(TOKENS, hidden) * 4, index_TK, draw(TOKENS, 2).abs() + 0.1, draw(TOKENS, hidden))


def experts_of(module: nn.Module) -> int:
    return module.get_parameter("down_proj").shape[0]


def hidden_of(module: nn.Module) -> int:
    return module.get_parameter("down_proj").shape[2 if module.is_transposed else 1]


def quantized(module: nn.Module, layout: ScaleLayout) -> dict[str, Float8Weight]:
    """The stacks of ``module`` in FP8, gate and up with grids of their own."""
    facts = experts_layout(module)
    assert facts is not None
    parts = {facts.up_name: facts.parts, facts.down_name: 1}
    return {name: quantize(module.get_parameter(name), layout, parts=parts[name]) for name in facts.names}


def float8_twin(
    module: nn.Module, weights: dict[str, Float8Weight], layout: ScaleLayout, settings: Settings
) -> Float8Experts:
    """``module``, of the same class and on octavo's forward, as the loader makes it: swapped on meta, filled,
    sealed.
    """
    facts = experts_layout(module)
    assert facts is not None
    layouts = dict.fromkeys(facts.names, layout)
    adopted = adopt_float8(module, facts, gate_of(module), settings, layouts, set())
    for name, weight in weights.items():
        codes, scales = storage(weight)
        declared = adopted.get_parameter(name), adopted.get_parameter(f"{name}_scale")
        assert [(d.shape, d.dtype) for d in declared] == [(t.shape, t.dtype) for t in (codes, scales)]
        adopted.register_parameter(name, nn.Parameter(codes.clone(), requires_grad=False))
        adopted.register_parameter(f"{name}_scale", nn.Parameter(scales.clone(), requires_grad=False))
    adopted.seal()
    return adopted


def dense_twin(module: nn.Module, settings: Settings) -> DenseExperts:
    """``module`` itself, on octavo's forward."""
    facts = experts_layout(module)
    assert facts is not None
    return adopt_dense(module, facts, gate_of(module), settings)


def factors_for(module: nn.Module, dtype: torch.dtype, seed: int = 1) -> dict[str, LoraFactors]:
    """A LoRA adapter on both stacks, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in experts_layout(module).names:
        num_experts, out_features, in_features = module.get_parameter(name).shape
        if module.is_transposed:
            in_features, out_features = out_features, in_features
        A = torch.randn(num_experts, RANK, in_features, dtype=dtype, generator=generator) * in_features**-0.5
        B = torch.randn(num_experts, out_features, RANK, dtype=dtype, generator=generator) * 0.3
        factors[name] = LoraFactors(A.requires_grad_(), B.requires_grad_(), 0.7)
    return factors


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def differentiate(
    forward: Forward, batch: Batch, leaves: dict[str, Tensor], *, shape: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """The output ``y``, and the gradients ``dx``, ``dp`` and ``d<leaf>`` of ``Σ y · dy``.

    ``shape``: leading dimensions to hand the tokens over in.
    """
    x_TH, p_TK = batch.x_TH.clone().requires_grad_(), batch.p_TK.clone().requires_grad_()
    lead = shape or x_TH.shape[:1]
    y = forward(*(tensor.view(*lead, tensor.shape[-1]) for tensor in (x_TH, batch.index_TK, p_TK)))
    wanted = {"x": x_TH, "p": p_TK, **leaves}
    grads = torch.autograd.grad(y, list(wanted.values()), batch.dy_TH.view(y.shape).to(y.dtype), allow_unused=True)
    missing = [name for name, grad in zip(wanted, grads, strict=True) if grad is None]
    assert not missing, f"no gradient for {missing}"
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def leaves_of(factors: dict[str, LoraFactors]) -> dict[str, Tensor]:
    """The tensors that train, by name."""
    return {
        f"{name}.{part}": getattr(f, f"{part}_{dims}")
        for name, f in factors.items()
        for part, dims in (("A", "ERK"), ("B", "ENR"))
    }


def with_lora(experts: OctavoExperts, factors: dict[str, LoraFactors]) -> Forward:
    """The forward of ``experts`` with the factors handed to it."""

    def forward(*inputs: Tensor) -> Tensor:
        with ExitStack() as stack:
            for name, factor in factors.items():
                stack.enter_context(experts.lora(name, [factor]))
            return experts(*inputs)

    return forward


def with_merged(stock: nn.Module, factors: dict[str, LoraFactors]) -> Forward:
    """The class's own forward with the factors merged into its weights."""

    def forward(*inputs: Tensor) -> Tensor:
        merged = {}
        for name, factor in factors.items():
            delta = factor.B_ENR @ factor.A_ERK * factor.scaling
            merged[name] = stock.get_parameter(name) + (delta.transpose(-1, -2) if stock.is_transposed else delta)
        return torch.func.functional_call(stock, merged, inputs)

    return forward


def relative_errors(want: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """``‖got − want‖ / ‖want‖`` by name; infinite where something is not finite, or is not zero and should be."""
    assert want.keys() == got.keys()
    return {name: _relative(want[name].double(), got[name].double()) for name in want}


def _relative(want: Tensor, got: Tensor) -> float:
    assert want.shape == got.shape
    error, norm = (got - want).norm().item(), want.norm().item()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return error / norm if norm else (float("inf") if error else 0.0)


def assert_close(want: dict[str, Tensor], got: dict[str, Tensor], tolerance: float) -> None:
    wrong = {name: error for name, error in relative_errors(want, got).items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"
