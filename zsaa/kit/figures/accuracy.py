"""Accuracy along the dial: a figure per data set."""

from __future__ import annotations

import re

import pandas as pd

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, CUTS, DATA_SETS, REFERENCE, STYLE, legend, multiples, panels
from zsaa.kit.labels import METHODS
from zsaa.kit.points import settings
from zsaa.kit.store import STUDIES
from zsaa.measure import stats


def curves(points):
    """What recipes reach on a data set, from its points: a row per model, recipe, method and target, with "value" (F1
    where there is one, else accuracy), "low", "high" and "n". Seeds of a recipe become their mean, see
    `stats.over_seeds`; of several readings of a training the one on the most samples counts."""
    scored = points[points["metric"].isin(("accuracy", "f1"))]
    found = settings(points[points["file"].isin(scored["file"]) & points["metric"].isin(("accuracy", "f1", "target"))])
    found = found[found["task"].isin(scored["task"])] if len(found) else found  # not the times in the same file
    if not len(found):
        return found
    for end in ("", "_low", "_high", "_n"):
        accuracy = found["accuracy" + end]
        found["value" + end] = found["f1" + end].fillna(accuracy) if "f1" in found else accuracy
    which = ["task", "model", "recipe", "method"]
    most = found.groupby([*which, "seed"], dropna=False)["value_n"].transform("max")
    found = found[found["value_n"] == most]
    rows = []
    for key, seeds in found.groupby([*which, "target"], dropna=False, sort=False):
        first = seeds.drop_duplicates("seed")
        mean, (low, high), _ = stats.over_seeds(
            list(first["value"]), list(zip(first["value_low"], first["value_high"]))
        )
        rows.append(
            {**dict(zip((*which, "target"), key)), "mac_reduction": first["mac_reduction"].iloc[0],
             "value": round(mean, 2), "low": low, "high": high, "n": int(first["value_n"].iloc[0]),
             "seeds": len(first), "split": first["split"].iloc[0]}
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("target", kind="stable")


def short(recipe: str) -> str:
    """ "zsaa+ (LoRA)" of "zsaa+ (LoRA), 5 epochs"; full fine-tuning goes without saying."""
    return recipe.split(", ")[0].removesuffix(" (full)")


def names_of(recipes) -> dict[str, str]:
    """What each recipe is called in a figure: short, unless another is called so, too."""
    brief = {recipe: short(recipe) for recipe in recipes}
    return {recipe: name if list(brief.values()).count(name) == 1 else recipe for recipe, name in brief.items()}


def dial(method: str) -> bool:
    return method == "dial" or method.startswith("dial (")


def draw(axis, rows, style, name, band=True):
    colour, marker, dashes = style
    axis.plot(rows["mac_reduction"], rows["value"], color=colour, marker=marker, linestyle=dashes, label=name)
    if band:
        axis.fill_between(rows["mac_reduction"], rows["low"], rows["high"], color=colour, alpha=0.12, linewidth=0)


def accuracy_figure(points, published: str | None = "IMDB"):
    """Accuracy against MAC reduction for one data set, from its points: recipes and conventional fine-tuning under the
    dial, the conventional one (or what there is without it) on truncated inputs, tokens kept at random, and the paper's
    curve of another model (against its wall-clock speed-up). Where another recipe's dial goes further than the
    conventional one was asked to, its own truncated inputs go on from there, hollow."""
    import matplotlib.pyplot as plt

    found = curves(points)
    with plt.rc_context(STYLE):
        figure, axis = panels(3.7)
        names = names_of(found["recipe"].unique())
        _dials(axis, found, names)
        _random(axis, found, names)
        _cuts(axis, found, names)
        printed = [(t, row[published]) for t, row in paper.TABLE_1.items() if published and row[published] is not None]
        if printed:
            style = {"color": COLOURS["paper"], "marker": "x", "linewidth": 0.9, "linestyle": "-."}
            axis.plot(*zip(*printed), **style, label=f"paper, {paper.TABLE_1_MODEL}")
        if found["task"].iloc[0] in DATA_SETS:  # chance; how many classes a user's own data have is not known here
            axis.axhline(50, **REFERENCE)
        metric = "F1" if "f1" in set(points["metric"]) else "accuracy"
        axis.set(xlabel="MAC reduction" + " (paper: speed-up)" * bool(published), ylabel=f"{metric} (%)")
        reach = max([found["target"].max(), *(t for t, _ in printed)])
        multiples(axis, [t for t in paper.TABLE_1 if t <= reach])
        legend(figure, columns=2)
    figure.set_label(_caption(found, metric, published))
    return figure


def _tau(method: str) -> str:
    """The dial's tau, as its method names it; the paper's goes without saying."""
    named = re.search(r"tau (\d+)", method)
    return named[1] if named else str(paper.TABLE_1_RECIPE["tau"])


def _dials(axis, found, names: dict[str, str]) -> None:
    dialled = found[found["method"].map(dial)]
    several = dialled["method"].map(_tau).nunique() > 1
    for (recipe, method), rows in dialled.groupby(["recipe", "method"], sort=False):
        name = short(recipe)
        colour = COLOURS["alpha" if name.startswith("alpha-sampled") else name.split(" (")[0]]
        style = (colour, "o", ":" if "LoRA" in name else "-")
        draw(axis, rows, style, f"{names[recipe]}, dial" + f", tau {_tau(method)}" * several)


def _random(axis, found, names: dict[str, str]) -> None:
    for recipe, rows in found[found["method"] == METHODS["random"]].groupby("recipe", sort=False):
        marker = {"zsaa+": "D", "conventional": "P"}.get(short(recipe).split(" (")[0], "s")
        n = int(rows["n"].iloc[0])
        name = f"{names[recipe]}, random tokens" + f" (n {n:,})" * int(n != found["n"].max())
        draw(axis, rows, (COLOURS["random"], marker, (0, (1, 2))), name)


def _cuts(axis, found, names: dict[str, str]) -> None:
    sides = {METHODS[side]: (COLOURS[side], *look) for side, look in CUTS.items()}
    cut = found[found["method"].isin(sides)]
    usual = cut[cut["recipe"].map(short) == "conventional"]
    first = set(usual["recipe"]) or set(cut["recipe"])
    far = cut[cut["recipe"].isin(first)]["target"].max()
    for (recipe, method), rows in cut.groupby(["recipe", "method"], sort=False):
        colour, marker, how = sides[method]
        name = f"{names[recipe]}, {how}"
        if recipe in first:
            whole = found[(found["recipe"] == recipe) & found["method"].map(dial) & (found["target"] == 1)]
            draw(axis, pd.concat([whole, rows]), (colour, marker, "--"), name)
        elif len(rows := rows[rows["target"] > far]):
            hollow = {"markerfacecolor": "white", "linewidth": 0.9, "linestyle": ":"}
            axis.plot(rows["mac_reduction"], rows["value"], color=colour, marker=marker, label=name, **hollow)


def _caption(found, metric: str, published: str | None) -> str:
    recipes = "; ".join(found["recipe"].unique())
    title = DATA_SETS.get(found["task"].iloc[0], (found["task"].iloc[0],))[0]
    text = (
        f"{title}: {metric} of {', '.join(found['model'].unique())} against the reduction of MACs, on "
        f"{found['n'].max():,} samples ({found['split'].iloc[0]}). Bands are 95% intervals. Trained: {recipes}."
    )
    paper_says = f" The paper's {paper.TABLE_1_MODEL} stands against its own speed-up, measured by the clock."
    return text + (paper_says if published else "")


def accuracy_figures(points) -> dict:
    """One accuracy figure per data set of result files of the kind "curve", by task name; a user's own, too."""
    points = points[~points["file"].str.startswith(STUDIES)]  # they have figures of their own
    own = points[points["split"].str.startswith("folder ", na=False)]["task"].unique()
    columns = {name: title if title in paper.TABLE_1_COLUMNS else None for name, (title, *_) in DATA_SETS.items()}
    columns |= dict.fromkeys(own)
    found = {name: points[points["task"] == name] for name in columns}
    scored = {name: part for name, part in found.items() if len(part) and "accuracy" in set(part["metric"])}
    return {name: accuracy_figure(part, columns[name]) for name, part in scored.items()}
