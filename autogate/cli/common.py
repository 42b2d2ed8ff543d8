"""What the commands share: consoles, errors and warnings on one line, models by name or file.

An error is printed on one line and the exit code is 1; with `--debug` it is raised. Wrong usage exits with 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import timm
import torch
import typer
from rich.console import Console
from torch import nn

from rewriters import AutogateError

console = Console()
errors = Console(stderr=True)

HUBS = ("hf_hub:", "hf-hub:", "local-dir:")
"""Beginnings of names that timm looks up elsewhere than in its own list."""

FILES = (".safetensors", ".pt", ".pth", ".bin", ".onnx")
"""Endings by which a name is that of a file."""

OPTIONS = {
    "`prepare(..., ignore=[...])`": "--ignore MODULE",
    "`ignore`": "--ignore",
    "`shortcuts`": "--shortcuts",
    "Pass the dense model: autogate.load(path, model=...).": "Name what builds it: --model package.module:function.",
    "Pass example_inputs, for instance torch.randn(2, 3, 224, 224).": "Give --image-size.",
}
"""What messages advise in Python, and how the same is said on the command line."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

F = TypeVar("F", bound=Callable[..., Any])


def one_line_errors(command: F) -> F:
    """Print a command's errors on one line and exit with 1; with `--debug`, raise them."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            what = str(error) if isinstance(error, (AutogateError, OSError)) else f"{type(error).__name__}: {error}"
            for in_python, option in OPTIONS.items():
                what = what.replace(in_python, option)
            errors.print("[red]error:[/]", end=" ")
            errors.print(what, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def timm_name(name: str) -> str:
    """Check that timm has a model with this name. An unknown name is wrong usage."""
    if name.startswith(HUBS):  # timm looks these up when it builds the model
        return name
    if Path(name).suffix in FILES or os.sep in name:
        raise typer.BadParameter(f"there is no file {name}.", param_hint="MODEL")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists all names."
        raise typer.BadParameter(f"timm has no model {name!r}. {hint}", param_hint="MODEL")
    return name


def written_model(path: Path) -> Path:
    """Check that a file exists. A missing file is wrong usage."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}.", param_hint="SLIM")
    return path


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each warning raised within on one line."""

    def tell(message: Warning | str, *_: Any) -> None:
        errors.print("[yellow]warning:[/]", end=" ")
        errors.print(str(message), markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell  # type: ignore[assignment]
        yield


def images(model: nn.Module, side: int | None) -> torch.Tensor | None:
    """A batch of two square images for `prepare`; None if `side` is None, so that the model's own size is used."""
    if side is None:
        return None
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return torch.randn(2, first.in_channels if first is not None else 3, side, side)
