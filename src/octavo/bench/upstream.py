"""transformers' own FP8 experts as a baseline: blocks of 128 x 128, activations rounded per token and block, no LoRA.

Their product is a Triton kernel that the package ``kernels`` downloads from the hub; where a package named
``finegrained_fp8`` (its sources) can be imported, that is taken instead, for machines without a network.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from octavo.bench.layer import LayerCase
from octavo.errors import EngineError
from octavo.formats.scheme import ScaleLayout
from octavo.ops.weights import storage

NAME = "transformers"
_PACKAGE = "finegrained_fp8"
_BLOCK = ScaleLayout("block", (128, 128))


def runs_on(device: torch.device) -> bool:
    """Whether their kernel does."""
    return device.type == "cuda"


def experts_case(case: LayerCase) -> LayerCase:
    """The layer that these experts can compute: as ``case``, in blocks of 128 x 128 and without LoRA."""
    return replace(case, shape=replace(case.shape, layout=_BLOCK), rank=0, inputs={})


def forward(case: LayerCase) -> Callable[[], Tensor]:
    """The layer of :func:`experts_case` on transformers' grouped FP8 experts.

    Raises:
        EngineError: this machine or this transformers does not have them; the message says why.
    """
    if not runs_on(case.device):
        raise EngineError("its kernel needs a GPU")
    if odd := [size for size in (case.shape.hidden, case.shape.intermediate) if size % 128]:
        raise EngineError(f"it was given blocks of 128 x 128, and this layer has a width of {odd[0]}")
    try:
        upstream = importlib.import_module("transformers.integrations.finegrained_fp8")
        _provide_kernel(upstream)
        upstream.load_finegrained_fp8_kernel()
        experts = _experts(upstream, case)
    # The package is missing, the hub cannot be reached, or the names are those of another version.
    except (ImportError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise EngineError(f"transformers did not load its kernel: {' '.join(str(error).split())[:200]}") from error
    return lambda: cast(Tensor, experts(case.inputs["x"], case.index, case.inputs["p"]))


def gradients(case: LayerCase, run: Callable[[], Tensor]) -> tuple[str, ...]:
    """The inputs in which these experts can be differentiated: none before transformers 5.23, whose kernel had no
    backward.
    """
    names = tuple(case.inputs)
    try:
        torch.autograd.grad(run(), [case.inputs[name] for name in names], case.dy)
    except torch.OutOfMemoryError:
        raise
    # what torch raises for an operator without a backward, NotImplementedError among it
    except RuntimeError:
        return ()
    return names


def _provide_kernel(upstream: Any) -> None:
    """Let transformers find the kernel in the package of that name, in place of a download."""
    if upstream._FINEGRAINED_FP8 is not None or importlib.util.find_spec(_PACKAGE) is None:
        return
    package = importlib.import_module(_PACKAGE)
    upstream._FINEGRAINED_FP8 = upstream.FineGrainedFP8(
        matmul=package.matmul_2d, batched_matmul=package.matmul_batched, grouped_matmul=package.matmul_grouped
    )


def _experts(upstream: Any, case: LayerCase) -> Any:
    """A module of theirs over the weights of ``case``, without a copy."""
    shape = case.shape
    config = importlib.import_module("transformers").PretrainedConfig(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    # As their quantizer makes the class of a model's experts.
    dispatching = upstream.use_experts_implementation(
        experts_class=upstream.FP8Experts,
        experts_interface=upstream.ALL_FP8_EXPERTS_FUNCTIONS,
        has_bias=False,
        has_gate=True,
    )
    with torch.device("meta"):
        experts = dispatching(config, block_size=_BLOCK.block)
    for name, weight in (("gate_up_proj", case.up), ("down_proj", case.down)):
        codes, scales = storage(weight)
        for key, tensor in ((name, codes.view(torch.float8_e4m3fn)), (f"{name}_scale_inv", scales)):
            declared = experts.get_parameter(key)
            if declared.shape != tensor.shape:
                raise EngineError(f"transformers declares {key} as {list(declared.shape)}, not {list(tensor.shape)}")
            setattr(experts, key, torch.nn.Parameter(tensor, requires_grad=False))
    return experts
