"""Rollouts by the model that is trained: generation with a KV cache on octavo's engines, no second copy of a weight.

Legend: ``B`` completions, ``P`` prompt positions, ``C`` completion positions, ``V`` vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

import octavo
from octavo.integrations.generation import Graphs, uses_graphs, why_no_graphs
from octavo.nn.experts import OctavoExperts
from octavo.nn.linear import Float8Linear
from octavo.train.rollout.replay import RoutingRecorder
from octavo.train.rollout.sampler import Sample, Synchronization


class ModelSampler:
    """Samples with the model of a trainer (trl's GRPOTrainer), in evaluation mode and under its autocast.

    ``numerics``: of the FP8 products while sampling, ``None`` for those that the model has. ``record``: keep the
    experts that were chosen, for `RoutingReplay`. ``graphs``: see `octavo.generate`; what is recorded is recorded in
    Python, so with ``record`` there are none.

    Raises:
        EngineError: graphs were asked for and cannot be had.
    """

    def __init__(
        self, trainer: Any, *, numerics: str | None = None, record: bool = False, graphs: Graphs = "auto"
    ) -> None:
        self._trainer = trainer
        self._numerics = numerics
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._graphs: Graphs = False if record else graphs
        self.decoding = _decoding(model, self._graphs, record=record)
        self._recorder = RoutingRecorder(model) if record else None
        self.routed_BSLK: Tensor | None = None

    def synchronize(self, model: Any, step: int) -> Synchronization:
        """Nothing moves: the factors that are trained are those that sample."""
        return Synchronization(0, 0.0)

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        """See `octavo.train.rollout.sampler.Sampler`; ``routed_BSLK`` then holds the experts, if they are recorded."""
        trainer = self._trainer
        tokenizer, device = trainer.processing_class, trainer.accelerator.device
        rows = [torch.tensor(ids) for ids in prompts]
        ids_BP = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left").to(device)
        mask_BP = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
        log_probs = _LogProbs(trainer.temperature)
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                generation_kwargs=trainer.generation_kwargs,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            trainer.accelerator.autocast(),
            _evaluating(model),
            _without_habits(model),
            _computing(model, self._numerics),
        ):
            if self._recorder is not None:
                self._recorder.start(len(rows))
            ids_BS = octavo.generate(
                model,
                graphs=self._graphs,
                input_ids=ids_BP,
                attention_mask=mask_BP,
                generation_config=trainer.generation_config,
                logits_processor=LogitsProcessorList([log_probs.logits]),
                stopping_criteria=StoppingCriteriaList([log_probs]),
            )
        if self._recorder is not None:
            self.routed_BSLK = self._recorder.stop(ids_BS.shape[1])
        ids_BC = ids_BS[:, ids_BP.shape[1] :].cpu()
        # Tokens that were sampled after every sequence had ended are not among the ids.
        logprobs_BC = torch.stack(log_probs.taken[: ids_BC.shape[1]], dim=1).cpu()
        return list(_cut(ids_BC, logprobs_BC, trainer.eos_token_ids))

    def close(self) -> None:
        """Remove the hooks."""
        if self._recorder is not None:
            self._recorder.close()


def _decoding(model: nn.Module, graphs: Graphs, *, record: bool) -> str:
    """How tokens are computed, in words."""
    if uses_graphs(model, graphs):
        return "each token as a CUDA graph"
    if record:
        return "without CUDA graphs: `rollout.replay` records experts"
    return f"without CUDA graphs: {why_no_graphs(model) or 'switched off'}"


class _Logits(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Keeps the logits of the step at hand. ``generate`` applies it before the temperature."""

    def __init__(self) -> None:
        self.last_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last_BV = scores
        return scores


class _LogProbs(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Never stops; ``generate`` asks it after each token, when the token is known and its logits still are.

    In this way one [B, V] is alive, where ``output_logits`` would keep one for every token.
    """

    def __init__(self, temperature: float) -> None:
        self.logits = _Logits()
        self.taken: list[Tensor] = []
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert self.logits.last_BV is not None, "generate asks the processor first"
        logits_BV = self.logits.last_BV.float() / self._temperature
        token_B1 = input_ids[:, -1:]
        self.taken.append(logits_BV.gather(1, token_B1)[:, 0] - logits_BV.logsumexp(dim=1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _cut(ids_BC: Tensor, logprobs_BC: Tensor, ends: Sequence[int]) -> Iterator[Sample]:
    """Each row up to its first end-of-text token, inclusive."""
    is_end_BC = torch.isin(ids_BC, torch.tensor(list(ends)))
    for ids_C, logprobs_C, is_end_C in zip(ids_BC, logprobs_BC, is_end_BC, strict=True):
        length = int(is_end_C.int().argmax()) + 1 if is_end_C.any() else len(ids_C)
        yield Sample(ids_C[:length].tolist(), logprobs_C[:length].tolist())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _without_habits(model: Any) -> Iterator[None]:
    """Without the checkpoint's ``generation_config.json``: what the trainer leaves open ``generate`` would take from
    there, and sample from another distribution than the log-probabilities are of.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


@contextmanager
def _computing(model: nn.Module, numerics: str | None) -> Iterator[None]:
    """With other numerics of the FP8 products inside the block."""
    if numerics is None:
        yield
        return
    ours = [module for module in model.modules() if isinstance(module, OctavoExperts | Float8Linear)]
    before = [module.settings for module in ours]
    octavo.configure(model, numerics=numerics)
    try:
        yield
    finally:
        for module, settings in zip(ours, before, strict=True):
            module.settings = settings
