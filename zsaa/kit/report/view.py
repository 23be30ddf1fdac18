"""All that the report shows, as plain data for its templates."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zsaa.kit import paper, points, tables
from zsaa.kit.report.grid import grid_of, number, ours_text
from zsaa.kit.report.provenance import flat, hardware_of, joules_text, provenance_of, seconds_text
from zsaa.kit.report.sections import MEANING, NOT_A_RESULT, SECTIONS, SIGN, Section
from zsaa.kit.store import RESULTS, all_results, load_results
from zsaa.kit.verdicts import VERDICTS, counts

ROOT = RESULTS.parent
FEW = 4  # runs that stand open in a place of a table; a telephone shows no more at once


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
    from zsaa.kit.claims import claims

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
    from zsaa.kit.runner.plan import load_profiles

    if not (ROOT / "notebooks" / "profiles.yaml").is_file():
        return {}
    return {
        profile: {
            name: list(dict.fromkeys([*(entry.get("needs") or ()), *(s.get("needs") or ()), *(s.get("wants") or ())]))
            for name, s in entry["notebooks"].items()
        }
        for profile, entry in load_profiles(ROOT).items()
    }


@dataclass(frozen=True)
class Sources:
    """What the report is made of. origins: "this run" or "committed" -> a folder with results/ and figures/ (and
    tables/); the first one is what the report is about, the others stand beside it. folder: where the report will lie.
    """

    origins: dict[str, Path]
    folder: Path

    @property
    def first(self) -> str:
        return next(iter(self.origins))

    @cached_property
    def results(self) -> dict[str, list[tuple[str, dict]]]:
        return {origin: all_results(source / "results") for origin, source in self.origins.items()}

    @cached_property
    def pictures(self) -> dict[str, list[Path]]:
        return {
            origin: [path for path in sorted((source / "figures").glob("*.png")) if path.stem not in NOT_A_RESULT]
            for origin, source in self.origins.items()
        }

    @cached_property
    def tables(self) -> list[Path]:
        """Tables that the notebooks of the first origin wrote."""
        return sorted((self.origins[self.first] / "tables").glob("*.html"))


def gather(sources: Sources, statuses: Sequence[dict] = ()) -> dict:
    """All that the page shows, as plain data for the templates."""
    first, profiles = sources.first, _profiles()
    rows = [provenance_of(origin, name, result) for origin, found in sources.results.items() for name, result in found]
    sections = [_section(section, sources, profiles) for section in SECTIONS]
    others = [p for p in sources.pictures[first] if not any(section.draws(p) for section in SECTIONS)]
    loose = [p for p in sources.tables if not any(section.wrote(p) for section in SECTIONS)]

    def total(origin: str, verdict: str) -> int:
        return sum(section["summary"].get(origin, {}).get(verdict, 0) for section in sections)

    return {
        "first": first,
        "origins": list(sources.origins),
        "sections": sections,
        "totals": {origin: {verdict: total(origin, verdict) for verdict in VERDICTS} for origin in sources.origins},
        "measured": {origin: _measured(sections, origin) for origin in sources.origins},
        "others": [{**_picture(path, sources.folder), "origin": first} for path in others],
        "loose": [path.read_text(encoding="utf-8") for path in loose],
        "notebooks": [_notebook(status, sources.folder) for status in statuses],
        "provenance": rows,
        "hardware": {origin: hardware_of([r for r in rows if r["origin"] == origin]) for origin in sources.origins},
        "verdicts": VERDICTS,
        "meaning": MEANING,
        "sign": SIGN,
        "few": FEW,
    }


def _measured(sections: Sequence[dict], origin: str) -> dict[str, int]:
    """How many of the paper's numbers one would have to measure, and of how many that gave the paper's."""
    found = [
        section["summary"][origin] for section in sections if origin in section["summary"] and not section["facts"]
    ]
    return {"all": sum(sum(s.values()) for s in found), "reproduced": sum(s["reproduced"] for s in found)}


def _section(section: Section, sources: Sources, profiles: dict) -> dict:
    first, cells, summary = sources.first, [], {}
    for origin, found in sources.results.items() if section.cells else ():
        mine = getattr(tables, section.cells)(flat(found))
        summary[origin] = counts(mine)
        known = [cell for _, cell in cells]  # what a run finds again is shown once
        cells += [(origin, cell) for cell in mine if cell not in known]
    return {
        "title": section.title,
        "about": section.about,
        "facts": section.facts,
        "anchor": section.anchor,
        "grid": grid_of(cells) if cells else None,
        "cells": [(origin, cell, ours_text(cell), number(cell.published)) for origin, cell in cells],
        "drawn": _drawn(section, sources.results),
        "figures": _figures(section, sources),
        "more": _more(section, sources),
        "summary": summary,
        "missing": summary.get(first, {}).get("not run", 0),
        "substitutes": any(cell.verdict == "substitute" for origin, cell in cells if origin == first),
        "written": [path.read_text(encoding="utf-8") for path in sources.tables if section.wrote(path)],
        "run": _command(section, profiles),
        "kind": "table" if section.cells else "figure",
    }


def _figures(section: Section, sources: Sources) -> list[dict]:
    """A section's pictures, a run's own rather than the committed ones."""
    for origin, pictures in sources.pictures.items():
        if mine := [path for path in pictures if section.draws(path)]:
            return [{**_picture(path, sources.folder), "origin": origin} for path in mine]
    return []


def _more(section: Section, sources: Sources) -> list[dict]:
    """A section's further tables."""
    found = []
    for title, name, kind in (*section.more, *section.whole):
        for origin, source in sources.origins.items():
            if taken := load_results(source / "results", kind=kind):
                table = getattr(tables, name)(taken if (title, name, kind) in section.whole else points.of(taken))
                found.append({"title": title, "origin": origin, **_frame(table)})
    if "audit" in section.drawn:
        found.append(_claims("committed", flat(sources.results["committed"])))
    return found


def _notebook(status: dict, folder: Path) -> dict:
    links = {key: status[key] for key in ("executed", "log") if status.get(key) and (folder / status[key]).is_file()}
    return {
        "name": str(status.get("name")),
        "state": str(status.get("status")),
        "time": seconds_text(status.get("seconds")),
        "energy": joules_text(status.get("gpu_joules"), status.get("cpu_joules")) if status.get("seconds") else "-",
        "message": status.get("message") or "",
        "links": links,
    }
