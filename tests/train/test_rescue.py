"""What a failing run may not save. What it does save is in test_sft.py and test_grpo.py, by whole runs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from octavo.train.rescue import SaveOnFailure


class Dead(nn.Parameter):
    """A parameter on a GPU that failed: every question to it is an error."""

    def isfinite(self) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_the_error_of_a_gpu_that_failed_is_the_one_to_tell(tmp_path) -> None:
    model = nn.Module()
    model.weight = Dead(torch.ones(2))
    arguments = SimpleNamespace(output_dir=str(tmp_path), world_size=1, device=torch.device("cpu"))
    rescue = SaveOnFailure()
    rescue.on_step_end(arguments, None, None)
    trainer = SimpleNamespace(args=arguments, model=model, state=SimpleNamespace(global_step=1))
    with pytest.raises(ValueError, match="the run's own"), rescue.watching(trainer, pytest.fail):
        raise ValueError("the run's own")
    assert not list(tmp_path.iterdir())
