"""From result files to figures. Nothing here computes a result: it only draws them.

python -m zsaa.kit.figures      draws figures/ from the committed results (make figures)
"""

from zsaa.kit.figures.accuracy import accuracy_figure, accuracy_figures
from zsaa.kit.figures.audit import audit_exponents_figure, audit_reach_figure, audit_reductions_figure
from zsaa.kit.figures.choice import choice_figure
from zsaa.kit.figures.committed import draw_committed
from zsaa.kit.figures.figure2 import figure_2
from zsaa.kit.figures.memory import footprint_figure, memory_and_training_figure
from zsaa.kit.figures.perplexity import longest, perplexity_figure
from zsaa.kit.figures.preservation import preservation_figure
from zsaa.kit.figures.speed import attention_figure, prefill_figure, speed_figure
from zsaa.kit.figures.style import COLOURS, CUTS, DATA_SETS, STYLE, save_figure

__all__ = [
    "COLOURS",
    "CUTS",
    "DATA_SETS",
    "STYLE",
    "accuracy_figure",
    "accuracy_figures",
    "attention_figure",
    "audit_exponents_figure",
    "audit_reach_figure",
    "audit_reductions_figure",
    "choice_figure",
    "draw_committed",
    "figure_2",
    "footprint_figure",
    "longest",
    "memory_and_training_figure",
    "perplexity_figure",
    "prefill_figure",
    "preservation_figure",
    "save_figure",
    "speed_figure",
]
