"""Memory by term, the peak of a step, and what to change where it does not fit."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from octavo.errors import OctavoError
from octavo.integrations.lora_config import TARGETS
from octavo.integrations.quantizer import Residence
from octavo.integrations.targets import find_weights
from octavo.nn.experts import Float8Experts, OctavoExperts
from octavo.nn.linear import Float8Linear
from octavo.ops.kept import Activations
from octavo.ops.pieces import IN_FLIGHT, PIECE_BYTES
from octavo.ops.ring import SLOTS
from octavo.plan.rehearsal import LayerCost, layer_costs, layers_of
from octavo.plan.skeleton import Adapters, bare_model, nbytes, trainable, with_adapters

GB = 1e9
# trl's output head works on tiles of tokens by vocabulary.
_TILE = (4096, 32_768)
# Bytes per token and hidden unit around the loss: hidden states compacted and normalised in bfloat16, the norm's input
# in float32, and the gradients of the three in float32 and bfloat16.
_AROUND_LOSS = 18
# Share of what comes and goes that the allocator holds beyond it, with segments that grow.
_SLACK = 0.03
# torchao quantizes states of tensors from this size on, in blocks.
_MIN_8BIT, _BLOCK_8BIT = 4096, 256
# One-hot routing of the balancing loss: int64, its mask in int64, two products in float32.
_AUX_BYTES = 24

MOST_REPLAYED = 12_288
"""Tokens of a forward up to which layers are replayed as CUDA graphs unless the user says otherwise."""

# Of a plan, beside its terms.
_NO_TERMS = ("moment", "host", "host_optimizer")

Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]


@dataclass(frozen=True)
class Request:
    """A run to be planned; names as in the configuration of ``octavo sft``."""

    checkpoint: str | Path
    adapters: Adapters = field(default_factory=Adapters)
    batch: int = 1
    seq: int = 2048
    grad_accumulation: int = 1
    optimizer: Optimizer = "adamw"
    activations: Activations = "bf16"
    experts: Residence = "resident"
    checkpointing: bool = True
    offload_hidden_states: bool = False
    offload_optimizer: bool = False
    graphs: Literal["auto"] | bool = False
    router_aux_loss: float | None = None


def replays(request: Request) -> bool:
    """Whether one GPU replays layers as CUDA graphs. ``auto`` is without dropout."""
    if not request.checkpointing or request.experts == "host":
        return False
    return replays_by_itself(request.batch * request.seq) if request.graphs == "auto" else request.graphs


def replays_by_itself(tokens: int, experts: Residence = "resident") -> bool:
    """What ``auto`` does with checkpointed rows of ``tokens``.

    Where layers are longer than what the host needs to launch them, a replay would take memory for nothing.
    """
    return experts == "resident" and tokens <= MOST_REPLAYED


@dataclass(frozen=True)
class Plan:
    """Bytes of the GPU by term at the peak of a step; ``moment`` says when that is. ``ring``: buffers for layers of
    experts that are kept in host memory, ``host`` bytes of it; ``host_optimizer``: bytes of it for optimizer states.
    ``recordings``: what CUDA graphs of layers hold all the time, one layer's transient memory and their buffers.
    """

    codes: int
    scales: int
    plain: int
    ring: int
    recordings: int
    adapters: int
    optimizer: int
    gradients: int
    kept: int
    transient: int
    loss: int
    allocator: int
    moment: str
    host: int = 0
    host_optimizer: int = 0

    @property
    def loaded(self) -> int:
        """After loading: codes, scales and what is not quantized."""
        return self.codes + self.scales + self.plain

    @property
    def peak(self) -> int:
        """Everything at once: what torch will have reserved."""
        return sum(self.terms.values())

    @property
    def allocated(self) -> int:
        """What tensors take of it."""
        return self.peak - self.allocator

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_TERMS}


@dataclass(frozen=True)
class Change:
    """One thing to change. ``says``: as a key and value of ``octavo sft``. ``saves``: bytes of the peak.

    ``same_run``: what is trained, and on what, stays as it is.
    """

    says: str
    saves: int
    same_run: bool
    request: Request = field(repr=False)


class Planner:
    """Plans of one checkpoint; the model is built once."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = checkpoint
        self._bare: PreTrainedModel | None = None
        self._costs: dict[object, _Measured] = {}

    def plan(self, request: Request) -> Plan:
        """The peak of a step as ``request`` says.

        Raises:
            OctavoError: the checkpoint cannot be read, has no such layers, or cannot be rehearsed.
        """
        costs, shapes, per_layer, (codes, scales, plain), streamed = self._measured(request)
        ring = host = 0
        if request.experts == "host":
            if not streamed:
                raise OctavoError(f"{request.checkpoint} has no routed experts in FP8 that could be kept on the host.")
            codes -= sum(of_codes for of_codes, _ in streamed)
            scales -= sum(of_scales for _, of_scales in streamed)
            layers = [sum(layer) for layer in streamed]
            ring, host = SLOTS * max(layers), sum(layers)
        config = self._model().config.get_text_config()
        size, tokens = request.adapters.dtype.itemsize, request.batch * request.seq
        hidden = tokens * config.hidden_size * 2
        numel = [_numel(shape) for shape in shapes]
        gradients, adapters = sum(numel) * size, sum(numel) * size
        states = [sum(state_tensors(request.optimizer, shape, size)) for shape in shapes]
        optimizer = sum(states)
        # Those on the host pass through in the step, and are not there before.
        stays, passes, host_optimizer = optimizer, 0, 0
        if request.offload_optimizer:
            stays, passes, host_optimizer = 0, min(optimizer, IN_FLIGHT * max([PIECE_BYTES, *states])), optimizer
        loss, kept_for_loss = _loss_bytes(request, config, tokens)
        kept = _kept(request, costs, hidden)
        first = 0 if request.grad_accumulation == 1 else gradients
        recorded = replays(request)
        recordings = 0
        if recorded:
            # Graphs share the memory of the largest, a layer's input, its gradient, and its factors' gradients.
            recordings = max(cost.transient for cost in costs) + 2 * hidden + max(per_layer) * size
        moments = {"the loss": (sum(kept) + kept_for_loss, first, 0, loss, 0)}
        # Backward from the last layer to the first: less and less is kept, more and more gradients are there.
        done = 0
        for index in reversed(range(len(costs))):
            done += per_layer[index] * size
            there = gradients if request.grad_accumulation > 1 else done
            moments[f"the backward pass of layer {index}"] = (
                sum(kept[: index + 1]),
                there,
                # outside of a graph: the gradient that comes in and the one that goes out
                2 * hidden
                if recorded
                else costs[index].transient - (0 if request.checkpointing else costs[index].kept),
                0,
                0,
            )
        moments["the optimizer's step"] = (0, gradients, 0, 0, passes)
        moment, (held, grads, transient, loss, passing) = max(moments.items(), key=lambda item: sum(item[1]))
        slack = round(_SLACK * (recordings + held + grads + transient + loss + passing))
        return Plan(
            codes, scales, plain, ring, recordings, adapters, stays + passing, grads, held, max(0, transient), loss,
            slack, moment, host, host_optimizer,
        )  # fmt: skip

    def changes(self, request: Request) -> list[Change]:
        """What would lower the peak: first what leaves the run as it is, then by how much."""
        before = self.plan(request).peak
        found = []
        for says, same_run, changed in _alternatives(request, self._model()):
            saves = before - self.plan(changed).peak
            if saves > 0:
                found.append(Change(says, saves, same_run, changed))
        return sorted(found, key=lambda change: (not change.same_run, -change.saves))

    def _model(self) -> PreTrainedModel:
        if self._bare is None:
            self._bare = bare_model(self.checkpoint)
        return self._bare

    def _measured(self, request: Request) -> "_Measured":
        key = (request.adapters, request.batch, request.seq, request.activations)
        if key not in self._costs:
            model = self._model()
            weights, streamed = _weights(model), _streamed(model)
            tuned = with_adapters(model, request.adapters)
            try:
                shapes = [tuple(parameter.shape) for _, _, parameter in trainable(tuned)]
                per_layer = [sum(p.numel() for _, _, p in trainable(layer)) for layer in layers_of(model)]
                costs = layer_costs(tuned, model, request.batch, request.seq, request.activations)
            finally:
                # peft wraps in place.
                self._bare = None
            self._costs[key] = _Measured(costs, shapes, per_layer, weights, streamed)
        return self._costs[key]


class _Measured(NamedTuple):
    """``costs`` of the layers, shapes and numbers per layer of what trains, bytes of weights, and of streamed ones."""

    costs: list[LayerCost]
    shapes: list[tuple[int, ...]]
    per_layer: list[int]
    weights: tuple[int, int, int]
    streamed: list[tuple[int, int]]


def _streamed(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Bytes of codes and of scales of each layer of experts that can be kept on the host."""
    found = []
    for module in model.modules():
        if isinstance(module, Float8Experts):
            names = module.experts_layout.names
            codes = nbytes([module.get_parameter(name) for name in names])
            found.append((codes, nbytes([module.get_parameter(f"{name}_scale") for name in names])))
    return found


def _weights(model: PreTrainedModel) -> tuple[int, int, int]:
    """Bytes of codes, of scales and of the rest, buffers included."""
    codes, scales = [], []
    for module in model.modules():
        if isinstance(module, Float8Experts | Float8Linear):
            names = module.experts_layout.names if isinstance(module, Float8Experts) else ("weight",)
            codes += [module.get_parameter(name) for name in names]
            scales += [module.get_parameter(name) for name in module.scale_names]
    everything = nbytes([*model.parameters(), *model.buffers()])
    return nbytes(codes), nbytes(scales), everything - nbytes(codes) - nbytes(scales)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def state_tensors(optimizer: Optimizer, shape: tuple[int, ...], size: int) -> list[int]:
    """Bytes of each tensor of states of one parameter with elements of ``size`` bytes; numbers are not counted."""
    numel = _numel(shape)
    if optimizer == "sgd":
        return []
    if optimizer == "adafactor":
        return [4 * numel // extent for extent in shape[-2:]] if len(shape) >= 2 else [4 * numel]
    if optimizer == "adamw" or numel < _MIN_8BIT or numel % _BLOCK_8BIT:
        return 2 * [numel * size]
    # A byte each, a float32 scale per block, and a table of 256 values.
    return 2 * [numel, 4 * numel // _BLOCK_8BIT, 4 * 256]


def _loss_bytes(request: Request, config: PretrainedConfig, tokens: int) -> tuple[int, int]:
    """(what the loss takes while it is computed, what its router logits keep)."""
    tile = min(tokens, _TILE[0]) * _TILE[1] * 2
    loss = tile + _AROUND_LOSS * tokens * config.hidden_size
    weight: float | None = request.router_aux_loss
    if weight is None:
        weight = getattr(config, "router_aux_loss_coef", None)
    if not weight or not hasattr(config, "output_router_logits") or not hasattr(config, "num_experts"):
        return loss, 0
    pairs = config.num_hidden_layers * tokens * config.num_experts
    return loss + _AUX_BYTES * pairs * config.num_experts_per_tok, 4 * pairs


def _kept(request: Request, costs: list[LayerCost], hidden: int) -> list[int]:
    """What each layer keeps until its backward pass."""
    if not request.checkpointing:
        return [cost.kept for cost in costs]
    if not request.offload_hidden_states:
        return [hidden] * len(costs)
    # One that leaves, one that is used and one that comes back.
    return [hidden * 3, *[0] * (len(costs) - 1)] if costs else []


def has_experts(model: PreTrainedModel) -> bool:
    """Whether there are routed experts on octavo's forward."""
    return any(isinstance(module, OctavoExperts) for module in model.modules())


def _alternatives(request: Request, model: PreTrainedModel) -> list[tuple[str, bool, Request]]:
    found: list[tuple[str, bool, Request]] = []

    def offer(says: str, *, same_run: bool = False, **changes: object) -> None:
        found.append((says, same_run, replace(request, **changes)))  # type: ignore[arg-type]

    adapters = request.adapters
    if not request.checkpointing:
        says = "train.gradient_checkpointing: non_reentrant"
        if request.activations == "fp8":
            says += " and model.activations: bf16"
        offer(says, same_run=request.activations == "bf16", checkpointing=True, activations="bf16")
    if not request.checkpointing and request.activations == "bf16" and has_experts(model):
        offer("model.activations: fp8", activations="fp8")
    if request.experts == "resident" and any(isinstance(module, Float8Experts) for module in model.modules()):
        offer("model.experts: host", same_run=True, experts="host")
    if request.checkpointing and not request.offload_hidden_states:
        offer("train.offload_hidden_states: true", same_run=True, offload_hidden_states=True)
    if not request.offload_optimizer and request.optimizer != "sgd":
        offer("train.offload_optimizer: true", same_run=True, offload_optimizer=True)
    if replays(request):
        offer("train.graphs: false", same_run=True, graphs=False)
    if request.optimizer != "adamw_8bit" or adapters.dtype != torch.bfloat16:
        offer(
            "train.optimizer: adamw_8bit and lora.dtype: bfloat16",
            same_run=True,
            optimizer="adamw_8bit",
            adapters=replace(adapters, dtype=torch.bfloat16),
        )
    if request.batch > 1:
        offer(f"train.batch_size: {request.batch // 2}", batch=request.batch // 2)
    if request.seq >= 1024:
        offer(f"data.max_length: {request.seq // 2}", seq=request.seq // 2)
    if "experts" in adapters.targets:
        if (adapters.expert_rank or 0) > 1:
            half = (adapters.expert_rank or 2) // 2
            offer(f"lora.expert_rank: {half}", adapters=replace(adapters, expert_rank=half))
        groups = {weight.group for weight in find_weights(model).values()}
        rest = tuple(target for target in adapters.targets if target != "experts" and TARGETS[target] in groups)
        if rest:
            offer(f"lora.targets: [{', '.join(rest)}]", adapters=replace(adapters, targets=rest))
    config = model.config.get_text_config()
    if request.router_aux_loss is None and getattr(config, "router_aux_loss_coef", None):
        offer("train.router_aux_loss: 0", router_aux_loss=0.0)
    return found
