"""The command line: `autogate --help`.

Each command is a file that reads options and prints tables. What it prints comes as plain values from
`autogate.inspection` (inspect, summary, bench), `autogate.files` (export), `autogate.demo`, `autogate.training` (train,
prune, finalize) and `autogate.reporting` (report).

A command's file is imported when the command is called: PyTorch and timm take seconds, which the list of commands
doesn't need.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise ImportError("the command line needs typer: pip install 'autogate[cli]'") from error

from autogate.version import __version__

COMMANDS = {
    "demo": "Train, slim and check a small timm network on scikit-learn's handwritten digits, in a minute.",
    "inspect": "Show which channels of a model could be removed, which are pinned and why, and what a budget leaves.",
    "summary": "Show what is left of a slim model: widths before and after, layer by layer, and what was removed.",
    "train": "Fine-tune a timm model with gates and make it slim. Start from a trained model.",
    "prune": "Slim a timm model at once: the channels that score lowest by a criterion go. Nothing is trained.",
    "finalize": "Make the slim model of a run from its last checkpoint, however far training is.",
    "report": "Write an HTML page about a run: what is left and accuracy over time, channels of each layer, gates.",
    "validate": "Measure the accuracy of a slim model on the validation images of a folder.",
    "bench": "Measure latency and throughput of a slim model and of its dense model.",
    "export": "Export a slim model to ONNX or torch.export, for batches of any size.",
}
"""The commands, each in the file of its name, with the first line of its help."""


class _Commands(TyperGroup):
    """Lists stand-ins, and imports a command when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        if found is None:
            return name, found, rest
        function = getattr(importlib.import_module(f"autogate.cli.{found.name}"), found.name or "")
        return name, _command(found.name or "", function), _repeated(rest, getattr(function, "several", ()))


def _command(name: str, function: Any) -> Any:
    """The command with this name."""
    only = typer.Typer(add_completion=False, rich_markup_mode="rich")
    only.command(name)(function)
    return typer.main.get_command(only)


def _repeated(words: list[str], options: tuple[str, ...]) -> list[str]:
    """The words of a command line, with an option before each of its numbers.

    >>> _repeated(["m", "--subnets", "0.1", "0.5", "--amp"], ("--subnets",))
    ['m', '--subnets', '0.1', '--subnets', '0.5', '--amp']
    """
    found: list[str] = []
    option = ""
    for word in words:
        is_number = word.replace(".", "", 1).isdigit()
        if is_number and option and found[-1] != option:
            found.append(option)
        option = word if word in options else option if is_number else ""
        found.append(word)
    return found


def _print_version(asked: bool) -> None:
    if asked:
        print(f"autogate {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="rich"
)  # fmt: skip


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Learn which channels a PyTorch model can do without, then make the model physically smaller.

    Exit codes: 0 success; 1 error; 2 wrong usage; 130 or 143 a run was stopped by Ctrl-C or SIGTERM and can be resumed.
    """


def _stand_in() -> None:
    """Replaced by the command of the same name when it is called."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_stand_in)

__all__ = ["app"]
