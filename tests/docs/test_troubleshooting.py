"""The troubleshooting page quotes messages and output as they are."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
BEGINNING, *REST = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
OF_OTHERS = ("Missing key(s)", "Unexpected key(s)", "size mismatch")
"""Messages of PyTorch."""


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def flat(text: str) -> str:
    """One line, without numbers: errors of rounding and sizes may differ from processor to processor."""
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", " ".join(text.split()))


def printed(block: str, names: dict[str, Any]) -> str:
    """What a block warns of, and prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        exec(compile(block, "docs/troubleshooting.md", "exec"), names)
    return "".join(f"{one.category.__name__}: {one.message}\n" for one in caught) + out.getvalue()


@pytest.mark.parametrize(
    "section", [text for text in REST[1::2] if re.search(r"```\n\n```text", text) and code(text)],
    ids=[title for title, text in zip(REST[::2], REST[1::2], strict=True)
         if re.search(r"```\n\n```text", text) and code(text)],
)  # fmt: skip
def test_a_section_shows_what_its_code_prints(section, tmp_path, monkeypatch):
    """A block of text right behind a block of code is the end of what that prints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in code(BEGINNING):
        exec(compile(block, "docs/troubleshooting.md", "exec"), names)
    compared = 0
    for block, shown in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", section, flags=re.DOTALL):
        found = printed(block, names)
        if shown:
            assert flat(found).endswith(flat(shown)), found
            compared += 1
    assert compared


@cache
def strings() -> str:
    """All strings in the packages' code, `#` for what is formatted into them."""
    found = []
    for path in (*(ROOT / "autogate").rglob("*.py"), *(ROOT / "rewriters").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "#" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """Messages that the page's tables have in their first column, and those that sentences say."""
    rows = re.findall(r"^\| (`.*?`) \|", PAGE, flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`(.*?)`", row) if message.count(" ") > 2]
    messages += re.findall(r"(?:says?|with) `([^`]+ [^`]+ [^`]+)`", PAGE)
    no_message = (*OF_OTHERS, "prepare(", "autogate", "torch.backends")
    return [" ".join(message.split()) for message in messages if not message.startswith(no_message)]


def test_there_are_messages_to_compare():
    assert len(quoted()) > 25


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_is_quoted_is_in_the_code(message):
    source = strings()
    for part in re.split(r"\.\.\.|…", message):
        assert part.strip(" :()") in source, part
