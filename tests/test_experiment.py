"""A whole experiment, from a local model and data in the hub's layout to its result file."""

import json

import pytest
import test_tasks
from test_models import save_tiny

from zsaa import experiment, finetune, tables
from zsaa.dial import settings


@pytest.fixture
def places(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 24), ("test", 12)):
        texts = [" ".join(f"w{(7 * i + j) % 95}" for j in range(20 + i % 10)) for i in range(count)]
        test_tasks.write(data, split, [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    return {"model": str(save_tiny(tmp_path / "model")), "source": str(data), "out": tmp_path / "out"}


def arguments(places, *more):
    shared = ["--task", "imdb", "--model", places["model"], "--source", places["source"], "--no-progress"]
    return [*shared, "--output-dir", str(places["out"]), *more]


def test_from_command_line_to_result_file(places, capsys):
    given = ["--name", "run", "--max-steps", "2", "--batch-size", "4", "--tau", "1", "--save-steps", "1",
             "--latency-repeats", "1", "--alpha-range", "0.7", "0.9", "--max-length", "32"]  # fmt: skip
    assert experiment.main(arguments(places, *given)) == 0
    assert "accuracy" in capsys.readouterr().out
    result = json.loads((places["out"] / "results/run.json").read_text())
    assert result["command"].startswith("python -m zsaa.experiment --task imdb")
    assert "--output-dir" not in result["command"] and str(places["out"]) not in result["command"]
    assert result["recipe"]["alpha_range"] == [0.7, 0.9] and result["train"]["steps"] == 2
    p = result["provenance"]
    assert (p["seed"], p["train_samples"], p["eval_samples"]) == (0, 24, 12) and p["seconds"] > 0
    assert {row["control"] for row in result["rows"]} == {"alpha", "first", "last", "ends", "random"}
    assert all(row["n"] == 12 and ("latency_ms" in row) == (row["control"] != "random") for row in result["rows"])
    assert tables.table_1([result])["speed-up"][0] == "1x"
    model, _ = finetune.load(places["out"] / "run/model", kind="sequence-classification")
    assert settings(model)["alpha_range"] == (0.7, 0.9) and settings(model)["tau"] == 1


def test_latency_only_trains_nothing(places):
    given = ["--name", "times", "--latency-only", "--latency-batches", "1", "2", "--latency-repeats", "1", "--tau", "1"]
    assert experiment.main(arguments(places, *given)) == 0
    result = json.loads((places["out"] / "results/times.json").read_text())
    assert result["kind"] == "latency" and {row["latency_batch"] for row in result["rows"]} == {1, 2}
    assert [p.name for p in places["out"].iterdir()] == ["results"]


def test_a_metric_that_curves_do_not_report_is_refused(places, monkeypatch):
    import dataclasses

    from zsaa import tasks

    original = tasks.load_task
    changed = lambda *a, **k: dataclasses.replace(original(*a, **k), metric="f1")  # noqa: E731
    monkeypatch.setattr(tasks, "load_task", changed)
    with pytest.raises(NotImplementedError, match="measured by f1"):
        experiment.main(arguments(places))
    assert not places["out"].exists()
