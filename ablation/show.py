"""From the ablation's result files to tables, paired tests and figures. Nothing here computes a result.

python -m ablation.show      draws figures/ablation_*.png from results/ablation (part of make figures)
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import yaml

from zsaa.kit.figures import CUTS, DATA_SETS, STYLE, save_figure
from zsaa.kit.store import RESULTS, with_interval
from zsaa.stats import difference, from_bits, interval, mean_difference

NOT_RUN = "not run"


def _title(task: str) -> str:
    return "A verdict at a random depth" if task == "depth" else DATA_SETS.get(task, (task,))[0]


@lru_cache
def _config() -> dict:
    """The configuration as it stands in the file; ablation.run.load_config checks it."""
    return yaml.safe_load((Path(__file__).parent / "config.yaml").read_text(encoding="utf-8"))


def load(folder: str | Path, task: str) -> dict[str, dict]:
    """Result files of one task by row; of several seeds or budgets of a row, each under its file's name. In the order
    of the configuration; a row's runs on the task's own budget first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder, task).glob("*.json"))}
    return {name: found[name] for name in sorted(found, key=lambda name: _place(found[name]))}


def _place(result: dict) -> tuple:
    rows = list(_config()["rows"])
    return (rows.index(result["row"]) if result["row"] in rows else len(rows), not _main(result), _seed(result))


def _cell(result: dict, control: str, target: float) -> dict | None:
    return next((r for r in result["rows"] if (r["control"], r["target"]) == (control, target)), None)


def _curves(results: dict[str, dict]):
    """(name, result, control) of every curve. A scorer alone is a point, not a curve: see `_scorer`."""
    for name, result in results.items():
        for control in dict.fromkeys(r["control"] for r in result["rows"]):
            if control != "scorer":
                yield (name if control == "alpha" else f"{name}, {control} tokens"), result, control


def _scorer(result: dict) -> dict | None:
    """What the learned scores know by themselves: the first scored layer's votes, summed."""
    return next((r for r in result["rows"] if r["control"] == "scorer"), None)


def _seed(result: dict) -> int:
    return result.get("training", {}).get("seed", 0)


def _budget(result: dict) -> str:
    """What a run was trained for, where it is not the task's own epochs in ablation/config.yaml; else ""."""
    training = result.get("training", {})
    if training.get("compute") is not None:
        return f"compute of {training['compute']:g} epoch" + "s" * (training["compute"] != 1)
    task = _config()["tasks"].get(result.get("task", {}).get("name"), {})
    epochs = training.get("epochs")
    if epochs in (None, task.get("training", {}).get("epochs", 1)):
        return ""
    return f"{epochs:g} epochs" + " more" * bool(training.get("start"))


def _main(result: dict) -> bool:
    """Trained for the task's own epochs, neither for others nor to equal compute?"""
    return not _budget(result)


def _ahead(ours: dict | list[dict], rival: dict | list[dict]) -> tuple[float, tuple[float, float]]:
    """Points by which one row of results is ahead of another on the same held-out texts, and the paired interval; of
    lists, the rows of several seeds, their means."""
    if isinstance(ours, list):
        return mean_difference(*([from_bits(r["right"], r["n"]) for r in rows] for rows in (ours, rival)))
    n = ours["n"]
    return difference("accuracy", [1] * n, from_bits(ours["right"], n), from_bits(rival["right"], n))


def accuracy_table(results: dict[str, dict], targets: Sequence[float], rows: dict[str, dict]):
    """One line per curve, in the order of `rows` (the configuration's): accuracy and interval at each MAC reduction,
    training compute and time; rows without a result file say so."""
    import pandas as pd

    lines = []
    for name, result, control in _curves(results):
        cells = {f"{t:g}x": _cell(result, control, t) for t in targets}
        log, alone = result["log"], _scorer(result)
        lines.append(
            {"row": name, **{t: with_interval(cell) if cell else "-" for t, cell in cells.items()},
             "scorer alone": f"{with_interval(alone)} at {alone['mac_reduction']:.0f}x" if alone else "-",
             "training MACs (epochs)": round(log["epochs_of_compute"], 2), "GPU minutes": round(log["seconds"] / 60, 1),
             "budget": _budget(result) or "the task's",
             "what it shows": rows.get(result["row"], result)["about"]}
        )  # fmt: skip
    belongs = [result["row"] for _, result, _ in _curves(results)]
    for name, row in rows.items():
        if name not in belongs:
            cells = dict.fromkeys((f"{t:g}x" for t in targets), NOT_RUN)
            cost = dict.fromkeys(("scorer alone", "training MACs (epochs)", "GPU minutes", "budget"), "-")
            lines.append({"row": name, **cells, **cost, "what it shows": row["about"]})
            belongs.append(name)
    order = list(rows)
    place = [order.index(row) if row in order else len(order) for row in belongs]
    return pd.DataFrame([lines[i] for i in sorted(range(len(lines)), key=place.__getitem__)])


def _fair(result: dict, rival: dict) -> bool:
    """May `rival` be the truncation that `result` is tested against? Both ran for the task's epochs or both to the same
    compute; a run of other epochs, which may have had more of them, faces truncation of any budget."""
    equal = _main(result) or result["training"].get("compute") is not None
    return _budget(rival) == _budget(result) if equal else True


def paired_table(results: dict[str, dict], targets: Sequence[float], against: str = "paper"):
    """Points by which each curve is ahead of the row `against` on the same held-out texts, with the 95% interval of a
    paired bootstrap, and a star where it leaves out 0. None where `against` was not run.

    against="truncation" takes at each target the best of the curves that read cut inputs, all seeds of them. Runs for
    the task's epochs are tested against truncation of the task's epochs, runs of equal compute against truncation of
    as much, and runs of other epochs (-epochsN) against the best truncation of any budget; where no rows tuned on cut
    inputs ran for as long, their lead is in part that of the longer training. against="scorer" takes each curve's own
    scorer alone, at its one, far lower price. Any other rival is its run for the task's epochs, whatever the curve's
    budget: column "budget" says which that is."""
    import pandas as pd

    curves = list(_curves(results))
    lines = []
    for name, result, control in curves:
        line: dict = {"row": name, "budget": _budget(result) or "the task's"}
        for target in targets:
            cell, rivals = _cell(result, control, target), []
            if against == "scorer" and control == "alpha":
                rivals.append(_scorer(result))
            for other, rival, side in curves:
                cut = side != "alpha" and target > 1 and _fair(result, rival)
                if cut if against == "truncation" else other == against:
                    rivals.append(_cell(rival, side, target))
            rivals = [r for r in rivals if r is not None and cell is not None and r["n"] == cell["n"]]
            if not rivals or cell is None:
                line[f"{target:g}x"] = "-"
                continue
            best = max(rivals, key=lambda r: r["accuracy"])
            gain, (low, high) = _ahead(cell, best)
            line[f"{target:g}x"] = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]" + ("*" if low > 0 or high < 0 else "")
        lines.append(line)
    table = pd.DataFrame(lines)
    return table if len(table) and (table.drop(columns=["row", "budget"]) != "-").any(axis=None) else None


# Those that the story is about: name, colour, marker, dashes, control, and the rows that may play it. The first that
# was run plays it: rivals at the learning rate of zsaa+, or else at the paper's.
ROLES = (
    ("salience (zsaa+)", "#0072B2", "o", "-", "alpha", ("wide-tau2",)),
    ("evidence, one drop", "#882255", "^", "-", "alpha", ("evidence-smooth",)),
    ("paper's recipe, dial", "#D55E00", "s", "-", "alpha", ("paper-faster", "paper")),
    ("conventional, dial", "#000000", "P", "-", "alpha", ("conventional-faster", "conventional")),
    ("tuned on both ends", "#CC79A7", "D", "--", "ends", ("truncated-ends-faster", "truncated-ends")),
    ("tuned on last tokens", "#009E73", "v", "--", "last", ("truncated-last-faster", "truncated-last")),
)
OURS, EVIDENCE = ROLES[0][-1], ROLES[1][0]
GREY = "#9A9A9A"
ROOM = 13.3  # names that fit beside a panel of the usual height


def protagonists(results: dict[str, dict]) -> dict[tuple[str, str], tuple[str, str, str, str]]:
    """(row, control) -> name, colour, marker, dashes of those that the story is about, as far as they were run for the
    task's epochs (see `_main`). All others are grey."""
    run = {result["row"] for result in results.values() if _main(result)}
    played = ((next((row for row in rows if row in run), None), control, look) for *look, control, rows in ROLES)
    return {(row, control): tuple(look) for row, control, look in played if row}


def own_row(results: dict[str, dict]) -> str | None:
    """The row that plays zsaa+ on this task."""
    return next((row for row, _ in protagonists(results) if row in OURS), None)


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved as little as it takes to be `gap` apart, within [low, high] if there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list] = []  # (first place, count): runs of neighbours that touch
    for i in order:
        groups.append([[places[i]], places[i]])
        while len(groups) > 1 and groups[-2][1] + gap * (len(groups[-2][0]) + len(groups[-1][0])) / 2 > groups[-1][1]:
            joined = groups.pop(-2)[0] + groups[-1][0]
            middle = statistics.fmean(v - gap * k for k, v in enumerate(joined)) + gap * (len(joined) - 1) / 2
            half = gap * (len(joined) - 1) / 2
            groups[-1] = [joined, max(low + half, min(high - half, middle))]
    spread = [middle + gap * (k - (len(run) - 1) / 2) for run, middle in groups for k in range(len(run))]
    found = [0.0] * len(places)
    for i, place in zip(order, spread):
        found[i] = place
    return found


def _label(axis, ends: Sequence[tuple], x: float, gap: float, low: float, high: float, scale=(float, float)) -> None:
    """Names beside the lines' ends, ends: (x, y, name, colour, strong), in a column at `x`, none over another. scale:
    into the measure in which `gap`, `low` and `high` are given, and back."""
    there, back = scale
    for (at, y, name, colour, strong), place in zip(ends, _apart([there(end[1]) for end in ends], gap, low, high)):
        colour = colour if strong else "#6A6A6A"
        axis.plot([at * 1.01, x * 0.99], [y, back(place)], color=colour, linewidth=0.5, alpha=0.6, clip_on=False)
        axis.text(x, back(place), name, color=colour, va="center", fontsize=8 if strong else 6.5,
                  fontweight="bold" if strong else "normal")  # fmt: skip


def _points(result: dict, control: str) -> tuple[list[dict], list[float], list[float]]:
    """(rows, MAC reductions, accuracies) of a curve, the mildest setting first; of settings that the dial cannot tell
    apart (tau) the last."""
    rows = sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])
    rows = [r for r, after in zip(rows, [*rows[1:], None]) if not after or after["mac_reduction"] > r["mac_reduction"]]
    return rows, [r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows]


def accuracy_figure(results: dict[str, dict], title: str):
    """Accuracy against MAC reduction (log scale). Solid: the dial, dashed: inputs cut. `protagonists` are in colour
    with 95% bands, named beside their ends, further seeds of theirs hollow and without a line; all other rows of the
    same budget are thin, grey and without a name (see `rows_figure`). A star is a protagonist's scorer alone, where it
    has one: votes of single tokens are a verdict, scores that gradients teach are none."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
        curves, heroes = [curve for curve in _curves(results) if _main(curve[1])], protagonists(results)
        ends, lowest, highest, n, most, seeds, others = [], 50.0, 50.0, 0, 1.0, False, False
        for _, result, control in curves:
            rows, x, y = _points(result, control)
            lowest, highest, n, most = min(lowest, *y), max(highest, *y), rows[0]["n"], max(most, *x)
            hero = heroes.get((result["row"], control))
            if hero is None:
                dashes = "-" if control == "alpha" else (0, (3, 1.5))
                axis.plot(x, y, color="#BBBBBB", linewidth=0.6, linestyle=dashes, zorder=2)
                others = True
                continue
            shown, colour, marker, dashes = hero
            if _seed(result):
                seeds = True
                axis.plot(
                    x, y, color=colour, marker=marker, markersize=4, markerfacecolor="white", linestyle="none", zorder=5
                )
                continue
            axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.8, linestyle=dashes, zorder=4)
            axis.fill_between(x, *zip(*(r["ci95"] for r in rows)), color=colour, alpha=0.15, linewidth=0, zorder=3)
            ends.append((x[-1], y[-1], shown, colour, True))
        axis.plot([0.9, 1.05 * most], [50, 50], color="#777777", linewidth=0.8, linestyle=(0, (1, 3)))
        beside, priced = max(13.0, 1.1 * most), []
        for _, result, control in curves:
            alone, hero = _scorer(result), heroes.get((result["row"], control))
            if control == "alpha" and hero and alone and not _seed(result):
                x, y = alone["mac_reduction"], alone["accuracy"]
                priced.append(x)
                axis.errorbar(x, y, yerr=[[y - alone["ci95"][0]], [alone["ci95"][1] - y]], color=hero[1], marker="*",
                              markersize=11, capsize=2, markeredgecolor="white", zorder=6)  # fmt: skip
                axis.annotate(f"scorer\nalone,\n{y:.1f}%", (x, alone["ci95"][1]), xytext=(0, 5), color=hero[1],
                              textcoords="offset points", ha="center", fontsize=8, fontweight="bold")  # fmt: skip
        bottom, top = min(47.0, lowest - 1.5), highest + 2.0
        gap = (top - bottom) * 0.05
        _label(axis, ends, beside, gap, bottom + gap / 2, top)
        axis.set(
            xscale="log",
            xlabel="MAC reduction (log scale)",
            ylabel="accuracy (%)",
            ylim=(bottom, top),
            xlim=(0.94, 290 if priced else 6 * most),
        )
        ticks = [1, 2, 3, 5, 7, 11, *([30] if priced else []), *priced]
        axis.set_xticks(ticks, [f"{t:.0f}x" for t in ticks])
        axis.minorticks_off()
        key = f"solid: the dial; dashed: inputs cut; {'hollow: another seed; ' if seeds else ''}bands: 95%"
        grey = "\ngrey: the other rows" if others else ""
        axis.set_title(f"{title}, n = {n:,}\n{key}{grey}", fontsize=8)
    return figure


def _groups(results: dict[str, dict]) -> dict[str, list[tuple]]:
    """Title -> curves of each group of the configuration that has any. Seed 0 alone, without protagonists. Runs of
    other budgets are a group of their own, but for adapters."""
    rows, groups, heroes = _config()["rows"], _config()["groups"], protagonists(results)
    found: dict[str, list[tuple]] = {group: [] for group in groups}
    for name, result, control in _curves(results):
        if _seed(result) or (_main(result) and (result["row"], control) in heroes):
            continue
        group = rows.get(result["row"], {}).get("group")
        group = group if _main(result) or group == "lora" else "budget"
        if group in found:
            found[group].append((name.removesuffix(" tokens"), result, control))
    return {groups[group]: curves for group, curves in found.items() if curves}


def rows_figure(results: dict[str, dict], title: str):
    """Every row: a panel per question (groups of ablation/config.yaml), its rows in dark grey, each with its marker and
    its name, dark where the row is a control that is blind to the text; `protagonists` in colour in all of them. Each
    panel has its own scale: what falls far below the others of its panel leaves it, and the number behind its name is
    its last accuracy. Panels with many names are taller. None without such rows."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    groups = _groups(results)
    if not groups:
        return None
    played = protagonists(results)
    heroes = [
        (result, control, *played[result["row"], control])
        for _, result, control in _curves(results)
        if _main(result) and not _seed(result) and (result["row"], control) in played
    ]
    heroes.sort(key=lambda hero: list(played).index((hero[0]["row"], hero[1])))
    tall = math.ceil(len(groups) / 2)
    crowd = [len(curves) for curves in groups.values()]
    heights = [max(1.0, *((count + 0.2) / ROOM for count in crowd[2 * row : 2 * row + 2])) for row in range(tall)]
    own = {"color": "#333333", "markersize": 3.5, "markerfacecolor": "white", "markeredgewidth": 0.8}
    with plt.rc_context({**STYLE, "font.size": 8}):
        figure, axes = plt.subplots(
            tall, 2, figsize=(7.0, 0.9 + 2.15 * sum(heights)), layout="constrained", squeeze=False,
            height_ratios=heights,
        )  # fmt: skip
        for axis in axes.flat[len(groups) :]:
            axis.remove()
        for place, (axis, (group, curves)) in enumerate(zip(axes.flat, groups.items())):
            drawn = [(name, *_points(result, control)[1:], control) for name, result, control in curves]
            blind = {name for name, result, _ in curves if result["about"].startswith("control")}
            most = max(max(x) for _, x, _, _ in drawn)
            last = [y[-1] for _, _, y, _ in drawn]
            floor = max(min(last), statistics.median(last) - 12.0)
            top = max(max(y) for _, _, y, _ in drawn)
            for result, control, _, colour, _, dashes in heroes:
                _, x, y = _points(result, control)
                if result["row"] not in OURS:  # no further than the panel's rows: beyond stand their names
                    reach = sum(value < 1.1 * most for value in x)
                    x, y = x[:reach], y[:reach]
                top = max(top, *y)
                axis.plot(x, y, color=colour, linewidth=1.3, linestyle=dashes, alpha=0.8, zorder=2)
                if result["row"] in OURS:
                    floor, most = min(floor, y[-1]), max(most, *x)
            bottom, top = floor - 1.5, top + 1.0
            ends = []
            for (name, x, y, control), marker in zip(drawn, "osD^vPX<>dh*p" * 2):
                dashes = "-" if control == "alpha" else (0, (3, 1.5))
                style = {**own, "marker": marker, **({"markerfacecolor": own["color"]} if name in blind else {})}
                axis.plot(x, y, linewidth=0.8, linestyle=dashes, zorder=4, **style)
                inside = y[-1] >= bottom
                ends.append((x[-1], y[-1], name if inside else f"{name} ({y[-1]:.0f})", style))
            gap, beside = (top - bottom) / (ROOM * heights[place // 2]), 1.18 * most
            low, high = bottom + 0.7 * gap, top - gap / 2
            places = _apart([min(high, max(low, y)) for _, y, _, _ in ends], gap, low, high)
            for (x, y, name, style), height in zip(ends, places):
                if y >= bottom:
                    axis.plot([x * 1.03, beside * 0.95], [y, height], color="#777777", linewidth=0.4)
                axis.plot(beside, height, clip_on=False, **style)
                axis.text(beside * 1.09, height, name, va="center", fontsize=6.5, color="#222222")
            axis.set(xscale="log", xlim=(0.94, 9 * most), ylim=(bottom, top))
            ticks = [t for t in (1, 2, 3, 5, 7, 11) if t < 1.05 * most]
            axis.set_xticks(ticks, [f"{t}x" for t in ticks])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
            axis.set_title(group, fontsize=8.5, loc="left")
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy (%)")
        handles = [
            plt.Line2D([], [], color=colour, linewidth=1.6, linestyle=dashes, label=shown)
            for _, _, shown, colour, _, dashes in heroes
        ]
        n = heroes[0][0]["rows"][0]["n"] if heroes else curves[0][1]["rows"][0]["n"]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=7.5,
                      title=f"{title}, n = {n:,}: accuracy against MAC reduction", title_fontsize=9)  # fmt: skip
    return figure


def accuracy_caption(results: dict[str, dict]) -> str:
    """What the reader of `accuracy_figure` must know: what training cost, and what the star is."""
    shown = {
        name.removesuffix(", dial"): result
        for (row, _), (name, *_) in protagonists(results).items()
        for result in results.values()
        if result["row"] == row and _main(result) and not _seed(result)
    }
    cost = "; ".join(f"{name} {result['log']['epochs_of_compute']:.2g}" for name, result in shown.items())
    text = f"Training MACs, in epochs at alpha = 1, on the same samples: {cost}."
    rates: dict[float, list[str]] = {}
    for name, result in shown.items():
        rates.setdefault(result["training"]["learning_rate"], []).append(name)
    most, *others = sorted(rates, key=lambda rate: -len(rates[rate]))
    text += f" Learning rate {most:g}" + "".join(f", of {' and '.join(rates[r])} {r:g}" for r in others) + "."
    floors = {name: result["variant"]["tau"] for name, result in shown.items() if result["variant"]["tau"] != 5}
    text += "".join(f" {name} keeps at least {tau} tokens (tau), the others 5." for name, tau in floors.items())
    if any(_scorer(result) for result in shown.values()):
        text += (
            " The star is a control: the votes' own verdict, summed in layer 1, without the layers above. What these "
            "add is the line's distance from it. Scores taught by gradients have no verdict of their own."
        )
    return text + " Grey: the other rows of ablation/config.yaml with the same epochs, named in the figure of all rows."


def rows_caption(results: dict[str, dict]) -> str:
    """What the reader of `rows_figure` must know: scales, and which rows were trained for more or less."""
    text = (
        "A panel per question, its rows in dark grey (seed 0; solid: the dial, dashed: inputs cut; dark markers: "
        "controls that are blind to the text), the rows of the main figure in colour. Each panel has its own scale; of "
        "a row that ends below it the last accuracy stands in brackets. All were trained for the same epochs, not with "
        "the same compute"
    )
    if other := [f"{name} ({_budget(result)})" for name, result in results.items() if not _main(result)]:
        text += f", but for {', '.join(other)}; compute counts MACs, in epochs at alpha = 1"
    return text + "."


def rivals(results: dict[str, dict], ours: str | None = None) -> dict[str, dict[float, tuple[dict, dict]]]:
    """What row `ours` (None: see `own_row`) is set beside: rival -> target -> (our cell, the rival's), on the same
    held-out texts. If ours has several seeds, the best way to cut inputs, means over seeds (lists of cells, of all
    seeds that each has). The best cut inputs at each target (for every seed of ours; chosen among all seeds of theirs
    and on these very texts, in the rival's favour), evidence in one drop, each kind of cut inputs, the paper's recipe,
    conventional fine-tuning under the dial, and our own scorer alone, if it has a verdict. Ours and rivals ran for the
    task's epochs, and rivals are seed 0 but for the best. Those that were not run are left out; {} without ours."""
    heroes, ours = protagonists(results), ours or own_row(results)
    mine = sorted((r for r in results.values() if r["row"] == ours and _main(r)), key=_seed)
    if not mine:
        return {}
    dials = {row: shown for (row, control), (shown, *_) in heroes.items() if control == "alpha" and row not in OURS}
    others: dict[str, list[dict]] = {}
    ways: dict[tuple, list[list[dict]]] = {}  # to cut inputs: by row and side, the curve of each seed
    for _, result, control in _curves(results):
        if not _main(result) or result["row"] == ours:
            continue
        rows = [r for r in result["rows"] if r["control"] == control]
        if control in CUTS:
            ways.setdefault((result["row"], control), []).append(rows)
        if _seed(result):
            continue
        if control in CUTS and result["row"].startswith("truncated"):
            name = f"tuned on {CUTS[control][1]}"
            if (result["row"], control) in heroes or name not in others:
                others[name] = rows
        elif control in CUTS:
            others.setdefault(f"conventional, {CUTS[control][1]}", rows)
        elif result["row"] in dials:
            others[dials[result["row"]]] = rows
    found: dict[str, dict] = {}

    def compare(name: str, result: dict, rival_at) -> None:
        for row in (r for r in result["rows"] if r["control"] == "alpha"):
            there = [r for r in rival_at(row["target"]) if r is not None and r["n"] == row["n"]]
            if there:
                found.setdefault(name, {})[row["target"]] = (row, max(there, key=lambda r: r["accuracy"]))

    def at(rows: list[dict], target: float) -> dict | None:
        return next((r for r in rows if r["target"] == target), None)

    for row in (r for r in mine[0]["rows"] if r["control"] == "alpha" and len(mine) > 1):
        target = row["target"]
        there = [[cell for rows in runs if (cell := at(rows, target))] for runs in ways.values()]
        there = [cells for cells in there if cells and all(cell["n"] == row["n"] for cell in cells)]
        if there:
            seeds = [cell for r in mine if (cell := _cell(r, "alpha", target))]
            best = max(there, key=lambda cells: statistics.fmean(cell["accuracy"] for cell in cells))
            found.setdefault(f"best way to cut, means of seeds (ours {len(mine)})", {})[target] = (seeds, best)
    cut = [rows for runs in ways.values() for rows in runs]
    for result in mine:
        suffix = f" (seed {_seed(result)})" if _seed(result) else ""
        compare(f"best cut inputs{suffix}", result, lambda t: [at(rows, t) for rows in cut])
    last = [name for name in dials.values() if name != EVIDENCE]  # one drop first, the plain dials last
    for name in sorted(others, key=lambda name: (name != EVIDENCE, name in last, not name.startswith("tuned"))):
        compare(name, mine[0], lambda t, rows=others[name]: [at(rows, t)])
    if alone := _scorer(mine[0]):
        compare(f"own scorer alone, {alone['mac_reduction']:.0f}x", mine[0], lambda t: [alone])
    return found


def _short(row: str) -> str:
    """ "salience" of "salience (zsaa+)"; a row that is no protagonist by its own name."""
    return next((name for name, *_, rows in ROLES if row in rows), row).split(" (")[0]


def paired_figure(results: dict[str, dict], title: str, ours: str | None = None):
    """Points by which `ours` is ahead of each of its `rivals`, with the paired 95% interval: a cell per rival and
    target, blue where ahead, orange where behind, white where the interval holds 0. None without rivals."""
    import matplotlib.pyplot as plt

    ours = ours or own_row(results)
    table = rivals(results, ours)
    targets = sorted({target for row in table.values() for target in row})
    if not targets:
        return None
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(1.4 + 0.52 * len(targets), 0.8 + 0.36 * len(table)), layout="constrained")
        for y, row in enumerate(table.values()):
            for x, target in enumerate(targets):
                if target not in row:
                    axis.text(x, y, "-", ha="center", va="center", fontsize=8, color="#777777")
                    continue
                gain, (low, high) = _ahead(*row[target])
                sure = low > 0 or high < 0
                strength = min(1.0, 0.25 + abs(gain) / 25)
                colour = ((0.0, 0.447, 0.698) if gain > 0 else (0.90, 0.52, 0.0)) if sure else (1.0, 1.0, 1.0)
                axis.add_patch(plt.Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=(*colour, strength), linewidth=0))
                ink = "white" if sure and gain > 0 and strength > 0.6 else "#111111" if sure else "#555555"
                axis.text(x, y - 0.17, f"{gain:+.1f}", ha="center", va="center", fontsize=8.5, color=ink,
                          fontweight="bold" if sure else "normal")  # fmt: skip
                axis.text(x, y + 0.24, f"{low:.1f}, {high:.1f}", ha="center", va="center", fontsize=6.5, color=ink)
        axis.set(xlim=(-0.5, len(targets) - 0.5), ylim=(len(table) - 0.5, -0.5), xlabel="MAC reduction")
        axis.set_xticks(range(len(targets)), [f"{t:g}x" for t in targets])
        axis.set_yticks(range(len(table)), [name.replace(", ", ",\n") for name in table], fontsize=7.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        n = next(cell["n"] for result in results.values() for cell in result["rows"])
        figure.suptitle(
            f"{title}: {_short(ours)} minus ..., points\npaired 95% intervals, n = {n:,}; white: undecided",
            fontsize=8.5,
        )
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
        names = axes[0, 0].get_legend_handles_labels()
        figure.legend(*names, loc="outside upper center", ncols=len(style), fontsize=8, title="tokens kept")
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


CONTINUED = {  # colour, marker, dashes
    "truncation": ("#000000", "o", "--"),
    "column sum (paper)": ("#D55E00", "s", "-"),
    "column mean": ("#E69F00", "^", "-"),
    "hybrid": ("#0072B2", "D", "-"),
    "recent, once": ("#009E73", "v", "-"),
    "random": ("#CC79A7", "x", "-"),
}


def continuation_figure(result: dict, worst: float = 2.2):
    """Behind a pruned prompt, against its MAC reduction: how often the next token is the stock model's, and perplexity
    over stock (log scale, up to `worst`). `CONTINUED` are in colour, with 95% bands (of the ratio: paired over the
    windows, normal); the rest is grey. A line below says which leave the scale, and how far they go."""
    import matplotlib.pyplot as plt

    stock = next(r for r in result["rows"] if r["variant"] == "stock")
    lines: dict[str, list] = {}
    for row in result["rows"]:
        if row["variant"] != "stock":
            lines.setdefault(row["variant"], []).append(row)
    ratio = {name: [row["perplexity"] / stock["perplexity"] for row in rows] for name, rows in lines.items()}
    beyond = {name: values for name, values in ratio.items() if max(values) > worst}
    hopeless = [name for name, values in beyond.items() if min(values) > worst]
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(5.0, 6.2), layout="constrained", sharex=True, height_ratios=(1, 1.25)
        )
        ends, most = {above: [], below: []}, max(r["mac_reduction"] for r in result["rows"])
        for name, rows in lines.items():
            if name in hopeless:
                continue
            colour, marker, dashes = CONTINUED.get(name, (GREY, None, "-"))
            strong = name in CONTINUED
            style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8 if strong else 0.7,
                     "linestyle": dashes, "zorder": 4 if strong else 2}  # fmt: skip
            x = [1.0, *(row["mac_reduction"] for row in rows)]
            for axis, y in ((above, [100.0, *(r["agreement"] for r in rows)]), (below, [1.0, *ratio[name]])):
                axis.plot(x, y, **style)
                if (x[-1] > 0.95 * most or strong) and (axis is above or y[-1] <= worst):
                    ends[axis].append((x[-1], y[-1], name, colour, strong))
            if strong:
                around = [interval(round(row["agreement"] * row["n"] / 100), row["n"]) for row in rows]
                above.fill_between(x, *zip((100, 100), *around), color=colour, alpha=0.13, linewidth=0)
                edges = [(1.0, 1.0)]
                for row in rows:
                    apart = [a - b for a, b in zip(row["nll"], stock["nll"])]
                    error = 1.96 * statistics.stdev(apart) / len(apart) ** 0.5
                    edges.append(tuple(math.exp(statistics.fmean(apart) + s * error) for s in (-1, 1)))
                below.fill_between(x, *zip(*edges), color=colour, alpha=0.13, linewidth=0)
        beside = 1.07 * most
        _label(above, ends[above], beside, 6.3, 2, 100)
        _label(below, ends[below], beside, 0.05 * math.log(worst), 0.0, math.log(worst), (math.log, math.exp))
        above.set(ylabel="next token as stock's (%)", ylim=(0, 102), xscale="log")
        below.set(xlabel="MAC reduction of the prompt", ylabel="perplexity over stock", yscale="log",
                  ylim=(0.985, worst), xlim=(0.98, most * 1.9))  # fmt: skip
        ticks = [t for t in (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3) if t <= worst]
        below.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        ticks = sorted({1, *(row["target"] for row in result["rows"])})
        below.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        for axis in (above, below):
            axis.minorticks_off()
        above.set_title(f"Untuned {result['model']['name']}: {stock['n']} held-out reviews, bands: 95%")
        if beyond:
            reach = {
                name: [f"{v:,.0f}" if v > 99 else f"{v:.1f}" for v in (min(vs), max(vs))] for name, vs in beyond.items()
            }
            text = "; ".join(f"{name} ({' to '.join(dict.fromkeys(ends))}x)" for name, ends in reach.items())
            figure.supxlabel("\n".join(textwrap.wrap(f"beyond {worst:g}x: {text}", 84)), fontsize=6.5, color="#555555")
    return figure


def sensitivity_figure(result: dict):
    """What dropping half of the tokens in one layer alone costs, layer by layer, and what two schedules cost at equal
    MACs: Eq. 2's, and the one solved from the first panel. Divergence of the class probabilities from alpha = 1."""
    import matplotlib.pyplot as plt

    costs = [max(cost, 1e-6) for cost in result["sensitivity"]]
    share, n = f"{100 * result['share']:.0f}%", result["provenance"]["eval_samples"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.7), layout="constrained", width_ratios=(1.6, 1))
        left.bar(range(1, len(costs) + 1), costs, color=ROLES[0][1], width=0.8)
        left.set(yscale="log", xlabel="layer that keeps half of its tokens", ylabel="divergence (nats)")
        left.set_title(f"one layer alone keeps {share}", fontsize=9)
        looks = {
            "geometric": (ROLES[0][1], "o", "-", "Eq. 2"),
            "rising": (ROLES[1][1], "^", "-.", "rising"),
            "solved": (ROLES[2][1], "s", "--", "solved"),
        }
        for name, (colour, marker, dashes, shown) in looks.items():
            rows = [r for r in result["rows"] if r["schedule"] == name]
            x, y = [r["target"] for r in rows], [r["divergence"] for r in rows]
            right.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=shown)
        right.set(yscale="log", xlabel="MAC reduction")
        right.set_xticks(x, [f"{t:g}x" for t in x])
        right.set_title("all layers, at equal MACs", fontsize=9)
        right.legend(fontsize=8)
        figure.suptitle(f"{result['adapter']}, {n} reviews: divergence from alpha = 1", fontsize=9.5)
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
    committed, figures, captions = RESULTS / "ablation", {}, {}
    if words := [json.loads(path.read_text()) for path in sorted(committed.glob("words-*.json"))]:
        figures["ablation_words"] = words_figure(words)
    if (path := committed / "continuation.json").is_file():
        figures["ablation_continuation"] = continuation_figure(json.loads(path.read_text()))
    if (path := committed / "sensitivity.json").is_file():
        figures["ablation_sensitivity"] = sensitivity_figure(json.loads(path.read_text()))
    for task in sorted(path for path in committed.glob("*") if path.is_dir()):
        results = load(committed, task.name)
        if own_row(results) is None:  # texts cut anew: a single run, set beside nothing
            continue
        figures[f"ablation_{task.name}"] = accuracy_figure(results, _title(task.name))
        captions[f"ablation_{task.name}"] = f"{_title(task.name)}. {accuracy_caption(results)}"
        if rows := rows_figure(results, _title(task.name)):
            figures[f"ablation_{task.name}_rows"] = rows
            captions[f"ablation_{task.name}_rows"] = f"{_title(task.name)}. {rows_caption(results)}"
        if paired := paired_figure(results, _title(task.name)):
            figures[f"ablation_paired_{task.name}"] = paired
            captions[f"ablation_paired_{task.name}"] = (
                f"{_title(task.name)}: {_short(OURS[0])} (row {own_row(results)}, seed 0, unless it says otherwise) "
                "minus each rival on the same texts, percentile bootstrap over these. All ran for the same epochs. The "
                "best way to cut is that with the best mean over its seeds at each MAC reduction, of which it may have "
                "one to three. The best cut inputs are chosen at each MAC reduction among all seeds and on these very "
                "texts, in the rival's favour. Each interval is of one cell, and does not cover training seeds."
            )
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name, captions.get(name))
    return [Path(folder) / f"{name}.png" for name in figures]


if __name__ == "__main__":
    for drawn in draw_committed(RESULTS.parent / "figures"):
        print(drawn)
