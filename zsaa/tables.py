"""From result files to tables, ours beside the paper's. Nothing here computes a result."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from zsaa import paper, stats
from zsaa.results import (
    by_eq_2,
    label,
    measured,
    over_seeds,
    per_sample,
    rows_of,
    stand_ins,
    status,
    trained_as_in_paper,
    training,
    with_interval,
)
from zsaa.verdicts import Cell

EXTRA = {"rotten_tomatoes": "Rotten Tomatoes"}  # data sets that the paper does not have
HOW = {
    "alpha": "dial",
    "random": "dial, tokens kept at random",
    "first": "first tokens only",
    "last": "last tokens only",
    "ends": "both ends only",
}


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


def table_1_cells(results: Iterable[dict]) -> list[Cell]:
    """Table 1: a Cell for each number that the paper prints, and for each run of its method (alpha-sampled
    fine-tuning under the dial) that bears on it. Runs that differ in their seed alone count as one.

    Our speed-ups are MAC reductions, solved for the data set; the paper's are by the clock.
    """
    curves = [r for r in over_seeds([r for r in results if r["kind"] == "curve"]) if _is_the_method(r)]
    cells = []
    for target, published in paper.TABLE_1.items():
        for column in paper.TABLE_1_COLUMNS:
            where = {"table": "Table 1", "row": f"{target}x", "column": column, "published": published[column]}
            found = [_cell(where, r, target) for r in curves if r["task"]["paper_column"] == column]
            if not found and published[column] is not None:
                found = [Cell(**where)]
            cells += [cell for cell in found if cell.published is not None or cell.ours is not None]
    return cells


def _is_the_method(result: dict) -> bool:
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
    return Cell(**where, **facts, ours=measured(row), interval=tuple(row["ci95"]), n=row["n"], protocol=how)


def table_1(results: Sequence[dict]):
    """Table 1 in the paper's shape, as a DataFrame: rows are speed-ups; each data set has the paper's column and one of
    each run of its method, "not run" where there is none. Data sets that the paper does not have come last.

    Cells of ours: metric [95% interval], alpha, achieved MAC reduction, verdict. n, and what stands in for the paper's
    model, data or training, are in the heading.
    """
    import pandas as pd

    results = [r for r in over_seeds([r for r in results if r["kind"] == "curve"]) if _is_the_method(r)]
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


def controls_table(results: Sequence[dict]):
    """Values at equal MACs, as a DataFrame with a column for each data set, training and control: the dial; the dial's
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
                    with_interval(cells[t]) + _beyond(cells[t]) if t in cells else "-" for t in paper.TABLE_1
                ]
    return pd.DataFrame(columns, index=pd.Index([f"{t}x" for t in paper.TABLE_1], name="MAC reduction"))


def _beyond(row: dict) -> str:
    """What a row's MACs fall by, where that is not its target: short texts are cut to whole tokens, few of them."""
    reached = row["mac_reduction"]
    return f" at {reached:.1f}x" if abs(reached / row["target"] - 1) > 0.05 else ""


def _by_data_set(results: Sequence[dict]) -> list[dict]:
    """The curves among `results`, those of a data set together, in the order in which they come."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        if result["kind"] == "curve":
            groups.setdefault(result["task"]["name"], []).append(result)
    return [result for group in groups.values() for result in group]


def differences_table(results: Sequence[dict]):
    """How many points the dial after a recipe's fine-tuning is ahead of each control at equal MACs, on the same
    samples, with a paired 95% interval (held-out samples; one seed of each). A control counts whichever training it
    comes after, on the same model; one that missed the target says what it reached."""
    import pandas as pd

    table, curves = [], _by_data_set(results)
    for ours in (r for r in curves if _is_the_method(r)):
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
                rivals = {r["target"]: r for r in rows_of(other, control)}
                pairs = [(row, rivals[row["target"]]) for row in rows_of(ours, "alpha") if row["target"] in rivals]
                if pairs:
                    line["n"] = pairs[0][0]["n"]
                    table.append(line | {f"{row['target']}x": _difference(row, rival) for row, rival in pairs})
    return pd.DataFrame(table).fillna("-")


def _difference(row: dict, rival: dict) -> str:
    labels, predicted = per_sample(row)
    metric = "f1" if "f1" in row else "accuracy"
    points, (low, high) = stats.difference(metric, labels, predicted, per_sample(rival)[1])
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}]{_beyond(rival)}"


# ------------------------------------------------------------------------------------------------- Table 2

CONTROL_WAYS = {
    "first": "first tokens only",
    "last": "last tokens only",
    "ends": "both ends only",
    "random": "random tokens",
}


def perplexity_way(row: dict) -> str:
    """How a row of a perplexity result saves: the dial with its score, or a control."""
    if row["control"] == "alpha":
        return f"dial, {row['score']}" if row["score"] else "stock"
    return CONTROL_WAYS[row["control"]]


def perplexity_subject(result: dict) -> str:
    """The model, how it was trained for the task, its schedule if that is not the paper's, and the text, between
    semicolons."""
    seed = result["provenance"]["seed"]  # of the windows that were drawn; a training says its own, which is the same
    drawn = f", seed {seed}" if seed and not result.get("train") else ""
    drops = "" if by_eq_2(result) else f", schedule {result['recipe']['schedule']}"
    return f"{result['model']['name']}, {training(result, 'windows')}{drawn}{drops}; {result['task']['title']}"


def perplexity_protocol(result: dict) -> str:
    """How the pruned model was scored, with a warning where the score reads the future."""
    how = result["protocol"]
    if how["name"] == "last-word":
        return "last word after a pruned context, causal"
    if how["reads_future"]:
        return f"carry-through, {how['prefix'] + how['continuation']} tokens; WHAT IS KEPT READS THE FUTURE"
    return f"prefix, {how['prefix']} pruned + {how['continuation']} scored, causal"


def _table_2_substitutes(result: dict) -> str:
    """What of a result is not the paper's: its Table 2 is for GPT-2, fine-tuned as section 4.2 says."""
    model = result["model"]  # a folder may be called gpt2 and be anything
    parts = ["model"] * (model["kind"] != "hub" or model["name"] not in paper.TABLE_2_MODELS)
    parts += ["data"] * result["task"]["substitute"] + ["training"] * (not trained_as_in_paper(result))
    return ", ".join(parts)


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
            found = [_ttft_cell(where, result, rows) for result in clocks for rows in _shapes(result["rows"], target)]
            cells += found or [Cell(**where)]
    return cells


def _shapes(rows: Sequence[dict], target: float) -> list[list[dict]]:
    """The rows at that reduction, a list for each model and batch, by length."""
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["target"] == target:
            groups.setdefault((row["model"], row["batch"]), []).append(row)
    return list(groups.values())


def _over_lengths(values: Sequence[float]) -> dict:
    """What a Cell says of facts without chance that were measured at several lengths: the one in the middle, and the
    range."""
    values = sorted(round(value, 2) for value in values)
    return {"ours": values[(len(values) - 1) // 2], "interval": (values[0], values[-1])}


def _lengths(rows: Sequence[dict], field: str) -> str:
    """The lengths, with what was measured at each."""
    return "prompts of " + ", ".join(f"{row['tokens']} tokens {row[field]:.2f}x" for row in rows)


def _ttft_cell(where: dict, result: dict, rows: list[dict]) -> Cell:
    device = result["provenance"]["hardware"]["device"]
    stands_in = ["device"] * ("T4" not in device) + ["model"] * (rows[0]["model"] != "gpt2-124m")
    how = "by the clock over stock at the alphas that Eq. 2 needs; " + _lengths(rows, "speedup")
    if any(row["capture_ms"] for row in rows):
        how += "; from CUDA graphs, kernel by kernel " + ", ".join(f"{row['by_kernel_speedup']:.2f}x" for row in rows)
    return Cell(
        **where, **_over_lengths([row["speedup"] for row in rows]), substitute=", ".join(stands_in), protocol=how,
        subject=f"{rows[0]['model']}'s true shape, random weights, {result['dtype']}, batch {rows[0]['batch']}, "
        f"{_device(result)}", result=result["name"],
    )  # fmt: skip


def _device(result: dict) -> str:
    hardware = result["provenance"]["hardware"]
    if hardware["device"] != "cpu":
        return hardware["device"]
    return f"CPU, {threads(hardware['threads'])}"


def threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def ttft_table(results: Sequence[dict]):
    """Results of the kind "ttft", a row per setting."""
    import pandas as pd

    return pd.DataFrame(
        {
            "shape, random weights": row["model"],
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "alpha": round(row["alpha"], 4),
            "first token, ms": f"{row['latency_ms']:.2f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "without CUDA graphs": f"{row['by_kernel_speedup']:.2f}x" if row["capture_ms"] else "-",
            "on": f"{_device(result)}, {result['dtype']}",
        }
        for result in results
        for row in result["rows"]
    )


def prefill_table(results: Sequence[dict]):
    """Results of the kind "bench-prefill", a row per setting. Columns without a value (on a CPU, a GPU's) are left
    out."""
    import pandas as pd

    def mega(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e6:.1f}"

    def between(result: dict, row: dict) -> str:  # peaks are a GPU's, and so are fused kernels
        fused = result.get("fused", True) and row["alpha"] < 1
        return "-" if row["peak_bytes"] is None else "fused" if fused else "PyTorch's"

    table = pd.DataFrame(
        {
            "shape, random weights": row["model"],
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "alpha": f"{row['alpha']:g}",
            "kernels between": between(result, row),
            "MACs": f"{row['mac_reduction']:.2f}x",
            "ms [quartiles]": "{:.1f} [{:.1f}, {:.1f}]".format(row["latency_ms"], *row["latency_ms_quartiles"]),
            "speed-up": f"{row['speedup']:.2f}x",
            "roofline's": f"{row['roofline_speedup']:.2f}x",
            "measured / roofline": f"{row['realised']:.2f}",
            "recording a graph, ms": f"{row['capture_ms']:.0f}" if row["capture_ms"] else "-",
            "cache, MB": mega(row["kv_bytes"]),
            "peak, MB": mega(row["peak_bytes"]),
            "graph, MB": mega(row["graph_bytes"]),
            "on": f"{_device(result)}, {result['dtype']}",
        }
        for result in results
        for row in result["rows"]
    )
    return table.loc[:, (table != "-").any()]


def footprint_table(results: Sequence[dict]):
    """Results of the kind "footprint", a row per setting."""
    import pandas as pd

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    kinds = {"alpha": "solved", "printed": "as printed", "all": "dial's code, nothing dropped"}
    return pd.DataFrame(
        {
            "shape, random weights": f"{row['model']}, {row['storage']}",
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "alpha": "1" if row["alpha"] == 1 else f"{row['alpha']:.4f} ({kinds[row['control']]})",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "footprint, MB": "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "over stock": times(row["footprint_reduction"]),
            "over the dial's own code": times(row["over_all"]),
            "cache, MB": f"{row['kv_bytes'] / 1e6:.1f}",
            "first token, ms": f"{row['latency_ms']:.1f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "on": _device(result),
        }
        for result in results
        for row in sorted(result["rows"], key=lambda row: (row["model"], row["storage"], row["tokens"], row["batch"]))
    )


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
    shown, low, high = map(_short, (cell.ours, *cell.interval))
    return shown if low == high else f"{shown} [{low}, {high}]"  # of a single length there is no range


def _short(value: float) -> str:
    """Two decimals; a perplexity that has blown up as a power of ten."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def table_2_controls(results: Sequence[dict]):
    """The dial and its controls at equal MACs, a row for each: times the stock model's perplexity per token [95%
    interval, paired] and the share of next tokens that stay as they were."""
    import pandas as pd

    table = []
    targets = sorted({row["target"] for result in results for row in result["rows"]} - {1})
    for result in results:
        head = {
            "measured": perplexity_subject(result),
            "protocol": f"{perplexity_protocol(result)}; per token",
            "n": result["rows"][0]["n"],
        }
        ways = dict.fromkeys(perplexity_way(row) for row in result["rows"] if row["target"] != 1)
        for name in ways:
            rows = {row["target"]: row for row in result["rows"] if perplexity_way(row) == name}
            shown = {f"{t:g}x": _against_stock(rows[t]) if t in rows else "-" for t in targets}
            table.append({**head, "keeps": name, **shown})
    return pd.DataFrame(table)


def _against_stock(row: dict) -> str:
    ratio, low, high = map(_short, (row["ratio"], *row["ratio_ci95"]))
    return f"x{ratio} [{low}, {high}], {row['agreement']:.0f}% the same"


def table_2_settings(results: Sequence[dict]):
    """All that was measured, a row per setting: alpha or tokens left, MACs, time to first token, perplexities."""
    import pandas as pd

    return pd.DataFrame(
        {
            "measured": perplexity_subject(result),
            "protocol": perplexity_protocol(result),
            "keeps": perplexity_way(row),
            "target": f"{row['target']:g}x",
            "alpha": "-" if row["alpha"] is None else round(row["alpha"], 4),
            "tokens left": row["keep_tokens"] or "-",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "TTFT": f"{row['speedup']:.2f}x" if row.get("speedup") else "not run",
            "per token": "{} [{}, {}]".format(*map(_short, (row["perplexity"], *row["ci95"]))),
            "per word": "{} [{}, {}]".format(*map(_short, (row["word_perplexity"], *row["word_ci95"]))),
            "next token the same": f"{row['agreement']:.1f}%",
            "... right after the prefix": f"{row['agreement_first']:.1f}%",
            "n": row["n"],
        }
        for result in results
        for row in result["rows"]
    )


# ---------------------------------------------------------------------------------------------------------


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
    lines = [f"| {' | '.join(map(str, flat.columns))} |", "|" + "---|" * len(flat.columns)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in flat.itertuples(index=False)]
    path.with_suffix(".md").write_text(f"### {title}\n\n" + "\n".join(lines) + "\n")
    with pd.option_context("display.max_colwidth", None):  # else pandas cuts cells off at 50 characters
        body = table.to_html(border=0, index=table.index.name is not None)
    path.with_suffix(".html").write_text(f"<h3>{html.escape(title)}</h3>\n{body}")


# Tables 3 and 4


def table_3_cells(results: Sequence[dict]) -> list[Cell]:
    """Table 3: a Cell for each number that the paper prints below 1x, and its scores at 1x, and for each result that
    bears on it. (Footprint and alpha are 1.00 at 1x by definition.)

    "MMLU": results of kind "choice" (zsaa.mmlu) under the paper's schedule. At one reduction there are two of each: at
    the alpha that Eq. 2 needs for it, and at the alpha that the paper prints. "GPU footprint": kind "footprint"
    (zsaa.bench), in 4 bits, at both
    alphas: the range over prompt lengths, which the paper does not state. No weight decides it, so random ones of the
    true shape are no substitute: a number outside the range differs. Inside, it may or may not be what the paper's
    prompts give: ours stand in for them.
    "alpha": kind "audit" (zsaa.audit), exact for the published configurations, and rounded as the paper rounds.
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
                        for rows in _shapes(_in_4_bits(r, shapes[model], control), target)
                    ]
                else:
                    found = [
                        Cell(
                            **where,
                            ours=round(row["needed"], 2),
                            subject=f"{model}'s published configuration",
                            protocol=f"exact: the alpha for which Eq. 2 gives {target}x (512 tokens, tau 5); the "
                            f"printed one gives {row['eq2']:.2f}x",
                            result=r["name"],
                        )
                        for r, row in implied
                        if (row["model"], row["reduction"]) == (model, target)
                    ]
                cells += found or [Cell(**where)]  # fmt: skip
    return cells


CHANCE = 25  # percent of four-way choices that are right by lot


def choice_subject(result: dict) -> str:
    """The model, its quantization, and how it was trained to answer."""
    model = result["model"]
    return f"{' '.join(filter(None, (model['name'], model['quantization'])))}, {training(result, 'questions')}"


def _score_cell(where: dict, result: dict, row: dict) -> Cell:
    task = result["task"]
    how = "solved for this reduction" if row["control"] == "alpha" else "as printed"
    protocol = f"alpha {row['alpha']:.4f} ({how}), {row['mac_reduction']:.2f}x fewer MACs, {task['shots']} shots, "
    protocol += {"letters": "likeliest letter", "text": "likeliest text"}[task["form"]]
    if row["ci95"][0] <= CHANCE <= row["ci95"][1]:
        protocol += f"; not told from chance ({CHANCE}%)"
    others = [name.removeprefix("no ") for name in result["differs_from_the_paper"]]
    return Cell(
        **where, ours=row["accuracy"], interval=tuple(row["ci95"]), n=row["n"], protocol=protocol,
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
    over = _over_lengths([row["footprint_reduction"] for row in rows])
    low, high = over["interval"]
    return Cell(
        **where, **over, substitute="prompts" if low <= where["published"] <= high else "", result=result["name"],
        subject=f"{rows[0]['model']}'s true shape, random weights, nf4, batch {rows[0]['batch']}, {_device(result)}",
        protocol=f"peak on top of the weights, {rows[0]['attention']} attention at 1x, alpha "
        f"{' to '.join(dict.fromkeys(alphas))} ({how}); {_lengths(rows, 'footprint_reduction')}; over the dial's own "
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


def table_4_cells(results: Sequence[dict]) -> list[Cell]:
    """Table 4: a Cell for each fact that the paper prints and each published configuration that bears on it (kind
    "architectures"). These are facts without chance: they are the paper's, as printed, or they differ."""
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
            shown = cell.ours if cell.verdict == "reproduced" else f"[{cell.ours}]"
            rows.setdefault(cell.subject, {})[cell.column] = shown
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"), columns=list(paper.TABLE_4_COLUMNS))
