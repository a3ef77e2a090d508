"""A plan as one HTML file that opens offline."""

from rpcompile.report.write import write_report

__all__ = ["write_report"]
