"""The YAML a person writes for a run: keys, ranges and defaults, checked before anything is loaded."""

import difflib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from octavo.errors import ConfigError

Target = Literal["attention", "mlp", "shared_experts", "experts"]

# What other trainers call it, where difflib would not find it.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("train.lr",),
    "per_device_train_batch_size": ("train.batch_size",),
    "gradient_accumulation_steps": ("train.grad_accumulation",),
    "num_train_epochs": ("train.epochs",),
    "num_epochs": ("train.epochs",),
    "num_generations": ("train.completions",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_new_tokens": ("rollout.max_new_tokens",),
    "reward_funcs": ("rewards",),
    "reward_functions": ("rewards",),
    "num_iterations": ("train.iterations",),
    "epsilon": ("train.clip",),
    "kl_coef": ("train.beta",),
    "use_vllm": ("rollout.server",),
    "max_steps": ("train.steps",),
    "lr_scheduler_type": ("train.scheduler",),
    "warmup_steps": ("train.warmup",),
    "warmup_ratio": ("train.warmup",),
    "optim": ("train.optimizer",),
    "attn_implementation": ("model.attention",),
    "torch_compile": ("train.compile",),
    "cuda_graphs": ("train.graphs",),
    "activation_offloading": ("train.offload_hidden_states",),
    "optimizer_cpu_offload": ("train.offload_optimizer",),
    "offload_optimizer_device": ("train.offload_optimizer",),
    "autocast_adapter_dtype": ("lora.dtype",),
    "save_steps": ("train.save_every",),
    "eval_steps": ("train.eval_every",),
    "early_stopping_patience": ("train.early_stopping",),
    "bf16": ("train.precision",),
    "router_aux_loss_coef": ("train.router_aux_loss",),
    "resume_from_checkpoint": ("train.resume",),
    "model_name_or_path": ("model.path",),
    "base_model": ("model.path",),
    "torch_dtype": ("model.dtype",),
    "lora_r": ("lora.r",),
    "rank": ("lora.r",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "target_modules": ("lora.targets",),
    "max_seq_length": ("data.max_length",),
    "dataset": ("data.train",),
    "output_dir": ("out",),
}


class Section(BaseModel):
    """A part of a configuration: its keys are known, and its values do not change."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class ModelSection(Section):
    """Which checkpoint is loaded, and how it computes."""

    path: str = Field(min_length=1, description="Folder of a checkpoint, or a hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Dtype of everything that is not FP8.")
    numerics: Literal["exact", "fp8_grad", "fp8"] = Field("exact", description="Arithmetic of the FP8 products.")
    engine: str = Field("auto", min_length=1, description="How the products are computed; `auto` picks and says so.")
    activations: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="What routed experts keep for backward: as computed, or in FP8, half of it. For runs without "
        "gradient checkpointing.",
    )
    experts: Literal["resident", "host"] = Field(
        "resident",
        description="Where FP8 experts are kept: with the rest of the model, or in pinned memory of the host, from "
        "which each layer is copied to the GPU ahead of its turn.",
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto",
        description="How attention is computed; `auto`: as transformers chooses, and without a mask in packed rows.",
    )


class LoraSection(Section):
    """What is trained."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scaling alpha / r; the rank unless given.")
    expert_rank: int | None = Field(None, ge=1, description="Rank of routed experts; max(1, r // top_k) unless given.")
    targets: tuple[Target, ...] = Field(
        ("attention", "mlp", "shared_experts", "experts"), min_length=1, description="Which groups of layers get LoRA."
    )
    router: bool = Field(False, description="Train the routers too.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A; peft allows 0 only where experts train.")
    modules_to_save: tuple[str, ...] = Field((), description="Modules trained in full and saved beside the adapter.")
    trainable_tokens: tuple[int, ...] = Field((), description="Ids of tokens whose embeddings are trained in full.")
    init: Literal["default", "gaussian"] = Field(
        "default", description="How A is drawn, uniform or not; B starts at 0."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of the adapters; bfloat16 halves them and needs `train.optimizer: adamw_8bit`."
    )


class DataSection(Section):
    """What it is trained on."""

    train: str = Field(min_length=1, description="A .jsonl or .parquet file, or a hub id.")
    eval: str | None = Field(None, min_length=1, description="The same, for evaluation.")
    eval_fraction: float | None = Field(None, gt=0, lt=1, description="Share of `train` held out instead of `eval`.")
    train_split: str = Field("train", min_length=1, description="Split of `train` where that is a hub id.")
    eval_split: str = Field("validation", min_length=1, description="Split of `eval` where that is a hub id.")
    subset: str | None = Field(None, description="Configuration of the hub data set.")
    format: Literal["auto", "messages", "prompt-completion", "text"] = Field(
        "auto", description="Which columns hold the example; `auto` reads it from the first one."
    )
    loss: Literal["auto", "assistant", "completion", "all"] = Field(
        "auto",
        description="Which tokens count; `auto`: the assistant's turns, the completion, or all of a text.",
    )
    max_length: int = Field(2048, ge=8, description="Tokens of an example; what is longer is cut at the end.")
    packing: bool = Field(False, description="Fill each row up to max_length with several examples.")
    chat_template: str | None = Field(
        None, description="Jinja file that replaces the tokenizer's chat template; needed where that marks no turns."
    )

    @model_validator(mode="after")
    def _one_evaluation(self) -> Self:
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("`eval` and `eval_fraction` are both given; keep one")
        return self


class OptimizationSection(Section):
    """Steps, optimizer, records and checkpoints of a run."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; excludes `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; 1 unless `steps` is given.")
    lr: float = Field(2e-4, gt=0, lt=10, description="Learning rate at its highest.")
    scheduler: Literal["linear", "cosine", "constant"] = Field("cosine", description="What it does after warm-up.")
    warmup: float = Field(0.03, ge=0, description="Warm-up: a share of all steps below 1, else a number of steps.")
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "sgd"] = Field(
        "adamw", description="Optimizer; `adamw_8bit` is torchao's, with states of 8 bits and stochastic rounding."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 clips nothing.")
    router_aux_loss: float | None = Field(
        None, ge=0, description="Weight of the load-balancing loss; the checkpoint's own unless given."
    )
    seed: int = Field(0, ge=0, description="Seed of adapters, order and dropout.")
    gradient_checkpointing: Literal["none", "reentrant", "non_reentrant"] = Field(
        "non_reentrant", description="Recompute activations in the backward pass."
    )
    offload_hidden_states: bool = Field(
        False, description="Keep what gradient checkpointing keeps, a hidden state per layer, in pinned host memory."
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep the optimizer's states in pinned host memory and stream them through the GPU at a step.",
    )
    precision: Literal["bf16", "float32"] = Field("bf16", description="Autocast to bfloat16, or no autocast.")
    logging_steps: int = Field(1, ge=1, description="Steps between two lines of metrics.jsonl.")
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints; one at the end unless given.")
    keep_checkpoints: int | None = Field(2, ge=1, description="Older checkpoints are deleted; null keeps all.")
    stop_on_nan: bool = Field(True, description="Stop at the first loss that is NaN or infinite.")
    report_to: Literal["none", "trackio", "tensorboard"] = Field("none", description="Where else the metrics go.")
    resume: str = Field(
        "auto", min_length=1, description="`auto`: from the last checkpoint in `out`, if any; `never`; or a checkpoint."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` and `epochs` are both given; keep one")
        return self

    @model_validator(mode="after")
    def _offloading_has_hidden_states(self) -> Self:
        if self.offload_hidden_states and self.gradient_checkpointing == "none":
            raise ValueError(
                "`offload_hidden_states` moves what gradient checkpointing keeps, and `gradient_checkpointing` is "
                "`none`; set it to `non_reentrant`"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_optimizer_has_states(self) -> Self:
        if self.offload_optimizer and self.optimizer == "sgd":
            raise ValueError("`offload_optimizer` moves the optimizer's states, and `sgd` keeps none; leave it out")
        return self


class TrainSection(OptimizationSection):
    """How it is trained."""

    batch_size: int = Field(1, ge=1, description="Examples per device and forward.")
    grad_accumulation: int = Field(1, ge=1, description="Forwards per optimizer step.")
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Decoder layers as compiled graphs while they train; `auto`: on a GPU. Step one takes a minute.",
    )
    graphs: Literal["auto"] | bool = Field(
        "auto",
        description="Replay checkpointed decoder layers as CUDA graphs, faster and in more memory (see `octavo plan`); "
        "`auto`: on one GPU, without dropout, experts on it, up to 12,288 tokens a forward.",
    )
    eval_every: int | None = Field(None, ge=1, description="Steps between evaluations; once at the end unless given.")
    eval_on_start: bool = Field(False, description="Evaluate once before the first step.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better loss, and keep the best adapter."
    )

    @model_validator(mode="after")
    def _early_stopping_evaluates(self) -> Self:
        if self.early_stopping is None:
            return self
        if self.eval_every is None:
            raise ValueError("`early_stopping` needs `eval_every`")
        if self.save_every is None or self.save_every % self.eval_every:
            raise ValueError(
                f"`early_stopping` keeps the best checkpoint, so `save_every` must be a multiple of `eval_every` "
                f"({self.eval_every}), and is {self.save_every}"
            )
        return self


class RunConfig(Section):
    """What every run has: a model, what trains in it, and a folder."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    out: Path = Field(description="Folder of the run: resolved config, versions, metrics, checkpoints, adapter.")

    @field_validator("model", mode="before")
    @classmethod
    def _model_is_a_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("data", mode="before", check_fields=False)
    @classmethod
    def _data_is_a_path(cls, value: object) -> object:
        return {"train": value} if isinstance(value, str) else value

    def to_yaml(self) -> str:
        """Every key with its value, defaults included."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def require_kept(model: ModelSection, train: OptimizationSection) -> None:
    """Refuse activations in FP8 where layers are recomputed: nothing is kept of them, so they would only be rounded.

    Raises:
        ValueError: both are asked for.
    """
    if model.activations == "fp8" and train.gradient_checkpointing != "none":
        raise ValueError(
            "`model.activations: fp8` halves what is kept for backward, and with `train.gradient_checkpointing: "
            f"{train.gradient_checkpointing}` that is recomputed, not kept; set it to `none`, or activations to `bf16`"
        )


class SftConfig(RunConfig):
    """A whole run of ``octavo sft``."""

    data: DataSection
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _activations_are_kept(self) -> Self:
        require_kept(self.model, self.train)
        return self

    @model_validator(mode="after")
    def _graphs_replay_checkpoints(self) -> Self:
        if self.train.graphs is not True:
            return self
        if self.train.gradient_checkpointing == "none":
            raise ValueError(
                "`train.graphs` take the place of gradient checkpointing, and `train.gradient_checkpointing` is "
                "`none`; set it to `non_reentrant`, or `graphs` to `false`"
            )
        if self.model.experts == "host":
            raise ValueError(
                "`train.graphs` cannot wait for the copies of `model.experts: host`; set `graphs` to `false`, or "
                "`experts` to `resident`"
            )
        if self.lora.dropout > 0:
            raise ValueError(
                f"`train.graphs` would draw other random numbers in each half, and `lora.dropout` is "
                f"{self.lora.dropout}; set it to 0, or `graphs` to `false`"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Self:
        if self.train.eval_every is not None and self.data.eval is None and self.data.eval_fraction is None:
            raise ValueError("`train.eval_every` needs `data.eval` or `data.eval_fraction`")
        return self

    @model_validator(mode="after")
    def _narrow_adapters_learn(self) -> Self:
        if self.lora.dtype == "bfloat16" and self.train.optimizer != "adamw_8bit":
            raise ValueError(
                f"`lora.dtype: bfloat16` with `train.optimizer: {self.train.optimizer}` would round away updates below "
                "1/256 of a weight; set `train.optimizer: adamw_8bit`, which rounds stochastically, or `lora.dtype: "
                "float32`"
            )
        return self

    def resolved(self) -> Self:
        """The same run with every path on this disk absolute, so that the written config runs from anywhere."""
        data = {key: absolute(getattr(self.data, key)) for key in ("train", "eval", "chat_template")}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"path": absolute(self.model.path)}),
                "data": self.data.model_copy(update=data),
                "out": self.out.expanduser().absolute(),
            }
        )


Config = TypeVar("Config", bound=RunConfig)


def absolute(name: str | None) -> str | None:
    """The absolute path of what is on this disk; anything else, such as a hub id, as it is."""
    if name is None:
        return None
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def load_config(path: Path, overrides: Iterable[str] = ()) -> SftConfig:
    """`read_config` for ``octavo sft``."""
    return read_config(SftConfig, path, overrides)


def parse_config(tree: Mapping[str, Any], *, source: str = "the configuration") -> SftConfig:
    """`check_config` for ``octavo sft``."""
    return check_config(SftConfig, tree, source=source)


def read_config(kind: type[Config], path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read and check a YAML file; each override is ``section.key=value`` with the value in YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, or has keys or values that are wrong; one sentence for each.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}.") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"The configuration {path} holds {type(tree).__name__}, expected keys such as `model:`.")
    for override in overrides:
        _apply_override(tree, override)
    return check_config(kind, tree, source=str(path))


def check_config(kind: type[Config], tree: Mapping[str, Any], *, source: str = "the configuration") -> Config:
    """Check a configuration that is a mapping already.

    Raises:
        ConfigError: keys or values are wrong; one sentence for each.
    """
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        problems = [_sentence(problem, kind) for problem in error.errors(include_url=False)]
    heading = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {source}:"
    raise ConfigError("\n  ".join([heading, *problems]))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"The override {override!r} is not of the form section.key=value.")
    section = tree
    for key in keys[:-1]:
        inner = section.setdefault(key, {})
        if isinstance(inner, str) and section is tree and key in ("model", "data"):
            # The short form `model: path` makes way for the long one.
            inner = section[key] = {"path" if key == "model" else "train": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"The override {override!r} reaches into `{key}`, which holds {inner!r}.")
        section = inner
    section[keys[-1]] = _parse_yaml(text, f"the override {override!r}")


def _parse_yaml(text: str, source: str) -> Any:
    try:
        # A SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}.") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error; PyYAML itself keeps the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _sentence(problem: Any, kind_of_run: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    path, kind = ".".join(location), problem["type"]
    if kind == "extra_forbidden":
        return f"`{path}` is not a key{_suggestion(location, _keys(kind_of_run))}"
    if kind == "missing":
        return f"`{path}` is missing: {_keys(kind_of_run).get(path, 'it has no default.')}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not location or kind == "value_error":
        return f"{f'`{path}`: ' if path else ''}{message}."
    return f"`{path}` is {problem['input']!r}: {message}."


def _keys(section: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration with its description."""
    keys: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys[f"{prefix}{name}"] = " ".join((inner.__doc__ or "").split())
            keys |= _keys(inner, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field.description or ""
    return keys


def _suggestion(location: list[str], keys: Mapping[str, str]) -> str:
    name = location[-1]
    prefix = "".join(f"{part}." for part in location[:-1])
    siblings = {key[len(prefix) :]: key for key in keys if key.startswith(prefix) and "." not in key[len(prefix) :]}
    leaves = {key.rpartition(".")[2]: key for key in keys}
    found = next((other for other in _OTHER_NAMES.get(name, ()) if other in keys), None) or leaves.get(name)
    for names in (siblings, leaves):
        close = difflib.get_close_matches(name, names, n=1)
        found = found or (names[close[0]] if close else None)
    return f"; did you mean `{found}`?" if found else f"; the keys here are {', '.join(siblings)}."


__all__ = [
    "DataSection",
    "LoraSection",
    "ModelSection",
    "RunConfig",
    "SftConfig",
    "TrainSection",
    "check_config",
    "load_config",
    "parse_config",
    "read_config",
]
