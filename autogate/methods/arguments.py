"""The arguments of `prepare` that a method has a say in, checked."""

from __future__ import annotations

from typing import Any

from autogate.budget import Shares
from autogate.methods.gdp import GDP
from autogate.methods.method import Method
from rewriters import AutogateError


def as_method(method: Any) -> Method:
    """The method; GDP if it is None.

    Raises:
        AutogateError: it is no method.
    """
    if method is None:
        return GDP()
    if isinstance(method, Method):
        return method
    raise AutogateError(
        f"method is {method!r}, which is no method.", where="prepare", remedy="Give a value such as autogate.GDP()."
    )


def budget_of(method: Method, **asked: Any) -> Shares:
    """The budget that the caller asks for. With a fixed lambda there is none, and prices are those of FLOPs.

    Args:
        method: the method.
        asked: the fields of `Shares`; None for what is not asked for.

    Raises:
        AutogateError: a share is out of its range, or there are shares beside a fixed lambda.
    """
    given = {name: share for name, share in asked.items() if share is not None}
    if method.lam is None:
        return Shares(**given)
    if given:
        raise AutogateError(
            f"{method!r} has a fixed lambda, which reaches no budget.",
            where="prepare",
            remedy="Give no share, or leave out `lam`: lambda is then steered to the budget.",
        )
    return Shares(flops=1.0)
