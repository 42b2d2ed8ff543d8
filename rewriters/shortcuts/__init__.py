"""Turn identity shortcuts into 1x1 convolutions before the analysis, and back after slimming."""

from rewriters.shortcuts.replacing import Replaced, Shortcut, replace_shortcuts
from rewriters.shortcuts.restoring import restore

__all__ = [
    "Replaced",
    "Shortcut",
    "replace_shortcuts",
    "restore",
]
