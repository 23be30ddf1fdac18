"""From result files to tables, ours beside the paper's. Nothing here computes a result."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from zsaa import paper
from zsaa.results import label, rows_of, status, with_interval


def table_1(results: Iterable[dict]):
    """Table 1 in long form, as a DataFrame: one row per data set, run and target speed-up; ours beside the paper's.

    "MACs" is what our rows reach at the printed alpha on the evaluated samples; the paper's own rows are wall-clock
    speed-ups of another model, so the difference is shown for orientation and every row of ours is a substitute.
    """
    import pandas as pd

    table = []
    for result in results:
        task = result["task"]
        for row in rows_of(result, "alpha"):
            published = paper.TABLE_1.get(row["target"], {}).get(task["paper_column"])
            low, high = row["ci95"]
            table.append(
                {
                    "data set": task["name"],
                    "run": label(result),
                    "speed-up": f"{row['target']}x",
                    "alpha": round(row["alpha"], 4),
                    "MACs": f"{row['mac_reduction']:.2f}x",
                    "measured": f"{row['speedup']:.2f}x" if row.get("speedup") else "not run",
                    "ours": row["accuracy"],
                    "95% interval": f"{low:.1f} to {high:.1f}",
                    "n": row["n"],
                    f"paper, {paper.TABLE_1_MODEL}": "no such column"
                    if task["paper_column"] is None
                    else ("-" if published is None else published),
                    "status": status(result),
                }
            )
    return pd.DataFrame(table)


def table_1_wide(results: Sequence[dict]):
    """Table 1 in the paper's shape: rows are speed-ups, columns are data sets and runs, each beside the paper's."""
    import pandas as pd

    columns = {}
    for result in results:
        name = f"{label(result)} ({status(result)})"
        cells = {f"{r['target']}x": r for r in rows_of(result, "alpha")}
        targets = [f"{t}x" for t in paper.TABLE_1]
        columns[(name, "alpha")] = [f"{cells[t]['alpha']:.3f}" if t in cells else "out of reach" for t in targets]
        columns[(name, "accuracy [95% interval]")] = [
            with_interval(cells[t]) if t in cells else "out of reach" for t in targets
        ]
    for column in dict.fromkeys(r["task"]["paper_column"] for r in results if r["task"]["paper_column"]):
        values = [paper.TABLE_1[t][column] for t in paper.TABLE_1]
        columns[(f"paper: {column}, {paper.TABLE_1_MODEL}", "accuracy")] = [
            "-" if v is None else f"{v:.2f}" for v in values
        ]
    return pd.DataFrame(columns, index=pd.Index([f"{t}x" for t in paper.TABLE_1], name="speed-up"))


def controls_table(results: Sequence[dict]):
    """Accuracy at equal MACs, per data set: the dial after either fine-tuning, and the plainest rival, the conventional
    model on the first or the last tokens only. A column a curve, a row a target; "-" where it was not run."""
    import pandas as pd

    columns = {}
    for result in results:
        for control in ("alpha", "first", "last"):
            cells = {r["target"]: r for r in rows_of(result, control)}
            if cells:
                how = "dial" if control == "alpha" else f"{control} tokens only"
                columns[(result["task"]["name"], f"{label(result, short=True)}, {how}")] = [
                    with_interval(cells[t]) if t in cells else "-" for t in paper.TABLE_1
                ]
    return pd.DataFrame(columns, index=pd.Index([f"{t}x" for t in paper.TABLE_1], name="MAC reduction"))


def save_table(table, path: str | Path, title: str) -> None:
    """`path`.md and `path`.html."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = table.copy()
    if flat.columns.nlevels > 1:
        flat.columns = [": ".join(column) for column in flat.columns]
    if flat.index.name:
        flat = flat.reset_index()
    lines = [f"| {' | '.join(map(str, flat.columns))} |", "|" + "---|" * len(flat.columns)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in flat.itertuples(index=False)]
    path.with_suffix(".md").write_text(f"### {title}\n\n" + "\n".join(lines) + "\n")
    path.with_suffix(".html").write_text(
        f"<h3>{html.escape(title)}</h3>\n" + table.to_html(border=0, index=table.index.name is not None)
    )
