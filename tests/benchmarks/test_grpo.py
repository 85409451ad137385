"""The benchmark of GRPO runs in its small form and reports what it promises."""

import json
import sys

import pytest

from benchmarks import grpo


@pytest.mark.slow
@pytest.mark.parametrize("model", ["glm", "qwen3-8b"])
def test_small_form_reports_a_whole_row(model, tmp_path, monkeypatch):
    file = tmp_path / "row.json"
    sizes = ["--tokens", "8", "--warm-up-tokens", "4", "--prompts", "2", "--completions", "2", "--batch-size", "2"]
    sizes += ["--compared-tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["grpo", model, "--small", *sizes, "--json", str(file)])
    grpo.main()
    [row] = json.loads(file.read_text())
    found = row["octavo"]
    # the warm-up is shorter, and is not what is reported
    assert found["completion_tokens"] == 8
    assert set(found["seconds"]) == {"rollout", "rewards", "forward and loss", "backward", "optimizer"}
    assert "on cpu" in found["generation"]["graphs"]
    assert "on cpu" in found["decoding"]
    compared = [found["generation"]["eager"], row["bf16_generation"]["alone"], row["bf16_generation"]["with LoRA"]]
    for generation in compared:
        # the same sequences on both sides
        assert (generation["sequences"], generation["tokens_per_sequence"]) == (4, 6)
        assert generation["tokens_per_second"] == pytest.approx(4 * 6 / generation["seconds"])
    sync = found["synchronization"]
    assert sync["own sampler"]["bytes"] == 0
    assert 0 < sync["vLLM client"]["bytes"] < 0.2 * row["checkpoint_gb"] * 1e9
