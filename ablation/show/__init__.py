"""From the ablation's result files to tables, paired tests and figures. Nothing here computes a result.

python -m ablation.show      draws figures/ablation_*.png from results/ablation (part of make figures)
"""

from ablation.show.accuracy import accuracy_figure
from ablation.show.committed import draw_committed
from ablation.show.continuation import CONTINUED, continuation_figure, continuation_table
from ablation.show.others import sensitivity_figure, survival_figure, words_figure
from ablation.show.paired import paired_figure, rivals
from ablation.show.panels import ROOM, apart, rows_figures
from ablation.show.rows import (
    budget_of,
    cell_at,
    curves,
    is_main,
    load,
    own_row,
    protagonists,
    scorer_of,
    seed_of,
)
from ablation.show.tables import NOT_RUN, accuracy_table, paired_table
from zsaa.kit.equal import ahead

__all__ = [
    "CONTINUED",
    "NOT_RUN",
    "ROOM",
    "accuracy_figure",
    "accuracy_table",
    "ahead",
    "apart",
    "budget_of",
    "cell_at",
    "continuation_figure",
    "continuation_table",
    "curves",
    "draw_committed",
    "is_main",
    "load",
    "own_row",
    "paired_figure",
    "paired_table",
    "protagonists",
    "rivals",
    "rows_figures",
    "scorer_of",
    "seed_of",
    "sensitivity_figure",
    "survival_figure",
    "words_figure",
]
