"""Export slim models as torch.export programs and ONNX files, and compare what was written with the model."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autogate.files.atomic_write import atomic_write
from autogate.files.data_config import NAME, as_json, data_config_of
from autogate.inputs import Inputs
from autogate.lock import locked
from autogate.saliency import saliency_of
from autogate.slim import history_of, read_inputs
from autogate.switching import check_one_width, subnets_of
from rewriters import AutogateError, VerificationError, relative_error, run_eval
from rewriters.outputs import full_precision
from rewriters.recording import generators_kept, tensors_of

Draw = Callable[[int], Inputs]
"""Makes inputs for so many samples."""

TOLERANCE = 1e-4
"""Largest accepted relative difference between the outputs of the model and of the exported one."""


def inputs_of(slim: nn.Module, batch: int, side: int | None = None) -> Inputs:
    """Random inputs like those that a slim model was prepared with, for `batch` samples.

    Args:
        slim: a slim model, a switchable or an adaptive one.
        batch: number of samples.
        side: side of square images, if the inputs are one batch of images; the original size if None.

    Raises:
        AutogateError: the model has no record of its example inputs, or `side` is given and they are not images.
    """
    inputs = _example_of(slim)
    tensors = tensors_of(inputs)
    if side is not None and (len(tensors) != 1 or tensors[0].ndim != 4):
        raise AutogateError(
            "its inputs are not one batch of images, so their size can't be changed.", where=type(slim).__name__
        )
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


def _example_of(slim: nn.Module) -> Inputs:
    """The example inputs that a model was prepared with, or zeros of their shapes."""
    history, subnets, bank = history_of(slim), subnets_of(slim), saliency_of(slim)
    if bank is not None:
        return bank.origin.calls_for(slim)[0]
    record = subnets.record if subnets is not None else history.slimmings[-1] if history is not None else None
    if record is None or record.inputs is None:
        raise AutogateError(
            "it has no record of its example inputs: it was not slimmed, or with inputs that no file holds.",
            where=type(slim).__name__,
            remedy="Pass the model that autogate.finalize or autogate.load returned.",
        )
    return read_inputs(record.inputs)


@locked
def to_torch_export(slim: nn.Module, path: str | os.PathLike[str], side: int | None = None) -> float:
    """Write a slim model in eval mode as a torch.export program, for batches of any size.

    The extra file "data_config.json" has what `slim.pretrained_cfg` says of images and classes, as in `save`.

    Args:
        slim: a slim model.
        path: path of the file, by convention "*.pt2".
        side: side of square images; that of the example inputs if None.

    Returns:
        The largest relative difference between the outputs, over batches of two and of three samples.

    Raises:
        AutogateError: torch.export can't export the model, it holds several subnets, or the file can't be written.
        VerificationError: the outputs of the program differ; no file is written.
    """
    check_one_width(slim)
    path, draw = Path(path), partial(inputs_of, slim, side=side)
    program = _program(slim, draw(2))
    made = io.BytesIO()  # torch aborts the process if it writes to a full disk itself
    torch.export.save(program, made, extra_files=_told(slim, draw(2), f"{NAME}.json"))
    with atomic_write(path) as temporary:
        temporary.write_bytes(made.getbuffer())
        loaded = torch.export.load(temporary).module()
        return _compare(slim, draw, path, lambda args, kwargs: loaded(*args, **kwargs))


@locked
def to_onnx(slim: nn.Module, path: str | os.PathLike[str], side: int | None = None) -> float:
    """Write a slim model in eval mode as an ONNX file, for batches of any size.

    The metadata "data_config" has what `slim.pretrained_cfg` says of images and classes, as in `save`, as JSON.

    Args:
        slim: a slim model.
        path: path of the file, by convention "*.onnx".
        side: side of square images; that of the example inputs if None.

    Returns:
        The largest relative difference between the outputs under onnxruntime, over batches of two and of three samples.

    Raises:
        AutogateError: onnx, onnxscript or onnxruntime is not installed, the model can't be exported or holds several
            subnets, or the file can't be written.
        VerificationError: the outputs of the file would differ; no file is written.
    """
    check_one_width(slim)
    return write_onnx(slim, path, partial(inputs_of, slim, side=side))


def write_onnx(model: nn.Module, path: str | os.PathLike[str], draw: Draw) -> float:
    """As `to_onnx`, for any model and inputs."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise AutogateError(f"ONNX needs {' and '.join(missing)}.", remedy="pip install 'autogate[onnx]'")
    import onnxruntime

    path, (args, kwargs) = Path(path), draw(2)
    program = _program(model, (args, kwargs))
    try:
        written = torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False)
    except Exception as error:  # operators that ONNX lacks raise errors of all kinds
        raise AutogateError(f"torch.onnx can't export it: {error}", where=type(model).__name__) from error
    assert written is not None  # None is returned only if a file is given
    with atomic_write(path) as temporary:
        written.model.metadata_props.update(_told(model, draw(2), NAME))
        written.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(args: Any, kwargs: Any) -> list[Tensor]:
            given = [tensor.cpu().numpy() for tensor in tensors_of((args, kwargs))]
            return [torch.from_numpy(out) for out in session.run(None, dict(zip(names, given, strict=True)))]

        return _compare(model, draw, path, run)


def _told(model: nn.Module, inputs: Inputs, name: str) -> dict[str, str]:
    """What the model says of images and classes, as JSON under a name; nothing if it doesn't say.

    The size is the one that is exported: what is written takes no other.
    """
    config = data_config_of(model)
    if config is None:
        return {}
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors_of(inputs)]
    if len(shapes) == 1 and len(shapes[0]) == 3:
        config = replace(config, input_size=shapes[0])
    return {name: as_json(config)}


def _program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    args, kwargs = inputs
    shapes = torch.export.ShapesCollection()
    for tensor in tensors_of((args, kwargs)):
        if tensor.ndim:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # user code can raise anything under torch.export
        raise AutogateError(f"torch.export can't export it: {error}", where=type(model).__name__) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _compare(model: nn.Module, draw: Draw, path: Path, run: Callable[[Any, Any], Any]) -> float:
    worst = 0.0
    for batch in (2, 3):
        args, kwargs = draw(batch)
        wanted = run_eval(model, args, kwargs)
        with full_precision(), generators_kept(model, args, kwargs):  # both draw the same random numbers
            got = tensors_of(run(args, kwargs))
        worst = max(worst, relative_error(got, [leaf.cpu() for leaf in wanted] if _on_cpu(got) else wanted))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"its outputs differ from the model's by {worst:.1e} of their size, more than {TOLERANCE:.0e}. It "
            "was not written.",
            where=str(path),
            remedy="Please report the model.",
        )
    return worst


def _on_cpu(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
