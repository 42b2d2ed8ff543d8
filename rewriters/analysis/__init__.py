"""Analyse a model. In: a model and example inputs. Out: an `Analysis` with its channel map."""

from rewriters.analysis.analyse import analyse, pin_call
from rewriters.analysis.capture_modes import Inputs, samples_in
from rewriters.analysis.own_code import is_open_ended
from rewriters.analysis.result import Analysis
from rewriters.analysis.traced_modules import looping_like, trace_calls, traces_of
from rewriters.analysis.trial_rewrites import trial_pattern

__all__ = [
    "Analysis",
    "Inputs",
    "analyse",
    "is_open_ended",
    "looping_like",
    "pin_call",
    "samples_in",
    "trace_calls",
    "traces_of",
    "trial_pattern",
]
