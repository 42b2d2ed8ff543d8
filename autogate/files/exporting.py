"""Slim models as torch.export programs and ONNX files, each read back and run beside the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.files.atomic_write import atomic_write
from autogate.inputs import Inputs
from autogate.slim import History, history_of, read_inputs
from rewriters import AutogateError, VerificationError, relative_error, run_eval
from rewriters.recording import tensors_of
from rewriters.verify import full_precision

TOLERANCE = 1e-4
"""Largest relative difference that is accepted between the model's outputs and the exported one's."""


def inputs_of(slim: nn.Module, batch: int, side: int | None = None) -> Inputs:
    """Random inputs like those that a slim model was prepared with, of `batch` samples.

    Args:
        side: of square images, where the only tensor among the inputs holds such; as they were, if None.

    Raises:
        AutogateError: it remembers no inputs.
    """
    history = history_of(slim)
    if not isinstance(history, History) or history.slimmings[-1].inputs is None:
        raise AutogateError("it remembers no example inputs.", where=type(slim).__name__)
    inputs = read_inputs(history.slimmings[-1].inputs)
    tensors = tensors_of(inputs)
    if side is not None and (len(tensors) != 1 or tensors[0].ndim != 4):
        raise AutogateError("it takes other inputs than images.", where=type(slim).__name__)
    samples = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    at = next(slim.parameters()).device

    def like(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if shape and shape[0] == samples:
            shape[0] = batch
        if side is not None:
            shape[2:] = [side, side]
        drawn = torch.randn(shape) if tensor.is_floating_point() else torch.zeros(shape)
        return drawn.to(at, tensor.dtype)

    return tree_map_only(Tensor, like, inputs)


def to_torch_export(slim: nn.Module, path: Path, side: int | None = None) -> float:
    """Write a slim model in eval mode as a torch.export program, for batches of any size.

    Returns:
        The largest relative difference of its outputs, over batches of two and three samples.

    Raises:
        AutogateError: torch.export can't follow the model, or the file can't be written.
        VerificationError: the program gives other outputs; there is no file then.
    """
    program = _program(slim, side)
    with atomic_write(path) as temporary:
        torch.export.save(program, temporary)
        loaded = torch.export.load(temporary).module()
        return _compare(slim, side, path, lambda args, kwargs: loaded(*args, **kwargs))


def to_onnx(slim: nn.Module, path: Path, side: int | None = None) -> float:
    """Write a slim model in eval mode as an ONNX file, for batches of any size.

    Returns:
        The largest relative difference of its outputs under onnxruntime, over batches of two and three samples.

    Raises:
        AutogateError: onnx, onnxscript or onnxruntime is not installed, or the model can't be expressed.
        VerificationError: the file would give other outputs; there is none then.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise AutogateError(f"ONNX needs {' and '.join(missing)}.", remedy="pip install 'autogate[onnx]'")
    import onnxruntime

    args, kwargs = inputs_of(slim, 2, side)
    program = _program(slim, side)
    try:
        written = torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False)
    except Exception as error:  # whatever an operator raises that ONNX has no word for
        raise AutogateError(f"torch.onnx can't express it: {error}", where=type(slim).__name__) from error
    assert written is not None  # where it isn't told to write a file
    with atomic_write(path) as temporary:
        written.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(args: Any, kwargs: Any) -> list[Tensor]:
            given = [tensor.cpu().numpy() for tensor in tensors_of((args, kwargs))]
            return [torch.from_numpy(out) for out in session.run(None, dict(zip(names, given, strict=True)))]

        return _compare(slim, side, path, run)


def _program(slim: nn.Module, side: int | None) -> torch.export.ExportedProgram:
    args, kwargs = inputs_of(slim, 2, side)
    shapes = torch.export.ShapesCollection()
    for tensor in tensors_of((args, kwargs)):
        if tensor.ndim:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    training = {module: module.training for module in slim.modules()}
    slim.eval()
    try:
        with torch.no_grad():
            return torch.export.export(slim, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # whatever user code does that torch.export does not foresee
        raise AutogateError(f"torch.export can't follow it: {error}", where=type(slim).__name__) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _compare(slim: nn.Module, side: int | None, path: Path, run: Callable[[Any, Any], Any]) -> float:
    worst = 0.0
    for batch in (2, 3):
        args, kwargs = inputs_of(slim, batch, side)
        wanted = run_eval(slim, args, kwargs)
        with full_precision():
            got = tensors_of(run(args, kwargs))
        worst = max(worst, relative_error(got, [leaf.cpu() for leaf in wanted] if _on_cpu(got) else wanted))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"its outputs differ by {worst:.1e} of their size from the slim model's, more than {TOLERANCE:.0e}.",
            where=str(path),
            remedy="Please report the model.",
        )
    return worst


def _on_cpu(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
