"""Routing replay: the experts chosen while sampling are recorded, and used again in the training forward.

A router near a tie picks other experts under other rounding, which moves the probability of a token more than the
rounding itself does. Only the choice is replayed: the weights of the chosen experts are the training router's own, and
have gradients.

Legend: ``B`` sequences, ``S`` positions of a sequence, ``T = B·S``, ``L`` layers with experts, ``K`` experts per token,
``E`` experts.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from octavo.errors import ConfigError
from octavo.train.rollout.sampler import RolloutError
from octavo.train.routing import experts_layers, num_experts

UNKNOWN = -1


class RoutingRecorder:
    """Records what the routers of ``model`` hand to the experts between `start` and `stop`."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[list[Tensor]] | None = None
        self._batch = 0
        self._handles: list[RemovableHandle] = []
        for layer, (_, outer, own) in enumerate(_layers(model)):
            self._handles.append(_on_chosen(outer, own, _Record(self, layer)))
        self._num_layers = len(self._handles)

    def start(self, num_sequences: int) -> None:
        """Record from now on forwards of ``num_sequences`` sequences."""
        self._calls = [[] for _ in range(self._num_layers)]
        self._batch = num_sequences

    def add(self, layer: int, chosen_TK: Tensor) -> None:
        """Take note of one forward of one layer."""
        if self._calls is not None:
            chosen = chosen_TK.reshape(self._batch, -1, chosen_TK.shape[-1])
            self._calls[layer].append(chosen.to(torch.int16))

    def stop(self, length: int) -> Tensor:
        """``[B, length, L, K]`` int16; `UNKNOWN` at positions that were not computed: the last token of each row."""
        assert self._calls is not None, "start comes before stop"
        layers = [torch.cat(calls, dim=1) for calls in self._calls]
        self._calls = None
        routed_BSLK = torch.stack(layers, dim=2)
        B, S, L, K = routed_BSLK.shape
        missing = routed_BSLK.new_full((B, length - S, L, K), UNKNOWN)
        return torch.cat([routed_BSLK, missing], dim=1)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class _Record:
    def __init__(self, recorder: RoutingRecorder, layer: int) -> None:
        self._recorder, self._layer = recorder, layer

    def __call__(self, chosen_TK: Tensor) -> None:
        self._recorder.add(self._layer, chosen_TK)


class RoutingReplay:
    """Makes the routers of ``model`` choose given experts, also where a layer is computed again in the backward.

    Raises `RolloutError` in the first forward of a layer whose router does not choose by ``topk`` over its experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routed_BSLK: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._checked: set[int] = set()
        for layer, (name, outer, own) in enumerate(_layers(model)):
            block = model.get_submodule(name.rpartition(".")[0])
            forced = _Forced(num_experts(own))
            self._handles += [
                block.register_forward_pre_hook(_Enter(self, layer, forced)),
                block.register_forward_hook(_Leave(forced), always_call=True),
                _on_chosen(outer, own, _Check(self, layer, name)),
            ]

    def force(self, routed_BSLK: Tensor | None) -> None:
        """Choose these experts in forwards of ``[B, S]`` tokens, and in their backwards; ``None``: route freely."""
        self._routed_BSLK = routed_BSLK

    def chosen_TK(self, layer: int) -> Tensor | None:
        """The experts to choose in a layer, [T, K]; None where routing is free."""
        if self._routed_BSLK is None:
            return None
        return self._routed_BSLK[:, :, layer].flatten(0, 1).long()

    def check(self, layer: int, name: str, chosen_TK: Tensor) -> None:
        """Once for each layer: the experts that were asked for are those that compute."""
        wanted_TK = self.chosen_TK(layer)
        if wanted_TK is None or layer in self._checked:
            return
        known = wanted_TK != UNKNOWN
        if chosen_TK.shape != wanted_TK.shape or not torch.equal(chosen_TK[known].long(), wanted_TK[known]):
            raise RolloutError(
                f"`rollout.replay`: the router of {name} did not take the experts that were recorded: it does not "
                "choose by one topk over all of them. Set `rollout.replay: false` for this model."
            )
        self._checked.add(layer)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class _Forced(TorchFunctionMode):
    """While entered, ``topk`` over the experts of one layer gives the values at given indices."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self.chosen_TK: Tensor | None = None
        self.entered = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        chosen_TK = self.chosen_TK
        if func not in (torch.topk, torch.Tensor.topk) or chosen_TK is None:
            return result
        scores = args[0]
        # Routers with groups of experts call topk over groups too, in other shapes.
        over_experts = scores.shape == (len(chosen_TK), self._num_experts)
        if not over_experts or result.indices.shape != chosen_TK.shape:
            return result
        indices = torch.where(chosen_TK == UNKNOWN, result.indices, chosen_TK)
        return torch.return_types.topk((scores.gather(1, indices), indices))


class _Enter:
    def __init__(self, replay: RoutingReplay, layer: int, forced: _Forced) -> None:
        self._replay, self._layer, self._forced = replay, layer, forced

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        chosen_TK = self._replay.chosen_TK(self._layer)
        if module.training and chosen_TK is not None:
            self._forced.chosen_TK = chosen_TK
            self._forced.entered = True
            self._forced.__enter__()  # type: ignore[no-untyped-call]


class _Leave:
    def __init__(self, forced: _Forced) -> None:
        self._forced = forced

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._forced.entered:
            self._forced.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._forced.entered = False
            self._forced.chosen_TK = None


class _Check:
    def __init__(self, replay: RoutingReplay, layer: int, name: str) -> None:
        self._replay, self._layer, self._name = replay, layer, name

    def __call__(self, chosen_TK: Tensor) -> None:
        self._replay.check(self._layer, self._name, chosen_TK.reshape(-1, chosen_TK.shape[-1]))


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    found = list(experts_layers(model))
    if not found:
        raise ConfigError("`rollout.replay` replays the choice of experts, and this model has none. Leave it out.")
    return found


def _on_chosen(outer: nn.Module, own: nn.Module, action: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``action`` with the experts that each forward of an experts module gets."""
    position = list(inspect.signature(type(own).forward).parameters).index("top_k_index") - 1

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        action((kwargs["top_k_index"] if "top_k_index" in kwargs else args[position]).detach())

    return outer.register_forward_pre_hook(hook, with_kwargs=True)
