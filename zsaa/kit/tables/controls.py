"""The dial and its controls, and how far apart they are at equal MACs on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.equal import ahead, at_equal_macs, control_rows
from zsaa.kit.labels import label
from zsaa.kit.store import over_seeds, per_sample, rows_of, with_interval
from zsaa.kit.tables.table1 import is_the_method
from zsaa.kit.tables.text import beyond
from zsaa.measure import stats

HOW = {
    "alpha": "dial",
    "random": "dial, tokens kept at random",
    "first": "first tokens only",
    "last": "last tokens only",
    "ends": "both ends only",
}


def controls_table(results: Sequence[dict]):
    """Values by MAC reduction, as a DataFrame with a column for each data set, training and control: the dial; its
    schedule with tokens kept at random; and the whole model on the first tokens, the last ones, or both ends. A row a
    target, "-" where it was not run. Cells that missed the target say what they reached."""
    import pandas as pd

    columns = {}
    for result in over_seeds(_by_data_set(results)):
        for control, how in HOW.items():
            cells = {r["target"]: r for r in rows_of(result, control)}
            if cells:
                samples = ", ".join(str(n) for n in sorted({cell["n"] for cell in cells.values()}))
                name = f"{label(result, short=True)}{', here' if result.get('adapter') else ''}, {how}, n {samples}"
                columns[result["task"]["name"], name] = [
                    with_interval(cells[t]) + beyond(cells[t]) if t in cells else "-" for t in paper.TABLE_1
                ]
    return pd.DataFrame(columns, index=pd.Index([f"{t}x" for t in paper.TABLE_1], name="MAC reduction"))


def _by_data_set(results: Sequence[dict]) -> list[dict]:
    """The curves among `results`, those of a data set together, in the order in which they come."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        if result["kind"] == "curve":
            groups.setdefault(result["task"]["name"], []).append(result)
    return [result for group in groups.values() for result in group]


def differences_table(results: Sequence[dict]):
    """How many points the dial after a recipe's fine-tuning is ahead of each control at equal MACs, on the same
    samples (zsaa.kit.equal says how), with a paired 95% interval (held-out samples; one seed of each). A control counts
    whichever training it comes after, on the same model. What was compared at other MACs says at which."""
    import pandas as pd

    table, curves = [], _by_data_set(results)
    for ours in (r for r in curves if is_the_method(r)):
        for other in curves:
            same = [(r["model"]["name"], r["task"]["name"], r["task"]["fingerprint"]) for r in (ours, other)]
            tuned = [(r["recipe"]["tuning"], r["recipe"].get("seed")) for r in (ours, other)]
            if same[0] != same[1] or tuned[0] != tuned[1]:
                continue
            for control in HOW:
                if control == "alpha" and other is ours:
                    continue
                line = {"data set": ours["task"]["name"], "dial of": ours["name"]}
                line["against"] = f"{other['name']}, {HOW[control]}"
                rivals = control_rows(other, control)
                asked = {row["target"] for row in rows_of(other, control)}  # no settings between those that were run
                mine = [row for row in rows_of(ours, "alpha") if row["target"] in asked]
                pairs = [(row, at_equal_macs(rivals, row["mac_reduction"])) for row in mine]
                pairs = [(row, rival) for row, rival in pairs if rival]
                if pairs:
                    line["n"] = pairs[0][0]["n"]
                    table.append(line | {f"{row['target']}x": _difference(row, rival) for row, rival in pairs})
    return pd.DataFrame(table).fillna("-")


def _difference(row: dict, rival: dict) -> str:
    if "f1" in row:
        labels, predicted = per_sample(row)
        points, (low, high) = stats.difference("f1", labels, predicted, per_sample(rival)[1])
    else:
        points, (low, high) = ahead(row, rival)
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]{beyond(rival, row['mac_reduction'])}"
