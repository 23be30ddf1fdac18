"""Tables of the ablation: accuracies, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence

from ablation.show.rows import budget_of, cell_at, curves, is_main, scorer_of
from zsaa.kit.equal import ahead, at_equal_macs, control_rows
from zsaa.kit.store import with_interval

NOT_RUN = "not run"


def accuracy_table(results: dict[str, dict], targets: Sequence[float], rows: dict[str, dict]):
    """One line per curve, in the order of `rows` (the configuration's): accuracy and interval at each MAC reduction,
    training compute and time; rows without a result file say so."""
    import pandas as pd

    lines = []
    for name, result, control in curves(results):
        cells = {f"{t:g}x": cell_at(result, control, t) for t in targets}
        log, alone = result["log"], scorer_of(result)
        lines.append(
            {"row": name, **{t: with_interval(cell) if cell else "-" for t, cell in cells.items()},
             "scorer alone": f"{with_interval(alone)} at {alone['mac_reduction']:.0f}x" if alone else "-",
             "training MACs (epochs)": round(log["epochs_of_compute"], 2), "GPU minutes": round(log["seconds"] / 60, 1),
             "budget": budget_of(result) or "the task's",
             "what it shows": rows.get(result["row"], result)["about"]}
        )  # fmt: skip
    belongs = [result["row"] for _, result, _ in curves(results)]
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
    equal = is_main(result) or result["training"].get("compute") is not None
    return budget_of(rival) == budget_of(result) if equal else True


def paired_table(results: dict[str, dict], targets: Sequence[float], against: str = "paper"):
    """Points by which each curve is ahead of the row `against` on the same held-out texts, with the 95% interval of a
    paired bootstrap, and a star where it leaves out 0, at the curve's own MACs (zsaa.kit.equal), whatever its target.
    None where `against` was not run.

    against="truncation" takes at each target the best of the curves that read cut inputs, all seeds of them. Runs for
    the task's epochs are tested against truncation of the task's epochs, runs of equal compute against truncation of
    as much, and runs of other epochs (-epochsN) against the best truncation of any budget; where no rows tuned on cut
    inputs ran for as long, their lead is in part that of the longer training. against="scorer" takes each curve's own
    scorer alone, at its one, far lower price. Any other rival is its run for the task's epochs, whatever the curve's
    budget: column "budget" says which that is."""
    import pandas as pd

    all_curves = list(curves(results))
    lines = []
    for name, result, control in all_curves:
        line: dict = {"row": name, "budget": budget_of(result) or "the task's"}
        for target in targets:
            cell, rivals = cell_at(result, control, target), []
            if against == "scorer" and control == "alpha":
                rivals.append(scorer_of(result))
            for other, rival, side in all_curves:
                cut = side != "alpha" and target > 1 and _fair(result, rival)
                if cell and (cut if against == "truncation" else other == against):
                    rivals.append(at_equal_macs(control_rows(rival, side), cell["mac_reduction"]))
            rivals = [r for r in rivals if r is not None and cell is not None and r["n"] == cell["n"]]
            if not rivals or cell is None:
                line[f"{target:g}x"] = "-"
                continue
            best = max(rivals, key=lambda r: r["accuracy"])
            gain, (low, high) = ahead(cell, best)
            line[f"{target:g}x"] = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]" + ("*" if low > 0 or high < 0 else "")
        lines.append(line)
    table = pd.DataFrame(lines)
    return table if len(table) and (table.drop(columns=["row", "budget"]) != "-").any(axis=None) else None
