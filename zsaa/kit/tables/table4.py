"""Table 4: what the published configurations say."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.verdicts import Cell


def table_4_cells(results: Sequence[dict]) -> list[Cell]:
    """Table 4: a Cell for each fact that the paper prints and each published configuration that bears on it (kind
    "architectures"). Nothing is measured: facts of the published configurations agree with the paper's, or differ."""
    known = [(r, row) for r in results if r["kind"] == "architectures" for row in r["rows"]]
    cells = []
    for name, published in paper.TABLE_4.items():
        for column, value in published.items():
            where = {"table": "Table 4", "row": name, "column": column, "published": value}
            found = []
            for result, row in known:
                if row["row"] != name:
                    continue
                ours, protocol = row.get(column), "built from the published configuration"
                if column == "size":  # in the paper's unit
                    ours = f"{row['parameters'] / {'M': 1e6, 'B': 1e9}[value[-1]]:.0f}{value[-1]}"
                    protocol = f"{row['parameters']:,} parameters, counted"
                elif column == "attention":
                    protocol += f": {row['heads']} heads, {row['key/value heads']} of keys and values"
                found.append(
                    Cell(**where, ours=ours, subject=row["checkpoint"], protocol=protocol, result=result["name"])
                )
            cells += found or [Cell(**where)]
    return cells


def table_4(results: Sequence[dict]):
    """Table 4 in the paper's shape, as a DataFrame: under each of the paper's rows what each checkpoint is; what
    differs stands in brackets."""
    import pandas as pd

    rows: dict[str, dict] = {}
    for cell in table_4_cells(results):
        rows.setdefault(f"{cell.row} (paper)", {})[cell.column] = cell.published
        if cell.ours is not None:
            shown = cell.ours if cell.verdict == "consistent" else f"[{cell.ours}]"
            rows.setdefault(cell.subject, {})[cell.column] = shown
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"), columns=list(paper.TABLE_4_COLUMNS))
