"""How far our row is ahead of each of its rivals, on the same texts."""

from __future__ import annotations

import statistics
import textwrap

from ablation.show.rows import (
    EVIDENCE,
    OURS,
    cell_at,
    curves,
    is_main,
    own_row,
    protagonists,
    scorer_of,
    seed_of,
    short,
)
from zsaa.kit.equal import ahead, at_equal_macs, control_rows
from zsaa.kit.figures.style import CUTS, STYLE, panels


def rivals(results: dict[str, dict], ours: str | None = None) -> dict[str, dict[float, tuple[dict, dict]]]:
    """What row `ours` (None: see `own_row`) is set beside: rival -> target -> (our cell, the rival's), on the same
    held-out texts, at our cell's MACs (zsaa.kit.equal). If ours has several seeds, the best way to cut inputs, means
    over seeds (lists of cells, of all seeds that each has). The best cut
    inputs at each target (for every seed of ours; chosen among all seeds of theirs and on these very texts, in the
    rival's favour), evidence in one drop, each kind of cut inputs, the paper's recipe,
    conventional fine-tuning under the dial, and our own scorer alone, if it has a verdict. Ours and rivals ran for the
    task's epochs, and rivals are seed 0 but for the best. Those that were not run are left out; {} without ours."""
    heroes, ours = protagonists(results), ours or own_row(results)
    mine = sorted((r for r in results.values() if r["row"] == ours and is_main(r)), key=seed_of)
    if not mine:
        return {}
    dials = {row: shown for (row, control), (shown, *_) in heroes.items() if control == "alpha" and row not in OURS}
    others: dict[str, list[dict]] = {}
    ways: dict[tuple, list[list[dict]]] = {}  # to cut inputs: by row and side, the curve of each seed
    for _, result, control in curves(results):
        if not is_main(result) or result["row"] == ours:
            continue
        rows = control_rows(result, control)
        if control in CUTS:
            ways.setdefault((result["row"], control), []).append(rows)
        if seed_of(result):
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

    def compare(name: str, result: dict, lines: list[list[dict]]) -> None:
        for row in (r for r in result["rows"] if r["control"] == "alpha"):
            there = [at_equal_macs(rows, row["mac_reduction"]) for rows in lines]
            there = [r for r in there if r is not None and r["n"] == row["n"]]
            if there:
                found.setdefault(name, {})[row["target"]] = (row, max(there, key=lambda r: r["accuracy"]))

    for row in (r for r in mine[0]["rows"] if r["control"] == "alpha" and len(mine) > 1):
        target, macs = row["target"], row["mac_reduction"]
        there = [[cell for rows in runs if (cell := at_equal_macs(rows, macs))] for runs in ways.values()]
        there = [cells for cells in there if cells and all(cell["n"] == row["n"] for cell in cells)]
        if there:
            seeds = [cell for r in mine if (cell := cell_at(r, "alpha", target))]
            best = max(there, key=lambda cells: statistics.fmean(cell["accuracy"] for cell in cells))
            found.setdefault(f"best way to cut, means of seeds (ours {len(mine)})", {})[target] = (seeds, best)
    cut = [rows for runs in ways.values() for rows in runs]
    for result in mine:
        suffix = f" (seed {seed_of(result)})" if seed_of(result) else ""
        compare(f"best cut inputs{suffix}", result, cut)
    last = [name for name in dials.values() if name != EVIDENCE]  # one drop first, the plain dials last
    for name in sorted(others, key=lambda name: (name != EVIDENCE, name in last, not name.startswith("tuned"))):
        compare(name, mine[0], [others[name]])
    if alone := scorer_of(mine[0]):
        dial = {row["target"]: (row, alone) for row in mine[0]["rows"] if row["control"] == "alpha"}
        found[f"own scorer alone, {alone['mac_reduction']:.0f}x"] = dial
    return found


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
        figure, axis = panels(0.5 + 0.4 * len(table))
        for y, row in enumerate(table.values()):
            for x, target in enumerate(targets):
                _cell(axis, x, y, ahead(*row[target]) if target in row else None)
        axis.set(xlim=(-0.5, len(targets) - 0.5), ylim=(len(table) - 0.5, -0.5), xlabel="MAC reduction")
        axis.set_xticks(range(len(targets)), [f"{t:g}x" for t in targets])
        axis.set_yticks(range(len(table)), [textwrap.fill(name, 20) for name in table], fontsize=6)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    n = next(cell["n"] for result in results.values() for cell in result["rows"])
    figure.set_label(
        f"{title}: points by which {short(ours)} (row {ours}, seed 0, unless it says otherwise) is ahead of each rival "
        f"on the same texts, n = {n:,}, with paired 95% intervals (percentile bootstrap over these); white: undecided. "
        "All ran for the same epochs. Short texts are cut to whole tokens: where cut inputs have no setting with the "
        "dial's MACs, so many texts count from the next longer cut and the rest from the next shorter one that they "
        "do. The best way to cut is that with the best mean over its seeds at each MAC "
        "reduction, of which it may have one to three. The best cut inputs are chosen at each MAC reduction among all "
        "seeds and on these very texts, in the rival's favour. Each interval is of one cell, and does not cover "
        "training seeds."
    )
    return figure


def _cell(axis, x: int, y: int, found: tuple | None) -> None:
    import matplotlib.pyplot as plt

    if found is None:
        axis.text(x, y, "-", ha="center", va="center", color="#777777")
        return
    gain, (low, high) = found
    sure = low > 0 or high < 0
    strength = min(1.0, 0.25 + abs(gain) / 25)
    colour = ((0.0, 0.447, 0.698) if gain > 0 else (0.90, 0.52, 0.0)) if sure else (1.0, 1.0, 1.0)
    axis.add_patch(plt.Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, color=(*colour, strength), linewidth=0))
    ink = "white" if sure and gain > 0 and strength > 0.6 else "#111111" if sure else "#555555"
    middle = {"ha": "center", "va": "center", "color": ink}
    axis.text(x, y - 0.24, f"{gain:+.1f}", fontsize=6.5, fontweight="bold" if sure else "normal", **middle)
    axis.text(x, y + 0.18, f"{low:.1f}\n{high:.1f}", fontsize=6, linespacing=1.0, **middle)
