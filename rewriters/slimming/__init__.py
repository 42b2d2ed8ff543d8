"""Remove channels. In: an `Analysis` and the live classes. Out: a `SlimPlan`, and the model that it was applied to."""

from rewriters.slimming.dead_branches import is_under
from rewriters.slimming.decisions import Decisions
from rewriters.slimming.dry_run import dry_run
from rewriters.slimming.first_difference import ValuesOfModules
from rewriters.slimming.module_fields import fields_after, refresh_flat_weights
from rewriters.slimming.ordering import order_channels
from rewriters.slimming.overlay import Overlay, Place, TensorSlice, with_all_forwards
from rewriters.slimming.plan import SlimPlan, apply, like, plan, take_indices
from rewriters.slimming.value_check import Refused, check_values, pin_refused

__all__ = [
    "Decisions",
    "Overlay",
    "Place",
    "Refused",
    "SlimPlan",
    "TensorSlice",
    "ValuesOfModules",
    "apply",
    "check_values",
    "dry_run",
    "fields_after",
    "is_under",
    "like",
    "order_channels",
    "pin_refused",
    "plan",
    "refresh_flat_weights",
    "take_indices",
    "with_all_forwards",
]
