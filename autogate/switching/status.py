"""What subnets a model has, as plain data and as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from autogate.switching.bank import Subnets
from autogate.switching.latency import known_latencies
from autogate.switching.structure import Structure


@dataclass(frozen=True)
class Row:
    """One subnet of a switchable model.

    Attributes:
        structure: its channels and shares.
        active: whether the next forward runs it.
        own_bytes: memory of the tensors that it has for itself.
        kept_bytes: memory of the slices that are kept for it now; views of the model's own tensors take none.
        seconds: of a forward over one sample on this machine; None if it was not timed.
        calibrated: whether its batch norms have statistics of its own; False for a width between subnets that was
            neither recalibrated nor trained.
    """

    structure: Structure
    active: bool
    own_bytes: int
    kept_bytes: int
    seconds: float | None
    calibrated: bool


@dataclass(frozen=True)
class Status:
    """The subnets of a model: those that it was fused of, the smallest first, then the widths that were made since.

    Print it for a table.
    """

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return table_of([row.structure for row in self.rows], self.rows)


def status_of(model: nn.Module, subnets: Subnets) -> Status:
    """The status of a model that has these subnets."""
    timed, rows = known_latencies(model, subnets), []
    for number, (subnet, tree) in enumerate(zip(subnets.subnets, subnets.children(), strict=True)):
        own = sum(tensor.nbytes for tensor in (*tree.parameters(), *tree.buffers()))
        active = number == subnets.active
        rows.append(Row(subnet.structure, active, own, subnet.kept_bytes, timed.get(number), subnet.calibrated))
    return Status(tuple(rows))


def table_of(structures: Sequence[Structure], rows: Sequence[Row] = ()) -> str:
    """A table with a line for each structure, and what is known of the subnets that have them."""
    more = ("active", "own", "kept", "latency", "norms") if rows else ()
    table = Table("subnet", *structures[0].shares, *more)
    for column in table.columns[1:]:
        column.justify = "right"
    for number, one in enumerate(structures):
        cells = _cells(rows[number]) if rows else ()
        table.add_row(one.name, *(f"{share:.1%}" for share in one.shares.values()), *cells)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    return (
        "*" if row.active else "",
        f"{row.own_bytes / 2**20:.1f} MB",
        f"{row.kept_bytes / 2**20:.1f} MB",
        "" if row.seconds is None else f"{1000 * row.seconds:.1f} ms",
        "" if row.calibrated else "not recalibrated",
    )
