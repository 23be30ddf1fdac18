"""A table of the paper with ours in each place, named by letters."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from zsaa.kit.verdicts import VERDICTS, Cell


def number(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def ours_text(cell: Cell) -> str:
    """Our number, with its interval where it has one."""
    if cell.ours is None:
        return "not run"
    if cell.interval is None:
        return number(cell.ours)
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


def grid_of(cells: Sequence[tuple[str, Cell]]) -> dict:
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
                    "ours": ours_text(cell),
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
            places.append({"published": number(published), "lines": lines, "verdict": strongest, "empty": empty})
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
