"""The alpha, or alpha and depth, for a budget in multiply-accumulates or milliseconds; what each alpha costs."""

from zsaa.budget.calibration import Calibration, calibrate
from zsaa.budget.control import truncation_for
from zsaa.budget.reporting import report
from zsaa.budget.solve import alpha_for
from zsaa.budget.split import Split, split_for

__all__ = ["Calibration", "Split", "alpha_for", "calibrate", "report", "split_for", "truncation_for"]
