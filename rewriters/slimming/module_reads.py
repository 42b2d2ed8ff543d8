"""Notice which code reads modules that are to be removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any
from unittest import mock

from torch import nn

from rewriters.outputs import run_eval, run_train
from rewriters.recording import RunningModules, leaves_of

_ACCESSORS = (
    (nn.ModuleList, "__getitem__"), (nn.ModuleList, "__iter__"), (nn.Sequential, "__getitem__"),
    (nn.Sequential, "__iter__"), (nn.ModuleDict, "__getitem__"), (nn.ModuleDict, "values"), (nn.ModuleDict, "items"),
)  # fmt: skip
"""What containers of modules are read by. Their length doesn't count, as a removed module's place stays."""


def read_elsewhere(
    model: nn.Module, gone: Collection[str], rewritten: Collection[str], args: tuple[Any, ...],
    kwargs: Mapping[str, Any], in_train_mode: bool,
) -> set[str]:  # fmt: skip
    """Those of the modules in `gone` that code reads which isn't rewritten.

    `nn.TransformerEncoder` reads `batch_first` from its first layer's attention.

    Args:
        model: runs on the example inputs.
        gone: paths of the modules to remove.
        rewritten: paths of the modules whose forwards won't read them any more.
        args: example inputs by position.
        kwargs: example inputs by name.
        in_train_mode: whether to run it in train mode too, if it can.
    """
    paths = {module: path for path, module in model.named_modules() if path in gone}
    running, read = RunningModules(model), set[str]()

    def note(values: Any) -> None:
        if running.running and running.running[-1] not in rewritten:
            read.update(paths[leaf] for leaf in leaves_of(values) if isinstance(leaf, nn.Module) and leaf in paths)

    with running.followed(), _reads_noted(note):
        run_eval(model, args, kwargs)
        if in_train_mode:
            with contextlib.suppress(Exception):  # it may want targets then
                run_train(model, args, kwargs)
    return read


@contextlib.contextmanager
def _reads_noted(note: Callable[[Any], None]) -> Iterator[None]:
    """Inside, `note` is called with the modules that are read from other modules."""

    def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            value = plain(*args, **kwargs)
            if isinstance(value, Iterator):
                found = list(value)
                note(found)
                return iter(found)
            note(list(value) if isinstance(value, (KeysView, ValuesView, ItemsView)) else value)
            return value

        return read

    with contextlib.ExitStack() as patched:
        for owner, name in ((nn.Module, "__getattr__"), *_ACCESSORS):
            patched.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
        yield
