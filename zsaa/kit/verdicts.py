"""What became of each number that the paper prints: reproduced, consistent, differs, substitute, or not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

VERDICTS = ("reproduced", "consistent", "differs", "substitute", "not run")


@dataclass(frozen=True)
class Cell:
    """One number of the paper, and what a result file holds for it. A number that several results bear on has a Cell
    for each; one that none bears on has a single Cell without `ours`.

    table, row, column: where the paper prints it ("Table 1", "2x", "IMDB").
    published: the paper's number; None where it prints none.
    ours: the number measured, in the paper's unit; None: not run.
    interval: its 95% interval (low, high), or, of a fact without chance that hangs on what the paper leaves open (the
        length of its prompts), the range of what was measured. None for facts that are not measured at all but stand in
        a published configuration or follow from it, and must equal the paper's.
    n: samples behind `ours`.
    protocol: how it was measured, in a line.
    subject: the model and data that were measured.
    substitute: what stands in for the paper's own ("model", "model and data", "weights", ...); "" if nothing does.
    result: the name of the result file.
    """

    table: str
    row: str
    column: str
    published: float | str | None
    ours: float | str | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    protocol: str = ""
    subject: str = ""
    substitute: str = ""
    result: str = ""

    @property
    def verdict(self) -> str:
        """A substitute is never called reproduced, however close; nor is a number that the paper does not print, nor a
        fact, for which nothing was run: it is consistent with what was published, or differs."""
        if self.ours is None:
            return "not run"
        if self.substitute or self.published is None:
            return "substitute"
        if self.interval is None:
            return "consistent" if self.ours == self.published else "differs"
        low, high = self.interval
        return "reproduced" if low <= self.published <= high else "differs"


def counts(cells: Iterable[Cell]) -> dict[str, int]:
    """How many of the paper's numbers (not of the results) got each verdict; of several, the strongest one counts."""
    best: dict[tuple, int] = {}
    for cell in cells:
        if cell.published is not None:
            where, rank = (cell.table, cell.row, cell.column), VERDICTS.index(cell.verdict)
            best[where] = min(best.get(where, rank), rank)
    found = Counter(VERDICTS[rank] for rank in best.values())
    return {verdict: found[verdict] for verdict in VERDICTS}
