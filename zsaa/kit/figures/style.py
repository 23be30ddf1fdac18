"""Colours, markers and fonts that the figures share, and figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsaa.kit.store import measured

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey print together with the markers.
COLOURS = {
    "alpha": "#0072B2",
    "first": "#E69F00",
    "last": "#009E73",
    "ends": "#56B4E9",
    "random": "#CC79A7",
    "conventional": "#D55E00",
    "zsaa+": "#000000",
    "paper": "#555555",
}

# Figure 2: a colour and a marker for each data set, a dash for each control.
DATA_SETS = {
    "imdb": ("IMDB", "#0072B2", "o"),
    "mnli_matched": ("MNLIm", "#E69F00", "s"),
    "mnli_mismatched": ("MNLImm", "#D55E00", "D"),
    "rte": ("RTE", "#009E73", "^"),
    "qqp": ("QQP", "#CC79A7", "v"),
    "qnli": ("QNLI", "#56B4E9", "P"),
    "sst2": ("SST-2", "#000000", "X"),
    "mrpc": ("MRPC", "#882255", "*"),
    "rotten_tomatoes": ("Rotten Tomatoes", "#888833", "h"),
}

CUTS = {"first": ("^", "first tokens"), "last": ("v", "last tokens"), "ends": ("D", "both ends")}

LORA = (0, (8, 1.5))

DASHES = {"first": (0, (1, 1)), "last": (0, (4, 1.5)), "ends": (0, (4, 1, 1, 1)), "random": (0, (1, 3))}

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

PRINTED_ERROR = {"xerr": 0.005, "fmt": "s", "color": COLOURS["paper"], "markersize": 4, "capsize": 2, "linewidth": 1}


def save_figure(figure, path: str | Path, caption: str | None = None) -> None:
    """`path`.png and `path`.svg, then closed; and `path`.txt, if it has a caption."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    if caption:
        path.with_suffix(".txt").write_text(caption + "\n")
    plt.close(figure)


def line(axis, rows, style, name, interval=True):
    colour, marker, dashes = style
    x, y = [r["mac_reduction"] for r in rows], [measured(r) for r in rows]
    axis.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.5, linestyle=dashes, label=name)
    if interval:
        low, high = zip(*(r["ci95"] for r in rows))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def dials(results: Sequence[dict]) -> list[dict]:
    """The results whose dial is drawn: an adapter that was evaluated again has its curve in its own result already."""
    return [r for r in results if r.get("adapter") not in [other["name"] for other in results]]
