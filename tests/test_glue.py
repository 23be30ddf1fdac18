"""Files for GLUE's test server, from local folders in the hub's layout whose test labels are hidden."""

import json
import zipfile

import datasets
import hub
import pandas as pd
import pytest
import torch
from test_models import save_tiny

import zsaa
from zsaa import finetune
from zsaa.data.tasks import TASKS, load_glue_test, tokenize
from zsaa.evaluation import glue
from zsaa.models import AssetError, load_model


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("glue")
    return {"sources": hub.write(root / "data", hidden=9), "model": save_tiny(root / "tiny")}


def classifier(places, task):
    labels = len(TASKS[task].label_names)
    model, tokenizer = load_model(str(places["model"]), kind="sequence-classification", num_labels=labels)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    return zsaa.enable(model, tau=2), tokenizer


@pytest.mark.parametrize("task", glue.FILES)
def test_a_file_per_task_with_the_predictions_of_the_model_at_that_alpha(places, task, tmp_path):
    model, tokenizer = classifier(places, task)
    source = places["sources"][task]
    path = glue.write_predictions(model, tokenizer, task, tmp_path, alpha=0.6, source=source, progress=False)
    assert path.name == glue.FILES[task]
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    indices, answers = zip(*(line.split("\t") for line in lines))
    assert list(indices) == [str(i) for i in range(9)]
    split, _ = load_glue_test(task, source)
    assert set(split["label"]) == {-1}
    names = TASKS[task].label_names
    if task in ("sst2", "mrpc", "qqp"):
        names = ("0", "1")
    for ids, answer in zip(tokenize(split, tokenizer)["input_ids"], answers):
        with zsaa.at(model, 0.6), torch.no_grad():
            assert answer == names[int(model(torch.tensor([ids])).logits.argmax())]
    assert json.loads(path.with_suffix(".json").read_text())["alpha"] == 0.6
    if "mnli" in task:
        other = load_glue_test("mnli_matched" if task == "mnli_mismatched" else "mnli_mismatched", source)[0]
        assert other["text"] != split["text"], "each has its own test set"


def test_samples_go_by_their_index_not_their_place(places, tmp_path):
    """The same rows in another order give the same file."""
    model, tokenizer = classifier(places, "rte")
    spec, shuffled = TASKS["rte"], tmp_path / "data" / "rte"
    shuffled.mkdir(parents=True)
    rows = hub.rows(spec, 9, "test", hidden=True)
    pd.DataFrame(rows[::-1]).to_parquet(shuffled / "test-00000-of-00001.parquet")
    options = dict(mac_reduction=1.5, progress=False)
    sources = (places["sources"]["rte"], str(tmp_path / "data"))
    files = [glue.write_predictions(model, tokenizer, "rte", tmp_path / s[-3:], source=s, **options) for s in sources]
    assert files[0].read_text() == files[1].read_text()
    record = json.loads(files[0].with_suffix(".json").read_text())
    assert record["mac_reduction"] >= 1.5 and record["alpha"] < 1 and record["provenance"]["eval_samples"] == 9
    pd.DataFrame(rows[1:]).to_parquet(shuffled / "test-00000-of-00001.parquet")
    with pytest.raises(AssetError, match="is not whole: its idx must number 8 rows from 0 on"):
        load_glue_test("rte", str(tmp_path / "data"))


def test_from_the_command_line_to_the_zip(places, tmp_path, capsys):
    finetune.save(*classifier(places, "sst2"), tmp_path / "trained")
    out = ["--output-dir", str(tmp_path / "out")]
    given = [str(tmp_path / "trained"), "--task", "sst2", "--alpha", "0.5", "--source", places["sources"]["sst2"], *out]
    assert glue.main(given) == 0 and glue.main(["--zip", *out]) == 0
    assert "SST-2.tsv" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert archive.namelist() == ["SST-2.tsv"]
        assert archive.read("SST-2.tsv").decode() == (tmp_path / "out/SST-2.tsv").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["SST-2.json", "SST-2.tsv", "submission.zip"]


def test_what_cannot_be_is_refused(places, tmp_path):
    with pytest.raises(ValueError, match="'imdb' has no test split at GLUE's server; these have: mnli_matched"):
        load_glue_test("imdb")
    model, tokenizer = classifier(places, "sst2")
    options = dict(source=places["sources"]["mnli_matched"])
    with pytest.raises(ValueError, match="the model has 2 classes, but mnli_matched has 3: entailment"):
        glue.write_predictions(model, tokenizer, "mnli_matched", tmp_path, alpha=0.5, **options)
    for wrong in ({}, {"alpha": 0.5, "mac_reduction": 2}):
        with pytest.raises(ValueError, match="give alpha or mac_reduction"):
            glue.write_predictions(model, tokenizer, "sst2", tmp_path, **options, **wrong)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got 1.5"):
        glue.write_predictions(model, tokenizer, "sst2", tmp_path, alpha=1.5, **options)
    with pytest.raises(FileNotFoundError, match="no prediction file"):
        glue.pack(tmp_path)
    assert not list(tmp_path.rglob("*.tsv"))
