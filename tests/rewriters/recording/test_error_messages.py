"""Errors of a forward name the line that a user can change."""

import torch

from rewriters.recording.error_messages import user_line, why_unrecordable


def line_of(code: str, filename: str) -> str:
    try:
        exec(compile(code, filename, "exec"), {"torch": torch})
    except RuntimeError as error:
        return user_line(error)
    raise AssertionError("it ran")


def test_a_library_beside_torch_is_not_torch():
    folder = torch.__file__.removesuffix("/torch/__init__.py")
    assert line_of("torch.zeros(2) @ torch.zeros(3)", f"{folder}/torchvision/ops/boxes.py").startswith(
        f"{folder}/torchvision/ops/boxes.py:1"
    )


def test_lines_of_torch_are_passed_over():
    folder = torch.__file__.removesuffix("/__init__.py")
    assert "test_error_messages.py" in line_of("torch.zeros(2) @ torch.zeros(3)", f"{folder}/functional.py")


def test_an_error_without_a_line_of_the_user_names_none():
    error = RuntimeError("never raised")
    assert user_line(error) == ""
    assert why_unrecordable(error) == "its forward can't be recorded: RuntimeError: never raised"
