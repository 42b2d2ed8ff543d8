"""What stands in a container in place of a module that was removed."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from rewriters.errors import SurgeryError


class Removed(nn.Module):
    """Keeps a module's place, so that indices, names and the number of modules in its container stay the same.

    Args:
        path: the module that stood here.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SurgeryError(
            "this module was removed, because none of its channels was left.",
            where=self.path,
            remedy="The model doesn't call it any more. Don't call it from elsewhere either, or keep its channels with "
            "`prepare(..., ignore=[...])`.",
        )

    def extra_repr(self) -> str:
        return self.path


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Modules that are asked for their length, and for what is in them by index or name."""
