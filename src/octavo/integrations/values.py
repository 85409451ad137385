"""Values of a loaded model, checked where they lie; an error names the tensor in the file.

See :mod:`octavo.checkpoint.values` for what is wrong with one.
"""

from itertools import chain

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from octavo.checkpoint.values import check_codes, check_numbers, check_scales
from octavo.errors import CheckpointError
from octavo.integrations.claims import Claims, Float8Target
from octavo.nn.linear import Float8Linear
from octavo.nn.storage import unsealed


def check_values(model: PreTrainedModel, claims: Claims) -> None:
    """Check every loaded scale and code where it lies; see :mod:`octavo.checkpoint.values`.

    Raises :class:`CheckpointError` naming the file and the tensor.
    """
    targets = [*(target for stacks in claims.experts.values() for target in stacks.values()), *claims.linears.values()]
    for target in targets:
        owner = model.get_submodule(target.owner)
        codes = unsealed(owner.get_parameter(target.parameter))
        scale_name = "weight_scale" if isinstance(owner, Float8Linear) else f"{target.parameter}_scale"
        scales = unsealed(owner.get_parameter(scale_name))
        try:
            check_scales(target.name, scales)
            check_codes(target.name, codes)
        except CheckpointError:
            _name_culprit(target, codes, scales)
            raise
        if target.static_input:
            name = "input_scale" if isinstance(owner, Float8Linear) else f"{target.parameter}_input_scale"
            _check_static_inputs(target, unsealed(owner.get_parameter(name)))


def check_plain_values(model: nn.Module) -> None:
    """Check every weight and buffer of ``model`` that is not quantized; of a sharded one, what is here.

    Raises :class:`CheckpointError` naming the tensor.
    """
    # A router's correction is a buffer, and one that is NaN chooses experts.
    named = ((name, tensor.detach()) for name, tensor in chain(model.named_parameters(), model.named_buffers()))
    check_numbers((name, t.to_local() if isinstance(t, DTensor) else t) for name, t in named)


def _check_static_inputs(target: Float8Target, inputs: Tensor) -> None:
    """``inputs``: static activation scales, [1, 1] or [E, parts, 1]."""
    try:
        check_scales(target.name, inputs)
    except CheckpointError:
        # parts are the slow axis of the sources
        in_order = inputs.reshape(-1, len(target.sources) // inputs.shape[0] if inputs.ndim == 3 else 1).T.reshape(-1)
        for source, scale in zip(target.sources, in_order, strict=True):
            assert source.activation is not None
            check_scales(f"{source.activation.file.name}: {source.activation.key}", scale)
        raise


def _name_culprit(target: Float8Target, codes: Tensor, scales: Tensor) -> None:
    """Check the tensors that a stack was made of one by one, so that the error names the one in the file."""
    if len(target.sources) == 1:
        pieces = [(target.sources[0], codes, scales)]
    else:
        num_experts = codes.shape[0]
        parts = len(target.sources) // num_experts
        pieces = [
            (
                target.sources[part * num_experts + expert],
                codes[expert].chunk(parts)[part],
                scales[expert].chunk(parts)[part],
            )
            for expert in range(num_experts)
            for part in range(parts)
        ]
    for source, source_codes, source_scales in pieces:
        check_scales(f"{source.scale.file.name}: {source.scale.key}", source_scales)
        check_codes(f"{source.weight.file.name}: {source.weight.key}", source_codes)
