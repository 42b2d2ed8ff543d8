"""Models that timm doesn't build, named on the command line as `package.module:function`.

Only the command line names code to import. A run's folder records the name, and is never asked what to import.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from autogate.files import load, read_file
from autogate.training import ModelFunction, Network, build_network, names_function

FunctionOption = Annotated[
    str | None, typer.Option("--model", help="package.module:function, if that builds the dense model.")
]


def dense_by(name: str, path: Path) -> nn.Module:
    """The dense model of a slim file, built by the function with this name.

    Raises:
        AutogateError: the file can't be read, or the function fails.
    """
    function, known = model_function(name, "--model"), read_file(path)[0].data_config
    if function is None:
        raise typer.BadParameter(f"{name!r} is not package.module:function.", param_hint="--model")
    classes = None if known is None or known.label_names is None else len(known.label_names)
    return build_network(Network(name), classes, function=function)


def slim_model(path: Path, name: str | None) -> nn.Module:
    """The slim model of a file. The function with this name builds its dense model; timm does if it is None."""
    return load(path) if name is None else load(path, dense_by(name, path))


def model_function(name: str | None, hint: str = "MODEL") -> ModelFunction | None:
    """The function with this name, imported as Python would from the current folder; None if it is no such name.

    A missing module or function is wrong usage.
    """
    if name is None or not names_function(name):
        return None
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the installed command starts with the folder of its script instead
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise typer.BadParameter(f"{path} can't be imported: {error}.", param_hint=hint) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        near = difflib.get_close_matches(attribute, [one for one in dir(module) if callable(getattr(module, one))])
        told = f" Did you mean {' or '.join(near)}?" if near else ""
        raise typer.BadParameter(f"{path} has no function {attribute!r}.{told}", param_hint=hint)
    return found  # type: ignore[no-any-return]
