"""Patches that record what a traced forward does past its proxies.

torch.fx sees only operations on proxies. Torch's builtin functions and contexts, `isinstance`, `len`, `min` and `max`,
the calls and parameters of modules, and autograd functions have to be patched to be recorded. The patches act only
while a tracer runs, and only in its own thread. They are applied once for all traces of an analysis: torch.fx
patches `nn.Module` for each trace, and Python notifies each of its thousands of subclasses.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace

from rewriters.errors import TraceError
from rewriters.forwards.attribute_reads import AttributeReads
from rewriters.forwards.following import ANSWERS, Following, hold_proxies, isinstance_of_value, set_following, thread
from rewriters.forwards.function_patches import autograd_functions_patched, scripted_functions_patched
from rewriters.forwards.proxies import ValueProxy
from rewriters.forwards.read_code import file_has_types

_FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "full_like", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip
"""Functions of torch that make tensors from numbers: all their calls are recorded."""

_LIMITS: dict[str, Callable[..., Any]] = {"finfo": torch.finfo, "iinfo": torch.iinfo}
"""Types of torch that are called with a dtype."""


@functools.cache
def _builtins(space: types.ModuleType) -> dict[str, Callable[..., Any]]:
    torch.overrides.get_overridable_functions()  # it reads these names once, so it has to run before they are patched
    builtins = {name: value for name, value in vars(space).items() if isinstance(value, types.BuiltinFunctionType)}
    found: dict[str, Callable[..., Any]] = {
        name: value for name, value in builtins.items() if not value.__name__.startswith("_")
    }
    return found | _LIMITS if space is torch else found


MATH = tuple(_builtins(math).values())
"""Functions of `math`: torch.fx records them also where a Python module imports them by name."""


_PATCHED = "__fx_already_patched"
"""torch.fx doesn't patch methods with this mark."""


@contextlib.contextmanager
def followed(tracer: fx.Tracer, attributes: AttributeReads) -> Iterator[None]:
    """Inside, `tracer` records what a forward does, and `attributes` which attributes it reads."""
    with patches_held() as patches, set_following(Following(tracer, attributes)):
        patches.put()
        yield


class _Patches(contextlib.ExitStack):
    """All patches, which are removed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._are_put = False

    def put(self) -> None:
        """Apply the patches, once."""
        if not self._are_put:
            for patch in (
                _functions_patched, _contexts_patched, _modules_patched, _leaves_patched, autograd_functions_patched,
                scripted_functions_patched,
            ):  # fmt: skip
                self.enter_context(patch())
            self._are_put = True


_held: _Patches | None = None


@contextlib.contextmanager
def patches_held() -> Iterator[_Patches]:
    """Inside, the patches of one trace stay for the next: each change of `nn.Module` reaches thousands of classes."""
    global _held
    if _held is not None:
        yield _held
        return
    try:
        with _Patches() as _held:
            yield _held
    finally:
        _held = None


@contextlib.contextmanager
def _functions_patched() -> Iterator[None]:
    """Record torch's and math's builtin functions with their arguments as they are.

    By themselves they read sizes that are proxies (which would guard these) before `__torch_function__` is called, and
    don't call it at all if no argument is a tensor (torch.zeros).
    """
    for space in (torch, F, math):
        vars(space).update(_recorders(space))
    vars(torch)["Size"] = _Size
    try:
        yield
    finally:
        vars(torch)["Size"] = _Size.plain
        for space in (torch, F, math):
            vars(space).update(_builtins(space))


@functools.cache
def _recorders(space: types.ModuleType) -> dict[str, Callable[..., Any]]:
    return {name: functools.partial(_record, name, plain) for name, plain in _builtins(space).items()}


def _record(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if thread.following is not None and (name in _FACTORIES or hold_proxies(args, kwargs)):
        return thread.following.tracer.create_proxy("call_function", function, args, kwargs)
    return function(*args, **kwargs)


class _OfProxies(type):
    """The class of a type's stand-in, which is called in its place with proxies among its arguments."""

    plain: type
    follow: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if thread.following is not None and hold_proxies(args, kwargs):
            return cls.follow(*args, **kwargs)
        return cls.plain(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance_of_value(instance, cls.plain)


class _Size(metaclass=_OfProxies):
    """torch.Size, which would read the sizes that are proxies."""

    plain = torch.Size

    @staticmethod
    def follow(sizes: Any = ()) -> Any:
        return sizes if type(sizes) is ValueProxy else tuple(sizes)


class _Int(metaclass=_OfProxies):
    """`int`, of which a proxy could only return the number itself."""

    plain = int

    @staticmethod
    def follow(number: Any, *base: Any) -> Any:
        return (
            number
            if type(number.value) is int and not base
            else number.tracer.create_proxy("call_function", int, (number, *base), {})
        )


class _Float(metaclass=_OfProxies):
    """`float`, as `_Int`."""

    plain = float

    @staticmethod
    def follow(number: Any) -> Any:
        if isinstance(number.value, torch.Tensor):
            return float(number)  # which its control flow would depend on
        return number.tracer.create_proxy("call_function", float, (number,), {})


@contextlib.contextmanager
def conversions_followed(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `int(size)` and `float(size)` are recorded in the file of a function, unless it has them as types."""
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    if scope.keys() & _CONVERSIONS or file_has_types(scope.get("__file__") or ""):
        yield
        return
    with mock.patch.dict(scope, _CONVERSIONS):
        yield


@contextlib.contextmanager
def rewritten_code_followed(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `len` and the functions of `math` that a rewritten forward's code holds are recorded, as in user code."""
    if not isinstance(function, types.FunctionType) or "__name__" in function.__globals__:
        yield  # it belongs to a Python module
        return
    wrapped = {id(one): _symbolic_trace._create_wrapped_func(one) for one in MATH}
    known, scope = wrapped | ANSWERS, function.__globals__
    with mock.patch.dict(scope, {name: known[id(value)] for name, value in scope.items() if id(value) in known}):
        yield


_CONVERSIONS: dict[str, Any] = {"int": _Int, "float": _Float}


@contextlib.contextmanager
def _modules_patched() -> Iterator[None]:
    """Record calls, parameters and attributes of modules; torch.fx itself would patch them again for every trace."""
    plain_call, plain_getattr = nn.Module.__call__, nn.Module.__getattr__
    plain_read, plain_write = nn.Module.__getattribute__, nn.Module.__setattr__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if thread.following is None:
            return plain_call(module, *args, **kwargs)
        return thread.following.tracer.call_module(module, functools.partial(plain_call, module), args, kwargs)

    def get(module: nn.Module, name: str) -> Any:
        value, following = plain_getattr(module, name), thread.following
        return value if following is None else following.tracer.getattr(name, value, following.parameters)

    def read(module: nn.Module, name: str) -> Any:
        value, following = plain_read(module, name), thread.following
        return value if following is None else following.attributes.read(module, name, value)

    def write(module: nn.Module, name: str, value: Any) -> None:
        if thread.following is not None:
            thread.following.attributes.write(module, name)
        plain_write(module, name, value)

    for patch in (call, get):
        setattr(patch, _PATCHED, True)
    with mock.patch.multiple(nn.Module, __call__=call, __getattr__=get, __getattribute__=read, __setattr__=write):
        yield


_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled

_ASKED = {
    "is_inference_mode_enabled": "whether the inference mode is on",
    "is_autocast_enabled": "whether autocast is on",
    "is_autocast_cpu_enabled": "whether autocast is on",
    "get_autocast_dtype": "for autocast's dtype",
    "get_autocast_gpu_dtype": "for autocast's dtype",
    "get_autocast_cpu_dtype": "for autocast's dtype",
}
"""Functions of torch that tell what its caller has switched on, by name, with what they are asked."""

CONTEXTS = (torch.amp._enter_autocast, torch.amp._exit_autocast, _is_grad_enabled, _set_grad_enabled)
"""The calls in a graph where the forward enters and leaves torch.autocast or `no_grad`. They don't run on fakes."""


@contextlib.contextmanager
def _contexts_patched() -> Iterator[None]:
    """Record where a forward enters and leaves torch.autocast and `torch.no_grad`, which torch.fx would lose."""
    plain_init, plain_enter, plain_exit = (vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__"))

    def init(context: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        of_value = type(device_type) is ValueProxy
        plain_init(context, device_type.value if of_value else device_type, *args, **kwargs)
        context.device = device_type

    def enter(context: Any) -> Any:
        if thread.following is None:
            return plain_enter(context)
        given = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
        context._recorded = thread.following.tracer.create_proxy("call_function", torch.amp._enter_autocast, given, {})
        return context

    def leave(context: Any, *error: Any) -> Any:
        if thread.following is None:
            return plain_exit(context, *error)
        thread.following.tracer.create_proxy("call_function", torch.amp._exit_autocast, (context._recorded,), {})
        return None

    def set_grad(mode: Any) -> None:
        if thread.following is None:
            _set_grad_enabled(mode)
        else:
            thread.following.tracer.create_proxy("call_function", _set_grad_enabled, (mode,), {})

    def is_grad() -> Any:
        asker = _asker("whether gradients are recorded")
        if thread.following is None or asker != "torch.autograd.grad_mode":
            return _is_grad_enabled()
        return thread.following.tracer.create_proxy("call_function", _is_grad_enabled, (), {})

    answers = {name: _unasked(name, what) for name, what in _ASKED.items()} | {"is_grad_enabled": is_grad}
    with (
        mock.patch.multiple(torch.autocast, __init__=init, __enter__=enter, __exit__=leave),
        mock.patch.object(torch._C, "_set_grad_enabled", set_grad),
        contextlib.ExitStack() as stack,
    ):
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch, name, answer))
        yield


def _asker(what: str) -> str:
    """The Python module that called what calls this. Raises if that is user code, in a forward that is followed."""
    asker: str = sys._getframe(2).f_globals.get("__name__", "")
    if thread.following is not None and not asker.startswith("torch."):
        raise TraceError(f"it asks {what}")
    return asker


def _unasked(name: str, what: str) -> Callable[..., Any]:
    """A function of torch that followed forwards may not call: the answer would be the one of the trace for ever."""
    plain = getattr(torch, name)

    def ask(*args: Any, **kwargs: Any) -> Any:
        _asker(what)
        return plain(*args, **kwargs)

    return ask


def _leaves_patched() -> contextlib.AbstractContextManager[Any]:
    """Trace into functions that were declared leaves (`torch.fx.wrap`), which proxies with values can run."""
    return mock.patch.dict(_symbolic_trace._wrapped_fns_to_patch, clear=True)
