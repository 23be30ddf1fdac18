"""The report of a run: one self-contained page with its status, tables, figures and provenance."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from zsaa.results import RESULTS, load_results

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
