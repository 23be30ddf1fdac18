"""From result files to figures. Nothing here computes a result: it only draws them.

python -m zsaa.figures      draws figures/ from the committed results (make figures)
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from zsaa import paper
from zsaa.results import RESULTS, by_eq_2, load_results, measured, over_seeds, rows_of, status, step_size, unpack
from zsaa.tables import CHANCE, choice_subject, perplexity_protocol, perplexity_subject, perplexity_way, threads

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey print together with the markers.
COLOURS = {
    "alpha": "#0072B2",
    "first": "#E69F00",
    "last": "#009E73",
    "ends": "#56B4E9",
    "random": "#CC79A7",
    "conventional": "#D55E00",
    "zsaa+": "#000000",
    "paper": "#555555",
}
# Figure 2: a colour and a marker for each data set, a dash for each control.
DATA_SETS = {
    "imdb": ("IMDB", "#0072B2", "o"),
    "mnli_matched": ("MNLIm", "#E69F00", "s"),
    "mnli_mismatched": ("MNLImm", "#D55E00", "D"),
    "rte": ("RTE", "#009E73", "^"),
    "qqp": ("QQP", "#CC79A7", "v"),
    "qnli": ("QNLI", "#56B4E9", "P"),
    "sst2": ("SST-2", "#000000", "X"),
    "mrpc": ("MRPC", "#882255", "*"),
    "rotten_tomatoes": ("Rotten Tomatoes", "#888833", "h"),
}
CUTS = {"first": ("^", "first tokens"), "last": ("v", "last tokens"), "ends": ("D", "both ends")}
LORA = (0, (8, 1.5))
DASHES = {"first": (0, (1, 1)), "last": (0, (4, 1.5)), "ends": (0, (4, 1, 1, 1)), "random": (0, (1, 3))}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "zsaa",  # the same figure gives the same file
}


def save_figure(figure, path: str | Path, caption: str | None = None) -> None:
    """`path`.png and `path`.svg, then closed; and `path`.txt, if it has a caption."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    if caption:
        path.with_suffix(".txt").write_text(caption + "\n")
    plt.close(figure)


def _line(axis, rows, style, name, interval=True):
    colour, marker, dashes = style
    x, y = [r["mac_reduction"] for r in rows], [measured(r) for r in rows]
    axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.5, linestyle=dashes, label=name)
    if interval:
        low, high = zip(*(r["ci95"] for r in rows))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _dials(results: Sequence[dict]) -> list[dict]:
    """The results whose dial is drawn: an adapter that was evaluated again has its curve in its own result already."""
    return [r for r in results if r.get("adapter") not in [other["name"] for other in results]]


def accuracy_figure(results: Sequence[dict], title: str, published: str | None = "IMDB"):
    """Accuracy against MAC reduction for one data set: the recipes and conventional fine-tuning under the dial, the
    conventional one (or what there is without it) on truncated inputs, tokens kept at random, and the paper's curve of
    another model (against its wall-clock speed-up). Where another recipe's dial goes further than the conventional one
    was asked to, its own truncated inputs go on from there, hollow. The title says how many samples the first result
    has."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
        titled = results[0]["provenance"]["eval_samples"]
        conventional = [
            r for r in results if (r["recipe"]["method"], r["recipe"]["tuning"]) == ("conventional", "full")
        ]
        cut_by = conventional or results
        far = max((r["target"] for c in cut_by for side in CUTS for r in rows_of(c, side)), default=0)
        floors = {r["recipe"].get("tau") for r in results}
        for result in results:
            method = result["recipe"]["method"]
            tuning = " (LoRA)" if result["recipe"]["tuning"] == "lora" else ""
            colour = COLOURS["alpha" if method == "alpha-sampled" else method]
            style = (colour, "o", ":" if tuning else "-")
            if result in _dials(results):
                floor = f" (tau = {result['recipe']['tau']})" if len(floors) > 1 else ""
                _line(axis, rows_of(result, "alpha"), style, f"{method}{tuning}, dial{floor}")
            if rows_of(result, "random"):
                n = rows_of(result, "random")[0]["n"]  # where it is not the title's
                name = f"{method}{tuning}, tokens kept at random" + (f" (n = {n})" if n != titled else "")
                marker = {"zsaa+": "D", "conventional": "P"}.get(method, "s")
                _line(axis, rows_of(result, "random"), (COLOURS["random"], marker, (0, (1, 2))), name)
            for side, (marker, how) in CUTS.items():
                name, rows = f"{method}{tuning}, {how} only", rows_of(result, side)
                if result in cut_by and rows:
                    _line(axis, rows_of(result, "alpha")[:1] + rows, (COLOURS[side], marker, "--"), name)
                elif rows := [r for r in rows if r["target"] > far]:
                    hollow = {"markersize": 4, "markerfacecolor": "white", "linewidth": 1, "linestyle": ":"}
                    x, y = [r["mac_reduction"] for r in rows], [measured(r) for r in rows]
                    axis.plot(x, y, color=COLOURS[side], marker=marker, label=name, **hollow)
        if published:
            points = [(t, row[published]) for t, row in paper.TABLE_1.items() if row[published] is not None]
            axis.plot(*zip(*points), color=COLOURS["paper"], marker="x", linewidth=1, linestyle="-.", markersize=5,
                      label=f"paper, {paper.TABLE_1_MODEL} (its speed-up)")  # fmt: skip
        axis.axhline(50, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        metric = "F1" if results[0]["task"]["metric"] == "f1" else "accuracy"
        axis.set(xlabel="MAC reduction", ylabel=f"{metric} (%)", title=title)
        reached = max(row["target"] for result in results for row in result["rows"])
        ticks = [t for t in paper.TABLE_1 if t <= reached]
        axis.set_xticks(ticks, [f"{t}x" for t in ticks])
        figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)
    return figure


def accuracy_figures(results: Sequence[dict]) -> dict:
    """One accuracy figure per data set that the results hold, by task name."""
    figures = {}
    for name, (title, *_) in DATA_SETS.items():
        if chosen := [r for r in over_seeds(results) if r["task"]["name"] == name]:
            model, n = chosen[0]["model"]["name"], chosen[0]["provenance"]["eval_samples"]
            title = f"{title}, {model}: {n} held-out samples, 95% intervals"
            if taught := chosen[0]["task"].get("training_substitute"):
                title += "\n" + textwrap.fill(f"trained on a substitute: {taught}", 75, break_on_hyphens=False)
            figures[name] = accuracy_figure(chosen, title, chosen[0]["task"]["paper_column"])
    return figures


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
    dials = _dials(sampled)
    used: dict[str, None] = {}
    with plt.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8.5}):
        figure = plt.figure(figsize=(7.1, 4.1), layout="constrained")
        a, b, c = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
        for task, (column, colour, marker) in DATA_SETS.items():
            mark = {"color": colour, "marker": marker, "markersize": 4}
            published = [(t, row[column]) for t, row in paper.TABLE_1.items() if row.get(column) is not None]
            if published:
                a.plot(*zip(*published), **mark, linewidth=0.7, markerfacecolor="white", alpha=0.55)
            for result in (r for r in dials if r["task"]["name"] == task and rows_of(r, "alpha")):
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


def perplexity_figure(results: Sequence[dict], columns: int = 2):
    """Perplexity per token over the stock model's (log scale) against MAC reduction, a panel per result: the dial by
    score, its controls, with 95% intervals of the paired ratio; and the paper's own ratios, against its speed-up."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = -(-len(results) // columns)
    styles = {
        "dial, column_sum": ("#0072B2", "o", "-"),
        "dial, column_mean": ("#56B4E9", "s", "-"),
        "last tokens only": (COLOURS["last"], "v", "--"),
        "both ends only": ("#CC79A7", "D", "--"),
        "first tokens only": (COLOURS["first"], "^", "--"),
        "random tokens": ("#D55E00", "P", ":"),
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, min(columns, len(results)), figsize=(5.2 if len(results) == 1 else 3.6 * columns, 2.9 * rows + 0.6),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[len(results) :]:
            axis.set_visible(False)
        named = {}
        for axis, result in zip(axes.flat, results):
            for name, (colour, marker, dashes) in styles.items():
                drawn = [r for r in result["rows"] if r["target"] == 1 or perplexity_way(r) == name]
                if len(drawn) < 2:
                    continue
                x, y = [r["mac_reduction"] for r in drawn], [r["ratio"] for r in drawn]
                low, high = zip(*(r["ratio_ci95"] for r in drawn))
                # A percentile interval may leave the estimate out by a hair.
                error = [[max(0, a - b) for a, b in zip(y, low)], [max(0, b - a) for a, b in zip(y, high)]]
                named[name] = axis.errorbar(
                    x, y, yerr=error, color=colour, marker=marker, markersize=4, linewidth=1.4, capsize=2,
                    elinewidth=0.8, linestyle=dashes,
                )  # fmt: skip
            column = result["task"]["paper_column"]
            ratios = [row[column] / paper.TABLE_2[1][column] for row in paper.TABLE_2.values()]
            named[f"paper, {paper.TABLE_2_MODEL}, on its corpus (its TTFT speed-up)"] = axis.plot(
                list(paper.TABLE_2),
                ratios,
                color=COLOURS["paper"],
                marker="x",
                linewidth=1,
                linestyle="-.",
                markersize=5,
            )[0]
            axis.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
            measured, *text = perplexity_subject(result).split("; ")
            counted = f"{measured}, n = {result['rows'][0]['n']}"
            whole = next(r["perplexity"] for r in rows_of(result, "alpha") if r["target"] == 1)
            lines = counted, *text, *perplexity_protocol(result).split("; "), f"stock: {whole:.1f}"
            axis.set_title("\n".join(lines), fontsize=8)
            axis.set(yscale="log", xlabel="MAC reduction")
            axis.set_ylabel("perplexity per token / stock\n(bars: 95%)", fontsize=7.5)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            low, high = axis.get_ylim()
            tens = [10.0**e for e in range(-3, 40, 1 if high < 1e5 * low else 3)]  # untuned, carry-through blows up
            steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
            axis.set_yticks([t * s for t in tens for s in steps if low <= t * s <= high])
            axis.set_xticks(ticks := sorted({r["target"] for r in result["rows"]} | set(paper.TABLE_2)))
            axis.set_xticklabels([f"{t:g}x" for t in ticks])
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=7.5)
    return figure


def longest(results: Sequence[dict]) -> list[dict]:
    """Of results of the kind "perplexity" whose trainings differ in their length alone, the one that saw most."""
    found: dict[tuple, dict] = {}
    for result in results:
        recipe, protocol = result["recipe"], result["protocol"]["name"]
        trained = recipe["method"], recipe["tuning"], recipe.get("seed"), by_eq_2(result)
        key = (result["model"]["name"], result["task"]["name"], protocol, *trained)
        if key not in found or _seen(result) > _seen(found[key]):
            found[key] = result
    return list(found.values())


def _seen(result: dict) -> int:
    """Samples that a training took, each as often as it came."""
    return result["train"]["steps"] * step_size(result) if result.get("train") else 0


def speed_figure(results: Sequence[dict], title: str):
    """Measured speed-up against the MAC reduction of the timed batch, per device and batch size, for the dial; the
    grey diagonal is what the MACs promise."""
    import matplotlib.pyplot as plt

    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
        top, drawn = 1.0, 0
        for result in results:
            rows = [r for r in rows_of(result, "alpha") if r.get("speedup")]
            for batch in sorted({r["latency_batch"] for r in rows}):
                part = [r for r in rows if r["latency_batch"] == batch]
                device = result["provenance"]["hardware"]["device"]
                cores = threads(result["provenance"]["hardware"]["threads"])
                device = f"CPU, {cores}" if device == "cpu" else device.split(" 80GB")[0]
                x, y = [r["latency_mac_reduction"] for r in part], [r["speedup"] for r in part]
                name = f"{device},\nbatch {batch} of {part[0]['latency_tokens']} tokens"
                style = dict(color=palette[drawn % len(palette)], marker="os^vDP"[drawn % 6], markersize=4)
                axis.plot(x, y, label=name, **style)
                top, drawn = max(top, *x), drawn + 1
        axis.plot([1, top], [1, top], color="#999999", linewidth=0.8, linestyle="--", label="what the MACs promise")
        axis.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.set(xlabel="MAC reduction of the timed batch", ylabel="measured speed-up over stock", title=title)
        axis.set(xscale="log", yscale="log")
        ticks = [t for t in (0.5, 1, 2, 3, 5, 7, 10, 15, 20) if t <= top * 1.3]
        axis.set_xticks([t for t in ticks if t >= 1], [f"{t:g}x" for t in ticks if t >= 1])
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        figure.legend(fontsize=7.5, loc="outside right center")
    return figure


def prefill_figure(results: Sequence[dict]):
    """Benchmarks of prefills (kind "bench-prefill"), one line per model, length and batch. Left: speed-up over stock
    against MAC reduction, and the roofline's (dotted: weights must be read, whatever alpha). Middle: the measured
    speed-up as a share of the roofline's. Right: memory of activations, cache and CUDA graphs, over stock's.
    Hollow: the control with PyTorch's own kernels between the products ("fused": false)."""
    import matplotlib.pyplot as plt

    lines: dict[tuple, list[dict]] = {}
    controls: dict[tuple, list[dict]] = {}
    for result in results:
        for row in result["rows"]:
            shape = row["model"], row["tokens"], row["batch"]
            if result.get("fused", True):
                lines.setdefault(shape, []).append(row)
            elif row["alpha"] < 1:
                controls.setdefault(shape, []).append(row)
    top = max(row["mac_reduction"] for rows in lines.values() for row in rows)
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
    with plt.rc_context(STYLE):
        figure, (speed, realised, memory) = plt.subplots(1, 3, figsize=(10.2, 3.3), layout="constrained")
        for number, ((model, tokens, batch), rows) in enumerate(sorted(lines.items())):
            rows = sorted(rows, key=lambda r: r["mac_reduction"])
            x, stock = [r["mac_reduction"] for r in rows], rows[0]
            style = dict(color=palette[number % 8], marker="os^vDPX*"[number % 8], markersize=4, linewidth=1.3)
            speed.plot(x, [r["speedup"] for r in rows], label=f"{model}, {batch} x {tokens} tokens", **style)
            speed.plot(x, [r["roofline_speedup"] for r in rows], color=style["color"], linewidth=0.9, linestyle=":")
            realised.plot(x, [r["realised"] for r in rows], **style)
            hollow = {**style, "linestyle": "none", "markerfacecolor": "white", "zorder": 3}
            for axis, field in ((speed, "speedup"), (realised, "realised")):
                plain = controls.get((model, tokens, batch), [])
                axis.plot([r["mac_reduction"] for r in plain], [r[field] for r in plain], **hollow)
            if all(r["peak_bytes"] for r in rows):
                held = [r["peak_bytes"] + (r["graph_bytes"] or 0) for r in rows]
                memory.plot(x, [bytes_ / stock["peak_bytes"] for bytes_ in held], **style)
        for axis, name in (
            (speed, "speed-up over stock (dotted: roofline)"),
            (realised, "speed-up, measured / roofline"),
            (memory, "memory without weights, over stock"),
        ):
            ticks = [t for t in (1, 2, 5, 10, 20, 50) if t <= 1.2 * top]
            axis.set(xscale="log", xlabel="MAC reduction", title=name)
            axis.set_xticks(ticks, [f"{t}x" for t in ticks])
            axis.minorticks_off()
        speed.set(yscale="log")
        speed.set_yticks([1, 2, 5, 10], ["1x", "2x", "5x", "10x"])
        realised.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        realised.set(ylim=(0, None))
        memory.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        memory.set(yscale="log")
        memory.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        memory.minorticks_off()
        if controls:
            plain = {"color": "#555555", "markerfacecolor": "white", "linestyle": "none"}
            speed.plot(
                [], [], marker="o", markersize=4, label="hollow: PyTorch's kernels between the products", **plain
            )
        figure.legend(fontsize=7.5, loc="outside lower center", ncols=3)
    return figure


def memory_and_training_figure(memory: Sequence[dict], training: Sequence[dict]):
    """Left (kind "bench-memory"): peak memory of a prefill on top of the weights, and in it the cache, against the
    length. Right (kind "bench-train"): a training step with alpha drawn from its range, over one at alpha = 1; the tick
    is what the MACs promise."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (held, steps) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained", width_ratios=(1.1, 1))
        measured = [row for result in memory for row in result["rows"]]
        lines = sorted({(row["model"], row["alpha"]) for row in measured}, key=lambda line: (line[0], -line[1]))
        for (model, alpha), colour, marker in zip(lines, ("#555555", "#0072B2", "#D55E00", "#009E73"), "so^v"):
            rows = sorted(
                (r for r in measured if (r["model"], r["alpha"]) == (model, alpha)), key=lambda r: r["tokens"]
            )
            x, name = [r["tokens"] for r in rows], "stock" if alpha == 1 else rf"$\alpha$ = {alpha:g}"
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            held.plot(x, [r["peak_bytes"] / 1e9 for r in rows], **style, label=f"{name}: peak")
            held.plot(x, [r["kv_bytes"] / 1e9 for r in rows], **style, linestyle=":", label=f"{name}: cache in it")
        held.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="GB on top of the weights")
        ticks = sorted({row["tokens"] for row in measured})
        held.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7.5)
        held.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        held.minorticks_off()
        held.set(title=f"memory, {', '.join(dict.fromkeys(model for model, _ in lines))}")
        held.legend(fontsize=7.5)
        rows = [row for result in training for row in result["rows"]][::-1]
        for y, row in enumerate(rows):
            ratio = row["sampled_over_conventional"]
            colour = "#0072B2" if ratio < 1 else "#E69F00"
            steps.barh(y, ratio, height=0.55, color=colour)
            steps.plot([row["ideal"]] * 2, [y - 0.38, y + 0.38], color="#000000", linewidth=2)
            steps.text(0.55, y, f"{ratio:.2f}", va="center", ha="center", fontsize=9, fontweight="bold", color="white")
        steps.axvline(1, color="#555555", linewidth=0.9, linestyle="--")
        names = [f"{row['model']}\n{row['batch']} x {row['tokens']}" for row in rows]
        steps.set_yticks(range(len(rows)), names, fontsize=8)
        steps.grid(axis="y", visible=False)
        drawn = ", ".join(dict.fromkeys(rf"$\alpha$ ~ U({row['low']:g}, {row['high']:g})" for row in rows))
        steps.set(title=f"training step, {drawn}", xlabel=r"time / step at $\alpha$ = 1 (tick: MACs)", xlim=(0, 1.3))
    return figure


def attention_figure(results: Sequence[dict]):
    """Benchmarks of attention with scores (kind "bench-attention"): milliseconds in multiples of PyTorch's attention
    alone, a group of bars per shape."""
    import matplotlib.pyplot as plt

    shown = {"attend_and_score": "zsaa: attention and scores", "flash + sums": "flash attention and scores",
             "torch backend": "without kernels"}  # fmt: skip
    groups: dict[str, dict[str, float]] = {}
    for result in results:
        for row in result["rows"]:
            name = f"heads {row['heads']}/{row['kv_heads']}\nof {row['dim']}\n{row['tokens']} tokens"
            groups.setdefault(name, {})[row["variant"]] = row["over_sdpa"]
    with plt.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
        for number, (variant, name) in enumerate(shown.items()):
            places = [i + 0.27 * (number - 1) for i, g in enumerate(groups.values()) if variant in g]
            heights = [g[variant] for g in groups.values() if variant in g]
            colour, hatch = ("#0072B2", "#E69F00", "#999999")[number], ("", "//", "..")[number]
            bars = axis.bar(places, heights, width=0.25, color=colour, hatch=hatch, edgecolor="white", label=name)
            axis.bar_label(bars, fmt="%.2f" if number < 2 else "%.0f", fontsize=6.5, padding=1)
        axis.axhline(1, color="#000000", linewidth=0.8, linestyle="--")
        axis.set(ylabel="time / PyTorch's attention alone", yscale="log")
        axis.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
        axis.minorticks_off()
        axis.set_xticks(range(len(groups)), groups, fontsize=7)
        figure.legend(fontsize=7.5, loc="outside upper center", ncols=3)
    return figure


def preservation_figure(kept: dict[float, list[list[int]]], tokens: Sequence[str], columns: int = 2):
    """Figure 3: which tokens each layer keeps, one panel per alpha.

    kept: alpha -> per layer the kept positions; tokens: the text, one string per position. Blue: kept; white: dropped
    (here or below). The red line counts the kept tokens of each layer, on the same axis as the positions.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns
    from matplotlib.colors import ListedColormap

    n, layers = len(tokens), len(next(iter(kept.values())))
    rows = -(-len(kept) // columns)
    labels = n <= 64
    with plt.rc_context({**STYLE, "axes.grid": False}):
        panel = (0.15 * n + 0.6, 0.11 * layers + 1.3) if labels else (5.2, 2.6)
        figure, axes = plt.subplots(
            rows, columns, figsize=(panel[0] * columns, panel[1] * rows), squeeze=False, layout="constrained"
        )
        for axis, (alpha, per_layer) in zip(axes.flat, kept.items()):
            grid = np.zeros((layers, n))
            for layer, positions in enumerate(per_layer):
                grid[layer, positions] = 1
            sns.heatmap(
                grid, ax=axis, cmap=ListedColormap(["white", "#4C8BC0"]), cbar=False, vmin=0, vmax=1,
                rasterized=True, linewidths=0.3 if labels else 0, linecolor="#E5E5E5",
                xticklabels=False, yticklabels=False,
            )  # fmt: skip
            counts = [len(positions) for positions in per_layer]
            axis.plot(counts, np.arange(layers) + 0.5, color="#C8102E", linewidth=1.6)
            share = sum(counts) / (layers * n)
            axis.set_title(rf"$\alpha$ = {alpha:g}: {share:.0%} of token-layers kept, {counts[-1]} of {n} at the top")
            axis.set_ylabel("layer")
            ticks = [0, *range(4, layers, 5)] if layers > 12 else range(layers)
            axis.set_yticks([t + 0.5 for t in ticks], [t + 1 for t in ticks], rotation=0)
            if labels:
                axis.set_xticks(np.arange(n) + 0.5, [t.strip() or repr(t) for t in tokens], rotation=90, fontsize=6.5)
            else:
                places = np.linspace(0, n - 1, 6, dtype=int)
                axis.set_xticks(places + 0.5, places, rotation=0)
                axis.set_xlabel("token position")
            for spine in axis.spines.values():
                spine.set(visible=True, color="#888888", linewidth=0.6)
        for axis in axes.flat[len(kept) :]:
            axis.set_visible(False)
        figure.legend(
            handles=[
                plt.Rectangle((0, 0), 1, 1, color="#4C8BC0", label="kept"),
                plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", label="dropped"),
                plt.Line2D([], [], color="#C8102E", label="number of kept tokens"),
            ],
            loc="outside lower center", ncols=3,
        )  # fmt: skip
    return figure


PRINTED_ERROR = {"xerr": 0.005, "fmt": "s", "color": COLOURS["paper"], "markersize": 4, "capsize": 2, "linewidth": 1}


def choice_figure(results: Sequence[dict], columns: int = 2):
    """Score of a four-way choice, MMLU or its substitute, against the MAC reduction of the prefill: a panel for each
    result (kind "choice"), the dial, its controls, and chance."""
    import matplotlib.pyplot as plt

    looks = {
        "alpha": ("dial", COLOURS["alpha"], "o", "-"),
        "printed": ("dial at the paper's printed alphas", COLOURS["paper"], "s", ":"),
        "last": ("last tokens only", COLOURS["last"], "v", "--"),
        "random": ("dial, tokens kept by lot", COLOURS["conventional"], "x", "-."),
    }
    with plt.rc_context(STYLE):
        shared = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
        rows, columns = -(-len(results) // columns), min(columns, len(results))
        figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns + 0.3, 2.6 * rows + 0.7), **shared)
        for axis in axes.flat[len(results) :]:
            axis.set_visible(False)
        handles = {}
        for axis, result in zip(axes.flat, results):
            whole = rows_of(result, "alpha")[:1]
            for control, (name, colour, marker, dashes) in looks.items():
                rows = rows_of(result, control)
                rows = rows if control == "alpha" else sorted(whole + rows, key=lambda r: r["mac_reduction"])
                if len(rows) > 1 or (control == "alpha" and rows):
                    _line(axis, rows, (colour, marker, dashes), name, interval=control in ("alpha", "last"))
            for handle, name in zip(*axis.get_legend_handles_labels()):
                handles.setdefault(name, handle)
            axis.axhline(CHANCE, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
            axis.annotate(  # beside the panel, as some results lie on that line
                "chance", (1, CHANCE), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                fontsize=7, color="#777777", va="center",
            )  # fmt: skip
            task = result["task"]
            how = {"letters": "letters", "text": "answers' own words"}[task["form"]]
            shown = f"{how}, {task['shots']} shots, n = {whole[0]['n']}"
            about = task["name"] + " (a substitute)" * task["substitute"]
            axis.set_title("\n".join((*choice_subject(result).split("; "), about, shown)), fontsize=8)
            axis.set_xlabel("MAC reduction")
            axis.tick_params(labelbottom=True)
        ticks = sorted({r["target"] for result in results for r in rows_of(result, "alpha")})
        axes.flat[0].set_xticks(ticks, [f"{t}x" for t in ticks])
        axes.flat[0].set(ylabel="score (%), bands: 95%", ylim=(min(18, axes.flat[0].get_ylim()[0]), None))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def footprint_figure(results: Sequence[dict], storage: str = "nf4"):
    """Table 3's footprint (kind "footprint"): by how much a prefill's peak memory on top of the weights shrinks,
    against the MAC reduction, a panel per model and a line per prompt length; hollow where alpha is as the paper prints
    it, filled where Eq. 2 gives the paper's reduction. Grey squares: the paper's. Dotted: the cache alone, at the
    longest. Where `storage` was not measured, the first that was. Returns figure and caption, or None without peaks."""
    import matplotlib.pyplot as plt

    measured = [row for result in results for row in result["rows"] if row["peak_bytes"] and row["control"] != "all"]
    if not measured:
        return None
    held = list(dict.fromkeys(row["storage"] for row in measured))
    storage = storage if storage in held else held[0]
    measured = [row for row in measured if row["storage"] == storage]
    names = {"llama3-8b": "LLaMA-3-8B-4bit", "gemma2-2b": "Gemma-2-2B-4bit"}
    models = list(dict.fromkeys(row["model"] for row in measured))
    lengths = sorted({(row["tokens"], row["batch"]) for row in measured})
    palette, markers = ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"), "os^vDP"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(3.4 * len(models), 3.3), layout="constrained", sharey=True, squeeze=False
        )
        named = {}
        for axis, model in zip(axes.flat, models):
            for number, (tokens, batch) in enumerate(lengths):
                rows = [r for r in measured if (r["model"], r["tokens"], r["batch"]) == (model, tokens, batch)]
                rows.sort(key=lambda row: row["mac_reduction"])
                style = {"color": palette[number % 6], "marker": markers[number % 6], "markersize": 4.5}
                x, y = ([row[key] for row in rows] for key in ("mac_reduction", "footprint_reduction"))
                name = f"{tokens} tokens" + (f", batch {batch}" if batch > 1 else "")
                (named[name],) = axis.plot(x, y, **style, linewidth=1.3)
                hollow = [row for row in rows if row["control"] == "printed"]
                x, y = ([row[key] for row in hollow] for key in ("mac_reduction", "footprint_reduction"))
                axis.plot(x, y, **style, linestyle="none", markerfacecolor="white")
            if rows:
                stock = max(row["kv_bytes"] for row in rows)
                x, y = [row["mac_reduction"] for row in rows], [stock / row["kv_bytes"] for row in rows]
                (named[f"cache alone, {tokens} tokens"],) = axis.plot(x, y, color="#000000", linestyle=":", linewidth=1)
            if model in names:
                printed = paper.TABLE_3[names[model]]
                (named["printed in Table 3"],) = axis.plot(
                    list(printed), [row["GPU footprint"] for row in printed.values()], "s--", color=COLOURS["paper"],
                    markersize=5, linewidth=1,
                )  # fmt: skip
            axis.set(title=f"{model}, {storage}", xlabel="MAC reduction")
            axis.set_xticks([1, 1.5, 2.5, 3.5], ["1x", "1.5x", "2.5x", "3.5x"])
        axes.flat[0].set_ylabel("footprint reduction")
        axes.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8)
    devices = ", ".join(dict.fromkeys(result["provenance"]["hardware"]["device"] for result in results))
    return figure, (
        f"Table 3's footprint: peak memory of a prefill on top of the weights, stock over dial, at the models' true "
        f"shapes with random weights, {storage}, {devices}. Hollow: alpha as the paper prints it; filled: as Eq. 2 "
        "needs it for 1.5x, 2.5x and 3.5x. The paper gives no prompt length."
    )


def audit_reductions_figure(audit: dict):
    """Table 3's printed reductions (squares; bars: alpha's rounding) beside what Eq. 2 and alpha^3 make of alpha."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in audit["rows"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(models), figsize=(6.8, 3.1), layout="constrained", sharey=True)
        for axis, model in zip(axes, models):
            curve = [row for row in audit["curves"] if row["model"] == model]
            for key, name, dashes in (("eq2", "Eq. 2", "-"), ("cubed", r"inferred: $\alpha^3$ in every layer", "--")):
                colour = COLOURS["alpha" if key == "eq2" else "conventional"]
                axis.plot([r["alpha"] for r in curve], [r[key] for r in curve], dashes, color=colour, label=name)
            printed = [row for row in audit["rows"] if row["model"] == model]
            axis.errorbar([r["alpha"] for r in printed], [r["reduction"] for r in printed], label="printed in Table 3",
                          **PRINTED_ERROR)  # fmt: skip
            axis.set(title=model, xlabel=r"$\alpha$", ylim=(0.9, 4.5))
            axis.invert_xaxis()
        axes[0].set_ylabel("MAC reduction")
        axes[0].legend(fontsize=8, loc="upper left")
    return figure


def audit_exponents_figure(audit: dict):
    """The k with which alpha^k per layer gives each printed reduction; bars: the rounding of both printed numbers."""
    import matplotlib.pyplot as plt

    rows = audit["exponents"][::-1]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 2.7), layout="constrained")
        for y, row in enumerate(rows):
            style = {"color": COLOURS["alpha" if row["model"].startswith("LLaMA") else "last"], "linewidth": 1.6}
            axis.plot([row["low"], row["high"]], [y, y], **style)
            axis.plot(row["k"], y, "o", markersize=5, color=style["color"])
        names = [f"{row['model'].removesuffix('-4bit')}: {row['reduction']}x at {row['alpha']}" for row in rows]
        axis.set_yticks(range(len(rows)), names)
        low, high = max(row["low"] for row in rows), min(row["high"] for row in rows)
        if low < high:
            axis.axvspan(low, high, color=COLOURS["conventional"], alpha=0.18, linewidth=0)
            axis.annotate("fits all six", ((low + high) / 2, len(rows) - 0.45), ha="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.annotate("Eq. 2", (1.08, len(rows) - 0.45), fontsize=8)
        axis.set(xlabel=r"k, where each layer keeps $\alpha^k$ of its tokens", xlim=(0.5, 7.5), ylim=(-0.6, len(rows)))
    return figure


def audit_reach_figure(audit: dict):
    """How far Eq. 2 with tau = 5 can reduce GPT-2's MACs, by length of the input, and what the tables' largest printed
    speed-ups need."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.3), layout="constrained")
        axis.plot([r["tokens"] for r in audit["most"]], [r["reduction"] for r in audit["most"]], color=COLOURS["alpha"])
        places: dict[tuple, list[str]] = {}
        for row in audit["reach"]:
            places.setdefault((row["tokens"], row["speed-up"]), []).append(row["column"])
        for (tokens, times), columns in places.items():
            axis.plot(tokens, times, "o", color=COLOURS["conventional"], markersize=5)
            axis.annotate(f"{times}x: {', '.join(columns)}\nneeds {tokens} tokens", (tokens, times), xytext=(9, -11),
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        axis.set(xlabel="tokens of an input", ylabel="largest MAC reduction", xlim=(0, 128), ylim=(0, 15))
    return figure


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw every figure that the committed results hold into `folder` (the repository's figures/); returns the PNGs."""
    curves, times = load_results(RESULTS, kind="curve"), load_results(RESULTS, kind="latency")
    figures = {}
    figures |= {f"accuracy_{name}": figure for name, figure in accuracy_figures(curves).items()}
    captions = {}
    if lengths := load_results(RESULTS, kind="lengths"):
        figures["figure2"], captions["figure2"] = figure_2(curves, lengths)
    if times:
        figures["speed"] = speed_figure(times, "Forward pass, SmolLM2-135M: measured speed-up")
    for name, draw in (("prefill", prefill_figure), ("attention", attention_figure)):
        if benchmarks := load_results(RESULTS / "h100", kind=f"bench-{name}"):
            figures[f"h100_{name}"] = draw(benchmarks)
    memory, training = (load_results(RESULTS / "h100", kind=f"bench-{name}") for name in ("memory", "train"))
    if memory and training:
        figures["h100_memory_training"] = memory_and_training_figure(memory, training)
    for result in load_results(RESULTS, kind="preservation"):
        for row, suffix in zip(result["rows"], ("", "_words")):
            kept, tokens = unpack(row)
            figures[f"preservation{suffix}"] = preservation_figure(kept, tokens, columns=1 if suffix else 2)
    if perplexities := load_results(RESULTS, kind="perplexity"):
        figures["perplexity"] = perplexity_figure(longest(perplexities))
    choices = load_results(RESULTS, kind="choice")
    for name, substitute in (("mmlu", False), ("choice", True)):
        if drawn := [r for r in choices if r["task"]["substitute"] == substitute]:
            figures[name] = choice_figure(drawn)
    if drawn := footprint_figure(load_results(RESULTS, kind="footprint")):
        figures["footprint"], captions["footprint"] = drawn
    for audit in load_results(RESULTS, kind="audit"):
        figures["audit_table3"] = audit_reductions_figure(audit)
        figures["audit_exponents"] = audit_exponents_figure(audit)
        figures["audit_reach"] = audit_reach_figure(audit)
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name, captions.get(name))
    return [Path(folder) / f"{name}.png" for name in figures]


if __name__ == "__main__":
    for drawn in draw_committed(RESULTS.parent / "figures"):
        print(drawn)
