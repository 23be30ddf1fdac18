"""From result files to tables, figures and the index page. Nothing here computes a result: it only draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from zsaa import paper

RESULTS = Path(__file__).resolve().parent.parent / "results"  # measurements committed with the source

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey print together with the markers.
COLOURS = {"alpha": "#0072B2", "first": "#E69F00", "last": "#009E73", "conventional": "#D55E00", "paper": "#555555"}
TASK_NAMES = {"imdb": "IMDB", "rotten_tomatoes": "Rotten Tomatoes"}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "zsaa",  # the same figure gives the same file
}


def load_results(*folders: str | Path, kind: str | None = None) -> list[dict]:
    """Result files (*.json) of the folders, by name; a damaged one raises ValueError with its path."""
    found = []
    for folder in folders or (RESULTS,):
        for path in sorted(Path(folder).glob("*.json")):
            try:
                result = json.loads(path.read_text())
                if kind is None or result["kind"] == kind:
                    found.append(result)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a result file ({error!r}). Remove it and run it again.") from error
    return found


def label(result: dict, short: bool = False) -> str:
    """What a curve is: how it was trained; unless `short`, also data set, model, and on what it ran."""
    recipe, hardware = result["recipe"], result["provenance"]["hardware"]
    training = f"{recipe['method']} ({'LoRA' if recipe['tuning'] == 'lora' else 'full'})"
    return (
        training if short else f"{result['task']['name']}, {result['model']['name']}, {training}, {hardware['device']}"
    )


def status(result: dict) -> str:
    """Every row of ours stands in for one of the paper's: what was substituted."""
    return "substitute: model" + (" and data" if result["task"]["substitute"] else "")


def rows_of(result: dict, control: str) -> list[dict]:
    return sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])


def _with_interval(row: dict) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(row["accuracy"], *row["ci95"])


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
            _with_interval(cells[t]) if t in cells else "out of reach" for t in targets
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
                    _with_interval(cells[t]) if t in cells else "-" for t in paper.TABLE_1
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


def save_figure(figure, path: str | Path) -> None:
    """`path`.png and `path`.svg, then closed."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def _line(axis, rows, style, name, interval=True):
    colour, marker, dashes = style
    x, y = [r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows]
    axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.5, linestyle=dashes, label=name)
    if interval:
        low, high = zip(*(r["ci95"] for r in rows))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def accuracy_figure(results: Sequence[dict], title: str, published: str | None = "IMDB"):
    """Accuracy against MAC reduction for one data set: alpha-sampled and conventional fine-tuning under the dial, the
    conventional one on truncated inputs, and the paper's curve of another model (against its wall-clock speed-up)."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.6))
        for result in results:
            method = result["recipe"]["method"]
            tuning = " (LoRA)" if result["recipe"]["tuning"] == "lora" else ""
            colour = COLOURS["alpha" if method == "alpha-sampled" else "conventional"]
            style = (colour, "o", ":" if tuning else "-")
            _line(axis, rows_of(result, "alpha"), style, f"{method}{tuning}, dial")
            if method == "conventional" and not tuning:
                whole = rows_of(result, "alpha")[:1]
                for side, marker in (("first", "^"), ("last", "v")):
                    if rows_of(result, side):
                        rows = whole + rows_of(result, side)
                        _line(axis, rows, (COLOURS[side], marker, "--"), f"conventional, {side} tokens only")
        if published:
            points = [(t, row[published]) for t, row in paper.TABLE_1.items() if row[published] is not None]
            axis.plot(*zip(*points), color=COLOURS["paper"], marker="x", linewidth=1, linestyle="-.", markersize=5,
                      label=f"paper, {paper.TABLE_1_MODEL} (its speed-up)")  # fmt: skip
        axis.axhline(50, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.set(xlabel="MAC reduction", ylabel="accuracy (%)", title=title)
        reached = max(row["target"] for result in results for row in result["rows"])
        ticks = [t for t in paper.TABLE_1 if t <= reached]
        axis.set_xticks(ticks, [f"{t}x" for t in ticks])
        axis.legend(fontsize=7.5, loc="lower left")
    return figure


def accuracy_figures(results: Sequence[dict]) -> dict:
    """One accuracy figure per data set that the results hold, by task name."""
    figures = {}
    for name, title in TASK_NAMES.items():
        if chosen := [r for r in results if r["task"]["name"] == name]:
            model, n = chosen[0]["model"]["name"], chosen[0]["provenance"]["eval_samples"]
            title = f"{title}, {model}: {n} held-out samples, 95% intervals"
            figures[name] = accuracy_figure(chosen, title, chosen[0]["task"]["paper_column"])
    return figures


def speed_figure(results: Sequence[dict], title: str):
    """Measured speed-up against the MAC reduction of the timed batch, per device and batch size, for the dial; the
    grey diagonal is what the MACs promise."""
    import matplotlib.pyplot as plt

    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
        top, drawn = 1.0, 0
        for result in results:
            rows = [r for r in rows_of(result, "alpha") if r.get("speedup")]
            for batch in sorted({r["latency_batch"] for r in rows}):
                part = [r for r in rows if r["latency_batch"] == batch]
                device = result["provenance"]["hardware"]["device"]
                cores = result["provenance"]["hardware"]["threads"]
                device = f"CPU, {cores} threads" if device == "cpu" else device.split(" 80GB")[0]
                x, y = [r["latency_mac_reduction"] for r in part], [r["speedup"] for r in part]
                name = f"{device},\nbatch {batch} of {part[0]['latency_tokens']} tokens"
                style = dict(color=palette[drawn % len(palette)], marker="os^vDP"[drawn % 6], markersize=4)
                axis.plot(x, y, label=name, **style)
                top, drawn = max(top, *x), drawn + 1
        axis.plot([1, top], [1, top], color="#999999", linewidth=0.8, linestyle="--", label="what the MACs promise")
        axis.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.set(xlabel="MAC reduction of the timed batch", ylabel="measured speed-up over stock", title=title)
        axis.set(xscale="log", yscale="log")
        ticks = [t for t in (0.5, 1, 2, 3, 5, 7, 10, 15, 20) if t <= top * 1.3]
        axis.set_xticks([t for t in ticks if t >= 1], [f"{t:g}x" for t in ticks if t >= 1])
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        figure.legend(fontsize=7.5, loc="outside right center")
    return figure


def pack(kept: dict[float, list[list[int]]], tokens: Sequence[str]) -> dict:
    """What `preservation_figure` draws, small enough for a result file: per alpha and layer a hexadecimal bit mask of
    the kept positions (position 0 is the lowest bit)."""
    masks = {str(a): [f"{sum(1 << p for p in layer):x}" for layer in layers] for a, layers in kept.items()}
    return {"tokens": list(tokens), "kept": masks}


def unpack(row: dict) -> tuple[dict[float, list[list[int]]], list[str]]:
    """The arguments of `preservation_figure` from a row written by `pack`."""
    n = len(row["tokens"])
    kept = {
        float(alpha): [[p for p in range(n) if int(mask, 16) >> p & 1] for mask in masks]
        for alpha, masks in row["kept"].items()
    }
    return kept, row["tokens"]


def preservation_figure(kept: dict[float, list[list[int]]], tokens: Sequence[str], columns: int = 2):
    """Figure 3: which tokens each layer keeps, one panel per alpha.

    kept: alpha -> per layer the kept positions; tokens: the text, one string per position. Blue: kept; white: dropped
    (here or below). The red line counts the kept tokens of each layer, on the same axis as the positions.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns
    from matplotlib.colors import ListedColormap

    n, layers = len(tokens), len(next(iter(kept.values())))
    rows = -(-len(kept) // columns)
    labels = n <= 64
    with plt.rc_context({**STYLE, "axes.grid": False}):
        panel = (0.15 * n + 0.6, 0.11 * layers + 1.3) if labels else (5.2, 2.6)
        figure, axes = plt.subplots(
            rows, columns, figsize=(panel[0] * columns, panel[1] * rows), squeeze=False, layout="constrained"
        )
        for axis, (alpha, per_layer) in zip(axes.flat, kept.items()):
            grid = np.zeros((layers, n))
            for layer, positions in enumerate(per_layer):
                grid[layer, positions] = 1
            sns.heatmap(
                grid, ax=axis, cmap=ListedColormap(["white", "#4C8BC0"]), cbar=False, vmin=0, vmax=1,
                rasterized=True, linewidths=0.3 if labels else 0, linecolor="#E5E5E5",
                xticklabels=False, yticklabels=False,
            )  # fmt: skip
            counts = [len(positions) for positions in per_layer]
            axis.plot(counts, np.arange(layers) + 0.5, color="#C8102E", linewidth=1.6)
            share = sum(counts) / (layers * n)
            axis.set_title(rf"$\alpha$ = {alpha:g}: {share:.0%} of token-layers kept, {counts[-1]} of {n} at the top")
            axis.set_ylabel("layer")
            ticks = [0, *range(4, layers, 5)] if layers > 12 else range(layers)
            axis.set_yticks([t + 0.5 for t in ticks], [t + 1 for t in ticks], rotation=0)
            if labels:
                axis.set_xticks(np.arange(n) + 0.5, [t.strip() or repr(t) for t in tokens], rotation=90, fontsize=6.5)
            else:
                places = np.linspace(0, n - 1, 6, dtype=int)
                axis.set_xticks(places + 0.5, places, rotation=0)
                axis.set_xlabel("token position")
            for spine in axis.spines.values():
                spine.set(visible=True, color="#888888", linewidth=0.6)
        for axis in axes.flat[len(kept) :]:
            axis.set_visible(False)
        figure.legend(
            handles=[
                plt.Rectangle((0, 0), 1, 1, color="#4C8BC0", label="kept"),
                plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", label="dropped"),
                plt.Line2D([], [], color="#C8102E", label="number of kept tokens"),
            ],
            loc="outside lower center", ncols=3,
        )  # fmt: skip
    return figure


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw every figure that the committed results hold into `folder` (the repository's figures/); returns the PNGs."""
    curves, times = load_results(RESULTS, kind="curve"), load_results(RESULTS, kind="latency")
    figures = {}
    figures |= {f"accuracy_{name}": figure for name, figure in accuracy_figures(curves).items()}
    if times:
        figures["speed"] = speed_figure(times, "Forward pass, SmolLM2-135M: measured speed-up")
    for result in load_results(RESULTS, kind="preservation"):
        for row, suffix in zip(result["rows"], ("", "_words")):
            kept, tokens = unpack(row)
            figures[f"preservation{suffix}"] = preservation_figure(kept, tokens, columns=1 if suffix else 2)
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name)
    return [Path(folder) / f"{name}.png" for name in figures]


# ------------------------------------------------------------------------------------------------ index page

_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #8883; vertical-align: top; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: white; }
figcaption, .note { color: #777; font-size: 13px; }
.failed { color: #c33; font-weight: 600; } .done { color: #2a7d2a; }
code { font-size: 12.5px; }
"""


def _image(path: Path, name: str) -> str:
    import base64

    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(path.with_suffix(".txt").read_text()) if path.with_suffix(".txt").is_file() else ""
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(name)}">'
        f"<figcaption>{html.escape(name)}. {caption}</figcaption></figure>"
    )


def _provenance_table(results: Sequence[dict]) -> str:
    rows = []
    for result in results:
        p = result["provenance"]
        hardware, versions = p["hardware"], p["versions"]
        cells = (
            result["name"],
            result["kind"],
            f"{result['model']['name']} on {result['task']['source']}" if "task" in result else result["model"]["name"],
            f"{hardware['device']} ({hardware['cpu']}, {hardware['cores']} cores)",
            f"{p.get('train_samples', '-')} / {p.get('eval_samples', '-')}",
            p.get("seed", "-"),
            p.get("seconds", "-"),
            f"torch {versions['torch']}, transformers {versions['transformers']}, Python {versions['python']}",
            f"{(p['commit'] or 'unknown')[:10]}{' with local changes' if p.get('dirty') else ''}, {p['date'][:10]}",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    head = (
        "result",
        "kind",
        "model and data",
        "hardware",
        "train / eval samples",
        "seed",
        "seconds",
        "versions",
        "commit",
    )
    return "<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr>" + "".join(rows) + "</table>"


def index(output_dir: str | Path, statuses: Sequence[dict] = ()) -> Path:
    """Write output_dir/index.html: run status, tables, figures, provenance, in one self-contained page; returns it.

    statuses: one dict per notebook, from the runner: name, status, and optionally message, seconds, and the paths of
    the executed notebook and the log relative to output_dir.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    body = [
        "<h1>zsaa</h1>",
        "<p>Efficient Large Language Models with Zero-Shot Adjustable Acceleration: reproduction.</p>",
    ]
    body.append(f'<p class="note">Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.</p>')
    if statuses:
        body.append("<h2>Notebooks</h2><table><tr><th>notebook</th><th>status</th><th>details</th></tr>")
        for entry in statuses:
            name, state = str(entry.get("name")), str(entry.get("status"))
            links = [
                f'<a href="{html.escape(entry[key])}">{key}</a>'
                for key in ("executed", "log")
                if entry.get(key) and (output_dir / entry[key]).is_file()
            ]
            extra = [f"{entry['seconds']:.0f} s"] if entry.get("seconds") else []
            extra += [html.escape(entry["message"])] if entry.get("message") else []
            css = "failed" if state in ("failed", "interrupted") else "done"
            cells = (html.escape(name), f'<span class="{css}">{html.escape(state)}</span>', ", ".join(extra + links))
            body.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
        body.append("</table>")
    tables = sorted((output_dir / "tables").glob("*.html"))
    figures = sorted((output_dir / "figures").glob("*.png"))
    if tables:
        body += ["<h2>Tables</h2>", *(t.read_text() for t in tables)]
    if figures:
        body += ["<h2>Figures</h2>", *(_image(f, f.stem.replace("_", " ")) for f in figures)]
    here = load_results(output_dir / "results")
    committed = load_results(RESULTS)
    for title, results in (("Provenance: measured by this run", here), ("Provenance: committed results", committed)):
        if results:
            body += [f"<h2>{title}</h2>", _provenance_table(results)]
    if not (tables or figures or here):
        body.append("<p>No table or figure has been made yet.</p>")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>zsaa report</title><style>{_CSS}</style>'
    draft = output_dir / ".index.html.new"
    draft.write_text(page + "\n".join(body) + "</html>\n")
    draft.replace(output_dir / "index.html")
    return output_dir / "index.html"


if __name__ == "__main__":
    for drawn in draw_committed(RESULTS.parent / "figures"):
        print(drawn)
