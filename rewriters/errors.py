"""The errors that both packages raise. Each says what is wrong, where, and what to do about it."""

from __future__ import annotations

LONGEST = 4000
"""Characters of each part of a message; what is longer loses its middle."""


class AutogateError(RuntimeError):
    """A model, an argument or a state that autogate cannot work with.

    Args:
        cause: what is wrong.
        where: module path (and op) where it is; empty for the call as a whole.
        remedy: what the caller can do about it.

    The model is as it was before the call that raised.
    """

    def __init__(self, cause: str, *, where: str = "", remedy: str = ""):
        self.cause, self.where, self.remedy = _shortened(cause), _shortened(where), _shortened(remedy)
        message = f"{self.where}: {self.cause}" if where else self.cause
        super().__init__(f"{message} {self.remedy}".rstrip())


def _shortened(text: str) -> str:
    """A text without its middle, if it is longer than anyone reads: the repr of a user's object, say."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} [...] {text[-500:]}"


class CaptureError(AutogateError):
    """The model's forward can't be captured: its control flow depends on the values of tensors, for instance."""


class TraceError(AutogateError):
    """torch.fx can't trace a module's forward."""


class SurgeryError(AutogateError):
    """A module can't be rewritten for the channels that are left. `finalize` raises it."""


class VerificationError(AutogateError):
    """The slim model's outputs differ from the gated model's by more than `rewriters.outputs.TOLERANCE`."""
