"""Table 1: accuracy or F1 along the dial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from zsaa.kit import paper
from zsaa.kit.labels import label, stand_ins, status
from zsaa.kit.store import ends, measured, over_seeds, rows_of, with_interval
from zsaa.kit.verdicts import Cell

EXTRA = {"rotten_tomatoes": "Rotten Tomatoes"}  # data sets that the paper does not have


def table_1_cells(results: Iterable[dict]) -> list[Cell]:
    """Table 1: a Cell for each number that the paper prints, and for each run of its method (alpha-sampled
    fine-tuning under the dial) that bears on it. Runs that differ in their seed alone count as one.

    Our speed-ups are MAC reductions, solved for the data set; the paper's are by the clock.
    """
    curves = [r for r in over_seeds([r for r in results if r["kind"] == "curve"]) if is_the_method(r)]
    cells = []
    for target, published in paper.TABLE_1.items():
        for column in paper.TABLE_1_COLUMNS:
            where = {"table": "Table 1", "row": f"{target}x", "column": column, "published": published[column]}
            found = [_cell(where, r, target) for r in curves if r["task"]["paper_column"] == column]
            if not found and published[column] is not None:
                found = [Cell(**where)]
            cells += [cell for cell in found if cell.published is not None or cell.ours is not None]
    return cells


def is_the_method(result: dict) -> bool:
    """The paper's recipe, or ours in its place: `stand_ins` tells them apart."""
    return result["recipe"]["method"] in ("alpha-sampled", "zsaa+") and bool(rows_of(result, "alpha"))


def _cell(where: dict, result: dict, target: float) -> Cell:
    row = next((r for r in rows_of(result, "alpha") if r["target"] == target), None)
    taught = result["task"].get("training_substitute")
    subject = label(result) + (f", trained on {taught}" if taught else "")
    facts = {"subject": subject, "substitute": stand_ins(result), "result": result["name"]}
    if row is None:
        reached = f"MACs fall {max(r['mac_reduction'] for r in rows_of(result, 'alpha')):.2f}x at most of what was run"
        return Cell(**where, **facts, protocol=f"not run at {target}x: out of reach (tau) or not asked for; {reached}")
    how = f"{'F1' if 'f1' in row else 'accuracy'}, alpha {row['alpha']:.4f}, {row['mac_reduction']:.2f}x fewer MACs"
    if row.get("speedup"):
        how += f", {row['speedup']:.2f}x by the clock (batch {row['latency_batch']} of {row['latency_tokens']} tokens)"
    how += f"; interval: {row['covers']}"
    return Cell(**where, **facts, ours=measured(row), interval=ends(row), n=row["n"], protocol=how)


def table_1(results: Sequence[dict]):
    """Table 1 in the paper's shape, as a DataFrame: rows are speed-ups; each data set has the paper's column and one of
    each run of its method, "not run" where there is none. Data sets that the paper does not have come last.

    Cells of ours: metric [95% interval], alpha, achieved MAC reduction, verdict. n, and what stands in for the paper's
    model, data or training, are in the heading.
    """
    import pandas as pd

    results = [r for r in over_seeds([r for r in results if r["kind"] == "curve"]) if is_the_method(r)]
    cells = {(c.column, c.result, c.row): c for c in table_1_cells(results)}
    columns = {}
    for column in paper.TABLE_1_COLUMNS:
        published = [row[column] for row in paper.TABLE_1.values()]
        metric = "F1" if column in ("QQP", "MRPC") else "accuracy"
        columns[column, f"paper, {paper.TABLE_1_MODEL}: {metric}"] = [_printed(v) for v in published]
        runs = [r for r in results if r["task"]["paper_column"] == column]
        for result in runs:
            found = [cells.get((column, result["name"], f"{t}x")) for t in paper.TABLE_1]
            columns[column, _heading(result)] = [
                _row_text(result, t, cell.verdict if cell and cell.ours is not None else None)
                for t, cell in zip(paper.TABLE_1, found)
            ]
        if not runs:
            columns[column, "ours"] = ["not run"] * len(published)
    for name, title in EXTRA.items():
        for result in (r for r in results if r["task"]["name"] == name):
            columns[f"{title} (not in the paper)", _heading(result)] = [
                _row_text(result, t, "no such column") for t in paper.TABLE_1
            ]
    return pd.DataFrame(columns, index=pd.Index([f"{t}x" for t in paper.TABLE_1], name="speed-up"))


def _printed(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _heading(result: dict) -> str:
    """Model, training, n, seeds, and what is substituted."""
    seeds = f"{len(result['seeds'])} seeds" if len(result["seeds"]) > 1 else f"seed {result['seeds'][0]}"
    where = " (evaluated here)" if result.get("adapter") else ""
    facts = f"{label(result, short=True)}, n {result['rows'][0]['n']}, {seeds}; {status(result)}"
    return f"{Path(result['model']['name']).name}{where}, {facts}"


def _row_text(result: dict, target: float, verdict: str | None) -> str:
    row = next((r for r in rows_of(result, "alpha") if r["target"] == target), None)
    if row is None:
        return "not run (out of reach, or not asked for)"
    return f"{with_interval(row)}, alpha {row['alpha']:.3f}, {row['mac_reduction']:.2f}x, {verdict}"
