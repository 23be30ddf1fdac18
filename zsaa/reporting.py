"""The report: the paper's tables and figures, what was run here, on what, with which verdict, and what was not.

    python -m zsaa.reporting      docs/report.html and docs/report.md from the committed results (make report)

One page, self-contained; a Markdown summary beside it. `index` writes the same page for a run's output folder, with
the state of its notebooks. Everything comes from result files, the figures drawn from them, zsaa.tables and
zsaa.verdicts; nothing here computes a result, and the same files give the same page.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zsaa import paper, tables
from zsaa.kit.files import write_text
from zsaa.results import RESULTS, load_results
from zsaa.verdicts import VERDICTS, Cell, counts

ROOT = RESULTS.parent
MEANING = {
    "reproduced": "the paper's own model and data; its number lies in our 95% interval, or is a fact and equal",
    "differs": "the paper's own model and data, or a fact that no weight decides; its number does not",
    "substitute": "another model, other data or settings: shown beside the paper's, never called reproduced",
    "not run": "nothing was measured",
}
SIGN = {"reproduced": "✓", "differs": "≠", "substitute": "≈", "not run": "–"}  # so that colour is never alone


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, or of ours.

    cells: the function of zsaa.tables that gives its Cells; "" for figures, which print no numbers.
    drawn: the kinds of the results that its figures are drawn from.
    more: further tables of ours: (title, function of zsaa.tables that makes a DataFrame, kind of the results it takes).
    figures: patterns of the names of its figures in figures/. In a run's folder they begin with the notebook's number.
    """

    title: str
    about: str
    notebook: str
    cells: str = ""
    drawn: tuple[str, ...] = ()
    more: tuple[tuple[str, str, str], ...] = ()
    figures: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


SECTIONS = (
    Section(
        "Table 1", "Accuracy (F1 for QQP and MRPC) of GPT-2 along the dial, percent.", "01_table1", "table_1_cells",
        more=(
            ("The dial and its controls at equal MACs", "controls_table", "curve"),
            ("Points by which the dial is ahead (+) or behind (-), same samples", "differences_table", "curve"),
        ),
        figures=("accuracy_*",),
    ),
    Section("Figure 2", "Accuracy, preserved activations and alpha against the speed-up.", "06_figure2",
            drawn=("lengths",), figures=("figure2*", "figure_2*")),
    Section("Table 2", "Perplexity of GPT-2 at 1 to 3 times faster first tokens.", "02_table2", "table_2_cells",
            more=(
                ("Time to the first token at the true shapes, random weights", "ttft_table", "ttft"),
                ("The dial and its rivals at equal MACs, over the stock model", "table_2_controls", "perplexity"),
            ),
            figures=("table2*", "perplexity*")),
    Section("Table 3", "MMLU, MACs and GPU memory of LLaMA 3 and Gemma 2 in 4 bits.", "04_table3", "table_3_cells",
            more=(
                ("Footprint, cache and first token at the true shapes, random weights", "footprint_table", "footprint"),
            ),
            figures=("table3*", "mmlu*", "choice*", "footprint*")),
    Section("Table 4", "The architectures, from the models' configurations.", "05_table4", "table_4_cells"),
    Section("Figure 3", "Which tokens each layer keeps.", "03_figure3", drawn=("preservation",),
            figures=("preservation*",)),
    Section("Audit", "What Eq. 2 implies for the paper's numbers, and which of its claims our results bear out.",
            "09_audit", drawn=("audit",), figures=("audit*",)),
    Section("Speed", "Not a figure of the paper: what the clock gives of what the MACs promise.", "10_speed",
            figures=("speed*", "h100_*")),
    Section("Ablation", "Not in the paper: scores, schedules and recipes beside the paper's.", "08_ablation",
            figures=("ablation*", "scores*", "continuation*")),
)  # fmt: skip
NOT_A_RESULT = ("slider",)  # pictures in figures/ that were not drawn from results


# ----------------------------------------------------------------------------------------------- gathering


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def _ours(cell: Cell) -> str:
    """Our number, with its interval where it has one."""
    if cell.ours is None:
        return "not run"
    if cell.interval is None:
        return _number(cell.ours)
    widest = max(map(abs, cell.interval))
    digits = ".2f" if widest < 20 else ".1f" if widest < 1e4 else ".1e"  # some perplexities blow up
    low, high = (f"{end:{digits}}" for end in cell.interval)
    return f"{cell.ours:{digits}}" + (f" [{low}, {high}]" if low != high else "")


def _masked(protocol: str) -> str:
    """A protocol without its numbers: what is the same in all places of a table. Of a list of numbers, the first."""
    return re.sub(r"(?<= )(…[^,;]*)(?:, \1)+", r"\1, …", re.sub(r"\d+([.,]\d+)*", "…", protocol))


def _shared(protocols: Sequence[str]) -> str:
    """What protocols that differ in numbers alone have in common: the parts that are the same in all, and of the others
    what stands in brackets, with the words before: "alpha (as printed)" of "alpha 0.99 (as printed)"."""
    split = [re.split(r"([,;] )", protocol) for protocol in protocols]
    found = ""
    for at in range(0, min(map(len, split)), 2):
        texts = {parts[at] for parts in split if len(parts) > at}
        text = texts.pop() if len(texts) == 1 else ""
        if texts and "(" in (words := _masked(split[0][at])):
            text = re.sub(r"… (?:to … )?", "", words)
        if text:
            found += (split[0][at - 1] if found else "") + text
    return found


def _standing(pair: tuple[str, Cell]) -> tuple[bool, bool]:
    """Of several lines in a place those come first that read no future, and those in the paper's unit, the token."""
    return "carry-through" in pair[1].protocol, "; per word" in pair[1].protocol


def _grid(cells: Sequence[tuple[str, Cell]]) -> dict:
    """The paper's table: {"columns", "rows": [{"row", "places": [{"published", "verdict", "lines"}]}], "runs"}.

    cells: (origin, Cell). In each place the paper's number, and a line for each run that bears on it, named by a
    letter; "runs" says what the letters stand for. A result with several numbers for one place, under different
    protocols, has a letter for each. The verdict of a place is the strongest of its lines'.
    """
    measured = sorted(((origin, cell) for origin, cell in cells if cell.ours is not None), key=_standing)
    places = Counter((origin, c.result, c.subject, c.row, c.column) for origin, c in measured)
    several = {(origin, result) for (origin, result, *_), count in places.items() if count > 1}

    def run(origin: str, cell: Cell) -> tuple[str, ...]:
        how = _masked(cell.protocol) if (origin, cell.result) in several else ""
        return origin, cell.subject, cell.result, cell.substitute, how

    runs = list(dict.fromkeys(run(*pair) for pair in measured))
    letter = {run: string.ascii_uppercase[i % 26] * (1 + i // 26) for i, run in enumerate(runs)}
    rows, columns = (list(dict.fromkeys(getattr(cell, key) for _, cell in cells)) for key in ("row", "column"))
    grid = []
    for row in rows:
        places = []
        for column in columns:
            here = [(origin, cell) for origin, cell in cells if (cell.row, cell.column) == (row, column)]
            published = next((cell.published for _, cell in here if cell.published is not None), None)
            lines = [
                {
                    "run": letter[run(origin, cell)],
                    "ours": _ours(cell),
                    "verdict": cell.verdict,
                    "n": cell.n,
                    "protocol": cell.protocol,
                }
                for origin, cell in sorted(here, key=_standing)
                if cell.ours is not None
            ]
            verdicts = [line["verdict"] for line in lines] or ["not run"]
            strongest = min(verdicts, key=VERDICTS.index)
            empty = published is None and not lines
            places.append({"published": _number(published), "lines": lines, "verdict": strongest, "empty": empty})
        grid.append({"row": row, "places": places})
    legend = []
    for key, name in letter.items():
        mine = [cell for origin, cell in measured if run(origin, cell) == key]
        samples = sorted({cell.n for cell in mine if cell.n is not None})
        n = " to ".join(f"{count:,}" for count in dict.fromkeys((samples[0], samples[-1]))) if samples else ""
        origin, subject, result, substitute, how = key
        if how or len({cell.protocol for cell in mine}) == 1:
            how = _shared([cell.protocol for cell in mine])
        legend.append({"run": name, "origin": origin, "subject": subject or result, "result": result, "n": n,
                       "substitute": substitute, "how": how})  # fmt: skip
    return {"columns": columns, "rows": grid, "runs": legend}


def _drawn(section: Section, held: dict[str, list[tuple[str, dict]]]) -> list[dict]:
    """What a section's figures were drawn from: a line for each origin, model and data."""
    lines: dict[tuple, list[str]] = {}
    seen: set[str] = set()
    for origin, found in held.items():
        new = [(name, result) for name, result in found if name not in seen]
        seen |= {name for name, _ in new}
        for name, result in new:
            if result.get("kind") in section.drawn and isinstance(result.get("task"), dict):
                model, task = result["model"]["name"], result["task"]
                own = model in paper.TABLE_1_HUB and not task["substitute"]
                key = (origin, "" if own else "substitute", model, task["source"])
                lines.setdefault(key, []).append(name.removesuffix(".json"))
    return [
        {"origin": origin, "verdict": verdict, "model": model, "data": data, "results": names}
        for (origin, verdict, model, data), names in lines.items()
    ]


def _claims(origin: str, found: Sequence[dict]) -> dict:
    """The paper's sentences and what the audit makes of them in the light of these results, as a further table."""
    from zsaa.audit import claims

    rows = [[claim.quote, claim.where, claim.verdict, claim.evidence] for claim in claims(found)]
    return {
        "title": "The paper's claims",
        "origin": origin,
        "head": ["claim", "where", "verdict", "evidence"],
        "rows": rows,
    }


def _frame(table) -> dict:
    """A DataFrame as {"head", "rows"} of text; column levels are joined."""
    flat = table.reset_index() if table.index.name else table
    head = [": ".join(str(part) for part in c if part) if isinstance(c, tuple) else str(c) for c in flat.columns]
    return {"head": head, "rows": [[str(value) for value in row] for row in flat.itertuples(index=False)]}


def _picture(path: Path, folder: Path) -> dict:
    """A figure: as data, SVG where that is smaller, and by its path from `folder` for Markdown."""
    vector = path.with_suffix(".svg")
    shown = vector if vector.is_file() and vector.stat().st_size < path.stat().st_size else path
    kind = "svg+xml" if shown is vector else "png"
    words = path.with_suffix(".txt")
    return {
        "name": path.stem,
        "caption": words.read_text(encoding="utf-8").strip() if words.is_file() else "",
        "data": f"data:image/{kind};base64,{base64.b64encode(shown.read_bytes()).decode()}",
        "path": Path(os.path.relpath(path, folder)).as_posix(),
    }


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _joules(*joules: float | None) -> str:
    """Energy, for people: "not measured", or kJ of the GPU and the CPU."""
    known = [f"{value / 1000:.1f} kJ {device}" for value, device in zip(joules, ("GPU", "CPU")) if value is not None]
    return " + ".join(known) or "not measured"


def _all_results(folder: Path) -> list[tuple[str, dict]]:
    """(path from `folder`, content) of every result file, those in subfolders too."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a result file ({error!r}). Remove it and run it again.") from error
        if isinstance(content, dict) and isinstance(content.get("provenance"), dict):
            found.append((path.relative_to(folder).as_posix(), content))
    return found


def _flat(found: Sequence[tuple[str, dict]]) -> list[dict]:
    """What `load_results` gives: the results of the folder itself."""
    return [result for name, result in found if "/" not in name]


def _data(task: dict | str | None) -> str:
    if not isinstance(task, dict):
        return "-"
    taught = task.get("training_substitute")
    return task.get("source", "-") + (f"; to train on, a substitute: {taught}" if taught else "")


def _provenance(origin: str, name: str, result: dict) -> dict:
    p = result["provenance"]
    hardware, versions = p.get("hardware", {}), p.get("versions", {})
    device = str(hardware.get("device", "-"))
    if device == "cpu":
        device = f"{hardware.get('cpu', 'CPU')}, {tables.threads(hardware.get('threads', hardware.get('cores')))}"
    samples = [f"{p[f'{part}_samples']:,} {part}" for part in ("train", "eval") if p.get(f"{part}_samples")]
    return {
        "origin": origin,
        "file": name.removesuffix(".json"),
        "kind": result.get("kind", "-"),
        "model": result.get("model", {}).get("name", "-") if isinstance(result.get("model"), dict) else "-",
        "data": _data(result.get("task")),
        "device": device,
        "samples": ", ".join(samples) or "-",
        "seed": p.get("seed", "-"),
        "seconds": p.get("seconds"),
        "time": _seconds(p.get("seconds")),
        "joules": (p.get("gpu_joules"), p.get("cpu_joules")),
        "energy": _joules(p.get("gpu_joules"), p.get("cpu_joules")),
        "versions": ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "python") if versions.get(k)),
        "commit": (p.get("commit") or "unknown")[:10] + (" with local changes" if p.get("dirty") else ""),
        "date": str(p.get("date", "-"))[:10],
        "command": result.get("command") or p.get("command") or "",
    }


def _hardware(rows: Sequence[dict]) -> list[dict]:
    """Per device: how many result files, how long, how much energy."""
    found = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        joules = [
            sum(values) if (values := [row["joules"][i] for row in mine if row["joules"][i] is not None]) else None
            for i in (0, 1)
        ]
        known = sum(any(value is not None for value in row["joules"]) for row in mine)
        energy = _joules(*joules) + (f" (in {known} of {len(mine)} files)" if 0 < known < len(mine) else "")
        seconds = sum(row["seconds"] or 0 for row in mine)
        found.append({"device": device, "files": len(mine), "time": _seconds(seconds), "energy": energy})
    return found


def _command(section: Section, profiles: dict) -> dict:
    """How to run a section with the paper's own model and data: the command and what it needs."""
    profile = next((p for p in ("paper", "full", "smoke") if section.notebook in profiles.get(p, {})), None)
    if profile is None:
        return {"command": "no notebook yet", "needs": ""}
    return {
        "command": f"./run_all.sh --profile {profile} --only {section.notebook}",
        "needs": ", ".join(profiles[profile][section.notebook]),
    }


def _profiles() -> dict[str, dict[str, list[str]]]:
    """{profile: {notebook: what it needs or wants}}; empty in an installed package, which has no notebooks."""
    from zsaa.runner import load_profiles

    if not (ROOT / "notebooks" / "profiles.yaml").is_file():
        return {}
    return {
        profile: {
            name: list(dict.fromkeys([*(entry.get("needs") or ()), *(s.get("needs") or ()), *(s.get("wants") or ())]))
            for name, s in entry["notebooks"].items()
        }
        for profile, entry in load_profiles(ROOT).items()
    }


def gather(sources: dict[str, Path], statuses: Sequence[dict], folder: Path) -> dict:
    """All that the page shows, as plain data for the templates.

    sources: origin ("this run", "committed") -> folder with results/ and figures/ (and tables/); the first one is what
        the report is about, the others stand beside it. folder: where the report will lie.
    """
    first = next(iter(sources))
    held = {origin: _all_results(source / "results") for origin, source in sources.items()}
    rows = [_provenance(origin, name, result) for origin, found in held.items() for name, result in found]
    pictures = {
        origin: [p for p in sorted((source / "figures").glob("*.png")) if p.stem not in NOT_A_RESULT]
        for origin, source in sources.items()
    }
    profiles, used, sections = _profiles(), set(), []
    for section in SECTIONS:
        cells, summary = [], {}
        function = getattr(tables, section.cells, None) if section.cells else None
        for origin, found in held.items() if function else ():
            mine = function(_flat(found))
            summary[origin] = counts(mine)
            known = [cell for _, cell in cells]  # what a run finds again is shown once
            cells += [(origin, cell) for cell in mine if cell not in known]
        figures = []
        for origin in sources:
            number = section.notebook.split("_")[0] + "_"
            mine = [
                path
                for path in pictures[origin]
                if path.stem.startswith(number) or any(fnmatch.fnmatch(path.stem, p) for p in section.figures)
            ]
            used.update(mine)
            figures = figures or [{**_picture(path, folder), "origin": origin} for path in mine]  # a run's own first
        more = []
        for title, name, kind in section.more:
            for origin, source in sources.items():
                if taken := load_results(source / "results", kind=kind):
                    more.append({"title": title, "origin": origin, **_frame(getattr(tables, name)(taken))})
        if "audit" in section.drawn:
            more.append(_claims("committed", _flat(held["committed"])))
        written = sorted((sources[first] / "tables").glob(f"{section.notebook.split('_')[0]}_*.html"))
        used.update(written)
        sections.append(
            {
                "title": section.title, "about": section.about, "anchor": section.anchor,
                "grid": _grid(cells) if cells else None,
                "cells": [(origin, cell, _ours(cell), _number(cell.published)) for origin, cell in cells],
                "drawn": _drawn(section, held), "figures": figures, "more": more,
                "summary": summary, "missing": summary.get(first, {}).get("not run", 0),
                "substitutes": any(c.verdict == "substitute" for o, c in cells if o == first),
                "written": [path.read_text(encoding="utf-8") for path in written],
                "run": _command(section, profiles),
                "kind": "table" if section.cells else "figure",
            }
        )  # fmt: skip
    others = [p for p in pictures[first] if p not in used]
    loose = sorted(p for p in (sources[first] / "tables").glob("*.html") if p not in used)

    def total(origin: str, verdict: str) -> int:
        return sum(section["summary"].get(origin, {}).get(verdict, 0) for section in sections)

    return {
        "first": first,
        "origins": list(sources),
        "sections": sections,
        "totals": {origin: {verdict: total(origin, verdict) for verdict in VERDICTS} for origin in sources},
        "others": [{**_picture(path, folder), "origin": first} for path in others],
        "loose": [path.read_text(encoding="utf-8") for path in loose],
        "notebooks": [_notebook(status, folder) for status in statuses],
        "provenance": rows,
        "hardware": {origin: _hardware([r for r in rows if r["origin"] == origin]) for origin in sources},
        "verdicts": VERDICTS,
        "meaning": MEANING,
        "sign": SIGN,
    }


def _notebook(status: dict, folder: Path) -> dict:
    links = {key: status[key] for key in ("executed", "log") if status.get(key) and (folder / status[key]).is_file()}
    return {
        "name": str(status.get("name")),
        "state": str(status.get("status")),
        "time": _seconds(status.get("seconds")),
        "energy": _joules(status.get("gpu_joules"), status.get("cpu_joules")) if status.get("seconds") else "-",
        "message": status.get("message") or "",
        "links": links,
    }


# ----------------------------------------------------------------------------------------------- writing


def render(template: str, view: dict) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        autoescape=template.endswith(".html"), keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["slug"] = lambda verdict: verdict.replace(" ", "-")
    environment.filters["line"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.get_template(template).render(view)


def index(output_dir: str | Path, statuses: Sequence[dict] = ()) -> Path:
    """Write output_dir/index.html and index.md: what this run measured, with the committed results beside it; returns
    the page's path.

    statuses: one dict per notebook, from the runner: name, status, and optionally message, seconds, gpu_joules,
    cpu_joules, and the paths of the executed notebook and the log relative to output_dir.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    view = gather({"this run": output_dir, "committed": ROOT}, statuses, output_dir)
    write_text(output_dir / "index.html", render("report.html", view))
    write_text(output_dir / "index.md", render("report.md", view))
    return output_dir / "index.html"


def committed(folder: str | Path) -> list[Path]:
    """Write report.html and report.md of the committed results into `folder` (the repository's docs/); returns both."""
    folder = Path(folder)
    view = gather({"committed": ROOT}, (), folder)
    for name in ("report.html", "report.md"):
        write_text(folder / name, render(name, view))
    return [folder / "report.html", folder / "report.md"]


if __name__ == "__main__":
    for written in committed(ROOT / "docs"):
        print(written)
