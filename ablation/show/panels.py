"""Every row of the ablation: a panel per question."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ablation.show.rows import OURS, budget_of, config, curves, is_main, points_of, protagonists, seed_of
from zsaa.kit.figures.style import STYLE, legend, multiples, panels

ROOM = 13.3  # names that fit beside a panel of the usual height
TALL = 1.85  # inches of such a panel
PANELS = 3  # of a figure


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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


def label(axis, ends: Sequence[tuple], x: float, gap: float, low: float, high: float, scale=(float, float)) -> None:
    """Names beside the lines' ends, ends: (x, y, name, colour, strong), in a column at `x`, none over another. scale:
    into the measure in which `gap`, `low` and `high` are given, and back."""
    there, back = scale
    for (at, y, name, colour, strong), place in zip(ends, apart([there(end[1]) for end in ends], gap, low, high)):
        colour = colour if strong else "#6A6A6A"
        axis.plot([at * 1.01, x * 0.99], [y, back(place)], color=colour, linewidth=0.5, alpha=0.6, clip_on=False)
        axis.text(x, back(place), name, color=colour, va="center", fontsize=8 if strong else 6.5,
                  fontweight="bold" if strong else "normal")  # fmt: skip


def _groups(results: dict[str, dict]) -> dict[str, list[tuple]]:
    """Title -> curves of each group of the configuration that has any. Seed 0 alone, without protagonists. Runs of
    other budgets are a group of their own, but for adapters."""
    rows, groups, heroes = config()["rows"], config()["groups"], protagonists(results)
    found: dict[str, list[tuple]] = {group: [] for group in groups}
    for name, result, control in curves(results):
        if seed_of(result) or (is_main(result) and (result["row"], control) in heroes):
            continue
        group = rows.get(result["row"], {}).get("group")
        group = group if is_main(result) or group == "lora" else "budget"
        if group in found:
            found[group].append((name.removesuffix(" tokens"), result, control))
    return {groups[group]: curves for group, curves in found.items() if curves}


def rows_figures(results: dict[str, dict], title: str) -> list:
    """Every row: a panel per question (groups of ablation/config.yaml), up to three in a figure, its rows in dark grey,
    each with its marker and its name, dark where the row is a control that is blind to the text; `protagonists` in
    colour in all of them. Each panel has its own scale: what falls far below the others of its panel leaves it, and the
    number behind its name is its last accuracy. Panels with many names are taller."""
    import matplotlib.pyplot as plt

    groups, played = list(_groups(results).items()), protagonists(results)
    heroes = [
        (result, control, *played[result["row"], control])
        for _, result, control in curves(results)
        if is_main(result) and not seed_of(result) and (result["row"], control) in played
    ]
    heroes.sort(key=lambda hero: list(played).index((hero[0]["row"], hero[1])))
    figures = []
    for first in range(0, len(groups), PANELS):
        part = groups[first : first + PANELS]
        heights = [max(1.0, (len(found) + 0.2) / ROOM) for _, found in part]
        with plt.rc_context(STYLE):
            shape = {"height_ratios": heights, "squeeze": False}
            figure, axes = panels(0.7 + TALL * sum(heights), len(part), 1, **shape)
            for axis, (group, found), height in zip(axes.flat, part, heights):
                _panel(axis, found, heroes, ROOM * height)
                axis.set_title(group, loc="left")
                axis.set_ylabel("accuracy (%)")
            handles = [
                plt.Line2D([], [], color=colour, linestyle=dashes, label=shown)
                for _, _, shown, colour, _, dashes in heroes
            ]
            if handles:
                legend(figure, handles, where="outside upper center")
        figure.set_label(_caption(results, title, part))
        figures.append(figure)
    return figures


def _panel(axis, found: list[tuple], heroes: list[tuple], room: float) -> None:
    """A question's rows; `room` names fit beside it."""
    from matplotlib.ticker import MaxNLocator

    drawn = [(name, *points_of(result, control)[1:], control) for name, result, control in found]
    blind = {name for name, result, _ in found if result["about"].startswith("control")}
    most = max(max(x) for _, x, _, _ in drawn)
    last = [y[-1] for _, _, y, _ in drawn]
    floor, top = max(min(last), statistics.median(last) - 12.0), max(max(y) for _, _, y, _ in drawn)
    for result, control, _, colour, _, dashes in heroes:
        _, x, y = points_of(result, control)
        if result["row"] not in OURS:  # no further than the panel's rows: beyond stand their names
            reach = sum(value < 1.1 * most for value in x)
            x, y = x[:reach], y[:reach]
        top = max(top, *y)
        axis.plot(x, y, color=colour, linewidth=1.1, linestyle=dashes, alpha=0.8, zorder=2)
        if result["row"] in OURS:
            floor, most = min(floor, y[-1]), max(most, *x)
    bottom, top = floor - 1.5, top + 1.0
    own = {"color": "#333333", "markersize": 3, "markerfacecolor": "white", "markeredgewidth": 0.7}
    ends = []
    for (name, x, y, control), marker in zip(drawn, "osD^vPX<>dh*p" * 3):
        dashes = "-" if control == "alpha" else (0, (3, 1.5))
        style = {**own, "marker": marker, **({"markerfacecolor": own["color"]} if name in blind else {})}
        axis.plot(x, y, linewidth=0.7, linestyle=dashes, zorder=4, **style)
        ends.append((x[-1], y[-1], name if y[-1] >= bottom else f"{name} ({y[-1]:.0f})", style))
    gap, beside = (top - bottom) / room, 1.18 * most
    low, high = bottom + 0.7 * gap, top - gap / 2
    places = apart([min(high, max(low, y)) for _, y, _, _ in ends], gap, low, high)
    for (x, y, name, style), height in zip(ends, places):
        if y >= bottom:
            axis.plot([x * 1.03, beside * 0.95], [y, height], color="#777777", linewidth=0.4)
        axis.plot(beside, height, clip_on=False, **style)
        axis.text(beside * 1.1, height, name, va="center", fontsize=6, color="#222222")
    axis.set(xscale="log", xlim=(0.94, 12 * most), ylim=(bottom, top))
    multiples(axis, [t for t in (1, 2, 3, 5, 7, 11) if t < 1.05 * most])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def _caption(results: dict[str, dict], title: str, part: list[tuple]) -> str:
    """What the reader must know: scales, and which rows were trained for more or less."""
    shown = [(name, result) for _, found in part for name, result, _ in found]
    n = shown[0][1]["rows"][0]["n"]
    text = (
        f"{title}, n = {n:,}: accuracy against the reduction of MACs. A panel per question, its rows in dark grey "
        "(seed 0; solid: the dial, dashed: inputs cut; dark markers: controls that are blind to the text), the rows of "
        "the main figure in colour. Each panel has its own scale; of a row that ends below it the last accuracy "
        "stands in brackets. All were trained for the same epochs, not with the same compute"
    )
    other = {name: budget_of(result) for name, result in shown if not is_main(result)}
    if other:
        listed = ", ".join(f"{name} ({budget})" for name, budget in other.items())
        text += f", but for {listed}; compute counts MACs, in epochs at alpha = 1"
    return text + "."
