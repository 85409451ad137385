"""The YAML a person writes for ``octavo grpo``."""

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from octavo.train.config import OptimizationSection, RunConfig, Section, absolute, require_kept


def _has_host(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


class PromptsSection(Section):
    """What it is asked."""

    train: str = Field(min_length=1, description="A .jsonl or .parquet file, or a hub id.")
    train_split: str = Field("train", min_length=1, description="Split of `train` where that is a hub id.")
    subset: str | None = Field(None, description="Configuration of the hub data set.")
    max_prompt_tokens: int = Field(1024, ge=1, description="A longer prompt is an error, named by file and line.")


class RewardSection(Section):
    """One reward function; a completion's reward is the weighted sum over them."""

    function: str = Field(
        min_length=1,
        description="`exact_match`, `format`, or a function of yours: `package.module:name`, or `file.py:name`.",
    )
    name: str | None = Field(
        None, min_length=1, description="What it is called in the metrics; the function's own name unless given."
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="Its share in the sum.")
    arguments: dict[str, Any] = Field({}, description="Keyword arguments that it gets at every call.")


class RolloutSection(Section):
    """Who answers, and how closely training must agree with it."""

    max_new_tokens: int = Field(256, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Of sampling and of the log-probabilities alike; nothing is cut off the distribution."
    )
    numerics: Literal["same", "exact", "fp8"] = Field(
        "same", description="Arithmetic of the FP8 products while sampling; `same`: that of training."
    )
    graphs: Literal["auto"] | bool = Field(
        "auto", description="Sample each token as one CUDA graph; `auto`: where the model and its device allow it."
    )
    replay: bool = Field(False, description="Train with the experts that were chosen while sampling.")
    server: str | None = Field(
        None, description="Sample on a vLLM server at this address, such as http://localhost:8000, not in this process."
    )
    adapters: str | None = Field(
        None, min_length=1, description="Folder in which the server finds adapters; `rollout` in `out` unless given."
    )
    server_timeout: float = Field(600.0, gt=0, description="Seconds that an answer of the server may take.")
    stop_mean: float | None = Field(
        0.1, gt=0, description="Stop where training and sampler differ by more nats per token on average; null: never."
    )
    stop_worst: float | None = Field(
        None, gt=0, description="Stop where they differ by more nats on any one token; null: never."
    )

    @field_validator("server")
    @classmethod
    def _server_is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("an address begins with http:// or https://")
        if value is not None and not _has_host(value):
            raise ValueError("an address has a host and, if any, a port that is a number: http://localhost:8000")
        return None if value is None else value.rstrip("/")

    @model_validator(mode="after")
    def _server_computes_by_itself(self) -> Self:
        if self.server is not None and self.replay:
            raise ValueError("`replay` needs the experts that were chosen, which a server does not tell")
        if self.server is not None and self.numerics != "same":
            raise ValueError("`numerics` of a server are its own; leave it at `same`")
        if self.server is not None and self.graphs is True:
            raise ValueError("`graphs` are of the model's own sampling; a server has its own. Leave it at `auto`")
        return self

    @model_validator(mode="after")
    def _graphs_record_nothing(self) -> Self:
        if self.graphs is True and self.replay:
            raise ValueError("`replay` records experts in Python, which a CUDA graph skips; leave `graphs` at `auto`")
        return self


class GrpoTrainSection(OptimizationSection):
    """How it is trained."""

    prompts: int = Field(8, ge=1, description="Prompts per device and optimizer step.")
    completions: int = Field(8, ge=2, description="Completions of each prompt; rewards are compared among them.")
    batch_size: int | None = Field(None, ge=1, description="Completions per forward; those of one prompt unless given.")
    iterations: int = Field(1, ge=1, description="Optimizer steps on the same completions.")
    lr: float = Field(5e-5, gt=0, lt=10, description="Learning rate at its highest.")
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the model without its adapter.")
    clip: float = Field(0.2, gt=0, lt=1, description="The probability ratio is clipped at 1 - clip and 1 + clip.")
    clip_high: float | None = Field(None, gt=0, description="Another upper bound: 1 + clip_high.")
    loss: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = Field("dapo", description="How tokens are averaged.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Divide advantages by the standard deviation of rewards over this."
    )
    mask_truncated: bool = Field(False, description="Leave completions out that reached max_new_tokens.")

    @property
    def forward_size(self) -> int:
        """Completions per forward."""
        return self.completions if self.batch_size is None else self.batch_size

    @model_validator(mode="after")
    def _whole_forwards(self) -> Self:
        if self.prompts * self.completions % self.forward_size:
            raise ValueError(
                f"`batch_size` {self.forward_size} does not divide the {self.prompts} x {self.completions} completions "
                "of a step"
            )
        return self


class GrpoConfig(RunConfig):
    """A whole run of ``octavo grpo``."""

    data: PromptsSection
    rewards: tuple[RewardSection, ...] = Field(min_length=1, description="Reward functions, see there.")
    rollout: RolloutSection = RolloutSection()
    train: GrpoTrainSection = GrpoTrainSection()

    @field_validator("rewards", mode="before")
    @classmethod
    def _reward_is_a_function(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return [{"function": one} if isinstance(one, str) else one for one in value]
        return value

    @model_validator(mode="after")
    def _activations_are_kept(self) -> Self:
        require_kept(self.model, self.train)
        return self

    @model_validator(mode="after")
    def _not_of_grpo(self) -> Self:
        if self.lora.dtype != "float32":
            raise ValueError("`lora.dtype` of GRPO is float32; leave it out")
        if self.train.offload_hidden_states:
            raise ValueError("`train.offload_hidden_states` is for `octavo sft`; leave it out")
        return self

    @model_validator(mode="after")
    def _replay_is_on_policy(self) -> Self:
        if self.rollout.replay and self.train.iterations > 1:
            raise ValueError(
                "`rollout.replay` needs `train.iterations: 1`: later steps on the same completions would be forced "
                "onto experts that an older router chose"
            )
        return self

    def resolved(self) -> Self:
        """The same run with every path on this disk absolute, so that the written config runs from anywhere."""
        rewards = []
        for reward in self.rewards:
            file, colon, name = reward.function.rpartition(":")
            path = absolute(file) if colon else None
            rewards.append(reward.model_copy(update={"function": f"{path}:{name}" if path else reward.function}))
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"path": absolute(self.model.path)}),
                "data": self.data.model_copy(update={"train": absolute(self.data.train)}),
                "rewards": tuple(rewards),
                "out": self.out.expanduser().absolute(),
            }
        )
