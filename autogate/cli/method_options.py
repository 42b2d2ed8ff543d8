"""The options of `autogate train` that name a method and its settings: one for each field."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from autogate.methods import METHODS

F = TypeVar("F", bound=Callable[..., Any])

_OF_THE_RUN = {"epochs", "steps_per_epoch"}
"""Fields that no option sets: a run has a length of its own."""

_PANEL = "Method"


def fields_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method that have options, by name."""
    return {field.name: field for field in dataclasses.fields(METHODS[name]) if field.name not in _OF_THE_RUN}


def with_method_options(command: F) -> F:
    """Give a command an option for each field of each method. It takes them as keywords that it doesn't name."""
    known: dict[str, list[str]] = {}
    for method in METHODS:
        for name in fields_of(method):
            known.setdefault(name, []).append(method)
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = []
    for name, methods in known.items():
        field = fields_of(methods[0])[name]
        of = "" if len(methods) == len(METHODS) else f" Only for {methods[0]}."
        default = "" if field.default is None else f" Default: {field.default}."
        option = typer.Option(help=f"As `{METHODS[methods[0]].__name__}.{name}`.{default}{of}", rich_help_panel=_PANEL)
        kind = Annotated[_type(field) | None, option]  # type: ignore[valid-type]
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command


def asked_method(asked: Mapping[str, Any]) -> str:
    """The method that the options ask for, as text (see `autogate.methods.method_of`)."""
    name = asked["method"]
    if name not in METHODS:
        raise typer.BadParameter(f"{name!r} is unknown; it is {' or '.join(METHODS)}.", param_hint="--method")
    own = fields_of(name)
    for other in METHODS:
        for field in fields_of(other):
            if field not in own and asked.get(field) is not None:
                raise typer.BadParameter(f"it is a setting of {other}.", param_hint=f"--{field.replace('_', '-')}")
    return repr(METHODS[name](**{field: asked[field] for field in own if asked.get(field) is not None}))


def _type(field: dataclasses.Field[Any]) -> type:
    """The type of an option for a field; annotations are text, such as "float | None"."""
    return {"int": int, "float": float, "bool": bool}.get(str(field.type).removesuffix(" | None"), str)


def read_limits(given: list[str]) -> dict[str, float | tuple[float, float]]:
    """Limits as the command line has them: NAME=LEAST or NAME=LEAST:MOST."""
    limits: dict[str, float | tuple[float, float]] = {}
    for text in given:
        name, _, bounds = text.rpartition("=")
        try:
            numbers = [float(bound) for bound in bounds.split(":")]
            limits[name] = numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
        except (ValueError, IndexError):
            name = ""
        if not name:
            raise typer.BadParameter(f"{text!r} is not NAME=LEAST or NAME=LEAST:MOST.", param_hint="--limit")
    return limits
