"""An HTML page about a training run: what `autogate report` writes."""

from autogate.reporting.page import Report, read_report, write_report

__all__ = ["Report", "read_report", "write_report"]
