"""trl's GRPOTrainer with octavo's rollouts: who samples is chosen, and training is compared with it.

trl has a public hook for rollouts, ``rollout_func``, and none for what happens to their log-probabilities. So three
methods of trl that are not public are extended here, and nowhere else: `_generate_and_score_completions`,
`_get_per_token_logps_and_entropies` and `_compute_loss`, as they are in trl 1.16; `tests/train/test_grpo_contract.py`
fails on the day they change.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import trl
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from octavo.plan.terms import Optimizer
from octavo.train.agreement import AgreementMeter
from octavo.train.completions import CompletionsFile
from octavo.train.grpo_config import RolloutSection
from octavo.train.offloaded_optimizer import OffloadsOptimizer
from octavo.train.prompts import Prompts, prompt_ids
from octavo.train.rewards import Reward
from octavo.train.rollout.own import ModelSampler
from octavo.train.rollout.replay import RoutingReplay
from octavo.train.rollout.sampler import Sampler
from octavo.train.watched import Watched

_ROUTED = "routed_BSLK"


class GrpoTrainer(Watched, OffloadsOptimizer, trl.GRPOTrainer):  # type: ignore[misc]  # trl is untyped
    """A `trl.GRPOTrainer` whose completions come from a `Sampler`; see the module's docstring."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: trl.GRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        adapter: LoraConfig,
        prompts: Prompts,
        rewards: Sequence[Reward],
        rollout: RolloutSection,
        completions: CompletionsFile,
        make_sampler: Callable[["GrpoTrainer"], Sampler] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        stop_on_nan: bool = True,
        offload_optimizer: Optimizer | None = None,
    ) -> None:
        """``make_sampler``: who samples, made once the trainer is; the model itself unless given.
        ``offload_optimizer``: the ``train.optimizer`` whose states are kept in host memory, if they are.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=prompts.dataset,
            processing_class=tokenizer,
            reward_funcs=list(rewards),
            peft_config=adapter,
            callbacks=list(callbacks),
            rollout_func=_roll_out,
        )
        if offload_optimizer is not None:
            self.offload_optimizer(offload_optimizer)
        self.watch(stop_on_nan=stop_on_nan)
        self._completions = completions
        self._agreement = AgreementMeter(stop_mean=rollout.stop_mean, stop_worst=rollout.stop_worst)
        self._replay = RoutingReplay(self.model) if rollout.replay else None
        self._synchronized_at = -1
        self._last_logps_BC: Tensor | None = None
        self._signal = torch.zeros((), device=self.accelerator.device)
        numerics = None if rollout.numerics == "same" else rollout.numerics
        self.sampler: Sampler = (
            ModelSampler(self, numerics=numerics, record=rollout.replay, graphs=rollout.graphs)
            if make_sampler is None
            else make_sampler(self)
        )

    def has_signal(self) -> bool:
        """Whether any token of the step at hand, on any rank, had an advantage: if not, gradients are zero."""
        found = bool(self.accelerator.reduce(self._signal, reduction="sum") > 0)
        self._signal = torch.zeros_like(self._signal)
        return found

    def roll_out(self, prompts: Sequence[Any]) -> dict[str, list[Any]]:
        """Synchronize if the adapter has changed, sample, and answer in the words of trl's ``rollout_func``."""
        if self._replay is not None:
            self._replay.force(None)
        step = self.state.global_step
        if step != self._synchronized_at:
            moved = self.sampler.synchronize(self.accelerator.unwrap_model(self.model), step)
            self._synchronized_at = step
            self._note("sync/bytes", moved.bytes)
            self._note("sync/seconds", moved.seconds)
        ids = [prompt_ids(self.processing_class, prompt) for prompt in prompts]
        began = time.perf_counter()
        samples = self.sampler.sample(ids)
        seconds = time.perf_counter() - began
        self._note("rollout/seconds", seconds)
        self._note("rollout/tokens_per_second", sum(len(sample.ids) for sample in samples) / seconds)
        return {
            "prompt_ids": ids,
            "completion_ids": [sample.ids for sample in samples],
            "logprobs": [sample.logprobs for sample in samples],
        }

    def close(self) -> None:
        """Give back what the sampler and the replay hold."""
        self.sampler.close()
        if self._replay is not None:
            self._replay.close()

    def _note(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if isinstance(self.sampler, ModelSampler) and self.sampler.routed_BSLK is not None:
            output[_ROUTED] = self.sampler.routed_BSLK
        if self.accelerator.is_main_process:
            self._completions.append(self._logged())
        return output

    def _logged(self) -> list[dict[str, Any]]:
        """What trl logs of the completions it has just scored, on all ranks, one record each."""
        logs, step = self._logs, self.state.global_step + 1
        columns = zip(logs["prompt"], logs["completion"], logs["advantages"], strict=True)
        return [
            {
                "step": step,
                "prompt": prompt,
                "completion": completion,
                # JSON has no NaN: trl's word for a reward that does not apply.
                "rewards": {
                    name: None if math.isnan(values[index]) else values[index]
                    for name, values in logs["rewards"].items()
                },
                "advantage": advantage,
            }
            for index, (prompt, completion, advantage) in enumerate(columns)
        ]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps_BC = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._replay is not None:
            # Kept until the next forward: layers that are computed again in the backward must choose the same.
            self._replay.force(inputs[_ROUTED])
        loss: Tensor = super()._compute_loss(model, inputs)
        # Completions that are masked, as truncated ones may be, have an advantage and no gradient.
        advantages_BC = inputs["advantages"].reshape(len(inputs["completion_mask"]), -1) * inputs["completion_mask"]
        self._signal += advantages_BC.abs().sum().to(self._signal)
        # Later steps on the same completions have moved on; that difference is what clipping is for.
        if self.state.global_step == self._synchronized_at:
            assert self._last_logps_BC is not None, "the loss has computed them"
            self._agreement.add(self._last_logps_BC, inputs["sampling_per_token_logps"], inputs["completion_mask"])
            if self.accelerator.sync_gradients:
                found = self._agreement.settle(self.accelerator, self.state.global_step + 1)
                if found is not None:
                    self._note("agreement/mean", found.mean)
                    self._note("agreement/worst", found.worst)
        return loss


def _roll_out(prompts: Sequence[Any], trainer: GrpoTrainer) -> dict[str, list[Any]]:
    return trainer.roll_out(prompts)
