"""Figure 2: accuracy, preserved activations and alpha against the speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsaa.kit import paper
from zsaa.kit.figures.style import DASHES, DATA_SETS, LORA, STYLE, dials
from zsaa.kit.labels import by_eq_2, status
from zsaa.kit.store import measured, over_seeds, rows_of


def figure_2(curves: Sequence[dict], lengths: Sequence[dict]):
    """Figure 2 against the speed-up: A, accuracy or F1 of the dial, of its controls at equal MACs, and of the paper's
    GPT-2; B, the share of hidden activations preserved; C, the alpha that gives it. Ours in MACs, the paper's by the
    clock. Returns the figure and its caption, which says what stands in for what, and what was not run.

    curves: results of kind "curve"; drawn are the dial and random keep after alpha-sampled fine-tuning, and inputs cut
    for the conventional model where there is one. lengths: results of kind "lengths"; those of Eq. 2 are drawn.
    """
    import matplotlib.pyplot as plt

    curves, lengths = over_seeds(curves), [r for r in lengths if by_eq_2(r)]
    sampled = [r for r in curves if r["recipe"]["method"] == "alpha-sampled"]
    dialled = dials(sampled)
    used: dict[str, None] = {}
    with plt.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8.5}):
        figure = plt.figure(figsize=(7.1, 4.1), layout="constrained")
        a, b, c = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
        for task, (column, colour, marker) in DATA_SETS.items():
            mark = {"color": colour, "marker": marker, "markersize": 4}
            published = [(t, row[column]) for t, row in paper.TABLE_1.items() if row.get(column) is not None]
            if published:
                a.plot(*zip(*published), **mark, linewidth=0.7, markerfacecolor="white", alpha=0.55)
            for result in (r for r in dialled if r["task"]["name"] == task and rows_of(r, "alpha")):
                rows = rows_of(result, "alpha")
                x = [r["mac_reduction"] for r in rows]
                dash = LORA if result["recipe"]["tuning"] == "lora" else "-"
                used["lora" if dash == LORA else "full"] = None
                a.plot(x, [measured(r) for r in rows], **mark, linewidth=1.6, linestyle=dash)
                a.fill_between(x, *zip(*(r["ci95"] for r in rows)), color=colour, alpha=0.15, linewidth=0)
            for control, dash in DASHES.items():
                method = "alpha-sampled" if control == "random" else "conventional"
                there = [r for r in curves if r["task"]["name"] == task]
                for result in [r for r in there if r["recipe"]["method"] == method] or there:
                    if not rows_of(result, control):
                        continue
                    rows = [r for r in rows_of(result, "alpha") if r["target"] == 1] + rows_of(result, control)
                    line = {"color": colour, "linestyle": dash, "linewidth": 1.2}
                    a.plot([r["mac_reduction"] for r in rows], [measured(r) for r in rows], **line)
                    used[control] = None
            for result in (r for r in lengths if r["task"]["name"] == task):
                dash = "-" if result["recipe"]["shape"] is None else (0, (4, 1.5))
                x = [r["mac_reduction"] for r in result["rows"]]
                for axis, field in ((b, "preserved"), (c, "alpha")):
                    axis.plot(x, [r[field] for r in result["rows"]], color=colour, linestyle=dash, linewidth=1.4)
                    coarse = [r for r in result["rows"] if r["target"] in paper.TABLE_1]
                    at = [r["mac_reduction"] for r in coarse], [r[field] for r in coarse]
                    axis.plot(*at, **mark, linestyle="none")
        a.set(title="A", ylabel="accuracy or F1 (%)")
        b.set(title="B", ylabel="hidden activations preserved", ylim=(0, 1.02))
        c.set(title="C", ylabel=r"$\alpha$", ylim=(0, 1.02))
        for axis in (a, b, c):
            axis.set(xlabel="speed-up")
            ticks = [t for t in paper.TABLE_1 if axis is a or t % 2]
            axis.set_xticks(ticks, [f"{t}x" for t in ticks])
        _figure_2_legends(figure, used, {r["recipe"]["shape"] for r in lengths})
    return figure, _figure_2_caption(sampled, lengths)


def _figure_2_legends(figure, used, shapes) -> None:
    from matplotlib.lines import Line2D

    sets = [Line2D([], [], color=k, marker=m, markersize=4, label=name) for name, k, m in DATA_SETS.values()]
    figure.legend(handles=sets, loc="outside lower center", ncols=5, fontsize=7)
    grey = {"color": "#444444", "linewidth": 1.4}
    names = {
        "first": "first tokens only",
        "last": "last tokens only",
        "ends": "both ends only",
        "random": "random keep",
    }
    trained = {"full": ("-", "A: dial, ours"), "lora": (LORA, "A: dial, ours (LoRA)")}
    kinds = [
        *(Line2D([], [], **grey, marker="o", markersize=4, linestyle=dash, label=name)
          for tuning, (dash, name) in trained.items() if tuning in used),
        Line2D([], [], color="#999999", linewidth=0.7, marker="o", markersize=4, markerfacecolor="white",
               label="A: dial, the paper's GPT-2"),
        *(Line2D([], [], **grey, linestyle=DASHES[c], label=f"A: {names[c]}") for c in DASHES if c in used),
    ]  # fmt: skip
    if None in shapes:
        kinds.append(Line2D([], [], **grey, label="B, C: our model"))
    if "gpt2" in shapes:
        kinds.append(Line2D([], [], **grey, linestyle=(0, (4, 1.5)), label="B, C: GPT-2's layers"))
    figure.legend(handles=kinds, loc="outside upper center", ncols=4, fontsize=7)


def _figure_2_caption(curves: Sequence[dict], lengths: Sequence[dict]) -> str:
    def missing(results: Sequence[dict]) -> str:
        there = {r["task"]["name"] for r in results}
        return ", ".join(name for task, (name, *_) in DATA_SETS.items() if task not in there) or "none"

    models = sorted({f"{Path(r['model']['name']).name} on {r['task']['name']}: {status(r)}" for r in curves})
    texts = sorted({f"{r['task']['name']} ({r['task']['source']}), cut by {r['model']['name']}" for r in lengths})
    return (
        f"Figure 2. Ours: speed-up in MACs, solved for each data set; bands are 95% intervals; {'; '.join(models)}. "
        f"Not run in A: {missing(curves)}. B and C follow from text lengths alone: {'; '.join(texts)}. "
        f"Not run in B and C: {missing(lengths)}."
    )
