"""A plan's weights, byte for byte, of the families of transformers: what their classes keep in float32, rename, stack
on disk or read by themselves.
"""

import json
import logging

import pytest

import octavo
from octavo.plan.skeleton import bare_model
from octavo.plan.terms import Planner, Request, _weights
from tests.families import table
from tests.families.checkpoints import LAYOUTS, save_quantized
from tests.families.tiny import class_called, tiny_model

from .test_plan import real_bytes

QUICK = {
    "Qwen2MoeExperts": "biases beside codes",
    "PhimoeExperts": "routers with another name on disk",
    "GraniteMoeExperts": "stacks on disk",
    "KimiLinearExperts": "escaped names",
    "DeepseekV32Experts": "a layer whose weight is read",
    "HunYuanMoEV1Experts": "routers made in float32",
    "Ernie4_5_MoeExperts": "routers kept in float32",
    "AfmoeExperts": "a mask by name",
}
# Its indexers, FP8 on disk, are dequantized to bfloat16, where transformers would keep them in float32.
UNLIKE = {"HYV4Experts"}


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Plain tensors of these models are float32 on disk."""
    caplog.set_level(logging.ERROR, "octavo")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in table.CAUSAL_LM
        if name not in UNLIKE
    ],
)
def test_weights_are_those_of_the_loaded_model(name, tmp_path):
    layout = LAYOUTS[table.CAUSAL_LM.index(name) % len(LAYOUTS)]
    folder = save_quantized(tiny_model(class_called(name)), tmp_path / "model", layout).folder
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    real = real_bytes(octavo.load_model(folder))
    assert _weights(bare_model(folder)) == real
    assert _weights(bare_model(alone)) == real


def test_attention_that_gives_its_mask_by_name_is_planned(tmp_path):
    model = tiny_model(class_called("AfmoeExperts"))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert Planner(tmp_path).plan(Request(tmp_path, seq=64)).peak > 0
