"""A whole experiment, from a local model and data in the hub's layout to its result file."""

import dataclasses
import json
import re
import subprocess
import sys

import datasets
import hub
import pytest
import reference
import test_tasks
from test_models import save_tiny

import zsaa
from zsaa import experiment, finetune
from zsaa.data.tasks import TASKS, load_task, tokenize
from zsaa.dial import settings
from zsaa.evaluation import accuracy as evaluate
from zsaa.kit import store, tables
from zsaa.measure import stats
from zsaa.models import load_model
from zsaa.studies import accuracy, command, training


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
    assert all(
        row["n"] == 12 and ("latency_ms" in row) == (row["control"] in ("alpha", "first")) for row in result["rows"]
    )
    assert tables.table_1([result])["IMDB"].iloc[0, 1].endswith("substitute")
    model, _ = finetune.load(next(places["out"].glob("trained/run-*/model")), kind="sequence-classification")
    assert settings(model)["alpha_range"] == (0.7, 0.9) and settings(model)["tau"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "-1"], r"epochs must be in \(0, inf\), got -1.0"),
        (["--epochs", "0"], r"epochs must be in \(0, inf\), got 0.0"),
        (["--max-steps", "0"], "max_steps must be a whole number, 1 or more, or -1"),
        (["--learning-rate", "0"], "learning_rate must be in"),
        (["--tau", "0"], "tau must be >= 1"),
        (["--recipe", "zsaa+", "--distill", "2"], "distill must be in"),
        (["--targets", "0.5"], r"--targets must be in \[1, inf\), got 0.5"),
        (["--targets", "inf"], r"--targets must be in \[1, inf\), got inf"),
        (["--targets", "nan"], r"--targets must be in \[1, inf\), got nan"),
        (["--targets", "99", "--max-steps", "1"], r"targets \[99\] .*leave no row.*ranges from 1 to"),
        (["--targets", "1", "--controls", "first", "--max-steps", "1"], "leave no row"),
        (["--learning-rate", "1e30", "--max-steps", "3"], r"has diverged.*learning_rate below 1e\+30"),
        (["--eval-batch-size", "0"], "batch_size must be a whole number, 1 or more, or None"),
        (["--latency-repeats", "-1"], "latency_repeats must be a whole number, 0 or more"),
        (["--latency-only", "--latency-repeats", "0"], "repeats must be a whole number, 1 or more"),
        (["--latency-only", "--latency-batches", "0"], "a batch to time must be a whole number, 1 or more"),
        (["--lengths-only", "--targets", "99"], "leave no row"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_leaves_no_result_is_refused_before_it_is_computed(places, given, message, capsys, monkeypatch):
    """And nothing of it is left: no model, no checkpoint, no result that says 50%."""
    monkeypatch.setattr(accuracy, "curve", lambda *a, **k: pytest.fail("it was evaluated"))
    with pytest.raises((ValueError, SystemExit)) as caught:
        experiment.main(arguments(places, "--max-length", "32", *given))
    said = capsys.readouterr().err + str(caught.value)
    assert re.search(message, said)
    assert getattr(caught.value, "code", 1) not in (0, None)
    assert not [p for p in places["out"].rglob("*") if p.is_file()]


ENDINGS = {
    OSError(28, "No space left on device", "out.json"): (1, "No space left on device: 'out.json'"),
    zsaa.UnsupportedModelError("OPT is not supported"): (1, "OPT is not supported"),
    KeyboardInterrupt(): (130, "interrupted"),
}


@pytest.mark.parametrize("error", ENDINGS, ids=lambda error: type(error).__name__)
def test_how_a_program_ends_is_a_line_and_a_code(error, capsys):
    def program():
        raise error

    code, line = ENDINGS[error]
    assert command.exit_code(program, "zsaa.run") == code
    said = capsys.readouterr().err
    assert said.startswith("zsaa.run: ") and line in said and said.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("module", ["experiment", "perplexity", "glue"])
def test_what_the_user_can_mend_is_said_in_a_line(module, tmp_path):
    """As a program: exit code 1, no traceback."""
    given = ["--source", str(tmp_path)]
    if module == "glue":
        given = [str(save_tiny(tmp_path / "model", head="sequence-classification")), "--task", "rte"]
        config = json.loads((tmp_path / "model/config.json").read_text())
        saved = {"tau": 0, "score": "column_sum", "schedule": "once", "alpha_range": None}
        (tmp_path / "model/config.json").write_text(json.dumps({**config, "zsaa": saved}))
    command = [sys.executable, "-m", f"zsaa.{module}", *given, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith(f"zsaa.{module}: ")]
    assert re.search("could not be read from the folder|with schedule 'once'", said)


def test_our_own_recipe_from_the_command_line(places):
    given = ["--name", "own", "--recipe", "zsaa+", "--max-steps", "3", "--batch-size", "4", "--tau", "1",
             "--schedule", "rising",
             "--strongest", "2.5", "--latency-repeats", "1", "--max-length", "32", "--targets", "1", "2"]  # fmt: skip
    assert experiment.main(arguments(places, *given)) == 0
    (path,) = (places["out"] / "results").glob("own.json")
    result = json.loads(path.read_text())
    recipe = finetune.Recipe.named(
        "zsaa+", max_steps=3, batch_size=4, tau=1, schedule="rising", strongest=2.5, max_length=32
    )
    assert {**result["recipe"], "alpha_range": None} == {
        **dataclasses.asdict(recipe),
        "method": "zsaa+",
        "file": recipe.file,
    }
    low, high = result["train"]["alpha_range"]
    model, _ = finetune.load(next(places["out"].glob("trained/own-*/model")), kind="sequence-classification")
    assert settings(model)["alpha_range"] == (low, high) and 0 < low < high == 1
    assert zsaa.dial.rule(model) == {"tau": 1, "score": "salience", "schedule": "rising"}
    (row,) = [row for row in result["rows"] if row["control"] == "alpha" and row["target"] == 2]
    lengths = [min(32, 20 + i % 10) for i in range(12)]
    rule = zsaa.dial.rule(model)
    assert row["mac_reduction"] == round(zsaa.mac_reduction(model.config, lengths, row["alpha"], **rule), 4) >= 2
    assert {row["control"] for row in result["rows"]} == {"alpha", "first", "last", "ends", "random"}
    assert tables.table_1([result])["IMDB"].iloc[0, 1].endswith("substitute")
    # What is finished is found again.
    before = path.stat().st_ino
    assert experiment.main(arguments(places, *given)) == 0 and path.stat().st_ino == before


def test_controls_without_a_row_of_their_own_are_left_out(places):
    """At 1x there is the dial alone, and a target out of reach is left out."""
    given = ["--name", "one", "--max-steps", "1", "--tau", "1", "--max-length", "32", "--latency-repeats", "0"]
    assert experiment.main(arguments(places, *given, "--targets", "1", "99")) == 0
    rows = json.loads((places["out"] / "results/one.json").read_text())["rows"]
    assert [(row["control"], row["target"]) for row in rows] == [("alpha", 1)]


def test_latency_only_trains_nothing(places):
    given = ["--name", "times", "--latency-only", "--latency-batches", "1", "2", "--latency-repeats", "1", "--tau", "1"]
    assert experiment.main(arguments(places, *given)) == 0
    result = json.loads((places["out"] / "results/times.json").read_text())
    assert result["kind"] == "latency" and {row["latency_batch"] for row in result["rows"]} == {1, 2}
    assert [p.name for p in places["out"].iterdir()] == ["results"]


SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip


@pytest.mark.parametrize("schedule", [[], ["--schedule", "rising"]], ids=" ".join)
def test_settings_are_timed_again_without_model_and_data(schedule, places, monkeypatch):
    from tiny import CONFIGS

    from zsaa import bench

    given = ["--name", "times", "--latency-only", "--latency-batches", "1", "--latency-repeats", "1", "--tau", "1"]
    assert experiment.main(arguments(places, *given, *schedule)) == 0
    earlier = places["out"] / "results/times.json"
    before = json.loads(earlier.read_text())
    assert before["recipe"]["schedule"] == (schedule[1] if schedule else "geometric")
    if not schedule:
        del before["recipe"]["schedule"]  # which versions that had no other did not write
    earlier.write_text(json.dumps(before))
    shape = {k: v for k, v in CONFIGS["llama"]().to_dict().items() if k in SHAPE}
    monkeypatch.setitem(bench.MODELS, before["model"]["name"], shape)
    again = ["--latency-only", "--settings-of", str(earlier), "--latency-batches", "1", "--latency-repeats", "1"]
    assert experiment.main([*again, "--name", "again", "--output-dir", str(places["out"])]) == 0
    after = json.loads((places["out"] / "results/again.json").read_text())
    fixed = ("control", "target", "alpha", "keep_tokens", "mac_reduction", "latency_tokens", "latency_mac_reduction")
    assert [[row[key] for key in fixed] for row in after["rows"]] == [[r[key] for key in fixed] for r in before["rows"]]
    assert after["model"]["kind"] == "random weights" and after["recipe"]["tau"] == 1 and after["name"] == "again"
    assert after["recipe"] == {"schedule": "geometric", **before["recipe"]}
    other = places["out"] / "once.json"
    other.write_text(json.dumps({**before, "recipe": {**before["recipe"], "schedule": "once"}}))
    with pytest.raises(ValueError, match="with schedule 'once'"):
        experiment.main([*again[:2], str(other), "--output-dir", str(places["out"])])
    monkeypatch.setitem(bench.MODELS, before["model"]["name"], {**shape, "intermediate_size": 64})
    with pytest.raises(ValueError, match="another model"):
        experiment.main([*again, "--output-dir", str(places["out"])])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All data sets in the hub's layout, and a tiny GPT-2 whose tokenizer has no pad token."""
    root = tmp_path_factory.mktemp("hub")
    return {"sources": hub.write(root / "data"), "model": str(save_tiny(root / "gpt2", "gpt2")), "out": root / "out"}


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


SHORT = dict(targets=(1, 2), latency_repeats=0, save_steps=None, progress=False)


def quick(**more):
    return finetune.Recipe(**{"max_steps": 2, "batch_size": 4, "tau": 1, "max_length": 32, **more})


FEW = ("imdb", "mnli_matched", "mrpc")  # one text, two, and F1


@pytest.mark.parametrize("task", [pytest.param(t, marks=() if t in FEW else pytest.mark.full) for t in hub.PAPER])
def test_every_task_of_table_1_from_the_hubs_layout_to_its_curve(everything, task):
    options = dict(task=task, source=everything["sources"][task], output_dir=everything["out"])
    result = experiment.run(quick(), model=everything["model"], **options, **SHORT)
    spec = TASKS[task]
    assert result["task"]["paper_column"] == spec.paper_column and result["task"]["metric"] == spec.metric
    assert result["recipe"]["alpha_range"] == [0.02, 1.0], "GPT-2's, of section 4.2"
    held_out = load_task(task, source=everything["sources"][task]).test["label"]
    for row in result["rows"]:
        labels, predicted = store.per_sample(row)
        assert row["n"] == 12 and round(store.measured(row), 2) == row[spec.metric]
        if spec.metric == "f1":
            assert labels == list(held_out) and row["f1"] == round(stats.f1(labels, predicted), 2)
    assert [r["control"] for r in result["rows"]] == ["alpha", "alpha", "first", "last", "ends", "random"]
    assert json.loads((everything["out"] / f"results/{result['name']}.json").read_text()) == result


@pytest.mark.full
def test_both_mnli_tasks_share_a_training_and_nothing_finished_is_done_again(everything, monkeypatch):
    trained, evaluated = [], []
    monkeypatch.setattr(training, "fine_tune", lambda *a, **k: trained.append(a) or finetune.fine_tune(*a, **k))
    monkeypatch.setattr(accuracy, "curve", lambda *a, **k: evaluated.append(a[4]) or evaluate.curve(*a, **k))
    options = dict(model=everything["model"], output_dir=everything["out"] / "again", **SHORT)

    def run(task, seed=3, **more):
        trained.clear(), evaluated.clear()
        return experiment.run(quick(seed=seed), task=task, source=everything["sources"][task], **options, **more)

    first = run("mnli_matched", controls=("alpha", "first"))
    assert len(trained) == 1 and evaluated == [("alpha",), ("first",)]
    assert run("mnli_matched", controls=("alpha", "first")) == first and not trained and not evaluated
    more = run("mnli_matched", controls=("alpha", "first", "last"))
    assert not trained and evaluated == [("last",)] and more["rows"][: len(first["rows"])] == first["rows"]
    (options["output_dir"] / f"results/{first['name']}.json").write_text('{"cut')  # killed while it wrote
    assert run("mnli_matched", controls=("alpha", "first"))["rows"] == first["rows"] and not trained and not evaluated

    other = run("mnli_mismatched", controls=("alpha",))
    assert not trained, "one model for both test sets"
    held_out = load_task("mnli_mismatched", source=everything["sources"]["mnli_mismatched"])
    net, tokenizer = finetune.load(next(options["output_dir"].glob("trained/*/model")), kind="sequence-classification")
    test = tokenize(held_out.test, tokenizer, 32)
    assert other["rows"] == evaluate.curve(net, tokenizer, test, (1, 2), ("alpha",), progress=False)
    assert run("mnli_matched", seed=4, controls=("alpha",))["name"].endswith("seed4") and len(trained) == 1


def test_a_file_per_seed(everything, capsys):
    given = ["--task", "rte", "--model", everything["model"], "--source", everything["sources"]["rte"]]
    given += [
        "--output-dir",
        str(everything["out"] / "seeds"),
        "--max-steps",
        "1",
        "--tau",
        "1",
        "--targets",
        "1",
        "--max-length",
        "32",
    ]
    given += ["--controls", "alpha", "--latency-repeats", "0", "--no-progress", "--seeds", "0", "7"]
    assert experiment.main(given) == 0
    found = {r["name"]: r for r in store.load_results(everything["out"] / "seeds/results")}
    assert sorted(found) == [f"rte-gpt2-alpha-sampled-full-seed{seed}" for seed in (0, 7)]
    for seed in (0, 7):
        r = found[f"rte-gpt2-alpha-sampled-full-seed{seed}"]
        assert r["recipe"]["seed"] == r["provenance"]["seed"] == seed and "--seeds 0 7" in r["command"]
    assert experiment.main([*given, "--name", "mine"]) == 0
    assert (everything["out"] / "seeds/results/mine-seed7.json").is_file()


def test_more_tokens_than_positions_are_refused(everything):
    with pytest.raises(ValueError, match="max_length is 257, but the model has 256 positions: choose 1 to 256"):
        experiment.run(
            quick(max_length=257), model=everything["model"], task="imdb", source=everything["sources"]["imdb"],
            output_dir=everything["out"] / "long", **SHORT,
        )  # fmt: skip
    assert not list((everything["out"] / "long").rglob("*.json"))


def test_an_unknown_adapter_is_named():
    with pytest.raises(ValueError, match="no committed adapter 'nope'. There are: .*imdb-lora-alpha-sampled"):
        experiment.run_adapter("nope")


def test_what_lengths_alone_say(everything):
    options = dict(
        task="qnli",
        source=everything["sources"]["qnli"],
        output_dir=everything["out"] / "lengths",
        tau=2,
        max_length=64,
    )
    result = experiment.lengths(model=everything["model"], targets=(1, 1.5, 2, 99), **options)
    assert [r["target"] for r in result["rows"]] == [1, 1.5, 2], "tau keeps 99 out of reach"
    model, tokenizer = load_model(everything["model"])
    tokens = [len(ids) for ids in tokenize(load_task("qnli", source=options["source"]).test, tokenizer)["input_ids"]]
    for row in result["rows"]:
        kept = sum(sum(reference.kept_counts(n, row["alpha"], 4, 2)) for n in tokens)
        assert row["preserved"] == pytest.approx(kept / (4 * sum(tokens)), abs=1e-5)
        assert (
            row["target"]
            <= row["mac_reduction"]
            == pytest.approx(zsaa.mac_reduction(model.config, tokens, row["alpha"], 2), abs=1e-4)
        )
    assert result["rows"][0]["preserved"] == 1 and result["layers"] == 4
    paper = experiment.lengths(model=everything["model"], shape="gpt2", targets=(1, 2), **options)
    assert paper["layers"] == 12 and paper["name"] == "lengths-qnli-gpt2-gpt2" and paper["recipe"]["shape"] == "gpt2"
    with pytest.raises(ValueError, match="shape must be 'gpt2' or None"):
        experiment.lengths(shape="llama")
