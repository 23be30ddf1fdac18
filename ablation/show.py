"""From the ablation's result files to tables, paired tests and figures. Nothing here computes a result.

python -m ablation.show      draws figures/ablation_*.png from results/ablation (part of make figures)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from zsaa.figures import COLOURS, DATA_SETS, STYLE, save_figure
from zsaa.results import RESULTS, from_bits, with_interval
from zsaa.stats import difference

NOT_RUN = "not run"


def _title(task: str) -> str:
    return "A verdict at a random depth" if task == "depth" else DATA_SETS.get(task, (task,))[0]


def load(folder: str | Path, task: str) -> dict[str, dict]:
    """Result files of one task by row; of several seeds or budgets of a row, each under its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder, task).glob("*.json"))}


def _cell(result: dict, control: str, target: float) -> dict | None:
    return next((r for r in result["rows"] if (r["control"], r["target"]) == (control, target)), None)


def _curves(results: dict[str, dict]):
    """(name, result, control) of every curve."""
    for name, result in results.items():
        for control in dict.fromkeys(r["control"] for r in result["rows"]):
            yield (name if control == "alpha" else f"{name}, {control} tokens"), result, control


def accuracy_table(results: dict[str, dict], targets: Sequence[float], rows: dict[str, dict]):
    """One line per curve: accuracy and interval at each MAC reduction, training compute and time; rows of the
    configuration without a result file say so."""
    import pandas as pd

    lines = []
    for name, result, control in _curves(results):
        cells = {f"{t:g}x": _cell(result, control, t) for t in targets}
        log = result["log"]
        lines.append(
            {"row": name, **{t: with_interval(cell) if cell else "-" for t, cell in cells.items()},
             "training MACs (epochs)": log["epochs_of_compute"], "GPU minutes": round(log["seconds"] / 60, 1),
             "what it shows": result["about"]}
        )  # fmt: skip
    ran = {result["row"] for result in results.values()}
    for name, row in rows.items():
        if name not in ran:
            cells = dict.fromkeys((f"{t:g}x" for t in targets), NOT_RUN)
            cost = {"training MACs (epochs)": "-", "GPU minutes": "-"}
            lines.append({"row": name, **cells, **cost, "what it shows": row["about"]})
    return pd.DataFrame(lines)


def paired_table(results: dict[str, dict], targets: Sequence[float], against: str = "paper"):
    """Points by which each curve is ahead of the row `against` on the same held-out texts, with the 95% interval of a
    paired bootstrap, and a star where it leaves out 0; against="truncation" takes at each target the best of the
    curves that read truncated inputs. None where `against` was not run."""
    import pandas as pd

    curves = list(_curves(results))
    lines = []
    for name, result, control in curves:
        line: dict = {"row": name}
        for target in targets:
            cell, rivals = _cell(result, control, target), []
            for other, rival, side in curves:
                if (side != "alpha" and target > 1) if against == "truncation" else other == against:
                    rivals.append(_cell(rival, side, target))
            rivals = [r for r in rivals if r is not None and cell is not None and r["n"] == cell["n"]]
            if not rivals or cell is None:
                line[f"{target:g}x"] = "-"
                continue
            best = max(rivals, key=lambda r: r["accuracy"])
            n = cell["n"]
            gain, (low, high) = difference(
                "accuracy", [1] * n, from_bits(cell["right"], n), from_bits(best["right"], n)
            )
            line[f"{target:g}x"] = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]" + ("*" if low > 0 or high < 0 else "")
        lines.append(line)
    table = pd.DataFrame(lines)
    return table if len(table) and (table.drop(columns="row") != "-").any(axis=None) else None


def accuracy_figure(results: dict[str, dict], title: str, names: Sequence[str] | None = None):
    """Accuracy against MAC reduction, a line per curve (those of `names`, default all); truncated inputs dashed."""
    import matplotlib.pyplot as plt

    palette = [*COLOURS.values(), "#CC79A7", "#56B4E9", "#F0E442"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        curves = [curve for curve in _curves(results) if names is None or curve[1]["row"] in names]
        for number, (name, result, control) in enumerate(curves):
            rows = sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])
            axis.plot(
                [r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows], markersize=3.5, linewidth=1.2,
                color=palette[number % len(palette)], marker="o^vsDPX*"[number % 8], label=name,
                linestyle="-" if control == "alpha" else "--",
            )  # fmt: skip
        axis.set(xlabel="MAC reduction", ylabel="accuracy (%)", title=title)
        figure.legend(fontsize=7, loc="outside right upper")
    return figure


# ---------------------------------------------------------------------------------------------- a bag of words


def words_figure(results: Sequence[dict]):
    """Accuracy of a bag of words on the tokens that each rule keeps, a panel per task; dashed: on whole texts."""
    import matplotlib.pyplot as plt

    style = {"salient": ("#0072B2", "o"), "last": ("#009E73", "v"), "ends": ("#CC79A7", "D"), "first": ("#E69F00", "^"),
             "random": ("#555555", "x")}  # fmt: skip
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(results), figsize=(3.3 * len(results) + 0.6, 3.0), squeeze=False, layout="constrained"
        )
        for axis, result in zip(axes.flat, results):
            whole = next(r for r in result["rows"] if r["control"] == "whole")
            axis.axhline(whole["accuracy"], color="#000000", linewidth=0.8, linestyle="--")
            for rule, (colour, marker) in style.items():
                rows = [whole, *(r for r in result["rows"] if r["control"] == rule)]
                x, y = [r["target"] for r in rows], [r["accuracy"] for r in rows]
                axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.3, label=rule)
                low, high = zip(*(r["ci95"] for r in rows))
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            ticks = [1, *sorted({r["target"] for r in result["rows"]} - {1})]
            axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
            axis.set(
                xlabel="as many tokens as truncation to", title=f"{_title(result['task']['name'])}, n = {whole['n']:,}"
            )
        axes[0, 0].set_ylabel("accuracy (%)")
        axes[0, 0].legend(fontsize=7.5, title="tokens kept", title_fontsize=7.5)
    return figure


# ------------------------------------------------------------------------------------------------- continuation


def continuation_table(result: dict):
    """Per variant and MAC reduction: agreement, perplexity, and how much worse (+) than truncation on the same windows:
    mean difference in nats per token with its standard error."""
    import pandas as pd

    lines, stock = [], next(r for r in result["rows"] if r["variant"] == "stock")
    for row in result["rows"]:
        rival = next((r for r in result["rows"] if r["variant"] == "truncation" and r["target"] == row["target"]), None)
        apart = "-"
        if rival is not None and rival is not row:
            differences = [a - b for a, b in zip(row["nll"], rival["nll"])]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            apart = f"{statistics.fmean(differences):+.3f} ± {error:.3f}"
        lines.append(
            {"variant": row["variant"], "MACs": f"{row['mac_reduction']:.2f}x", "agreement (%)": row["agreement"],
             "perplexity": round(row["perplexity"], 1), "over stock": f"{row['perplexity'] / stock['perplexity']:.3f}x",
             "nats over truncation": apart, "n": row["n"]}
        )  # fmt: skip
    return pd.DataFrame(lines)


def continuation_figure(result: dict, worst: float = 3.0):
    """Perplexity over stock against MAC reduction, a line per variant, log scale; what is beyond `worst` is named below
    the legend instead of drawn."""
    import matplotlib.pyplot as plt

    stock = next(r["perplexity"] for r in result["rows"] if r["variant"] == "stock")
    lines: dict[str, list] = {}
    for row in result["rows"]:
        if row["variant"] != "stock":
            lines.setdefault(row["variant"], []).append((row["mac_reduction"], row["perplexity"] / stock))
    palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.6, 3.6), layout="constrained")
        beyond = []
        for number, (name, points) in enumerate(sorted(lines.items(), key=lambda item: item[1][-1][1])):
            if max(y for _, y in points) > worst:
                beyond.append(name)
                continue
            plain = name == "truncation"
            axis.plot(
                *zip(*points), label=name, markersize=4, linewidth=2.2 if plain else 1.2,
                color="black" if plain else palette[number % 6], marker="os^vDPX*"[number % 8],
                linestyle="--" if plain else ("-", "-.")[number // 6 % 2],
            )  # fmt: skip
        axis.set(xlabel="MAC reduction of the prompt", ylabel="perplexity over stock", yscale="log")
        axis.set_title(f"Untuned {result['model']['name']}: {result['rows'][0]['n']} held-out reviews")
        ticks = [t for t in (1, 1.1, 1.2, 1.5, 2, 2.5, 3) if t <= worst]
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        note = f"beyond {worst:g}x: {', '.join(beyond)}" if beyond else None
        figure.legend(fontsize=7.5, loc="outside right upper", title=note, title_fontsize=7, alignment="left")
    return figure


def survival_figure(depths: dict[str, list[float]], words: Sequence[str], title: str):
    """How far each token of a text goes under each score: a row of cells per score (depths: name -> share of the layers
    that each token reaches), the text below."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(0.13 * len(words) + 1.6, 0.24 * len(depths) + 1.2), layout="constrained")
        picture = axis.imshow(list(depths.values()), aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axis.set_yticks(range(len(depths)), depths)
        axis.set_xticks(range(len(words)), [w.strip() or "·" for w in words], rotation=90, fontsize=6)
        axis.set_title(title)
        figure.colorbar(picture, label="share of layers", shrink=0.8, pad=0.01)
    return figure


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw what results/ablation holds into `folder` (the repository's figures/); returns the PNGs."""
    committed, figures = RESULTS / "ablation", {}
    if words := [json.loads(path.read_text()) for path in sorted(committed.glob("words-*.json"))]:
        figures["ablation_words"] = words_figure(words)
    if (path := committed / "continuation.json").is_file():
        figures["ablation_continuation"] = continuation_figure(json.loads(path.read_text()))
    for task in sorted(path for path in committed.glob("*") if path.is_dir()):
        figures[f"ablation_{task.name}"] = accuracy_figure(load(committed, task.name), _title(task.name))
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name)
    return [Path(folder) / f"{name}.png" for name in figures]


if __name__ == "__main__":
    for drawn in draw_committed(RESULTS.parent / "figures"):
        print(drawn)
