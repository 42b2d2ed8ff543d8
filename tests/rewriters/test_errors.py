"""Messages of errors."""

from rewriters import AutogateError
from rewriters.errors import LONGEST


def test_a_message_that_is_too_long_loses_its_middle():
    error = AutogateError("begin" + "x" * 10**7 + "end.", where="layer", remedy="Do this.")
    assert len(str(error)) < LONGEST + 100
    assert str(error).startswith("layer: beginx") and str(error).endswith("xend. Do this.")
    assert str(AutogateError("short.", where="here", remedy="Go.")) == "here: short. Go."
