"""Analysis and rewriting of models: capture, channel labels, slimming, verification.

    analysis = rewriters.analyse(model, (example,))       # the channel map, in seconds
    rewriters.dry_run(model, analysis, (example,))        # the proof that every class can be removed
    plan = rewriters.plan(model, analysis, live)          # which indices stay, which forwards change
    rewriters.apply(model, plan, rewriters.UndoLog())     # carried out on the live model; it can be undone

Nothing here knows how a gate is learned. `rewriters/README.md` walks through the folders with an example.
"""

from rewriters.analysis import Analysis, analyse, samples_in
from rewriters.cross_channel import write_live
from rewriters.errors import AutogateError, CaptureError, SurgeryError, VerificationError
from rewriters.labelling import ALWAYS, ChannelMap, Group, Kernel, Pin, Side, Statistic
from rewriters.outputs import Outputs, relative_error, rounding_errors, run_eval
from rewriters.shortcuts import Replaced, Shortcut, replace_shortcuts, restore
from rewriters.slimming import Decisions, SlimPlan, apply, dry_run, fields_after, plan
from rewriters.undo_log import UndoLog

__all__ = [
    "ALWAYS",
    "Analysis",
    "AutogateError",
    "CaptureError",
    "ChannelMap",
    "Decisions",
    "Group",
    "Kernel",
    "Outputs",
    "Pin",
    "Replaced",
    "Shortcut",
    "Side",
    "SlimPlan",
    "Statistic",
    "SurgeryError",
    "UndoLog",
    "VerificationError",
    "analyse",
    "apply",
    "dry_run",
    "fields_after",
    "plan",
    "relative_error",
    "replace_shortcuts",
    "restore",
    "rounding_errors",
    "run_eval",
    "samples_in",
    "write_live",
]
