"""What the report shows, in its order."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, or of ours.

    cells: the function of zsaa.kit.tables that gives its Cells; "" for figures, which print no numbers.
    drawn: the kinds of the results that its figures are drawn from.
    more: further tables of ours: (title, function of zsaa.kit.tables that makes a DataFrame of points, their kind).
    whole: the same, of functions that take the result files, as they need what was said of each sample.
    facts: do its numbers stand in published configurations, so that nothing is measured?
    figures: patterns of the names of its figures in figures/. In a run's folder they begin with the notebook's number.
    """

    title: str
    about: str
    notebook: str
    cells: str = ""
    drawn: tuple[str, ...] = ()
    more: tuple[tuple[str, str, str], ...] = ()
    whole: tuple[tuple[str, str, str], ...] = ()
    figures: tuple[str, ...] = ()
    facts: bool = False

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    def wrote(self, path: Path) -> bool:
        """Is `path` a table or figure that the section's notebook wrote?"""
        return path.stem.startswith(self.notebook.split("_")[0] + "_")

    def draws(self, path: Path) -> bool:
        return self.wrote(path) or any(fnmatch.fnmatch(path.stem, pattern) for pattern in self.figures)


SECTIONS = (
    Section(
        "Table 1", "Accuracy (F1 for QQP, MRPC) of GPT-2 (137M) along the dial, percent.", "01_table1", "table_1_cells",
        whole=(
            ("The dial and its controls", "controls_table", "curve"),
            ("Points by which the dial is ahead (+) or behind (-) at equal MACs", "differences_table", "curve"),
        ),
        figures=("headline*", "accuracy_*"),
    ),
    Section("Figure 2", "Accuracy, preserved activations and alpha against the speed-up.", "06_figure2",
            drawn=("lengths",), figures=("figure2*", "figure_2*")),
    Section("Table 2", "Perplexity of GPT-2 (137M) at 1 to 3 times faster first tokens.", "02_table2", "table_2_cells",
            more=(
                ("Time to the first token at the true shapes, random weights", "ttft_table", "ttft"),
                ("The dial and its rivals, over the stock model", "table_2_controls", "perplexity"),
            ),
            figures=("table2*", "perplexity*")),
    Section("Table 3", "MMLU, MACs and GPU memory of LLaMA 3 and Gemma 2 in 4 bits.", "04_table3", "table_3_cells",
            more=(
                ("Footprint, cache and first token at the true shapes, random weights", "footprint_table", "footprint"),
            ),
            figures=("table3*", "mmlu*", "choice*", "footprint*")),
    Section("Table 4", "The architectures: facts of published configurations, nothing measured. Its GPT-2 has 355M "
            "parameters; that of Tables 1 and 2 has 137M, as the paper says there.", "05_table4", "table_4_cells",
            facts=True),
    Section("Figure 3", "Which tokens each layer keeps.", "03_figure3", drawn=("preservation",),
            figures=("preservation*",)),
    Section("Audit", "What Eq. 2 implies for the paper's numbers, and which of its claims our results bear out.",
            "09_audit", drawn=("audit",), figures=("audit*",)),
    Section("Speed", "Not a figure of the paper: what the clock gives of what the MACs promise.", "10_speed",
            figures=("speed*", "h100_*")),
    Section("Ablation", "Not in the paper: scores, schedules and recipes beside the paper's.", "08_ablation",
            figures=("ablation*", "scores*", "continuation*")),
)  # fmt: skip

NOT_A_RESULT = ("slider",)  # pictures in figures/ that were not drawn from results

MEANING = {
    "reproduced": "measured on the paper's own model and data; its number lies in our 95% interval",
    "consistent": "a fact of the published configuration, which says the same; nothing was measured",
    "differs": "the paper's own model and data, or a fact that no weight decides; its number does not",
    "substitute": "another model, other data or settings: shown beside the paper's, never called reproduced",
    "not run": "nothing was measured",
}

SIGN = {"reproduced": "✓", "consistent": "=", "differs": "≠", "substitute": "≈", "not run": "–"}  # besides colour
