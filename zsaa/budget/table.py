"""The table that `zsaa.report` gives: a pandas DataFrame that prints whole."""

from __future__ import annotations

import html

import pandas as pd
from tabulate import tabulate

SHOWN = {  # column -> its heading and format in print
    "first layer": ("first\nlayer", "{:,}"),
    "median layer": ("median\nlayer", "{:,}"),
    "last layer": ("last\nlayer", "{:,}"),
    "kept": ("kept", "{:.0%}"),
    "GMACs": ("GMACs", "{:,.3f}"),
    "MAC reduction": ("MACs", "{:.2f}x"),
    "KV bytes": ("KV\nbytes", "{:,}"),
    "ms": ("ms", "{}"),  # measured, or "~" and predicted
    "speed-up": ("speed-\nup", "{:.2f}x"),
}


class Costs(pd.DataFrame):
    """A row per alpha. In print no column is cut, and times stand there only where they are known. What is made of it
    (a part, a copy) is a plain DataFrame."""

    @property
    def _constructor(self):
        return pd.DataFrame

    def _printed(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells."""
        table = pd.DataFrame(self).copy()
        predicted, measured = table.pop("predicted ms"), table.pop("measured ms")
        table.insert(table.columns.get_loc("speed-up"), "ms", [
            f"~{guess:.2f}" if time != time else f"{time:.2f}" for time, guess in zip(measured, predicted)
        ])  # fmt: skip
        if predicted.isna().all():
            table = table.drop(columns=["ms", "speed-up"])
        looks = [SHOWN.get(name, (name, "{}")) for name in table]
        cells = [
            [f"{alpha:g}", *(text.format(value) for (_, text), value in zip(looks, row))]
            for alpha, row in zip(table.index, table.itertuples(index=False))
        ]
        return ["alpha", *(heading for heading, _ in looks)], cells

    def _about(self) -> str:
        return "{model}, {batch} x {n:,} tokens, {device}; times: {timing}".format(**self.attrs)

    def __repr__(self) -> str:
        headings, cells = self._printed()
        text = tabulate(cells, headings, disable_numparse=True, stralign="right")
        return f"{text}\n{self._about()}"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        headings, cells = self._printed()
        headings = [heading.replace("-\n", "-").replace("\n", " ") for heading in headings]
        return (
            tabulate(cells, headings, tablefmt="html", disable_numparse=True) + f"<p>{html.escape(self._about())}</p>"
        )
