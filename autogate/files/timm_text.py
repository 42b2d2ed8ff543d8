"""timm's own form of a pruned model: a text of tensor shapes, by which timm narrows the layers of the dense model.

"conv1.weight:[32, 3, 3, 3]***bn1.weight:[32]***..." is what timm keeps in `timm/models/_pruned` for its pruned models,
and what its `adapt_model_from_string` reads. It states the widths of 2-d convolutions, batch norms and linear layers.
It can't express other layers that change their width, or forwards that change.
"""

from __future__ import annotations

from timm.models import adapt_model_from_string
from torch import nn

from autogate.files.timm_builds import build_with_timm, dense_of, find_timm_build
from autogate.lock import locked
from autogate.slim import describe_tensors, first_difference, history_of
from autogate.wrappers import unwrap
from rewriters import AutogateError
from rewriters.forwards import RewrittenForward

_BETWEEN = "***"


@locked
def to_timm_text(slim: nn.Module, dense: nn.Module | None = None) -> str:
    """Write the shapes of a slim model as the text that `timm.models.adapt_model_from_string(dense, text)` reads.

    To check the text, timm narrows the dense model with it, and the result is compared with the slim model. Everything
    but the weights must be the same.

        >>> import timm, torch, autogate
        >>> model = autogate.prepare(timm.create_model("resnet18", num_classes=10))
        >>> with torch.no_grad():
        ...     autogate.gates(model).alpha[::2] = 0
        >>> slim = autogate.finalize(model, warn=False)
        >>> text = autogate.to_timm_text(slim)
        >>> text[:49]
        'conv1.weight:[32, 3, 7, 7]***bn1.weight:[32]***bn'
        >>> dense = timm.create_model("resnet18", num_classes=10)
        >>> narrow = timm.models.adapt_model_from_string(dense, text)
        >>> narrow.load_state_dict(slim.state_dict())
        <All keys matched successfully>

    Args:
        slim: the model that `finalize` returned, or any other, such as timm's pruned models.
        dense: the model that it was slimmed from. If None, timm builds it, as for `load`; a model that was never
            slimmed is taken for its own dense model.

    Raises:
        AutogateError: the text can't express the model. The message names the module or tensor.
    """
    slim = unwrap(slim)
    for path, module in slim.named_modules():
        if isinstance(module.__dict__.get("forward"), RewrittenForward):
            raise AutogateError(
                "its forward was rewritten, which a text of shapes can't express.",
                where=path,
                remedy="Use autogate.save.",
            )
    text = _BETWEEN.join(f"{name}:{list(tensor.shape)}" for name, tensor in slim.state_dict().items())
    try:
        narrow = adapt_model_from_string(_dense(slim) if dense is None else dense, text)
    except AutogateError:
        raise
    except Exception as error:  # such as a layer that lacks a tensor timm expects
        raise AutogateError(
            f"timm can't narrow its dense model: {type(error).__name__}: {error}.",
            where=type(slim).__name__,
            remedy="Use autogate.save.",
        ) from error
    for here, there in ((_shapes(narrow), _shapes(slim)), (_convolutions(narrow), _convolutions(slim))):
        different = first_difference(here, there)
        if different is not None:
            name, timms, ours = different
            raise AutogateError(
                f"timm makes it {timms} when it reads the text of shapes, and it is {ours} in the slim model.",
                where=name,
                remedy="Use autogate.save.",
            )
    return text


def read_timm_text(text: str) -> dict[str, tuple[int, ...]]:
    """Parse a text of shapes into shapes by name.

        >>> from autogate.files.timm_text import read_timm_text
        >>> read_timm_text("conv1.weight:[32, 3, 3, 3]***bn1.num_batches_tracked:[]")
        {'conv1.weight': (32, 3, 3, 3), 'bn1.num_batches_tracked': ()}

    Raises:
        AutogateError: an entry doesn't have the form "name:[size, ...]".
    """
    shapes = {}
    for entry in text.strip().split(_BETWEEN):
        name, _, sizes = entry.partition(":")
        numbers = [number.strip() for number in sizes[1:-1].split(",") if number.strip()]
        if not name or sizes[:1] + sizes[-1:] != "[]" or not all(number.isdecimal() for number in numbers):
            raise AutogateError(
                f"{entry[:60]!r} is not an entry of a text of shapes.", remedy='Entries have the form "name:[2, 3]".'
            )
        shapes[name] = tuple(map(int, numbers))
    return shapes


def _dense(slim: nn.Module) -> nn.Module:
    history = history_of(slim)
    if history is None:
        return slim
    how, why_not = find_timm_build(slim, dense_of(slim))
    if how is None:
        raise AutogateError(
            f"the dense model is needed to check the text, and timm can't build it: {why_not}.",
            where=type(slim).__name__,
            remedy="Pass the dense model: to_timm_text(slim, dense).",
        )
    return build_with_timm(how)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in describe_tensors(model).items()}


def _convolutions(model: nn.Module) -> dict[str, str]:
    return {path: module.extra_repr() for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
