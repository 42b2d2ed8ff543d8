"""Forwards may keep things on their modules (caches, counters); what they keep of stand-ins must not stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from rewriters.journal import Journal

_OWN_TO_TORCH = frozenset(nn.Module().__dict__)


@contextlib.contextmanager
def attributes_preserved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, forwards run on fake tensors or proxies; afterwards the modules' plain attributes are as before.

    That goes for what an attribute is and, where it is a dict, a list or a set, for what it holds. Parameters,
    buffers, children and hooks are not looked at.
    """
    before = [(module.__dict__, dict(_plain(module))) for module in modules]
    held = [(value, type(value)(value)) for _, plain in before for value in plain.values() if _holds(value)]
    try:
        yield
    finally:
        for attributes, plain in before:
            added = [name for name in attributes if name not in _OWN_TO_TORCH and name not in plain]
            for name in added:
                del attributes[name]
            attributes.update({name: value for name, value in plain.items() if attributes.get(name) is not value})
        for container, content in held:
            _restore(container, content)


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in module.__dict__.items() if name not in _OWN_TO_TORCH)


def _holds(value: Any) -> bool:
    return type(value) in (dict, list, set)


def _restore(container: Any, content: Any) -> None:
    """Gives a container, which others may hold too, its content back."""
    same = len(container) == len(content) and all(
        a is b for a, b in zip(_entries(container), _entries(content), strict=True)
    )
    if same:
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _entries(container: Any) -> Iterable[Any]:
    return (part for item in container.items() for part in item) if isinstance(container, dict) else container


def drop_caches(modules: Iterable[nn.Module], journal: Journal) -> None:
    """Empty what forwards have kept of earlier calls, every change noted in `journal`.

    Such a cache (a bias looked up once in eval mode) hides what it was computed from, and holds sizes as they
    were. It is a plain attribute, a dict of tensors none of which is a parameter.
    """
    for module in modules:
        for name, value in list(_plain(module)):
            if type(value) is dict and value and all(_is_computed(item) for item in value.values()):
                journal.set_attribute(module, name, {})


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Inside, forwards have kept nothing of earlier calls."""
    journal = Journal()
    drop_caches(model.modules(), journal)
    try:
        yield
    finally:
        journal.undo()
