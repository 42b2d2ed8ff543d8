"""What happens to a model's graph: capture, channel labels, slimming, verification.

    analysis = rewriters.analyse(model, (example,))       # the channel map, in seconds
    rewriters.rehearse(model, analysis, (example,))       # the proof that all of it can go
    plan = rewriters.plan(model, analysis, live)          # which indices stay, which forwards change
    rewriters.apply(model, plan, rewriters.Journal())     # carried out on the live model, and undoable

Nothing here knows how a gate is learned.
"""

from rewriters.analysis.analyse import Analysis, analyse, samples_in
from rewriters.cross_channel.placement import write_live
from rewriters.errors import AutogateError, CaptureError, SurgeryError, VerificationError
from rewriters.labelling.channel_map import ALWAYS, ChannelMap, Group, Kernel, Pin, Side, Statistic
from rewriters.shortcuts.replacing import Shortcut, replace_shortcuts
from rewriters.shortcuts.restoring import restore
from rewriters.slimming.decisions import Decisions
from rewriters.slimming.dry_run import rehearse
from rewriters.slimming.module_fields import fields_after
from rewriters.slimming.plan import SlimPlan, apply, plan
from rewriters.undo_log import Journal
from rewriters.verify import relative_error, run_eval

__all__ = [
    "ALWAYS",
    "Analysis",
    "AutogateError",
    "CaptureError",
    "ChannelMap",
    "Decisions",
    "Group",
    "Journal",
    "Kernel",
    "Pin",
    "Shortcut",
    "Side",
    "SlimPlan",
    "Statistic",
    "SurgeryError",
    "VerificationError",
    "analyse",
    "apply",
    "fields_after",
    "plan",
    "rehearse",
    "relative_error",
    "replace_shortcuts",
    "restore",
    "run_eval",
    "samples_in",
    "write_live",
]
