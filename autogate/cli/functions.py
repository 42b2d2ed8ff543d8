"""Models that timm doesn't build, named on the command line as `package.module:function`.

Only the command line names code to import. A run's folder records the name, and is never asked what to import.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Annotated

import typer

from autogate.training import ModelFunction, names_function

FunctionOption = Annotated[
    str | None, typer.Option("--model", help="package.module:function, if the run was started with one.")
]


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
