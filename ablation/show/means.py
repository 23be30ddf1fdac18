"""Accuracy on IMDB at speed, means over seeds, and how far that is ahead of cut inputs, as docs/findings has it.

python -m ablation.show.means      prints the tables
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ablation.show.rows import OURS, cell_at, curves, is_main, load, title_of
from zsaa.kit import paper
from zsaa.kit.equal import ahead, at_equal_macs, control_rows, right, said
from zsaa.kit.figures.style import CUTS
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import mean_difference

SEEDS = ("", "-seed1", "-seed2")
COLUMNS = {  # result files, one per seed; control
    "recipe `zsaa+`": (tuple(f"ablation/imdb/wide-tau2{seed}" for seed in SEEDS), "alpha"),
    "`zsaa+` by adapters": (tuple(f"ablation/imdb/lora-crops{seed}-epochs5" for seed in SEEDS[:2]), "alpha"),
    "the paper's recipe, its settings": (("accuracy/imdb-alpha-sampled",), "alpha"),
    "the same at our learning rate": (("ablation/imdb/paper-faster",), "alpha"),
    "inputs cut to both ends": (tuple(f"ablation/imdb/truncated-ends-faster{seed}" for seed in SEEDS), "ends"),
    "inputs cut to the last tokens": (tuple(f"ablation/imdb/truncated-last-faster{seed}" for seed in SEEDS), "last"),
}


def means_table(results: Path = RESULTS):
    """A line per MAC reduction, a column per method: the mean accuracy of its seeds, with the 95% interval of the
    chance in the reviews (percentile bootstrap, all seeds together); cut inputs at just these MACs."""
    import pandas as pd

    lines = [{"MACs": f"{target}x"} for target in paper.TABLE_1]
    for name, (files, control) in COLUMNS.items():
        seeds = [json.loads((results / f"{file}.json").read_text(encoding="utf-8")) for file in files]
        title = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        for target, line in zip(paper.TABLE_1, lines):
            found = [right(at_equal_macs(control_rows(result, control), target)) for result in seeds]
            mean, (low, high) = mean_difference(found, [np.zeros(len(found[0]))])
            line[title] = f"{mean:.1f} [{low:.1f}, {high:.1f}]"
    for target, line in zip(paper.TABLE_1, lines):
        line["paper (GPT-2, at this speed-up)"] = f"{paper.TABLE_1[target]['IMDB']:.2f}"
    return pd.DataFrame(lines)


def cuts_table(results: Path = RESULTS, tasks: tuple[str, ...] = ("imdb", "depth", "rotten_tomatoes")):
    """A line per task: points by which the mean of our seeds is ahead of the best of all curves on cut inputs, of all
    their seeds, chosen at each MAC reduction on these texts; at our MACs, paired over the texts."""
    import pandas as pd

    lines = []
    for task in tasks:
        runs = [run for run in curves(load(results / "ablation", task)) if is_main(run[1])]
        ours = [result for _, result, _ in runs if result["row"] in OURS]
        cuts = [control_rows(result, control) for _, result, control in runs if control in CUTS]
        line = {"points ahead": f"`{task}`" if task == "depth" else title_of(task)}
        for target in [target for target in paper.TABLE_1 if target > 1]:
            mine = [cell_at(result, "alpha", target) for result in ours]
            there = [cell for rows in cuts if (cell := at_equal_macs(rows, mine[0]["mac_reduction"]))]
            best = max(there, key=lambda cell: cell["accuracy"])
            line[f"{target}x"] = said(ahead(mine, [best]))
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    for table in (means_table(), cuts_table()):
        print(table.to_markdown(index=False, disable_numparse=True), end="\n\n")
