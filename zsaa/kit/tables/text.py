"""How numbers read in a table, and tables as files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from zsaa.kit.verdicts import Cell


def cells_table(cells: Iterable[Cell]):
    """Any table of the paper in long form, as a DataFrame: a line for each Cell."""
    import pandas as pd

    return pd.DataFrame(
        {
            "row": cell.row,
            "column": cell.column,
            "paper": "-" if cell.published is None else cell.published,
            "ours": "not run" if cell.ours is None else cell.ours,
            "95% interval, or range": _ends(cell.interval),
            "n": "-" if cell.n is None else cell.n,
            "verdict": cell.verdict,
            "stands in": cell.substitute or "-",
            "what": cell.subject or "-",
            "how": cell.protocol or "-",
            "result": cell.result or "-",
        }
        for cell in cells
    )


def _ends(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "-"
    return "{:.{d}f} to {:.{d}f}".format(*interval, d=1 if max(interval) >= 20 else 2)


def beyond(row: dict, asked: float | None = None) -> str:
    """What a row's MACs fall by, where that is not what was asked for (its target, unless given): short texts are cut
    to whole tokens, few of them."""
    reached = row["mac_reduction"]
    return f" at {reached:.1f}x" if abs(reached / (asked or row["target"]) - 1) > 0.02 else ""


def short(value: float) -> str:
    """Two decimals; a perplexity that has blown up as a power of ten."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def by_shape(rows: Sequence[dict], target: float) -> list[list[dict]]:
    """The rows at that reduction, a list for each model and batch, by length."""
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["target"] == target:
            groups.setdefault((row["model"], row["batch"]), []).append(row)
    return list(groups.values())


def over_lengths(values: Sequence[float]) -> dict:
    """What a Cell says of facts without chance that were measured at several lengths: the one in the middle, and the
    range."""
    values = sorted(round(value, 2) for value in values)
    return {"ours": values[(len(values) - 1) // 2], "interval": (values[0], values[-1])}


def at_lengths(rows: Sequence[dict], field: str) -> str:
    """The lengths, with what was measured at each."""
    return "prompts of " + ", ".join(f"{row['tokens']} tokens {row[field]:.2f}x" for row in rows)


def save_table(table, path: str | Path, title: str) -> None:
    """`path`.md and `path`.html."""
    import pandas as pd

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = table.copy()
    if flat.columns.nlevels > 1:
        flat.columns = [": ".join(column) for column in flat.columns]
    if flat.index.name:
        flat = flat.reset_index()
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in flat.itertuples(index=False)]
    names = [str(name).replace("|", "\\|") for name in flat.columns]
    text = tabulate(cells, names, tablefmt="github", disable_numparse=True)
    path.with_suffix(".md").write_text(f"### {title}\n\n{text}\n", encoding="utf-8")
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts cells off at 50 characters
        body = table.to_html(border=0, index=table.index.name is not None)
    path.with_suffix(".html").write_text(f"<h3>{html.escape(title)}</h3>\n{body}", encoding="utf-8")
