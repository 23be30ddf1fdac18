"""Table 2: perplexity along the dial, and time to the first token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zsaa.kit import paper
from zsaa.kit.labels import (
    by_eq_2,
    device_of,
    perplexity_protocol,
    perplexity_subject,
    trained_as_in_paper,
)
from zsaa.kit.points import settings
from zsaa.kit.store import rows_of
from zsaa.kit.tables.text import at_lengths, beyond, by_shape, over_lengths, short
from zsaa.kit.verdicts import Cell


def table_2_cells(results: Iterable[dict]) -> list[Cell]:
    """Every number of Table 2, with a Cell for each result (of kind "perplexity") that bears on it, per token and per
    word (the paper does not say which; last words: per word). Only the dial with the paper's score and schedule
    counts, at alpha solved for that MAC reduction; the paper's rows are speed-ups of time-to-first-token.

    These speed-ups are the column TTFT (1x is by definition), with a Cell for each model and batch of results of the
    kind "ttft" (zsaa.bench): the clock at the alpha that is solved for that reduction. No weight decides it, so random
    ones of the true shape will do; another device than the paper's T4 stands in."""
    results = list(results)
    clocks = [r for r in results if r["kind"] == "ttft"]
    results = [r for r in results if r["kind"] == "perplexity"]
    results = [r for r in results if by_eq_2(r)]
    cells = []
    for target, columns in paper.TABLE_2.items():
        for column, published in columns.items():
            where = {"table": "Table 2", "row": f"{target}x", "column": column, "published": published}
            found = []
            for result in results:
                for row in rows_of(result, "alpha") if result["task"]["paper_column"] == column else ():
                    if row["target"] != target or row["score"] not in (None, "column_sum"):
                        continue
                    per = {"word": "word_"} if result["protocol"]["normalisation"] == "word" else {}
                    for unit, field in (per or {"token": "", "word": "word_"}).items():
                        measured = {"ours": row[f"{field}perplexity"], "interval": tuple(row[f"{field}ci95"])}
                        measured |= {"n": row["n"], "protocol": f"{perplexity_protocol(result)}; per {unit}"}
                        measured |= {"subject": perplexity_subject(result), "substitute": _table_2_substitutes(result)}
                        found.append(Cell(**where, **measured, result=result["name"]))
            cells += found or [Cell(**where)]
        if target != 1:
            where = {"table": "Table 2", "row": f"{target}x", "column": "TTFT", "published": target}
            found = [_ttft_cell(where, result, rows) for result in clocks for rows in by_shape(result["rows"], target)]
            cells += found or [Cell(**where)]
    return cells


def _table_2_substitutes(result: dict) -> str:
    """What of a result is not the paper's: its Table 2 is for GPT-2, fine-tuned as section 4.2 says."""
    model = result["model"]  # a folder may be called gpt2 and be anything
    parts = ["model"] * (model["kind"] != "hub" or model["name"] not in paper.TABLE_2_MODELS)
    parts += ["data"] * result["task"]["substitute"] + ["training"] * (not trained_as_in_paper(result))
    return ", ".join(parts)


def _ttft_cell(where: dict, result: dict, rows: list[dict]) -> Cell:
    device = result["provenance"]["hardware"]["device"]
    stands_in = ["device"] * ("T4" not in device) + ["model"] * (rows[0]["model"] != "gpt2-124m")
    how = "by the clock over stock at the alphas that Eq. 2 needs; " + at_lengths(rows, "speedup")
    if any(row["capture_ms"] for row in rows):
        how += "; from CUDA graphs, kernel by kernel " + ", ".join(f"{row['by_kernel_speedup']:.2f}x" for row in rows)
    return Cell(
        **where, **over_lengths([row["speedup"] for row in rows]), substitute=", ".join(stands_in), protocol=how,
        subject=f"{rows[0]['model']}'s true shape, random weights, {result['dtype']}, batch {rows[0]['batch']}, "
        f"{device_of(result)}", result=result["name"],
    )  # fmt: skip


def table_2(cells: Sequence[Cell]):
    """Table 2, a row for the paper and one for each of ours: perplexity [95% interval] at each speed-up (the paper's of
    time-to-first-token, ours of MACs), and last what the clock makes of these [range over prompt lengths]."""
    import pandas as pd

    table = []
    for column in (*paper.TABLE_2_COLUMNS, "TTFT"):
        clock = column == "TTFT"
        numbers = {f"{t}x": f"{t}x" if clock else f"{row[column]:.2f}" for t, row in paper.TABLE_2.items()}
        table.append(
            {
                "corpus": "any: speed-up of the first token" if clock else column,
                "measured": f"paper: {paper.TABLE_2_MODEL}",
                "protocol": "not stated",
                **numbers,
            }
        )
        groups: dict[tuple, list[Cell]] = {}
        for cell in cells:
            if cell.column == column:
                groups.setdefault((cell.subject, "" if clock else cell.protocol, cell.result), []).append(cell)
        if len(groups) > 1:  # what no result bears on is said in the rows of those that bear on other speed-ups
            groups.pop(("", "", ""), None)
        for (what, how, _), group in groups.items():
            measured = {cell.row: cell for cell in group if cell.ours is not None}
            row = {"corpus": table[-1]["corpus"], "measured": what or "not run", "protocol": how or "-"}
            row |= {t: _perplexity(measured[t]) if t in measured else "not run" for t in numbers}
            verdicts = {t: measured[t].verdict if t in measured else "not run" for t in numbers}
            if clock:
                del verdicts["1x"]
                row |= {"1x": "1x"}
            same = len({*verdicts.values()}) == 1
            row["verdict"] = group[0].verdict if same else ", ".join(f"{t} {v}" for t, v in verdicts.items())
            table.append({**row, "n": group[0].n or "-", "stands in": group[0].substitute or "-"})
    columns = ["corpus", "measured", "protocol", "n", *(f"{t}x" for t in paper.TABLE_2), "verdict", "stands in"]
    return pd.DataFrame(table, columns=columns, dtype=object).fillna("-")


def _perplexity(cell: Cell) -> str:
    shown, low, high = map(short, (cell.ours, *cell.interval))
    return shown if low == high else f"{shown} [{low}, {high}]"  # of a single length there is no range


def _measured(row) -> str:
    """The model, how it was trained, the seed of the windows that were drawn if that says more, and the text."""
    seed = f", seed {row['seed']:g}" if row["seed"] and "seed" not in row["recipe"] else ""
    return f"{row['model']}, {row['recipe']}{seed}; {row['task'].split('; ')[0]}"


def _protocol(row) -> str:
    return row["task"].split("; ", 1)[1]


def _way(method: str) -> str:
    return "dial, column_sum" if method == "dial" else method.replace("dial (score ", "dial, ").replace(")", "")


def table_2_controls(points):
    """The dial and its controls by MAC reduction, a row for each, from points of the kind "perplexity": times the stock
    model's perplexity per token [95% interval, paired] and the share of next tokens that stay as they were. Short texts
    are cut to whole tokens: what missed its reduction says what it reached."""
    import pandas as pd

    found, table = settings(points), []
    targets = sorted(set(found["target"]) - {1})
    for _, result in found.groupby("file", sort=False):
        first = result.iloc[0]
        head = {
            "measured": _measured(first),
            "protocol": f"{_protocol(first)}; per token",
            "n": f"{first['ratio_n']:g}",
        }
        for method, rows in result[result["target"] != 1].groupby("method", sort=False):
            at = {row["target"]: row for row in rows.to_dict("records")}
            shown = {f"{t:g}x": _against_stock(at[t]) if t in at else "-" for t in targets}
            table.append({**head, "keeps": _way(method), **shown})
    return pd.DataFrame(table)


def _against_stock(row: dict) -> str:
    ratio, low, high = map(short, (row["ratio"], row["ratio_low"], row["ratio_high"]))
    return f"x{ratio} [{low}, {high}], {row['agreement']:.0f}% the same{beyond(row)}"


def table_2_settings(points):
    """All that was measured, a row per setting: alpha or tokens left, MACs, time to first token, perplexities."""
    import pandas as pd

    def number(row: dict, name: str, text: str, missing: str = "-") -> str:
        return missing if row.get(name) is None or row[name] != row[name] else text.format(row[name])

    def perplexity(row: dict, name: str) -> str:
        return "{} [{}, {}]".format(*map(short, (row[name], row[f"{name}_low"], row[f"{name}_high"])))

    return pd.DataFrame(
        {
            "measured": _measured(row),
            "protocol": _protocol(row),
            "keeps": _way(row["method"]),
            "target": f"{row['target']:g}x",
            "alpha": number({"alpha": round(row["alpha"], 4)}, "alpha", "{}"),
            "tokens left": number(row, "keep_tokens", "{:g}"),
            "MACs": f"{row['mac_reduction']:.2f}x",
            "TTFT": number(row, "speedup", "{:.2f}x", "not run"),
            "per token": perplexity(row, "perplexity"),
            "per word": perplexity(row, "word_perplexity"),
            "next token the same": f"{row['agreement']:.1f}%",
            "... right after the prefix": f"{row['agreement_first']:.1f}%",
            "n": f"{row['ratio_n']:g}",
        }
        for row in settings(points).to_dict("records")
    )
