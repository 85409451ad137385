"""A person's YAML: what is wrong is named by key, with what was probably meant."""

import pytest
from pydantic import BaseModel

from octavo.errors import ConfigError
from octavo.train.config import SftConfig, load_config, parse_config

MINIMAL = {"model": "some/model", "data": "some/data", "out": "run"}


def refused(**changes: object) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config({**MINIMAL, **changes})
    return str(error.value)


def test_the_short_form_is_the_long_one_with_defaults():
    config = parse_config(MINIMAL)
    assert config.model.path == "some/model"
    assert config.data.train == "some/data"
    assert config.lora.r == 16
    assert config.train.resume == "auto"
    assert "experts" in config.lora.targets
    assert not config.lora.router


@pytest.mark.parametrize(
    ("changes", "key", "suggestion"),
    [
        ({"trian": {}}, "`trian` is not a key", "`train`"),
        ({"train": {"leraning_rate": 1}}, "`train.leraning_rate` is not a key", "keys here"),
        ({"train": {"learning_rate": 1}}, "`train.learning_rate` is not a key", "`train.lr`"),
        ({"lr": 1}, "`lr` is not a key", "`train.lr`"),
        ({"max_lenght": 1}, "`max_lenght` is not a key", "`data.max_length`"),
        ({"lora": {"lora_alpha": 1}}, "`lora.lora_alpha` is not a key", "`lora.alpha`"),
        ({"model": {"path": "x", "dtyp": "bfloat16"}}, "`model.dtyp` is not a key", "`model.dtype`"),
    ],
)
def test_an_unknown_key_is_refused_by_name_with_a_suggestion(changes, key, suggestion):
    message = refused(**changes)
    assert key in message
    assert suggestion in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"r": 0}}, "`lora.r` is 0"),
        ({"lora": {"dropout": 1.0}}, "`lora.dropout` is 1.0"),
        ({"lora": {"targets": ["attention", "expertz"]}}, "`lora.targets.1` is 'expertz'"),
        ({"lora": {"targets": []}}, "`lora.targets` is []"),
        ({"train": {"lr": -1}}, "`train.lr` is -1"),
        ({"train": {"steps": 1.5}}, "`train.steps` is 1.5"),
        ({"train": {"scheduler": "sine"}}, "'linear', 'cosine' or 'constant'"),
        ({"train": {"gradient_checkpointing": True}}, "'none', 'reentrant' or 'non_reentrant'"),
        ({"model": {"path": "x", "dtype": "float8"}}, "`model.dtype` is 'float8'"),
        ({"train": {"steps": 1, "epochs": 1}}, "`train`: `steps` and `epochs` are both given"),
        ({"data": {"train": "x", "eval": "y", "eval_fraction": 0.1}}, "`eval` and `eval_fraction` are both given"),
        ({"train": {"eval_every": 5}}, "`train.eval_every` needs `data.eval`"),
        ({"train": {"early_stopping": 2}}, "`early_stopping` needs `eval_every`"),
        ({"train": {"early_stopping": 2, "eval_every": 2, "save_every": 3}}, "multiple of `eval_every`"),
        ({"lora": {"dtype": "bfloat16"}}, "`lora.dtype: bfloat16` with `train.optimizer: adamw` would round away"),
        ({"train": {"offload_hidden_states": True, "gradient_checkpointing": "none"}}, "moves what gradient"),
        (
            {"train": {"offload_optimizer": True, "optimizer": "sgd"}},
            "`offload_optimizer` moves the optimizer's states",
        ),
        ({"train": {"optimizer_cpu_offload": True}}, "did you mean `train.offload_optimizer`"),
        ({"model": {"path": "x", "attention": "flash"}}, "`model.attention` is 'flash'"),
        ({"out": None}, "`out` is None"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(changes, said):
    assert said in refused(**changes)


def test_every_problem_is_told_at_once_and_what_is_missing_is_described():
    with pytest.raises(ConfigError) as error:
        parse_config({"model": {"path": "x", "dtyp": "y"}, "train": {"lr": -1}, "out": "run"})
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 problems")
    assert len(lines) == 4
    assert any("`data` is missing: What it is trained on." in line for line in lines)


def test_numbers_of_yaml_1_2_are_numbers(tmp_path):
    # PyYAML reads 1e-4, without a point, as text.
    path = tmp_path / "sft.yaml"
    path.write_text("model: m\ndata: d\nout: o\ntrain: {lr: 1e-4}\n")
    assert load_config(path).train.lr == 1e-4


def test_a_key_written_twice_is_refused_where_yaml_would_keep_the_last(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model: m\ndata: d\nout: o\ntrain: {lr: 1.0}\ntrain: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"'train' is there twice.*line 5"):
        load_config(path)


@pytest.mark.parametrize(("text", "said"), [("a: [", "is not YAML"), ("- a", "holds list"), ("", "holds NoneType")])
def test_what_is_not_a_mapping_in_yaml_is_refused(tmp_path, text, said):
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_overrides_reach_single_values_also_past_the_short_forms(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model: m\ndata: d\nout: o\n")
    config = load_config(
        path, ["train.lr=1e-3", "model.dtype=float32", "lora.targets=[attention]", "data.packing=true"]
    )
    assert config.model.path == "m"
    assert config.model.dtype == "float32"
    assert config.train.lr == 1e-3
    assert config.lora.targets == ("attention",)
    assert config.data.packing
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(path, ["train.lr"])
    with pytest.raises(ConfigError, match=r"`train\.lrr` is not a key"):
        load_config(path, ["train.lrr=1"])


def test_the_resolved_config_is_complete_and_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "data.jsonl").touch()
    config = parse_config({"model": "model", "data": "data.jsonl", "out": "run"}).resolved()
    assert config.model.path == str(tmp_path / "model")
    assert config.data.train == str(tmp_path / "data.jsonl")
    assert config.out == tmp_path / "run"
    # A hub id is none of this disk's paths.
    assert parse_config({**MINIMAL, "model": "org/name"}).resolved().model.path == "org/name"
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    assert all(f"{key}:" in config.to_yaml() for section in sections() for key in section.model_fields)


def sections() -> list[type[BaseModel]]:
    fields = SftConfig.model_fields.values()
    return [f.annotation for f in fields if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)]


def test_every_key_is_documented():
    for section in [SftConfig, *sections()]:
        assert section.__doc__
        for name, field in section.model_fields.items():
            documented = field.description or (field.annotation and field.annotation.__doc__)
            assert documented, f"{section.__name__}.{name}"
    assert len(sections()) == 4
