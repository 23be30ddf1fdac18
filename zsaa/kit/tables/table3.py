"""Table 3: MMLU, MACs and GPU memory of 4-bit models."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.labels import by_eq_2, choice_subject, device_of
from zsaa.kit.store import ends, measured, rows_of
from zsaa.kit.tables.text import at_lengths, by_shape, over_lengths
from zsaa.kit.verdicts import Cell

CHANCE = 25  # percent of four-way choices that are right by lot


def table_3_cells(results: Sequence[dict]) -> list[Cell]:
    """Table 3: a Cell for each number that the paper prints below 1x, and its scores at 1x, and for each result that
    bears on it. (Footprint and alpha are 1.00 at 1x by definition.)

    "MMLU": results of kind "choice" (zsaa.mmlu) under the paper's schedule. At one reduction there are two of each: at
    the alpha that Eq. 2 needs for it, and at the alpha that the paper prints. "GPU footprint": kind "footprint"
    (zsaa.bench), in 4 bits, at both
    alphas: the range over prompt lengths, which the paper does not state. No weight decides it, so random ones of the
    true shape are no substitute: a number outside the range differs. Inside, it may or may not be what the paper's
    prompts give: ours stand in for them.
    "alpha": kind "audit" (zsaa.kit.audit), exact for the published configurations, and rounded as the paper rounds.
    """
    scores = [r for r in results if r["kind"] == "choice" and by_eq_2(r)]
    footprints = [r for r in results if r["kind"] == "footprint"]
    implied = [(r, row) for r in results if r["kind"] == "audit" for row in r["rows"]]
    shapes = {"LLaMA-3-8B-4bit": "llama3-8b", "Gemma-2-2B-4bit": "gemma2-2b"}
    cells = []
    for model, rows in paper.TABLE_3.items():
        for target, published in rows.items():
            for column in paper.TABLE_3_COLUMNS:
                where = {"table": "Table 3", "row": f"{target}x", "column": f"{model}: {column}"}
                where["published"] = published[column]
                if column == "MMLU":
                    found = [
                        _score_cell(where, r, row)
                        for r in scores
                        if r["model"]["stands_for"] == model
                        for control in ("alpha", "printed")
                        for row in rows_of(r, control)
                        if row["target"] == target
                    ]
                elif target == 1:
                    continue
                elif column == "GPU footprint":
                    found = [
                        _footprint_cell(where, r, rows)
                        for r in footprints
                        for control in ("alpha", "printed")
                        for rows in by_shape(_in_4_bits(r, shapes[model], control), target)
                    ]
                else:
                    found = [
                        Cell(
                            **where,
                            ours=round(row["needed"], 2),
                            subject=f"{model}'s published configuration",
                            protocol=f"exact: the alpha for which Eq. 2 gives {target}x (512 tokens, tau {paper.TAU}); "
                            f"the printed one gives {row['eq2']:.2f}x",
                            result=r["name"],
                        )
                        for r, row in implied
                        if (row["model"], row["reduction"]) == (model, target)
                    ]
                cells += found or [Cell(**where)]  # fmt: skip
    return cells


def _score_cell(where: dict, result: dict, row: dict) -> Cell:
    task = result["task"]
    how = "solved for this reduction" if row["control"] == "alpha" else "as printed"
    protocol = f"alpha {row['alpha']:.4f} ({how}), {row['mac_reduction']:.2f}x fewer MACs, {task['shots']} shots, "
    protocol += {"letters": "likeliest letter", "text": "likeliest text"}[task["form"]]
    if row["ci95"][0] <= CHANCE <= row["ci95"][1]:
        protocol += f"; not told from chance ({CHANCE}%)"
    others = [name.removeprefix("no ") for name in result["differs_from_the_paper"]]
    return Cell(
        **where, ours=measured(row), interval=ends(row), n=row["n"], protocol=protocol,
        subject=f"{choice_subject(result)}; {task['name']}, chance {CHANCE}%",
        substitute=", ".join(others), result=result["name"],
    )  # fmt: skip


def _in_4_bits(result: dict, shape: str, control: str) -> list[dict]:
    """The rows of a footprint result that bear on Table 3: in 4 bits, and measured."""
    mine = [row for row in result["rows"] if (row["model"], row["control"]) == (shape, control)]
    return [row for row in mine if row["storage"] == "nf4" and row["peak_bytes"]]


def _footprint_cell(where: dict, result: dict, rows: list[dict]) -> Cell:
    how = "solved for this reduction" if rows[0]["control"] == "alpha" else "as printed"
    alphas = [f"{end([row['alpha'] for row in rows]):.4f}" for end in (min, max)]
    over = over_lengths([row["footprint_reduction"] for row in rows])
    low, high = over["interval"]
    return Cell(
        **where, **over, substitute="prompts" if low <= where["published"] <= high else "", result=result["name"],
        subject=f"{rows[0]['model']}'s true shape, random weights, nf4, batch {rows[0]['batch']}, {device_of(result)}",
        protocol=f"peak on top of the weights, {rows[0]['attention']} attention at 1x, alpha "
        f"{' to '.join(dict.fromkeys(alphas))} ({how}); {at_lengths(rows, 'footprint_reduction')}; over the dial's own "
        "code while it drops nothing " + ", ".join(f"{row['over_all']:.2f}x" for row in rows),
    )  # fmt: skip


def table_3(results: Sequence[dict]):
    """Table 3 in the paper's shape, as a DataFrame: rows are reductions; each column of the paper is followed by one of
    each of our results, the score with its interval, the footprint with its range. "not run" where there is none."""
    import pandas as pd

    columns: dict[tuple, dict] = {}
    for cell in table_3_cells(results):
        column = columns.setdefault((cell.column, "paper"), {})
        column[cell.row] = f"{cell.published:.2f}"
        if cell.ours is None:
            columns.setdefault((cell.column, "ours"), {})[cell.row] = "not run"
            continue
        stands_in = ""
        if cell.column.endswith("MMLU"):
            stands_in = f" (substitute: {cell.substitute})" if cell.substitute else " (the paper's)"
        how = ", printed alpha" if "(as printed)" in cell.protocol else ""
        heading = f"{cell.subject}{stands_in}, {cell.result}{how}"
        digits = 1 if cell.n else 2
        shown = "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(cell.ours, *cell.interval or (0, 0), d=digits)
        shown = shown if cell.interval else f"{cell.ours:.2f}"
        columns.setdefault((cell.column, heading), {})[cell.row] = f"{shown}, {cell.verdict}"
    names = list(dict.fromkeys(name for name, _ in columns))
    for name in names:  # one column says that nothing was run, unless there is one of a run
        if len([heading for column, heading in columns if column == name]) > 2:
            columns.pop((name, "ours"), None)
    order = sorted(columns, key=lambda column: (names.index(column[0]), column[1] != "paper"))
    index = [f"{t}x" for t in paper.TABLE_3["LLaMA-3-8B-4bit"]]
    shown = {
        column: [columns[column].get(row, "not run" if row in columns[column[0], "paper"] else "-") for row in index]
        for column in order
    }
    return pd.DataFrame(shown, index=pd.Index(index, name="MACs"))
