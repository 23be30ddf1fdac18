"""A card as a table, as JSON, and as a picture for a slide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsaa.measure import write_json

MARKS = {"measured": "", "computed": "*", "estimated": "~"}  # beside a number in print
SHOWN = ("MACs", "time", "KV cache", "peak memory", "energy", "from and to memory, at least")  # panels of the picture


def mark(how: str) -> str:
    return MARKS.get(how.split()[0], "")


def short(value: float | None, unit: str) -> str:
    """As people say it: 1.2 G, 340 MB."""
    if value is None:
        return "-"
    if unit in ("ms", "USD", "J"):
        return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    unit = {"byte": "B", "MAC": "", "FLOP": ""}.get(unit, unit)  # whose metric says what is counted
    sizes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, prefix = next((size, prefix) for size, prefix in sizes if abs(value) >= size)
    return f"{value / (size or 1):.3g} {prefix}{unit}".rstrip()


class Card:
    """rows: one dict for each number (alpha, phase, resource, metric, value, unit, how, "against stock": the value over
    that at alpha = 1). about: of what model, request, rule, device and prices, and the provenance."""

    def __init__(self, rows: list[dict], about: dict[str, Any]):
        self.rows, self.about = rows, about

    @property
    def table(self):
        """The rows as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def value(self, phase: str, metric: str, alpha: float = 1.0) -> float | None:
        """One number; KeyError for one that the card does not have."""
        for row in self.rows:
            if (row["phase"], row["metric"], row["alpha"]) == (phase, metric, alpha):
                return row["value"]
        raise KeyError(f"the card has no {metric!r} of {phase!r} at alpha {alpha}.")

    def dict(self) -> dict:
        return {"kind": "card", **self.about, "model": {"name": self.about["model"]}, "rows": self.rows}

    def save(self, path: str | Path) -> Path:
        """Write the card as JSON."""
        return write_json(Path(path), self.dict())

    @property
    def alphas(self) -> list[float]:
        return list(dict.fromkeys(row["alpha"] for row in self.rows))

    def _printed(self) -> tuple[list[str], list[list[str]]]:
        """Headings, and a line for each metric of each phase, with a column for each alpha."""
        lines: dict[tuple, list[str]] = {}
        for row in self.rows:
            key = row["phase"], row["resource"], row["metric"]
            lines.setdefault(key, []).append(short(row["value"], row["unit"]) + mark(row["how"]))
        return ["phase", "resource", "metric", *(f"alpha {a:g}" for a in self.alphas)], [
            [*key, *values] for key, values in lines.items()
        ]

    def _about(self) -> str:
        said = {**self.about, "commit": (self.about["provenance"]["commit"] or "no commit")[:10]}
        why = {row["how"].partition(": ")[2] for row in self.rows if row["value"] is None}
        missing = ", - not measured" + (f" ({'; '.join(sorted(why - {''}))})" if why - {""} else "") if why else ""
        legend = f"* computed, ~ estimated, others measured{missing}"
        said["new"] = ", {new} new ones".format(**said) if any("token" in row["phase"] for row in self.rows) else ""
        return "{model}, {batch} x {n} tokens{new}, {dtype}, {device}, {commit}. ".format(**said) + legend

    def _priced(self) -> str:
        return f". Prices: {self.about['prices']['date']}." if "prices" in self.about else "."

    def __repr__(self) -> str:
        from tabulate import tabulate

        headings, cells = self._printed()
        return f"{tabulate(cells, headings, disable_numparse=True)}\n{self._about()}{self._priced()}"

    def _repr_html_(self) -> str:
        import html

        from tabulate import tabulate

        headings, cells = self._printed()
        said = html.escape(self._about() + self._priced())
        return f"{tabulate(cells, headings, tablefmt='html', disable_numparse=True)}<p>{said}</p>"

    def figure(self, metrics: Sequence[str] = SHOWN):
        """Bars of these metrics, those that have a number: a row of panels for each phase, for a slide (16:9)."""
        import matplotlib.pyplot as plt

        from zsaa.kit.figures.style import STYLE

        phases = list(dict.fromkeys(row["phase"] for row in self.rows))
        there = {(r["phase"], r["metric"]) for r in self.rows if r["value"] is not None}
        drawn = [m for m in metrics if any((phase, m) in there for phase in phases)]
        with plt.rc_context({**STYLE, "axes.grid": False}):
            figure, axes = plt.subplots(len(phases), len(drawn), figsize=(10, 5.6), squeeze=False, layout="constrained")
            for line, phase in zip(axes, phases):
                for axis, metric in zip(line, drawn):
                    rows = [r for r in self.rows if (r["phase"], r["metric"]) == (phase, metric)]
                    _bars(axis, [r for r in rows if r["value"] is not None], metric)
                line[0].set_ylabel(phase)
            axes[-1, 0].set_xlabel("alpha")
        figure.set_label(f"What a prefill, a decoded token and a fine-tuning step cost, by alpha: {self._about()}.")
        figure.suptitle(self._about(), fontsize=6.5, color="#555555", wrap=True)
        return figure


def _bars(axis, rows: list[dict], metric: str) -> None:
    axis.set_title(metric + (mark(rows[0]["how"]) if rows else ""))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    if not rows:
        axis.text(0.5, 0.5, "-", ha="center", va="center", transform=axis.transAxes)
        axis.set_xticks([])
        return
    colours = ["#0072B2" if row["alpha"] < 1 else "#999999" for row in rows]
    bars = axis.bar(range(len(rows)), [row["value"] for row in rows], color=colours, width=0.7)
    axis.bar_label(bars, [short(row["value"], row["unit"]) for row in rows], fontsize=6, padding=1)
    axis.set_xticks(range(len(rows)), [f"{row['alpha']:g}" for row in rows])
    axis.margins(y=0.2)
