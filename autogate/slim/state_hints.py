"""What a slim model says beside PyTorch's list of keys when a state_dict of another form is loaded into it."""

from __future__ import annotations

from typing import Any

from torch import nn

from autogate.gating import BANK
from autogate.naming import tell_beside
from autogate.slim.history import history_of
from rewriters import UndoLog

_GATED = (
    "this model is slim, and the state is of one with gates. Load it into the prepared model, then call "
    "autogate.finalize"
)


def add_state_hint(model: nn.Module, undo_log: UndoLog) -> None:
    """Let a slim model's `load_state_dict` name the form of a state that doesn't fit."""
    before, after = model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks
    if _tell_of_gates in after.values():
        return
    handle = model.register_load_state_dict_pre_hook(_tell_of_other_forms)
    undo_log.set(before, handle.id, before.pop(handle.id))
    handle = model.register_load_state_dict_post_hook(_tell_of_gates)
    undo_log.set(after, handle.id, after.pop(handle.id))


def _tell_of_gates(model: nn.Module, keys: Any) -> None:
    if BANK not in model._modules:
        tell_beside(keys.unexpected_keys, f"{BANK}.alpha", _GATED)


def _tell_of_other_forms(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    history = history_of(model)
    if history is None:
        return
    gated = f"{prefix}{BANK}.alpha" in state and BANK not in model._modules
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    given = {name: tuple(getattr(state.get(f"{prefix}{name}"), "shape", own[name])) for name in own}
    if gated and given != own:
        errors.append(_GATED)
    elif given != own:
        dense = history.slimmings[0].tensors
        is_dense = all(shape == dense[name].shape for name, shape in given.items() if name in dense)
        errors.append(
            f"this model is slim, and the state is of {'the dense model' if is_dense else 'one slimmed otherwise'}. "
            "Load it into a model of that form; autogate.load builds a slim model from its file"
        )
