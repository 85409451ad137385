"""torchao's AdamW with states of 8 bits, its step on a GPU ours: one launch for all quantized parameters of a group.

Class, states, checkpoints and rules are torchao's, so either continues the other's checkpoints. Its own step calls a
compiled function for each parameter, which keeps the host busy for longer than the GPU, and is compiled for each shape.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from octavo.ops.kernels.adamw_8bit import Tensors

_MASK = (1 << 64) - 1


def fused_adamw_8bit(optimizer: Optimizer) -> Optimizer:
    """``optimizer``; if it is torchao's `AdamW8bit`, with a step that is one kernel where a GPU holds whole parameters.

    Groups with amsgrad, sharded parameters or parameters on the CPU take torchao's own step, as do other block sizes.
    A parameter that torchao does not quantize (fewer than 4096 elements, or no multiple of 256), or whose memory is not
    contiguous, takes torchao's step without its compilation.

    Stochastic rounding of what the kernel updates draws its bits from torch's initial seed, the step, the parameter's
    place among all and the element's in it: not from a generator, and not from what else is updated with it.
    """
    module = sys.modules.get("torchao.optim")
    if module is None or type(optimizer) is not module.AdamW8bit or not find_spec("triton"):
        return optimizer
    optimizer.__class__ = _fused_class()
    # Hooks of steps, which torch puts around the step of an optimizer's class when it is made.
    optimizer._patch_step_function()
    _numbers(optimizer)
    return optimizer


def rounding_seed(seed: int, step: int, number: int) -> int:
    """64 bits, signed, of ``seed``, ``step`` and the ``number`` of a parameter, mixed as splitmix64 does."""
    state = 0
    for word in (seed, step, number):
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


# torchao is optional, and takes long to import.
@cache
def _fused_class() -> type[Optimizer]:
    from torchao.optim import AdamW8bit

    class FusedAdamW8bit(AdamW8bit):  # type: ignore[misc]  # torchao is untyped
        """torchao's `AdamW8bit` with the step of `octavo.ops.kernels.adamw_8bit`."""

        param_groups: list[dict[str, Any]]

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            _numbers(self)

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            groups = self.param_groups
            for group in groups:
                parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
                if _is_fused(self, group, parameters):
                    _step(self, group, parameters)
                    continue
                self.param_groups = [group]
                try:
                    # Past AdamW8bit, around whose step are the hooks that are around this one already.
                    super(AdamW8bit, self).step()
                finally:
                    self.param_groups = groups
            return loss

    FusedAdamW8bit.__qualname__ = FusedAdamW8bit.__name__
    return FusedAdamW8bit


def _numbers(optimizer: Any) -> WeakTensorKeyDictionary:
    """Of each parameter, its place in the optimizer's order; one that is new comes last."""
    # An attribute, which no checkpoint has: it is the same wherever the same parameters are handed over.
    # Weak, since parameters may be exchanged for sharded ones, whose step is torchao's.
    numbers: WeakTensorKeyDictionary = optimizer.__dict__.setdefault("_octavo_numbers", WeakTensorKeyDictionary())
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        numbers.setdefault(parameter, len(numbers))
    return numbers


def _is_fused(optimizer: Any, group: dict[str, Any], parameters: list[Tensor]) -> bool:
    from octavo.ops.kernels.adamw_8bit import BLOCK_SIZE
    from octavo.ops.kernels.common import INTERPRETED

    return (
        optimizer.block_size == BLOCK_SIZE
        and not group["amsgrad"]
        and all(type(parameter) in (Tensor, nn.Parameter) for parameter in parameters)
        and all(parameter.device.type == "cuda" or INTERPRETED for parameter in parameters)
    )


def _step(optimizer: Any, group: dict[str, Any], parameters: list[Tensor]) -> None:
    """One step on ``parameters`` of ``group``, which have gradients."""
    if not parameters:
        return
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    from octavo.ops.kernels.adamw_8bit import BLOCK_SIZE, Moment, Tensors, fits

    def moment(state: Tensor) -> Moment | None:
        if not isinstance(state, OptimState8bit) or state.block_size != BLOCK_SIZE:
            return None
        return Moment(state.codes, state.scale, state.qmap)

    numbers, seed = _numbers(optimizer), torch.initial_seed()
    states = [_state(optimizer, parameter) for parameter in parameters]
    if not isinstance(group["lr"], Tensor):
        raise RuntimeError(
            "lr was changed to a non-Tensor object. If you want to update lr, please use "
            "optim.param_groups[0]['lr'].fill_(new_lr)"
        )
    torch._foreach_add_([state["step"] for state in states], 1)
    stochastic = optimizer.bf16_stochastic_round
    launches: dict[tuple[int, torch.device, torch.dtype, torch.dtype], list[Tensors]] = defaultdict(list)
    for parameter, state in zip(parameters, states, strict=True):
        gradient = parameter.grad
        assert gradient is not None
        m, v = moment(state["exp_avg"]), moment(state["exp_avg_sq"])
        if m is None or v is None or not fits(parameter, m, v):
            single_param_adam(
                parameter.detach(), gradient, state["step"], state["exp_avg"], state["exp_avg_sq"], None,
                group["lr"], *group["betas"], group["weight_decay"], group["eps"], True,
                stochastic and parameter.dtype is torch.bfloat16,
            )  # fmt: skip
            continue
        step = int(state["step"])
        drawn = rounding_seed(seed, step, numbers[parameter])
        launch = launches[step, parameter.device, parameter.dtype, gradient.dtype]
        launch.append(Tensors(parameter.detach(), gradient, m, v, drawn))
    for (step, *_), tensors in launches.items():
        _launch(group, step, tensors, stochastic)


def _launch(group: dict[str, Any], step: int, tensors: "list[Tensors]", stochastic: bool) -> None:
    from octavo.ops.kernels import adamw_8bit as kernel

    # In float32, as torchao has them.
    lr, count = group["lr"].cpu(), torch.tensor(float(step))
    beta1, beta2 = group["betas"]
    numbers = kernel.Numbers(
        lr=float(lr),
        decay=float(lr * group["weight_decay"]),
        weights=(float(1 - beta1), float(1 - beta2)),
        corrections=(float(1 - beta1**count), float((1 - beta2**count).sqrt())),
        eps=float(group["eps"]),
    )
    kernel.step(tensors, numbers, stochastic=stochastic)


def _state(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """The state of ``parameter``, as torchao makes it when there is none."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise RuntimeError("Sparse gradient is not supported")
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = optimizer._new_buffer(parameter, True)
        state["exp_avg_sq"] = optimizer._new_buffer(parameter, False)
    elif state["step"].device.type != "cpu":
        # A checkpoint may have been read onto the GPU, where each number would be waited for.
        state["step"] = state["step"].cpu()
    return state
