"""Proof, before the first optimizer step, that every tensor that should train gets a gradient.

A LoRA delta is a product of two factors, and the gradient of a factor is zero wherever its partner is. So a factor must
get a gradient that is not zero as soon as its partner is not zero: B at the first backward, A at the first backward
after B has moved (the second, unless warm-up begins at a learning rate of zero), both at once when a run resumes.

The factors of routed experts are stacked, A [r·E, in] expert-slowest and B [out, r·E] expert-fastest. An expert that
got no token has no gradient and is exempt; one that got no token and has a gradient shows factors in the wrong order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.errors import AdapterError
from octavo.train.routing import ExpertTokens
from octavo.train.trainable import TrainableTensor, trainable_tensors

_NAMED = 5


@dataclass(frozen=True, slots=True)
class ProofReport:
    """What one backward showed. ``waiting`` factors could not have a gradient yet: their partner is still zero."""

    backward: int
    proven: int
    waiting: int
    # (layer, expert) pairs that got no token so far in the proof, out of how many; None where tokens were not counted.
    idle_experts: tuple[int, int] | None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to prove."""
        return self.waiting == 0

    def __str__(self) -> str:
        text = f"gradients after backward {self.backward}: {self.proven} tensors proven"
        if self.waiting:
            text += f", {self.waiting} wait for their partner to leave zero"
        if self.idle_experts is not None and self.idle_experts[0]:
            text += f"; {self.idle_experts[0]} of {self.idle_experts[1]} experts have had no token"
        return text


class GradientProof:
    """Checks the gradients of a model after each backward, until all are proven.

    ``watch`` before the first forward adds two things that the gradients alone do not tell: which experts got a token,
    and which gradient was the first to be non-finite. Under DDP and FSDP2 call it on every rank.
    """

    def __init__(self) -> None:
        self._backward = 0
        self._proven: set[str] = set()
        # Factors that were proven when an optimizer step was taken: they must have moved since.
        self._stepped: set[str] = set()
        self._tokens: ExpertTokens | None = None
        self._handles: list[RemovableHandle] = []
        self._followed: list[tuple[str, torch.Tensor]] = []

    def watch(self, model: nn.Module) -> None:
        """Count tokens and follow gradients of ``model`` until the proof is complete or closed."""
        self._tokens = ExpertTokens(model, padding=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(_Follow(name, self._followed)))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None

    def optimizer_stepped(self, learning_rate: float) -> None:
        """Tell that an optimizer step was taken: at a rate above zero it moves every factor that had a gradient."""
        if learning_rate > 0:
            self._stepped |= self._proven

    def after_backward(self, model: nn.Module) -> ProofReport:
        """Check every trainable tensor of ``model``; to be called before the optimizer steps.

        Raises:
            AdapterError: nothing trains, or a gradient is missing, not finite, or zero where it cannot be.
        """
        self._backward += 1
        tensors = list(trainable_tensors(model))
        if not tensors:
            raise AdapterError("No parameter of the model is trainable, so nothing would be learned. Add an adapter.")
        counts = self._expert_counts()
        try:
            self._require_gradients(tensors)
            states = [_State(tensor, counts.get(tensor.layer or "")) for tensor in tensors]
            self._require_finite(states)
            self._require_moving_factors(states)
            _require_expert_order(states)
        except AdapterError:
            self.close()
            raise
        if len(self._proven) == len(tensors):
            self.close()
        idle = sum(int((count == 0).sum()) for count in counts.values()), sum(len(count) for count in counts.values())
        return ProofReport(
            self._backward, len(self._proven), len(tensors) - len(self._proven), idle if counts else None
        )

    def _require_gradients(self, tensors: Sequence[TrainableTensor]) -> None:
        missing = [tensor.name for tensor in tensors if tensor.parameter.grad is None]
        if len(missing) == len(tensors):
            _fail(
                "No trainable parameter has a gradient",
                missing,
                "The loss does not depend on any of them: reentrant gradient checkpointing without "
                "`model.enable_input_require_grads()` does this, and so does a loss without counted tokens.",
            )
        if missing:
            _fail(
                f"{len(missing)} of {len(tensors)} trainable parameters have no gradient",
                missing,
                "The forward does not use them: their layer was bypassed, or it runs an experts implementation "
                "without adapters or without a backward.",
            )

    def _require_finite(self, states: Sequence["_State"]) -> None:
        # Clipping spreads one non-finite gradient over all of them, so the order of the backward is asked first.
        followed = [float(size) for _, size in self._followed]
        first = [name for (name, _), size in zip(self._followed, followed, strict=True) if not math.isfinite(size)]
        self._followed.clear()
        found = first or [state.tensor.name for state in states if not math.isfinite(state.gradient)]
        if found:
            cause = "values that overflow, or weights and scales of the checkpoint that are not finite"
            where = "The backward met the first one named first: look after that layer for " if first else "Look for "
            _fail(
                f"{len(set(found))} of {len(states)} trainable parameters have a gradient that is NaN or infinite",
                list(dict.fromkeys(found)),
                f"{where}{cause}.",
            )

    def _require_moving_factors(self, states: Sequence["_State"]) -> None:
        pairs = {(state.tensor.pair, state.tensor.side): state for state in states if state.tensor.side is not None}
        silent, dead = [], []
        for state in states:
            tensor = state.tensor
            partner = pairs.get((tensor.pair, "A" if tensor.side == "B" else "B"))
            if tensor.side is None or state.gradient > 0:
                self._proven.add(tensor.name)
            elif tensor.name in self._proven or state.without_tokens:
                continue
            elif partner is None:
                silent.append(tensor.name)
            elif partner.value == 0:
                if state.value == 0 or partner.tensor.name in self._stepped:
                    dead.append(partner.tensor.name)
            elif tensor.begins_at_zero or state.value == 0 or partner.is_reached():
                silent.append(tensor.name)
        if silent:
            _fail(
                f"{len(silent)} LoRA factors have a gradient that is zero everywhere, though their partner is not zero",
                silent,
                "The adapter does not reach the output of its layer: the layer computes with the raw weights, or the "
                "delta is rounded away.",
            )
        if dead:
            _fail(
                f"{len(dead)} LoRA factors are zero where they should have moved",
                dead,
                "The optimizer does not hold them, or both factors of the adapter began at zero.",
            )

    def _expert_counts(self) -> dict[str, torch.Tensor]:
        """Tokens per layer and expert since the last backward, over all ranks."""
        if self._tokens is None:
            return {}
        counts = {name: count.clone() for name, count in self._tokens.counts.items()}
        self._tokens.reset()
        if dist.is_available() and dist.is_initialized():
            for count in counts.values():
                dist.all_reduce(count)
        return counts


class _State:
    """One trainable tensor after a backward: the largest magnitude in it and in its gradient."""

    def __init__(self, tensor: TrainableTensor, tokens_E: torch.Tensor | None) -> None:
        gradient = tensor.parameter.grad
        assert gradient is not None, "gradients were required before"
        self.tensor = tensor
        self._tokens_E = tokens_E
        self._gradient, self._value = _whole(gradient), _whole(tensor.parameter)

    @cached_property
    def gradient(self) -> float:
        """Largest magnitude in the gradient, NaN where it holds one."""
        return _largest(self._gradient)

    @cached_property
    def value(self) -> float:
        """Largest magnitude in the tensor."""
        return _largest(self._value)

    @property
    def without_tokens(self) -> bool:
        """Whether it is known that no token at all reached the experts of its layer."""
        return self._tokens_E is not None and not self._tokens_E.any()

    def is_reached(self) -> bool:
        """Whether some slice is not zero and has a gradient, so that the partner's slice must have one too."""
        return bool(((self._slices(self._value) > 0) & (self._slices(self._gradient) > 0)).any())

    def idle_experts_have_gradient(self) -> bool:
        """Whether an expert that got no token has a gradient all the same."""
        if self._tokens_E is None or self.tensor.side is None:
            return False
        slices_E = self._slices(self._gradient)
        return bool((slices_E[(self._tokens_E == 0).to(slices_E.device)] != 0).any())

    def _slices(self, stacked: torch.Tensor) -> torch.Tensor:
        """The largest magnitude in each expert's slice of a stacked factor: [E], E = 1 for other layers."""
        E = self.tensor.num_experts
        slices_EN = stacked.reshape(E, -1) if self.tensor.side == "A" else stacked.reshape(-1, E).T
        return slices_EN.abs().amax(dim=1)


class GradientProofCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Runs a `GradientProof` in any transformers or trl trainer: ``callbacks=[GradientProofCallback()]``.

    With gradient accumulation the check is at the first optimizer step, after all its backwards.
    """

    def __init__(self, report: Callable[[ProofReport], None] | None = None) -> None:
        """``report`` gets the outcome of each backward that was checked, on the main process."""
        self.proof = GradientProof()
        self.reports: list[ProofReport] = []
        self._report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.proof.watch(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._open:
            self.reports.append(self.proof.after_backward(kwargs["model"]))
            if self._report is not None and state.is_world_process_zero:
                self._report(self.reports[-1])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._open:
            self.proof.optimizer_stepped(max(group["lr"] for group in kwargs["optimizer"].param_groups))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.proof.close()

    @property
    def _open(self) -> bool:
        return not self.reports or not self.reports[-1].complete


class _Follow:
    """Notes the largest gradient of one parameter as it is accumulated, on its device, without a synchronisation."""

    def __init__(self, name: str, seen: list[tuple[str, torch.Tensor]]) -> None:
        self._name, self._seen = name, seen

    def __call__(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and parameter.grad.numel():
            self._seen.append((self._name, torch.linalg.vector_norm(parameter.grad.detach(), math.inf)))


def _require_expert_order(states: Sequence[_State]) -> None:
    wrong = [state.tensor.name for state in states if state.idle_experts_have_gradient()]
    if wrong:
        _fail(
            f"{len(wrong)} expert factors have gradients at experts that got no token",
            wrong,
            "Their layout is scrambled: A is [r·E, in], expert slowest, and B is [out, r·E], expert fastest.",
        )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered from all ranks where it is sharded: a shard may well be zero."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _largest(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0


def _fail(what: str, names: Sequence[str], cause: str) -> NoReturn:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    raise AdapterError(f"{what}: {', '.join(names[:_NAMED])}{more}. {cause} No optimizer step was taken on it.")
