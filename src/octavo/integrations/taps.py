"""Hooks inside a compiled layer: what they would see is an output of the graph, and they run after it.

A hook in a graph is traced once, with the state that it had then. Two kinds of hook only read: transformers collects
router logits with one, octavo counts the tokens of experts with another (:class:`Observer`). For the time of the graph
they are taken off, a tap in their place keeps what they would get, and they are called afterwards in eager mode.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

# A number that no handle of torch has.
_ID = -1
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_SEEN_BEFORE, _SEEN_AFTER = "_octavo_seen_before", "_octavo_seen_after"

# How often a module got a child, in this process: with none since, no layer has a module that it did not have.
_registrations = 0
_counting: list[Any] = []


class Observer:
    """To be inherited by a forward pre-hook that reads its arguments and changes nothing: it may run after the layer
    did. It is registered ``with_kwargs``, and gets tensors without a gradient.
    """


class Taps:
    """The taps of one layer. A tap stays once it was needed: a recomputed forward must be the same graph."""

    def __init__(self) -> None:
        if not _counting:
            _counting.append(register_module_module_registration_hook(_count))
        self._modules: list[tuple[str, nn.Module]] = []
        self._hooks: list[Any] = []
        self.seen = -1
        """Changes when something may have been added inside the layer."""
        self._before: tuple[str, ...] = ()
        self._after: tuple[str, ...] = ()

    def modules(self, layer: nn.Module) -> tuple[Sequence[tuple[str, nn.Module]], bool]:
        """What is inside ``layer``, by name, and whether that was looked up anew: something may have been added."""
        if self.seen == _registrations:
            return self._modules, False
        self._modules, self.seen = list(layer.named_modules())[1:], _registrations
        # torch never replaces these dictionaries, and most are empty: one pass over them is all that a forward pays
        self._hooks = [
            hooks
            for _, module in self._modules
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        return self._modules, True

    def plan(self, layer: nn.Module) -> "Tapping | None":
        """The taps that a forward of ``layer`` needs now; ``None`` where a hook inside may change what it sees."""
        self.modules(layer)
        if not any(self._hooks):
            return self.tapping((self._before, self._after))
        hooked = self._hooked()
        if not all(_only_reads(module) for _, module in hooked):
            return None
        self._before = _union(self._before, (name for name, module in hooked if module._forward_pre_hooks))
        self._after = _union(self._after, (name for name, module in hooked if _collects_now(module)))
        return self.tapping((self._before, self._after))

    def tapping(self, names: "Names") -> "Tapping":
        """Taps before and after the modules of these ``names``, in place of all hooks that there are."""
        if not names[0] and not names[1] and not any(self._hooks):
            return Tapping(names, [])
        touched = {name: module for name, module in self._modules if name in (*names[0], *names[1])}
        touched.update(self._hooked())
        return Tapping(names, list(touched.items()))

    def _hooked(self) -> list[tuple[str, nn.Module]]:
        each = len(self._hooks) // max(1, len(self._modules))
        found = sorted({place // each for place, hooks in enumerate(self._hooks) if hooks})
        return [self._modules[place] for place in found]


Names = tuple[tuple[str, ...], tuple[str, ...]]


class Tapping:
    """The taps of one forward: placed around the graph, then the hooks get what they kept."""

    def __init__(self, names: Names, touched: list[tuple[str, nn.Module]]) -> None:
        self.names = names
        self._touched = touched

    def run(self, region: Callable[..., Any], layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """``region(layer, names, *args, **kwargs)`` with taps for hooks, then the hooks."""
        with self.placed():
            output = region(layer, self.names, *args, **kwargs)
        self.hand(self.take())
        return output

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside the block there are taps in place of hooks."""
        before, after = self.names
        kept = [(module, [getattr(module, hooks) for hooks in _HOOKS]) for _, module in self._touched]
        for name, module in self._touched:
            module._forward_pre_hooks = _TAP_BEFORE if name in before else _NONE
            module._forward_pre_hooks_with_kwargs = _TAP_BEFORE_WITH_KWARGS
            module._forward_hooks = _TAP_AFTER if name in after else _NONE
        try:
            yield
        finally:
            for module, hooks in kept:
                for attribute, value in zip(_HOOKS, hooks, strict=True):
                    setattr(module, attribute, value)

    def take(self) -> list[tuple[Any, Any]]:
        """What the taps kept since they were placed: for each module (its arguments, its output), ``None`` for none."""
        return [
            (module.__dict__.pop(_SEEN_BEFORE, None), module.__dict__.pop(_SEEN_AFTER, None))
            for _, module in self._touched
        ]

    def hand(self, taken: list[tuple[Any, Any]]) -> None:
        """Call the hooks with what the taps kept."""
        for (_, module), (seen, output) in zip(self._touched, taken, strict=True):
            if seen is not None:
                for hook in module._forward_pre_hooks.values():
                    hook(module, *seen)
            if output is not None:
                for hook in module._forward_hooks.values():
                    hook(module, (), output)


def _count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    global _registrations
    # transformers' models take a slice of their layers in each forward, which is a new list of them
    if not (isinstance(module, nn.ModuleList) and isinstance(submodule, GradientCheckpointingLayer)):
        _registrations += 1


def _only_reads(module: nn.Module) -> bool:
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    observed = all(isinstance(hook, Observer) for hook in module._forward_pre_hooks.values())
    return observed and all(is_collector(hook) for hook in module._forward_hooks.values())


def is_collector(hook: Callable[..., Any]) -> bool:
    """Whether ``hook`` is transformers' own that collects outputs; it is a closure without a public name."""
    collector = output_capturing.install_output_capuring_hook.__qualname__ + ".<locals>.output_capturing_hook"
    return (hook.__module__, getattr(hook, "__qualname__", "")) == (output_capturing.__name__, collector)


def _collects_now(module: nn.Module) -> bool:
    """Whether a collector on ``module`` would keep something in this forward."""
    wanted = output_capturing._active_collector.get() if module._forward_hooks else None
    hooks = module._forward_hooks.values()
    return wanted is not None and any(inspect.getclosurevars(hook).nonlocals["key"] in wanted for hook in hooks)


def _union(names: tuple[str, ...], more: Iterable[str]) -> tuple[str, ...]:
    return (*names, *(name for name in more if name not in names))


def _tap_before(module: nn.Module, args: Any, kwargs: Any) -> None:
    detached = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    setattr(module, _SEEN_BEFORE, detached)


def _tap_after(module: nn.Module, args: Any, output: Any) -> None:
    setattr(module, _SEEN_AFTER, output)


# The same objects for every module, so that one graph serves all layers of a kind.
_NONE: OrderedDict[int, Callable[..., Any]] = OrderedDict()
_TAP_BEFORE: OrderedDict[int, Callable[..., Any]] = OrderedDict({_ID: _tap_before})
_TAP_BEFORE_WITH_KWARGS: OrderedDict[int, bool] = OrderedDict({_ID: True})
_TAP_AFTER: OrderedDict[int, Callable[..., Any]] = OrderedDict({_ID: _tap_after})
