"""Jobs: what every committed command asks for, and the command line that is made from the signatures."""

import json
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from zsaa import experiment, mmlu, perplexity
from zsaa.bench import command as bench
from zsaa.finetune import Recipe
from zsaa.kit import store
from zsaa.studies import command, older
from zsaa.studies.calls import job
from zsaa.studies.job import SETTINGS, Accuracy, Job, Perplexity

JOBS = {
    "zsaa.experiment": older.experiment, "zsaa.perplexity": older.perplexity, "zsaa.mmlu": older.mmlu,
    "zsaa.run": command.job_of,
}  # fmt: skip
WRITTEN = [(file, result) for file, result in store.all_results() if "python -m zsaa." in (result.get("command") or "")]


def parsed(result):
    _, _, module, *arguments = shlex.split(result["command"])
    return module, arguments


@pytest.mark.parametrize(("file", "result"), WRITTEN, ids=[file for file, _ in WRITTEN])
def test_every_committed_command_still_asks_for_what_its_file_holds(file, result):
    module, arguments = parsed(result)
    if module == "zsaa.bench":
        asked = bench.parser().parse_args(arguments)
        assert result["kind"] in (asked.bench, f"bench-{asked.bench}")
        assert {row.get("tokens") for row in result["rows"]} - {None} <= {*asked.tokens}
        return
    if module not in JOBS:
        assert module in (
            "zsaa.audit",
            "zsaa.architectures",
            "zsaa.depth",
            "zsaa.depth.combined",
            "zsaa.depth.draft",
            "zsaa.depth.heal",
            "zsaa.serve.load",
            "zsaa.serve.soak",
            "zsaa.serve.study",
        )
        return
    asked = JOBS[module](arguments)
    kinds = {"accuracy": "curve", "choice": "choice", "perplexity": "perplexity", "answers": "questions"}
    assert result["kind"] == kinds.get(asked.objective, asked.objective)
    if asked.settings.targets and asked.objective in ("perplexity", "accuracy", "lengths"):
        assert {row["target"] for row in result["rows"]} <= {*asked.settings.targets}
    if asked.name:
        assert result["name"] == asked.name
    if hasattr(asked.settings, "controls"):
        assert {row["control"] for row in result["rows"]} <= {*asked.settings.controls}
    if asked.recipe:
        mine = asdict(next(asked.each()).recipe)
        said = {k: v for k, v in result["recipe"].items() if k in mine}  # older recipes had fields that are gone
        assert len(said) > 12
        given = {k: v for k, v in mine.items() if k in said and k not in ("alpha_range", "method")}
        assert given.items() <= said.items(), "the recipe that the file says it was made by"
    else:
        assert "train" not in result or result["train"] is None or "adapter" in result
    if asked.test and asked.objective == "accuracy":
        assert result["provenance"]["eval_samples"] == asked.test
    if asked.objective == "perplexity":
        protocol = result["protocol"]
        assert (protocol["prefix"], protocol["continuation"]) == (asked.settings.prefix, asked.settings.continuation)
        assert protocol["windows"] <= asked.test


def test_there_are_commands_of_each_kind():
    assert {parsed(result)[0] for _, result in WRITTEN} >= {"zsaa.bench", *JOBS}


@pytest.mark.parametrize("objective", SETTINGS)
def test_a_printed_config_asks_for_the_same_job(objective, tmp_path, capsys):
    given = ["--objective", objective, "--test", "12", "--seeds", "[3,4]", "--settings.targets", "[1, 2.5]"]
    if objective not in ("latency", "lengths"):
        given += ["--recipe", "paper", "--changes.epochs", "1.5", "--changes.learning_rate", "2e-5"]
    with pytest.raises(SystemExit) as ended:
        command.main([*given, "--print_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["objective"] == objective
    assert {*shown["settings"]} == {field.name for field in fields(SETTINGS[objective])}
    (tmp_path / "job.yaml").write_text(text)
    typed, read = command.job_of(given), command.job_of(["--config", str(tmp_path / "job.yaml")])
    assert typed == read and typed.settings.targets == (1, 2.5) and typed.seeds == (3, 4)
    assert typed.recipe == (Recipe(epochs=1.5, learning_rate=2e-5) if "--recipe" in given else None)
    assert command.job_of(["--config", str(tmp_path / "job.yaml"), "--test", "5"]) == replace(
        typed, test=5, command=typed.command.replace("--test 12", "--test 5")
    )


def test_the_command_of_a_job_asks_for_it_again():
    given = ["--objective", "perplexity", "--recipe", "zsaa+", "--changes.sampling", "alpha", "--changes.distill", "0"]
    given += ["--changes.score", "column_sum", "--settings.controls", '["alpha", "last"]', "--output", "somewhere/here"]
    asked = command.job_of([*given, "--name", "a name", "--settings.stride", "null", "--settings.prefix", "40"])
    module, arguments = parsed({"command": asked.command})
    assert module == "zsaa.run" and "somewhere" not in asked.command
    assert command.job_of([*arguments, "--output", "somewhere/here"]) == asked
    assert asked.settings == Perplexity(controls=("alpha", "last"), prefix=40)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--objective", "speed"], "accuracy.*perplexity.*choice.*speed"),
        (["--settings.protocol", "prefix"], "settings.protocol"),
        (["--objective", "perplexity", "--settings.protocol", "backwards"], "prefix.*last-word.*backwards"),
        (["--recipe", "nope"], "no recipe 'nope'. Available: conventional, depth, paper"),
        (["--recipe", "paper", "--changes.epochs", "0"], r"epochs must be in \(0, inf\), got 0"),
        (["--recipe", "paper", "--changes.epoch", "1"], "epoch"),
        (["--changes.epochs", "1"], "of no recipe: add --recipe paper"),
        (["--settings.targets", "[0.5]"], r"must be in \[1, inf\), got 0.5"),
        (["--settings.latency_repeats", "-1"], "latency_repeats must be a whole number, 0 or more, got -1"),
        (["--test", "0"], r"test must be a whole number, 1 or more, or None \(all\), got 0"),
        (["--seeds", "[]"], "seeds is empty: give one or more"),
        (["--objective", "lengths", "--recipe", "paper"], "trains nothing: leave it out"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_there_cannot_be_ends_the_program_and_says_why(given, message, capsys):
    import re

    with pytest.raises(SystemExit) as ended:
        command.main(given)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, said, re.DOTALL), said


def test_a_job_for_each_seed():
    asked = job("choice", recipe=Recipe(tuning="lora"), seeds=(2, 5), limit=7, output_dir="out")
    one, other = asked.each()
    assert (one.recipe.seed, one.seed, one.named("x")) == (2, 2, "x-seed2") and other.named("x-seed5") == "x-seed5"
    assert (asked.test, asked.output, asked.data) == (7, "out", "mmlu")
    (alone,) = job("accuracy", recipe=Recipe(seed=3), name="mine").each()
    assert alone.named("x") == "mine" and alone.recipe.seed == 3
    with pytest.raises(TypeError, match="colour"):
        job("accuracy", colour="red")
    with pytest.raises(ValueError, match="must be Perplexity, got Accuracy"):
        Job("perplexity", settings=Accuracy())


def test_old_commands_and_the_new_one_do_the_same(monkeypatch):
    """Each ends in `command.measure`, the one place where a job is done."""
    done = []
    for module in (experiment, perplexity, mmlu):
        monkeypatch.setattr(module, "measure", lambda asked: done.append(asked) or [{}])
    monkeypatch.setattr(command, "measure", lambda asked: done.append(asked) or [])
    experiment.main(["--task", "rte", "--epochs", "2"])
    experiment.run(Recipe(epochs=2), task="rte")
    command.main(["--data", "rte", "--recipe", "paper", "--changes.epochs", "2", "--output", "outputs/experiments"])
    first, *others = [replace(asked, command=None) for asked in done]
    assert others == [first, first]
    done.clear()
    perplexity.main(["--corpus", "ptb", "--tau", "3", "--train", "2000"])
    perplexity.run(corpus="ptb", tau=3)
    assert done[0].settings.tau == 3 and replace(done[0], command=None) == done[1]
    mmlu.main(["--source", "reviews", "--limit", "4"])
    assert (done[2].data, done[2].test, done[2].recipe) == ("reviews", 4, None)


def test_results_say_how_they_were_asked_for(tmp_path):
    """From the command line to the file: lengths, which run nothing."""
    from test_models import save_tiny
    from test_tasks import write

    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "data", split, [{"text": "w1 w2 w3 " * 9, "label": i % 2} for i in range(4)])
    given = ["--objective", "lengths", "--model", str(save_tiny(tmp_path / "model")), "--settings.targets", "[1,1.5]"]
    given += ["--source", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--name", "some"]
    given += ["--settings.max_length", "64"]
    assert command.main(given) == 0
    result = json.loads(Path(tmp_path / "out/results/some.json").read_text())
    assert result["command"].startswith("python -m zsaa.run --objective lengths")
    assert [row["target"] for row in result["rows"]] == [1, 1.5]
