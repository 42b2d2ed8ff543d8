"""What the commands share: consoles, errors told in a line, models looked up by name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import timm
import torch
import typer
from rich.console import Console
from torch import nn

from autogate.files import TimmBuild, build_with_timm
from rewriters import AutogateError

console = Console()
errors = Console(stderr=True)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

F = TypeVar("F", bound=Callable[..., Any])


def one_line_errors(command: F) -> F:
    """A command that tells an error in a line and exits with 1, and raises it where called with `debug`."""

    @functools.wraps(command)
    def told(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            what = str(error) if isinstance(error, (AutogateError, OSError)) else f"{type(error).__name__}: {error}"
            errors.print("[red]error:[/]", end=" ")
            errors.print(what, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return told  # type: ignore[return-value]


def timm_model(name: str, classes: int | None = None) -> nn.Module:
    """The timm model of that name, its weights random; a name that timm doesn't know is wrong usage."""
    return build_with_timm(TimmBuild(timm_name(name), {} if classes is None else {"num_classes": classes}))


def timm_name(name: str) -> str:
    """A name that timm has a model of; another is wrong usage."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() has their names."
        raise typer.BadParameter(f"timm has no model {name!r}. {hint}", param_hint="MODEL")
    return name


def written_model(path: Path) -> Path:
    """A file that is there; one that isn't is wrong usage."""
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}.", param_hint="SLIM")
    return path


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings of what is done within are told in a line each."""

    def tell(message: Warning | str, *_: Any) -> None:
        errors.print("[yellow]warning:[/]", end=" ")
        errors.print(str(message), markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell  # type: ignore[assignment]
        yield


def images(model: nn.Module, side: int | None) -> torch.Tensor | None:
    """A batch of two square images for `prepare`, None to leave the size to the model."""
    if side is None:
        return None
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return torch.randn(2, first.in_channels if first is not None else 3, side, side)
