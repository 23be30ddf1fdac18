"""The alpha for a budget in multiply-accumulates or milliseconds, and what each alpha costs."""

from zsaa.budget.solve import Calibration, alpha_for, calibrate, report

__all__ = ["Calibration", "alpha_for", "calibrate", "report"]
