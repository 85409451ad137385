"""Rollouts by a vLLM server, which gets the adapter and nothing else, through its OpenAI-compatible HTTP interface.

Used are ``GET /v1/models``, ``POST /v1/load_lora_adapter``, ``POST /v1/unload_lora_adapter`` and ``POST
/v1/completions`` as vLLM documents them (https://docs.vllm.ai/en/latest/features/lora/). The server must run with
``--enable-lora``, ``--max-lora-rank`` of at least the adapter's, ``--logprobs-mode processed_logprobs`` and
``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``, and must see the folder of adapters under the same path.
"""

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from octavo.train.rollout.adapter_files import adapter_pairs, write_adapter
from octavo.train.rollout.sampler import RolloutError, Sample, Synchronization

_TOKEN = re.compile(r"token_id:\d+")


class _LogProbs(BaseModel):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []


class _Choice(BaseModel):
    index: int
    logprobs: _LogProbs | None = None


class _Completions(BaseModel):
    choices: list[_Choice]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


_Answer = TypeVar("_Answer", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the server samples: the whole vocabulary at ``temperature``, until a token of ``ends``."""

    max_new_tokens: int
    temperature: float
    ends: tuple[int, ...]

    def body(self) -> dict[str, Any]:
        """In the words of ``/v1/completions``; everything is said, because a server has defaults of its own."""
        return {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "stop_token_ids": list(self.ends),
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "skip_special_tokens": False,
            "n": 1,
            # Of the sampled token alone, and the token by its id: text would not tell which tokens it was made of.
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }


class VllmServer:
    """A `Sampler` over one server. Each synchronisation loads an adapter under a new name, so that no cached prefix of
    an older one is used.
    """

    def __init__(
        self,
        address: str,
        *,
        run: str,
        folder: Path,
        base_model: str,
        dtype: torch.dtype,
        parameters: SamplingParameters,
        timeout: float,
        main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """``run``: part of the adapters' names on the server. ``folder``: where they are written for it. ``main``:
        whether this process writes and loads; the others ``wait`` for it.

        Raises:
            RolloutError: the server cannot be reached.
        """
        self._address, self._timeout = address, timeout
        self._prefix, self._folder = f"octavo-{run}-", folder
        self._base_model, self._dtype = base_model, dtype
        self._parameters = parameters
        self._main, self._wait = main, wait
        self._name: str | None = None
        served = self._models()
        if main:
            # Of a run of this name that was cut off.
            for name in served:
                if name.startswith(self._prefix):
                    self._unload(name)

    def synchronize(self, model: Any, step: int) -> Synchronization:
        """Unload the adapter before, write this one and have it loaded; bytes of its files and of the requests."""
        began = time.perf_counter()
        before, self._name = self._name, f"{self._prefix}{step}"
        # Collected by all ranks, where factors are sharded.
        pairs = adapter_pairs(model)
        moved = 0
        if self._main:
            if before is not None:
                # First, because a server with room for one adapter would drop it by itself, and then refuse to.
                moved += self._unload(before)
                shutil.rmtree(self._folder / before, ignore_errors=True)
            folder = self._folder / self._name
            moved += write_adapter(pairs, folder, base_model=self._base_model, dtype=self._dtype)
            moved += self._load(self._name, folder)
        else:
            for _ in pairs:
                pass
        self._wait()
        return Synchronization(moved, time.perf_counter() - began)

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        """See `octavo.train.rollout.sampler.Sampler`; all prompts in one request, for the server to batch."""
        if self._name is None:
            raise RolloutError("The server has no adapter yet: synchronize before sampling.")
        body = {"model": self._name, "prompt": [list(ids) for ids in prompts], **self._parameters.body()}
        choices = sorted(self._json(_Completions, "/v1/completions", body).choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(prompts))):
            raise RolloutError(
                f"{self._address} gave {len(choices)} completions for {len(prompts)} prompts, of index "
                f"{[choice.index for choice in choices][:20]}; expected one each."
            )
        return [self._sample(choice) for choice in choices]

    def close(self) -> None:
        """Unload the last adapter and remove its files. The run's own adapter is saved elsewhere."""
        if self._main and self._name is not None:
            name, self._name = self._name, None
            # A server that is gone holds nothing, and is not why the run ends.
            with suppress(RolloutError):
                self._unload(name)
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _sample(self, choice: _Choice) -> Sample:
        found = choice.logprobs or _LogProbs()
        tokens, logprobs = found.tokens, found.token_logprobs
        if not tokens or not all(_TOKEN.fullmatch(token) for token in tokens):
            raise RolloutError(
                f"{self._address} gave a completion without token ids and log-probabilities (`logprobs` is "
                f"{found.model_dump_json()[:80]}). vLLM gives them with `logprobs` and `return_tokens_as_token_ids`."
            )
        if len(tokens) != len(logprobs) or len(tokens) > self._parameters.max_new_tokens:
            raise RolloutError(
                f"{self._address} gave a completion of {len(tokens)} tokens with {len(logprobs)} log-probabilities, "
                f"and was asked for one of at most {self._parameters.max_new_tokens} with one each."
            )
        ids = [int(token.rpartition(":")[2]) for token in tokens]
        # vLLM writes null where it could not compute one; NaN stops the comparison with the training forward.
        return Sample(ids, [float("nan") if value is None else value for value in logprobs])

    def _models(self) -> list[str]:
        return [model.id for model in self._json(_Models, "/v1/models").data]

    def _load(self, name: str, folder: Path) -> int:
        return self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})[1]

    def _unload(self, name: str) -> int:
        return self._post("/v1/unload_lora_adapter", {"lora_name": name})[1]

    def _json(self, kind: type[_Answer], path: str, body: Mapping[str, Any] | None = None) -> _Answer:
        text, _ = self._post(path, body)
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole of it"
            raise RolloutError(
                f"{self._address}{path} answered {text[:80]!r}, which is not what vLLM documents: {place}: "
                f"{first['msg']}."
            ) from error

    def _post(self, path: str, body: Mapping[str, Any] | None) -> tuple[str, int]:
        """The answer's text and the bytes that were sent; a GET without ``body``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._address}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return response.read().decode(errors="replace"), len(data or b"")
        except urllib.error.HTTPError as error:
            raise RolloutError(_refusal(self._address, path, error)) from error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise RolloutError(
                f"`rollout.server`: {self._address}{path} does not answer: {reason}. Start vLLM there, or raise "
                "`rollout.server_timeout`."
            ) from error


def _refusal(address: str, path: str, error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
        inner = answer.get("error", answer)
        message = str(inner.get("message", text))
    except (json.JSONDecodeError, AttributeError):
        message = text
    hint = ""
    if error.code == HTTPStatus.NOT_FOUND and path.endswith("_lora_adapter") and "adapter" not in message:
        hint = " Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
    return f"{address}{path} refused with status {error.code}: {' '.join(message.split())[:300]}.{hint}"
