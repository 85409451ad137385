"""``activations="fp8"`` from the public calls: who takes it, who shows it, who refuses."""

from pathlib import Path

import peft
import pytest
import torch
from typer.testing import CliRunner

import octavo
from octavo.cli.main import app
from octavo.errors import ConfigError, EngineError
from octavo.nn.experts import OctavoExperts
from octavo.plan.skeleton import Adapters
from octavo.plan.terms import Planner, Request
from octavo.train.config import parse_config
from tests.curves import dequantized

SFT = {"data": "words.jsonl", "out": "run"}


def gradients(activations: str) -> dict[str, torch.Tensor]:
    model = octavo.load_model(octavo.demo.checkpoint("qwen-tiny"), activations=activations, dtype=torch.float32)  # type: ignore[arg-type]
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=4))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    ids = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_a_real_model_has_the_same_loss_and_nearby_gradients() -> None:
    """Errors of layers add up on the way back: the whole gradient is within 6 %, and points the same way."""
    plain, narrow = gradients("bf16"), gradients("fp8")
    assert torch.equal(plain.pop("loss"), narrow.pop("loss"))
    want, got = (torch.cat([g.flatten() for g in one.values()]) for one in (plain, narrow))
    assert 1e-3 < ((got - want).norm() / want.norm()).item() < 6e-2
    assert torch.cosine_similarity(got, want, dim=0) > 0.998


def test_it_travels_and_shows() -> None:
    model = octavo.load_model(octavo.demo.checkpoint("glm-tiny"), activations="fp8")
    experts = [module for module in model.modules() if isinstance(module, OctavoExperts)]
    assert {module.settings.activations for module in experts} == {"fp8"}
    assert "activations=fp8" in repr(experts[0])
    rows = octavo.describe(model).rows
    assert {row.activations for row in rows if row.module.endswith("experts")} == {"fp8"}
    assert "kept" in str(octavo.describe(model)).splitlines()[0]
    octavo.configure(model, numerics="fp8")
    assert experts[0].settings.activations == "fp8"
    octavo.configure(model, activations="bf16")
    assert (experts[0].settings.activations, experts[0].settings.numerics) == ("bf16", "fp8")
    assert "activations" not in repr(experts[0])


def test_it_is_refused_where_nothing_would_be_kept_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has none on octavo's forward"):
        octavo.load_model(octavo.demo.checkpoint("dense-tiny"), activations="fp8")
    model = octavo.load_model(octavo.demo.checkpoint("dense-tiny"))
    with pytest.raises(EngineError, match="has none on octavo's forward"):
        octavo.configure(model, activations="fp8")
    with pytest.raises(EngineError, match="is none of bf16, fp8"):
        octavo.load_model(octavo.demo.checkpoint("qwen-tiny"), activations="int8")  # type: ignore[arg-type]
    plain = dequantized(octavo.demo.checkpoint("qwen-tiny"), tmp_path / "plain")
    with pytest.raises(EngineError, match="engine='stock'"):
        octavo.load_model(plain, engine="stock", activations="fp8")


def test_a_run_that_recomputes_its_layers_refuses() -> None:
    model = {"path": "somewhere", "activations": "fp8"}
    with pytest.raises(ConfigError, match="recomputed, not kept"):
        parse_config({"model": model, **SFT})
    config = parse_config({"model": model, "train": {"gradient_checkpointing": "none"}, **SFT})
    assert config.model.activations == "fp8"


def test_a_plan_counts_it() -> None:
    folder = str(octavo.demo.checkpoint("qwen-tiny"))
    planner = Planner(folder)
    plain = planner.plan(Request(folder, Adapters(8), seq=512, checkpointing=False))
    narrow = planner.plan(Request(folder, Adapters(8), seq=512, checkpointing=False, activations="fp8"))
    assert 0.5 * plain.kept < narrow.kept < 0.95 * plain.kept
    changes = planner.changes(Request(folder, Adapters(8), seq=512, checkpointing=False))
    assert "model.activations: fp8" in [change.says for change in changes]
    refused = CliRunner().invoke(app, ["plan", folder, "--activations", "fp8"])
    assert refused.exit_code == 1
    assert "--no-checkpointing" in refused.output
    command = ["plan", folder, "--activations", "fp8", "--no-checkpointing", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
