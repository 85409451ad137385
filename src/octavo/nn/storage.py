"""How codes and scales live in a module: one-byte codes as uint8 and float32 scales as int32, frozen parameters.

Integer parameters survive ``model.to(dtype)``, FSDP2's mixed precision, DDP, and peft's habit of creating adapters in
the dtype of the base; float8 and float32 ones survive none of these. Not buffers: DDP broadcasts buffers in each
forward.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from octavo.errors import AdapterError, OctavoError

CODES = torch.float8_e4m3fn


def declare(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Declare a parameter on the meta device in the dtype that the loader must put there."""
    module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))


def seal(module: nn.Module, codes: list[str], scales: list[str]) -> None:
    """Re-register loaded float8 ``codes`` as uint8 and float32 ``scales`` as int32, frozen; no copy."""
    for names, loaded, stored in ((codes, CODES, torch.uint8), (scales, torch.float32, torch.int32)):
        for name in names:
            parameter = module.get_parameter(name)
            if parameter.dtype not in (loaded, stored):
                raise OctavoError(
                    f"{name} of {type(module).__name__} holds {parameter.dtype} after loading, expected {loaded}."
                )
            module.register_parameter(name, nn.Parameter(parameter.data.view(stored), requires_grad=False))


def unsealed(tensor: Tensor) -> Tensor:
    """A sealed parameter as the checkpoint has it: float8 codes or float32 scales; a view."""
    return tensor.detach().view({torch.uint8: CODES, torch.int32: torch.float32}[tensor.dtype])


def opened_scales(tensor: Tensor) -> Tensor:
    """Scales as float32 multipliers; a view."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.float32)


def check_codes_dtype(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` holds one-byte codes: a cast would have lost the scale."""
    if tensor.dtype not in (torch.uint8, CODES):
        raise OctavoError(
            f"{name} of {type(module).__name__} holds {tensor.dtype} instead of one-byte FP8 codes, so its scales no "
            f"longer "
            "apply. Something replaced or cast the frozen weight after loading; load the model again and leave "
            "frozen parameters alone."
        )


def check_activations(module: nn.Module, x: Tensor) -> None:
    """Raise unless ``x`` is floating-point and wider than a byte: a model may cast it to the dtype of the codes."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise OctavoError(
            f"{type(module).__name__} got {x.dtype} activations, expected floating-point ones. The model's code casts "
            "them to the dtype of this layer's weight, which holds FP8 codes: please report the model's class."
        )


def refuse_parametrization(module: nn.Module) -> None:
    """Raise if a parametrization sits on the codes: it would add a delta to codes without their scale."""
    if "parametrizations" in module._modules:
        names = ", ".join(module._modules["parametrizations"]._modules)  # type: ignore[union-attr]
        raise AdapterError(
            f"{names} of {type(module).__name__} carries a torch parametrization, which would be added to raw FP8 "
            f"codes. "
            "Use peft's LoRA (octavo.lora_config makes a configuration); octavo hands its factors to the forward "
            "instead."
        )


def apply_guarded(
    module: nn.Module, sealed: list[str], fn: Callable[[Tensor], Tensor], stay: Iterable[str] = ()
) -> Callable[[Tensor], Tensor]:
    """``fn`` for ``nn.Module._apply`` that moves sealed parameters but never casts them, and leaves those in ``stay``
    as they are.
    """

    def ids(names: Iterable[str]) -> set[int]:
        return {id(module._parameters[name]) for name in names if module._parameters.get(name) is not None}

    frozen, left = ids(sealed), ids(stay)

    def guarded(tensor: Tensor) -> Tensor:
        if id(tensor) in left:
            return tensor
        result = fn(tensor)
        if id(tensor) in frozen and result.dtype != tensor.dtype:
            return tensor.to(result.device)
        return result

    return guarded
