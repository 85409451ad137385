"""Whether training and sampler compute the same probabilities, right after they were given the same adapter.

Group-relative policy optimisation weighs tokens by how likely they were when sampled. Where the training forward finds
other probabilities for them than the sampler had, every step is off policy in a way that no clipping sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError


class AgreementError(OctavoError):
    """Training and sampler differ by more than the configuration allows."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Absolute differences of log-probabilities of sampled tokens, in nats, over all ranks."""

    tokens: int
    mean: float
    worst: float


class AgreementMeter:
    """Collects the differences of one synchronisation, forward by forward."""

    def __init__(self, *, stop_mean: float | None, stop_worst: float | None) -> None:
        self._limits = (("mean", stop_mean), ("worst", stop_worst))
        self._sums: list[Tensor] = []
        self._worst: list[Tensor] = []

    def add(self, training_BC: Tensor, sampled_BC: Tensor, mask_BC: Tensor) -> None:
        """Log-probabilities of the same tokens [B, C] under the training forward and as the sampler gave them."""
        apart_BC = torch.where(mask_BC.bool(), (training_BC - sampled_BC).abs().double(), 0.0)
        self._sums.append(torch.stack([apart_BC.sum(), mask_BC.sum().double()]))
        self._worst.append(apart_BC.max())

    def settle(self, accelerator: Any, step: int) -> Agreement | None:
        """What was collected since the last call, over all ranks; None if nothing was. Call it on every rank.

        Raises:
            AgreementError: it is more than is allowed, or not a number.
        """
        if not self._sums:
            return None
        apart, tokens = accelerator.reduce(torch.stack(self._sums).sum(0), reduction="sum").tolist()
        worst = float(accelerator.gather(torch.stack(self._worst).max()).max())
        self._sums.clear()
        self._worst.clear()
        found = Agreement(int(tokens), apart / max(tokens, 1), worst)
        for name, limit in self._limits:
            value = getattr(found, name)
            if limit is not None and not value <= limit:
                raise AgreementError(
                    f"At step {step} training and sampler differ by {found.mean:.4f} nats per token on average and by "
                    f"{found.worst:.3f} at worst, over {found.tokens} sampled tokens with the same adapter: more than "
                    f"`rollout.stop_{name}: {limit}`. No optimizer step was taken on them. Give both the same numerics "
                    "(`rollout.numerics`, `model.numerics`); for experts that flip between them set "
                    "`rollout.replay: true`; with a server see that it applies the adapter and reports "
                    "log-probabilities at the sampling temperature. Or allow more."
                )
        return found
