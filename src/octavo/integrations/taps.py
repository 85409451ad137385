"""Hooks inside a compiled layer: what they would see is an output of the graph, and they run after it.

A hook in a graph is traced once, with the state that it had then. Two kinds of hook only read: transformers collects
router logits with one, octavo counts the tokens of experts with another (:class:`Observer`). For the time of the graph
they are taken off, a tap in their place keeps what they would get, and they are called afterwards in eager mode.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_map_only
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
        self._seen = -1
        self._before: tuple[str, ...] = ()
        self._after: tuple[str, ...] = ()

    def modules(self, layer: nn.Module) -> tuple[Sequence[tuple[str, nn.Module]], bool]:
        """What is inside ``layer``, by name, and whether that was looked up anew: something may have been added."""
        if self._seen == _registrations:
            return self._modules, False
        self._modules, self._seen = list(layer.named_modules())[1:], _registrations
        return self._modules, True

    def run(self, layer: nn.Module, region: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
        """``region(layer, taps, *args, **kwargs)`` with taps for hooks, then the hooks: (whether it ran, its output).

        It does not run where a hook inside ``layer`` is not known to change nothing.
        """
        modules, _ = self.modules(layer)
        hooked = [(name, module) for name, module in modules if _has_hooks(module)]
        if not all(_only_reads(module) for _, module in hooked):
            return False, None
        self._before = _union(self._before, (name for name, module in hooked if module._forward_pre_hooks))
        self._after = _union(self._after, (name for name, module in hooked if _collects_now(module)))
        if not hooked and not self._before and not self._after:
            return True, region(layer, (), *args, **kwargs)
        touched = {name: module for name, module in modules if name in (*self._before, *self._after)}
        touched.update(hooked)
        kept = [(module, [getattr(module, hooks) for hooks in _HOOKS]) for module in touched.values()]
        for name, module in touched.items():
            module._forward_pre_hooks = _TAP_BEFORE if name in self._before else _NONE
            module._forward_pre_hooks_with_kwargs = _TAP_BEFORE_WITH_KWARGS
            module._forward_hooks = _TAP_AFTER if name in self._after else _NONE
        try:
            output = region(layer, (self._before, self._after), *args, **kwargs)
        finally:
            for module, hooks in kept:
                for attribute, value in zip(_HOOKS, hooks, strict=True):
                    setattr(module, attribute, value)
        for module in touched.values():
            _replay(module)
        return True, output


def _count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    global _registrations
    _registrations += 1


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _only_reads(module: nn.Module) -> bool:
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    observed = all(isinstance(hook, Observer) for hook in module._forward_pre_hooks.values())
    return observed and all(_is_collector(hook) for hook in module._forward_hooks.values())


def _is_collector(hook: Callable[..., Any]) -> bool:
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


def _replay(module: nn.Module) -> None:
    """Call the hooks of ``module`` with what its taps kept."""
    if seen := module.__dict__.pop(_SEEN_BEFORE, None):
        for hook in module._forward_pre_hooks.values():
            hook(module, *seen)
    if (output := module.__dict__.pop(_SEEN_AFTER, None)) is not None:
        for hook in module._forward_hooks.values():
            hook(module, (), output)
