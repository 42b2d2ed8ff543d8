"""What the code that a trace runs through says about itself: its lines, and whether it asks for identity.

`is` can't be answered by a proxy: Python compares the objects themselves. So before a value is read from a proxy, the
code that reads it is looked at.
"""

from __future__ import annotations

import dis
import functools
import linecache
import re
import sys
import types

_PASSED = ("torch.fx", "rewriters.forwards.proxies", "rewriters.forwards.tracing", "rewriters.forwards.tracer_patches",
           "rewriters.forwards.read_code", "rewriters.forwards.attribute_reads", "rewriters.forwards.following",
           "rewriters.forwards.function_patches", "rewriters.forwards.names_in_code")  # fmt: skip


def caller() -> types.FrameType:
    """The frame of the innermost code that is not part of the tracer."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_PASSED):
        frame = frame.f_back
    return frame


def line_of_caller() -> str:
    """The line that runs, as `module:line (its code)`."""
    frame = caller()
    name = frame.f_globals.get("__name__", frame.f_code.co_filename)
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals).strip()
    return f"{name}:{frame.f_lineno} ({code})" if code else f"{name}:{frame.f_lineno}"


def methods_of_caller(module: object) -> frozenset[str]:
    """Names of the methods of an object, besides `forward`, that the code which runs now was called through."""
    names: set[str] = set()
    frame: types.FrameType | None = caller()
    while frame is not None and frame.f_globals.get("__name__") != "torch.fx._symbolic_trace":
        code = frame.f_code
        if code.co_argcount and code.co_name != "forward" and frame.f_locals.get(code.co_varnames[0]) is module:
            names.add(code.co_name)
        frame = frame.f_back
    return frozenset(names)


def compares_identity(frame: types.FrameType) -> bool:
    """Whether a frame's code asks `is` of something else than None."""
    return code_compares_identity(frame.f_code)


def asks_types(frame: types.FrameType) -> bool:
    """Whether a frame's code asks for the `type` of something."""
    return "type" in frame.f_code.co_names


@functools.lru_cache(maxsize=4096)
def code_compares_identity(code: types.CodeType) -> bool:
    """Whether code asks `is` of something else than None."""
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IS_OP" and not (before and before.opname == "LOAD_CONST" and before.argval is None):
            return True
        before = instruction
    return False


def file_has_types(path: str) -> bool:
    """Whether code in a file compares types, or names `int` or `float` as one."""
    lines = linecache.getlines(path)
    known = _types_in.get(path)
    if known is None or known[0] is not lines:
        known = _types_in[path] = (lines, bool(_HAS_TYPES.search("".join(lines))))
    return known[1]


_HAS_TYPES = re.compile(r"\btype\(.*\)\s*(is|==|in|!=)\b|\bis (int|float)\b|(dtype=|\.(to|type)\()(int|float)\b")

_types_in: dict[str, tuple[list[str], bool]] = {}
"""What was found in each file, and the lines that it was found in: a file that is read anew gives another list."""
