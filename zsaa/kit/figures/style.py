"""Size, fonts, colours and markers that the figures share, and figures as files.

Every figure is as wide as a column of print, 85 mm, and no text in it is smaller than 6 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COLUMN = 85 / 25.4  # inches
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
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = "os^vDhp<"
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
STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "zsaa",  # the same figure gives the same file
}
REFERENCE = {"color": "#999999", "linewidth": 0.7, "linestyle": (0, (1, 3))}  # chance, stock: what lines are held to


def panels(height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of a column's width and `height` inches, and its axes as matplotlib's `subplots` gives them. Call it,
    and draw, within `matplotlib.rc_context(STYLE)`."""
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(COLUMN, height), layout="constrained", **options)


def legend(figure, handles=None, names=None, columns: int = 3, where: str = "outside lower center", size: float = 6.5):
    """A legend outside the axes, of all their lines unless some are given, in as many columns as fit."""
    if handles is None:
        found = [axis.get_legend_handles_labels() for axis in figure.axes]
        named = {name: handle for lines in found for handle, name in zip(*lines)}
        handles, names = list(named.values()), list(named)
    labels = names if names is not None else [handle.get_label() for handle in handles]
    for count, points in ((count, points) for count in range(columns, 0, -1) for points in (size, 6)):
        made = figure.legend(handles, labels, loc=where, ncols=count, fontsize=points)
        if made.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            return made
        made.remove()
    raise ValueError(f"a legend of {labels} is wider than the figure; give the lines shorter names.")


def grid(count: int, height: float, xlabel: str, ylabel: str, **options):
    """A figure of `count` panels, in two columns if there are several, each `height` inches, and a list of their axes.
    The axes at the left and at the bottom have the labels; the latter have named ticks also where ticks are shared."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = panels(height * rows + 0.6, rows, columns, squeeze=False, **options)
    found = list(axes.flat[:count])
    for axis in axes.flat[count:]:
        axis.remove()
    for axis in found[count - columns :]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(xlabel)
    for axis in found[::columns]:
        axis.set_ylabel(ylabel)
    return figure, found


def multiples(axis, values: Sequence[float], along: str = "x") -> None:
    """Ticks that read "2x", at these values and nowhere else."""
    getattr(axis, f"set_{along}ticks")(values, [f"{value:g}x" for value in values])
    axis.tick_params(which="minor", bottom=False, left=False)


def save_figure(figure, path: str | Path, caption: str | None = None) -> None:
    """`path`.png and `path`.svg, then closed; and `path`.txt, if it has a caption: the figure's label, unless another
    is given."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None)
    if caption := caption or figure.get_label():
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    plt.close(figure)


def show(figure, path: str | Path) -> None:
    """In a notebook: the figure below the cell, and in files, as `save_figure` has it."""
    from IPython.display import display

    save_figure(figure, path)
    display(figure)
