"""Undo what a forward leaves on its modules: caches, counters, hooks, replaced buffers, random numbers.

Forwards leave things behind when they are recorded: values that they looked up (LeViT's biases, a
`functools.lru_cache`), hooks (Hugging Face collects stages by them). All of it is undone, because it would hold fake
tensors. Caches that earlier calls left are set aside for the analysis, which they would hide parameters from, and a
slim model starts without them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewriters.recording.module_walk import modules_of
from rewriters.recording.pytrees import tensors_of
from rewriters.undo_log import UndoLog

_OWN_TO_TORCH = frozenset(nn.Module().__dict__)
_GENERATOR = type(torch.default_generator)  # isinstance asks a metaclass written in Python
_SIMPLE = frozenset((bool, int, float, str, tuple, type(None)))
_UNCACHED = _SIMPLE | {dict, list, set, OrderedDict, nn.Parameter, Tensor}
_NO_STATE = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)
_ABSENT = object()
_REGISTRIES = frozenset(
    ("_parameters", "_buffers",
     *(name for name, value in nn.Module().__dict__.items() if "hooks" in name and isinstance(value, dict)))
)  # fmt: skip
"""The dicts in which `nn.Module` keeps tensors and hooks; torch.jit's modules have others."""


Change = tuple[nn.Module, str, bool, Any]
"""A module, the name of an attribute, whether it was missing, and what it was."""


@contextlib.contextmanager
def attributes_preserved(modules: Iterable[nn.Module]) -> Iterator[list[Change]]:
    """Inside, forwards run on fake tensors or proxies; afterwards the modules' plain attributes are as before.

    This includes the contents of an attribute that is a dict, a list, a set or an object of the user's. What
    `functools.lru_cache` keeps is dropped, hooks that forwards registered are removed, and buffers that they replaced
    are put back. Children are not visited.

    Yields:
        A list, filled afterwards, of the changed attributes of those modules on which a forward keeps tensors in an
        attribute that was None or missing.
    """
    modules = list(modules)
    kept: list[Change] = []
    before = [(module, module.__dict__, module.__dict__.copy()) for module in modules]
    containers = [container for *_, plain in before for container in _containers(plain)]
    filled = [(one, type(one)(one)) for one in containers if one]
    empty = [one for one in containers if not one]
    try:
        yield kept
    finally:
        _clear_functions(modules)
        for module, attributes, plain in before:
            if [*attributes] == [*plain] and all(map(operator.is_, attributes.values(), plain.values())):
                continue
            kept += _changes(module, plain)
            for name in attributes.keys() - _OWN_TO_TORCH - plain.keys():
                del attributes[name]
            for name in plain.keys() - _OWN_TO_TORCH:
                if attributes.get(name, _ABSENT) is not plain[name]:
                    attributes[name] = plain[name]
        for container, content in filled:
            _restore(container, content)
        for container in empty:
            if container:
                container.clear()


def _changes(module: nn.Module, before: Mapping[str, Any]) -> list[Change]:
    """What has changed on a module that keeps tensors where it had none; only what was None, a flag, a number ..."""
    now = _plain(module)
    if not any(before.get(name) is None and tensors_of(value) for name, value in now):
        return []
    changed = [name for name, value in now if before.get(name, _ABSENT) is not value]
    return [
        (module, name, name not in before, before.get(name)) for name in changed if type(before.get(name)) in _SIMPLE
    ]


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in module.__dict__.items() if name not in _OWN_TO_TORCH]


def _clear_functions(modules: Iterable[nn.Module]) -> None:
    """Empty the `functools.lru_cache` of functions on modules, on their classes and in the classes' Python modules."""
    values = (value for module in modules for value in module.__dict__.values() if type(value) not in _UNCACHED)
    for function in (function for value in values for function in _cached_in(value)):
        function.cache_clear()
    for cls in {cls for kind in set(map(type, modules)) for cls in kind.__mro__}:
        for function in _cached_beside(cls):
            function.cache_clear()


@functools.cache
def _cached_beside(cls: type) -> tuple[Any, ...]:
    if cls.__module__.partition(".")[0] in ("torch", "builtins"):
        return ()
    values = (*vars(cls).values(), *vars(sys.modules.get(cls.__module__, cls)).values())
    return tuple({id(function): function for value in values for function in _cached_in(value)}.values())


def _cached_in(value: Any) -> Iterator[Any]:
    """The function itself, or the one that it wraps, if that has an `lru_cache`."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod, types.MethodType)) else value
    cells = getattr(function, "__closure__", None) or () if isinstance(function, types.FunctionType) else ()
    for found in (function, *(cell.cell_contents for cell in cells if _is_filled(cell))):
        if isinstance(found, functools._lru_cache_wrapper):
            yield found


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the variable isn't defined yet
        return False


def _containers(attributes: Mapping[str, Any]) -> list[Any]:
    """A module's registries, and what `_held_in` finds in its plain attributes."""
    found: list[Any] = [value for name in _REGISTRIES if isinstance(value := attributes.get(name), dict)]
    for name in attributes.keys() - _OWN_TO_TORCH:
        value = attributes[name]
        if type(value) not in _SIMPLE and (held := _held_in(value)) is not None:
            found.append(held)
    return found


def _held_in(value: Any) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """The container that an attribute's value is, or the `__dict__` of an object that is not a module."""
    if type(value) in (dict, list, set):
        return value
    return None if isinstance(value, _NO_STATE) else getattr(value, "__dict__", None)


def _restore(container: Any, content: Any) -> None:
    """Restore a container's content in place, because others may hold the container too."""
    if len(container) == len(content) and all(map(operator.is_, _entries(container), _entries(content))):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _entries(container: Any) -> Iterable[Any]:
    return itertools.chain(container, container.values()) if isinstance(container, dict) else container


@contextlib.contextmanager
def random_numbers_kept(devices: Collection[torch.device] = ()) -> Iterator[None]:
    """Restore random number generators afterwards: Python's, NumPy's, and PyTorch's on the CPU and on `devices`."""
    of_python, of_numpy = random_states()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextlib.contextmanager
def generators_kept(model: nn.Module, *inputs: Any) -> Iterator[Callable[[], bool]]:
    """Restore afterwards all random number generators that a model may draw from, those that its modules keep too.

    Args:
        model: the model.
        inputs: what it runs on.

    Yields:
        A function that says whether numbers were drawn from one of PyTorch's generators since the beginning.
    """
    devices: set[torch.device] = set()
    if torch.cuda.is_initialized():  # no tensor is on a GPU otherwise
        tensors = [*model.parameters(), *model.buffers(), *tensors_of(inputs)]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    values = [vars(module).values() for module in modules_of(model)]
    own = [value for held in values if _GENERATOR in map(type, held) for value in held if type(value) is _GENERATOR]
    own += [torch.default_generator, *(torch.cuda.default_generators[device.index] for device in devices)]
    with random_numbers_kept(devices):
        before = [(generator, generator.get_state()) for generator in own]
        try:
            yield lambda: any(not torch.equal(generator.get_state(), state) for generator, state in before)
        finally:
            for generator, state in before:
                generator.set_state(state)


def drawn_since(before: tuple[Any, Any]) -> bool:
    """Whether Python's or NumPy's random numbers have been drawn since `random_states` returned `before`."""
    of_python, of_numpy = before
    now_python, now_numpy = random_states()
    return of_python != now_python or any(map(_differ, of_numpy, now_numpy))


def random_states() -> tuple[Any, Any]:
    """States of Python's and NumPy's random number generators."""
    return random.getstate(), np.random.get_state()


def _differ(one: Any, other: Any) -> bool:
    return not np.array_equal(one, other)


def with_caches(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that may keep something between calls: they have a plain dict, or a cached function."""
    return [
        module for module in modules
        if any(type(value) is dict or any(_cached_in(value)) for _, value in _plain(module))
        or any(_cached_beside(cls) for cls in type(module).__mro__)
    ]  # fmt: skip


def drop_caches(modules: Iterable[nn.Module], undo_log: UndoLog) -> None:
    """Empty the caches that forwards filled in earlier calls, and note every change in `undo_log`.

    Such a cache (a bias looked up once in eval mode) hides what it was computed from, and has the old sizes. It is a
    plain attribute: a dict of tensors, none of which is a parameter. Entries of a `functools.lru_cache` are dropped
    too, and these are not restored.
    """
    modules = list(modules)
    _clear_functions(modules)
    for module in modules:
        for name, value in _plain(module):
            if type(value) is dict and value and all(_is_computed(item) for item in value.values()):
                undo_log.set_attribute(module, name, {})


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Inside, the caches of earlier calls are empty."""
    undo_log = UndoLog()
    drop_caches(modules_of(model), undo_log)
    try:
        yield
    finally:
        undo_log.undo()


def set_modes(model: nn.Module, modes: Mapping[nn.Module, bool] | bool) -> dict[nn.Module, bool]:
    """Set the mode (train or eval) of all modules, or of these; returns the modes before, to set them again."""
    wanted = dict.fromkeys(modules_of(model), modes) if isinstance(modes, bool) else modes
    before = {module: module.training for module in wanted}
    for module, mode in before.items():
        if mode is wanted[module]:
            continue
        if "training" in module.__dict__:  # a tenth of the time of `nn.Module.__setattr__`
            module.__dict__["training"] = wanted[module]
        else:  # torch.jit keeps it elsewhere
            module.training = wanted[module]
    return before


KNOWN_IN_TRAIN_MODE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
"""Layers that do nothing to channels in train mode that they don't do in eval mode, but draw and count."""


def set_train_mode(model: nn.Module) -> dict[nn.Module, bool]:
    """Set every module to train mode except torch's own dropouts and batch norms; returns the modes before.

    So that two train forwards can be compared: a dropout draws other numbers for a tensor of another shape, and a batch
    norm over a few equal samples magnifies rounding.
    """
    return set_modes(model, {module: not isinstance(module, KNOWN_IN_TRAIN_MODE) for module in modules_of(model)})
