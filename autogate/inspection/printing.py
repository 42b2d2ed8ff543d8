"""Tables of rich as text, and in notebooks."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


class Printed(ABC):
    """What prints as tables, and shows them in notebooks."""

    @abstractmethod
    def tables(self) -> Sequence[Table]:
        """What is printed; tables without rows are left out."""

    def __str__(self) -> str:
        return self._printed().export_text().rstrip()

    def _repr_html_(self) -> str:
        """For notebooks."""
        return self._printed().export_html(code_format='<pre style="line-height: 1.2">{code}</pre>', inline_styles=True)

    def _printed(self) -> Console:
        console = Console(width=110, record=True, file=io.StringIO())
        for table in self.tables():
            if table.row_count:
                console.print(table)
        return console


def short(number: float) -> str:
    """A number with a unit prefix: 4.09 G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"
