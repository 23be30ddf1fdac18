"""The alpha for a budget in multiply-accumulates or milliseconds, and what each alpha costs."""

from zsaa.budget.calibration import Calibration, calibrate
from zsaa.budget.control import truncation_for
from zsaa.budget.reporting import report
from zsaa.budget.solve import alpha_for

__all__ = ["Calibration", "alpha_for", "calibrate", "report", "truncation_for"]
