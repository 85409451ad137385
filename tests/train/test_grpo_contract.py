"""What octavo extends in trl's GRPOTrainer without a public hook is still there, in the form it relies on."""

import inspect

import pytest
import trl


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_get_per_token_logps_and_entropies", ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]),
    ],
)
def test_methods_that_are_extended(method, parameters):
    found = list(inspect.signature(getattr(trl.GRPOTrainer, method)).parameters)
    assert found[: len(parameters)] == parameters


def test_there_is_still_no_public_hook_for_log_probabilities():
    """When one of these appears, the private methods can be let alone."""
    assert "importance_sampling_correction" not in inspect.signature(trl.GRPOConfig).parameters
    assert {"rollout_func"} <= inspect.signature(trl.GRPOTrainer).parameters.keys()
