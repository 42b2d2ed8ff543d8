"""Turn identity shortcuts into 1x1 convolutions before the analysis, and back after slimming."""

from rewriters.shortcuts.replacing import Shortcut, replace_shortcuts
from rewriters.shortcuts.restoring import restore

__all__ = [
    "Shortcut",
    "replace_shortcuts",
    "restore",
]
