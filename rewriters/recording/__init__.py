"""Run a model once without data. In: a model and example inputs. Out: a graph of its ATen calls (`Capture`)."""

from rewriters.recording.answered_calls import AnsweredCalls
from rewriters.recording.capture import (
    Capture,
    Kept,
    capture,
    in_every_place,
    without_fast_paths,
)
from rewriters.recording.function_calls import FunctionCall, FunctionCalls
from rewriters.recording.garbage_collection import collect, frozen_heap
from rewriters.recording.kept_attributes import forget, kept_before, remember
from rewriters.recording.meta_kernels import MetaMode, constant, run_on_fakes
from rewriters.recording.module_calls import ModuleCall
from rewriters.recording.module_walk import modules_of, named_modules, named_tensors, tensor_slots
from rewriters.recording.numbers_in_code import Sourced, plain
from rewriters.recording.opaque import Opaque, opaque_call, opaque_modules_stubbed
from rewriters.recording.pytrees import (
    all_tensors,
    args_of,
    held_tensors,
    leaves_of,
    maker_of,
    map_tensors,
    plain_kind,
    tensors_at,
    tensors_of,
)
from rewriters.recording.random_draws import OneNumber, is_draw
from rewriters.recording.recorder import is_getitem, only_restrides, reshapes_in_place
from rewriters.recording.rounding import OtherRounding
from rewriters.recording.running_modules import RunningModules
from rewriters.recording.side_effects import (
    attributes_preserved,
    drawn_since,
    drop_caches,
    generators_kept,
    random_numbers_kept,
    random_states,
    set_modes,
    set_train_mode,
    with_caches,
    without_caches,
)

__all__ = [
    "AnsweredCalls",
    "Capture",
    "FunctionCall",
    "FunctionCalls",
    "Kept",
    "MetaMode",
    "ModuleCall",
    "OneNumber",
    "Opaque",
    "OtherRounding",
    "RunningModules",
    "Sourced",
    "all_tensors",
    "args_of",
    "attributes_preserved",
    "capture",
    "collect",
    "constant",
    "drawn_since",
    "drop_caches",
    "forget",
    "frozen_heap",
    "generators_kept",
    "held_tensors",
    "in_every_place",
    "is_draw",
    "is_getitem",
    "kept_before",
    "leaves_of",
    "maker_of",
    "map_tensors",
    "modules_of",
    "named_modules",
    "named_tensors",
    "only_restrides",
    "opaque_call",
    "opaque_modules_stubbed",
    "plain",
    "plain_kind",
    "random_numbers_kept",
    "random_states",
    "remember",
    "reshapes_in_place",
    "run_on_fakes",
    "set_modes",
    "set_train_mode",
    "tensor_slots",
    "tensors_at",
    "tensors_of",
    "with_caches",
    "without_caches",
    "without_fast_paths",
]
