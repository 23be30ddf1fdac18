"""From points (zsaa.kit.points) to figures. Nothing here computes a result: it only draws them.
Each figure's label is its caption.

python -m zsaa.kit.figures      draws figures/ from the committed results (make figures)
"""

from zsaa.kit.figures.accuracy import accuracy_figure, accuracy_figures
from zsaa.kit.figures.audit import audit_exponents_figure, audit_reach_figure, audit_reductions_figure
from zsaa.kit.figures.choice import choice_figure
from zsaa.kit.figures.committed import draw_committed
from zsaa.kit.figures.depth import depth_figure, distances_figure, exits_figure
from zsaa.kit.figures.figure2 import figure_2
from zsaa.kit.figures.headline import headline_figure
from zsaa.kit.figures.memory import footprint_figure, memory_figure
from zsaa.kit.figures.perplexity import perplexity_figure, perplexity_figures
from zsaa.kit.figures.preservation import preservation_figure
from zsaa.kit.figures.question import first_token_figure, passages_figure
from zsaa.kit.figures.quickstart import kept_figure, reviews_figure, scores_figure, untuned_figure
from zsaa.kit.figures.rush import outcomes_figure, replicas_figure, rush_figure
from zsaa.kit.figures.speed import attention_figure, prefill_figures, speed_figure, training_figure
from zsaa.kit.figures.style import COLOURS, COLUMN, CUTS, DATA_SETS, STYLE, panels, save_figure, show

__all__ = [
    "COLOURS",
    "COLUMN",
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
    "depth_figure",
    "distances_figure",
    "draw_committed",
    "exits_figure",
    "figure_2",
    "first_token_figure",
    "footprint_figure",
    "headline_figure",
    "kept_figure",
    "memory_figure",
    "outcomes_figure",
    "panels",
    "passages_figure",
    "perplexity_figure",
    "perplexity_figures",
    "prefill_figures",
    "preservation_figure",
    "replicas_figure",
    "reviews_figure",
    "rush_figure",
    "save_figure",
    "scores_figure",
    "show",
    "speed_figure",
    "training_figure",
    "untuned_figure",
]
