"""Methods as text: a method prints as the call that makes it, and that call is read again. Nothing is executed."""

from __future__ import annotations

import ast
import math
from typing import Any

from autogate.methods.clipped_lasso import ClippedLasso
from autogate.methods.gdp import GDP
from autogate.methods.method import Method
from rewriters import AutogateError

METHODS: dict[str, type[Method]] = {"gdp": GDP, "clipped-lasso": ClippedLasso}
"""The methods by the names that the command line has for them."""


def method_of(text: str) -> Method:
    """The method that a call such as "GDP(reach=0.2)" makes.

    Raises:
        AutogateError: it is no call of a method that autogate has, or a setting is outside its range.
    """
    kinds = {kind.__name__: kind for kind in METHODS.values()}
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError(text)
        kind, settings = kinds[call.func.id], {word.arg or "": _value(word.value) for word in call.keywords}
        return kind(**settings)
    except (SyntaxError, ValueError, KeyError, TypeError) as error:
        raise AutogateError(
            f"{text!r} makes no method.", where="method", remedy=f"Known ones are {', '.join(kinds)}."
        ) from error


def _value(node: ast.expr) -> Any:
    return math.inf if isinstance(node, ast.Name) and node.id == "inf" else ast.literal_eval(node)
