"""From result files to tables, ours beside the paper's. Nothing here computes a result."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from zsaa import paper
from zsaa.results import label, rows_of, status, with_interval
from zsaa.verdicts import Cell


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
    """The model, how it was trained for the task, and the text."""
    recipe = result["recipe"]
    trained = {"untuned": "untuned", "saved": "tuned before"}.get(recipe["method"], f"{recipe['method']} fine-tuning")
    seed = f", seed {result['provenance']['seed']}" if result["provenance"]["seed"] else ""
    return f"{result['model']['name']}, {trained}{seed}; {result['task']['title']}"


def perplexity_protocol(result: dict) -> str:
    """How the pruned model was scored, with a warning where the score reads the future."""
    how = result["protocol"]
    if how["name"] == "last-word":
        return "last word after a pruned context, causal"
    if how["reads_future"]:
        return f"carry-through, {how['prefix'] + how['continuation']} tokens; WHAT IS KEPT READS THE FUTURE"
    return f"prefix, {how['prefix']} pruned + {how['continuation']} scored, causal"


def _table_2_substitutes(result: dict) -> str:
    """What of a result is not the paper's: its Table 2 is for GPT-2, fine-tuned with sampled alpha for 5 epochs."""
    recipe = result["recipe"]
    as_in_paper = recipe["method"] == "alpha-sampled" and recipe["epochs"] >= 5 and recipe["max_steps"] <= 0
    model = result["model"]  # a folder may be called gpt2 and be anything
    parts = ["model"] * (model["kind"] != "hub" or model["name"] not in paper.TABLE_2_MODELS)
    parts += ["data"] * result["task"]["substitute"] + ["training"] * (not as_in_paper)
    return ", ".join(parts)


def table_2_cells(results: Iterable[dict]) -> list[Cell]:
    """Every number of Table 2, with a Cell for each result (of kind "perplexity") that bears on it, per token and per
    word (the paper does not say which; last words: per word). Only the dial with the paper's score counts, at alpha
    solved for that MAC reduction; the paper's rows are speed-ups of time-to-first-token."""
    results = [r for r in results if r["kind"] == "perplexity"]
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
    return cells


def table_2(cells: Sequence[Cell]):
    """Table 2, a row for the paper and one for each of ours: perplexity [95% interval] at each speed-up (the paper's of
    time-to-first-token, ours of MACs)."""
    import pandas as pd

    table = []
    for column in paper.TABLE_2_COLUMNS:
        numbers = {f"{t}x": f"{row[column]:.2f}" for t, row in paper.TABLE_2.items()}
        table.append(
            {"corpus": column, "measured": f"paper: {paper.TABLE_2_MODEL}", "protocol": "not stated", **numbers}
        )
        groups: dict[tuple, list[Cell]] = {}
        for cell in cells:
            if cell.column == column:
                groups.setdefault((cell.subject, cell.protocol, cell.result), []).append(cell)
        if len(groups) > 1:  # what no result bears on is said in the rows of those that bear on other speed-ups
            groups.pop(("", "", ""), None)
        for (what, how, _), group in groups.items():
            measured = {cell.row: cell for cell in group if cell.ours is not None}
            row = {"corpus": column, "measured": what or "not run", "protocol": how or "-"}
            row |= {t: _perplexity(measured[t]) if t in measured else "not run" for t in numbers}
            verdicts = {t: measured[t].verdict if t in measured else "not run" for t in numbers}
            same = len({*verdicts.values()}) == 1
            row["verdict"] = group[0].verdict if same else ", ".join(f"{t} {v}" for t, v in verdicts.items())
            table.append({**row, "n": group[0].n or "-", "stands in": group[0].substitute or "-"})
    columns = ["corpus", "measured", "protocol", "n", *(f"{t}x" for t in paper.TABLE_2), "verdict", "stands in"]
    return pd.DataFrame(table, columns=columns, dtype=object).fillna("-")


def _perplexity(cell: Cell) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(cell.ours, *cell.interval)


def table_2_controls(results: Sequence[dict]):
    """The dial and its controls at equal MACs, a row for each: times the stock model's perplexity [95% interval,
    paired] and the share of next tokens that stay as they were."""
    import pandas as pd

    table = []
    targets = sorted({row["target"] for result in results for row in result["rows"]} - {1})
    for result in results:
        head = {
            "measured": perplexity_subject(result),
            "protocol": perplexity_protocol(result),
            "n": result["rows"][0]["n"],
        }
        ways = dict.fromkeys(perplexity_way(row) for row in result["rows"] if row["target"] != 1)
        for name in ways:
            rows = {row["target"]: row for row in result["rows"] if perplexity_way(row) == name}
            shown = {f"{t:g}x": _against_stock(rows[t]) if t in rows else "-" for t in targets}
            table.append({**head, "keeps": name, **shown})
    return pd.DataFrame(table)


def _against_stock(row: dict) -> str:
    return "x{:.2f} [{:.2f}, {:.2f}], {:.0f}% the same".format(row["ratio"], *row["ratio_ci95"], row["agreement"])


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
            "per token": "{:.2f} [{:.2f}, {:.2f}]".format(row["perplexity"], *row["ci95"]),
            "per word": "{:.2f} [{:.2f}, {:.2f}]".format(row["word_perplexity"], *row["word_ci95"]),
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


# Tables 3 and 4


def table_3_cells(results: Sequence[dict]) -> list[Cell]:
    """Table 3: a Cell for each number that the paper prints below 1x, and its scores at 1x, and for each result that
    bears on it. (Footprint and alpha are 1.00 at 1x by definition.)

    "MMLU": results of kind "choice" (zsaa.mmlu). At one reduction there are two of each: at the alpha that Eq. 2 needs
    for it, and at the alpha that the paper prints. "GPU footprint": kind "footprint" (zsaa.bench), random weights.
    "alpha": kind "audit" (zsaa.audit), exact for the published configurations, and rounded as the paper rounds.
    """
    scores = [r for r in results if r["kind"] == "choice"]
    footprints = [(r, row) for r in results if r["kind"] == "footprint" for row in r["rows"]]
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
                        _footprint_cell(where, r, row)
                        for r, row in footprints
                        if (row["model"], row["target"]) == (shapes[model], target) and row["peak_bytes"]
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


def _score_cell(where: dict, result: dict, row: dict) -> Cell:
    task, model = result["task"], result["model"]
    how = "solved for this reduction" if row["control"] == "alpha" else "as printed"
    protocol = f"alpha {row['alpha']:.4f} ({how}), {row['mac_reduction']:.2f}x fewer MACs, {task['shots']} shots, "
    protocol += {"letters": "likeliest letter", "text": "likeliest text"}[task["form"]]
    return Cell(
        **where, ours=row["accuracy"], interval=tuple(row["ci95"]), n=row["n"], protocol=protocol,
        subject=f"{model['name']}{' ' + model['quantization'] if model['quantization'] else ''} on {task['name']}",
        substitute=", ".join(result["differs_from_the_paper"]), result=result["name"],
    )  # fmt: skip


def _footprint_cell(where: dict, result: dict, row: dict) -> Cell:
    how = "solved for this reduction" if row["control"] == "alpha" else "as printed"
    return Cell(
        **where, ours=round(row["footprint_reduction"], 2), substitute="weights", result=result["name"],
        subject=f"{row['model']} shape, {row['storage']}, {row['batch']} x {row['tokens']} tokens",
        protocol=f"peak on top of the weights, {row['attention']} attention at 1x, alpha {row['alpha']:.4f} ({how})",
    )  # fmt: skip


def table_3(results: Sequence[dict]):
    """Table 3 in the paper's shape, as a DataFrame: rows are reductions; each column of the paper is followed by one of
    each of our results, the score with its interval. "not run" where there is none."""
    import pandas as pd

    columns: dict[tuple, dict] = {}
    for cell in table_3_cells(results):
        column = columns.setdefault((cell.column, "paper"), {})
        column[cell.row] = f"{cell.published:.2f}"
        if cell.ours is None:
            columns.setdefault((cell.column, "ours"), {})[cell.row] = "not run"
            continue
        stands_in = f"substitute: {cell.substitute}" if cell.substitute else "the paper's"
        how = ", printed alpha" if "(as printed)" in cell.protocol else ""
        heading = f"{cell.subject} ({stands_in}), {cell.result}{how}"
        shown = f"{cell.ours:.1f} [{cell.interval[0]:.1f}, {cell.interval[1]:.1f}]" if cell.n else f"{cell.ours:.2f}"
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
