"""Remove channels. In: an `Analysis` and the live classes. Out: a `SlimPlan`, and the model that it was applied to."""

from rewriters.slimming.dead_branches import is_under
from rewriters.slimming.decisions import Decisions
from rewriters.slimming.dry_run import dry_run
from rewriters.slimming.first_difference import ValuesOfModules
from rewriters.slimming.module_fields import fields_after, refresh_flat_weights
from rewriters.slimming.ordering import order_channels
from rewriters.slimming.overlay import Overlay, Place, TensorSlice, with_all_forwards
from rewriters.slimming.plan import SlimPlan, apply, plan, resized_forwards
from rewriters.slimming.probe_inputs import Probe, Probes, one_sample, probes
from rewriters.slimming.probing import Answer, answers, finite
from rewriters.slimming.tensors import like, take_indices
from rewriters.slimming.trial_inputs import smaller_inputs
from rewriters.slimming.value_check import Checked, Refused, check_values, pin_refused

__all__ = [
    "Answer",
    "Checked",
    "Decisions",
    "Overlay",
    "Place",
    "Probe",
    "Probes",
    "Refused",
    "SlimPlan",
    "TensorSlice",
    "ValuesOfModules",
    "answers",
    "apply",
    "check_values",
    "dry_run",
    "fields_after",
    "finite",
    "is_under",
    "like",
    "one_sample",
    "order_channels",
    "pin_refused",
    "plan",
    "probes",
    "refresh_flat_weights",
    "resized_forwards",
    "smaller_inputs",
    "take_indices",
    "with_all_forwards",
]
