"""The ablation's rows: continuations, depths, and rows that are run, saved, judged and shipped by commands."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from test_models import save_tiny

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import continuation, depth, run, ship
from ablation.curves import logits_of
from ablation.run import load_config
from ablation.train import train
from ablation.training import Training
from ablation.variants import Variant
from zsaa import finetune
from zsaa.rule import kept_counts


def test_continuations_at_alpha_1_are_the_stock_models():
    model = tiny.make("llama")
    ids, _, _ = tiny.tokens([40, 40, 40])
    rows = continuation.curve(model, ids, 8, {"paper": Variant(), "keys": Variant(dropped="keys")}, [1, 2])
    logits = model(ids).logits[:, -9:-1].detach()
    nll = -logits.log_softmax(-1).gather(2, ids[:, -8:, None]).squeeze(-1)
    for row in rows[:3]:  # stock, and at 1x whatever the variant
        assert row["agreement"] == 100 and row["nll"] == pytest.approx(nll.mean(1).tolist(), abs=1e-5)
    two = {row["variant"]: row for row in rows if row["target"] == 2}
    assert set(two) == {"truncation", "paper", "keys"}
    with zsaa.at(zsaa.enable(model), two["paper"]["alpha"]), torch.no_grad():
        prompt = model(ids[:, :32], use_cache=True)
        follows = model(ids[:, 32:], past_key_values=prompt.past_key_values).logits[:, :-1]
    logits = torch.cat((prompt.logits[:, -1:], follows), 1)
    nll = -logits.log_softmax(-1).gather(2, ids[:, 32:, None]).squeeze(-1)
    assert two["paper"]["nll"] == pytest.approx(nll.mean(1).tolist(), abs=1e-5)


def test_the_verdict_stands_anywhere_among_balanced_fillers():
    texts, labels = [f"sentence {i}" for i in range(60)], [i % 2 for i in range(60)]
    made, answers, places = depth.passages(texts, labels, 9, seed=3)
    assert answers == labels and made == depth.passages(texts, labels, 9, seed=3)[0]
    assert set(places) == set(range(9))
    for passage, own, place in zip(made, texts, places):
        lines = passage.split("\n")
        assert lines[place] == depth.MARK + own and len(lines) == 9 and passage.count(own + "\n") <= 1
        fillers = [labels[texts.index(line)] for i, line in enumerate(lines) if i != place]
        assert sum(fillers) == 4
    with pytest.raises(ValueError, match="odd"):
        depth.passages(texts, labels, 8, seed=0)


def test_every_row_of_the_configuration_can_be_run_and_says_why():
    config = load_config()
    assert all(row["about"] and row["group"] in config["groups"] for row in config["rows"].values())
    assert not any(row["about"].startswith(("the same", "and ")) for row in config["rows"].values()), (
        "each stands alone"
    )
    for fields in config["continuation"]["variants"].values():
        Variant(**fields)


def two_reviews():
    """40 short texts to train on and 20 to be tested on, in the tiny tokenizer's words."""
    sides = [
        Dataset.from_dict({"text": [f"w{i % 90} w{i % 7}" for i in range(n)], "label": [i % 2 for i in range(n)]})
        for n in (40, 20)
    ]
    return SimpleNamespace(train=sides[0], test=sides[1], source="made up")


@pytest.mark.parametrize(
    "row",
    [
        "salience-spared",
        pytest.param("both-front", marks=pytest.mark.full),
        "lora-plus",
        pytest.param("lora-wide", marks=pytest.mark.full),
        pytest.param("lora-crops-deep", marks=pytest.mark.full),
        pytest.param("wide-phrases", marks=pytest.mark.full),
        pytest.param("phrases-zipf", marks=pytest.mark.full),
        "votes-geometric",
    ],
)
def test_gradients_teach_every_kind_of_head(row, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    before, after = [], []

    def learn(net, *given):
        probe, log = train(net, *given)
        heads = probe.by_gradient.heads
        after.append(heads[str(3)][-1])
        return probe, log

    monkeypatch.setattr(run, "train", learn)
    for epochs in ("0.3", "2"):
        command = ["--model", str(tmp_path / "model"), "--rows", row, "--task", "depth", "--epochs", epochs]
        command += ["--targets", "1", "2", "--output-dir", str(tmp_path / epochs), "--save", str(tmp_path / "saved")]
        assert run.main(command) == 0
    before, after = ([p.detach().clone() for p in head.parameters()] for head in after)
    assert all((a != b).any() for a, b in zip(before, after))
    assert len(list((tmp_path / "saved" / row).glob("*e.safetensors"))) == 1
    if row.startswith("lora"):
        given = [*command[:-3], str(tmp_path / "read"), "--saved", str(tmp_path / "saved" / row)]
        assert run.main(given) == 0
        read, trained = (
            json.loads((tmp_path / folder / "depth" / f"{row}-epochs2.json").read_text()) for folder in ("read", "2")
        )
        assert [r["right"] for r in read["rows"]] == [r["right"] for r in trained["rows"]]
        assert read["log"]["steps"] == 0 < trained["log"]["steps"]


def test_a_row_from_the_command_line_is_run_once(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    command = ["--model", str(tmp_path / "model"), "--rows", "probe-once", "--task", "depth", "--epochs", "0.5",
               "--targets", "1", "2", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert run.main(command) == 0
    (path,) = (tmp_path / "out").rglob("*.json")
    assert path.relative_to(tmp_path / "out").as_posix() == "depth/probe-once-epochs0.5.json"
    result = json.loads(path.read_text())
    assert result["provenance"]["seed"] == 0 and result["rows"][0]["n"] == 20
    before = path.stat().st_ino  # a new file would be another one
    assert run.main(command) == 0 and path.stat().st_ino == before
    assert run.main([*command, "--seeds", "1"]) == 0 and len(list((tmp_path / "out").rglob("*.json"))) == 2


def test_a_saved_row_is_judged_under_the_schedule_that_it_learned(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "model", "llama")
    config = load_config()
    config["rows"]["learned"]["training"] |= {"lora": 4}  # --saved reads adapters
    monkeypatch.setattr(run, "load_config", lambda: config)
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    learned = [0.5, 1.5, 0.75, 1.25]

    def learn(*given):
        probe, log = train(*given)
        return probe, {**log, "schedule": learned}

    monkeypatch.setattr(run, "train", learn)
    command = ["--task", "depth", "--model", str(base), "--rows", "learned", "--epochs", "0.5", "--targets", "2"]
    folder = tmp_path / "rows" / "learned"
    assert run.main([*command, "--output-dir", str(tmp_path / "trained"), "--save", str(folder.parent)]) == 0
    assert run.main([*command, "--output-dir", str(tmp_path / "read"), "--saved", str(folder)]) == 0
    found, before = (json.loads(next((tmp_path / n).rglob("*.json")).read_text()) for n in ("read", "trained"))
    assert found["variant"] == before["variant"] and found["variant"]["schedule"] == learned
    assert found["log"]["schedule"] == learned
    assert [r["alpha"] for r in found["rows"]] == [r["alpha"] for r in before["rows"]]
    file = folder / run.SCHEDULE_FILE
    again = [*command, "--output-dir", str(tmp_path / "again"), "--saved", str(folder)]
    file.write_text(json.dumps({"schedule": learned[:3]}))
    with pytest.raises(ValueError, match="has 3 weights, and the model has 4 layers"):
        run.main(again)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no schedule.json.*Train and --save it anew"):
        run.main(again)


def test_a_ladder_is_called_by_one_name(tmp_path, monkeypatch):
    """The package and the bench ask the same function."""
    (tmp_path / "zsaa.json").write_text(json.dumps({"alpha_range": None, "score": "salience", "schedule": "rising"}))
    monkeypatch.setattr(ship, "load_task", lambda *args, **kwargs: None)
    monkeypatch.setattr(ship, "task_record", lambda data: {})
    monkeypatch.setattr(ship, "model_record", lambda name: {})
    assert ship.method_of is finetune.method_of
    for sampling, name in (("ladder", "zsaa+"), ("alpha", "alpha-sampled"), ("log", "log")):
        training = asdict(Training(sampling=sampling))
        result = {"training": training, "variant": {"tau": 2}, "row": "r", "task": {"name": "t"}, "rows": []}
        result |= {"model": {"name": "m"}, "log": {"steps": 1, "seconds": 1}, "provenance": {"eval_samples": 1}}
        assert ship.curve_of(result, tmp_path, 9)["recipe"]["method"] == name
    recipe = finetune.Recipe(sampling="ladder")
    assert finetune.describe(recipe, tiny.make("llama"))["method"] == "zsaa+"


@pytest.mark.parametrize("row", ["lora-crops", "wide", "paper"])
def test_a_saved_row_is_shipped_with_the_dial_on(row, tmp_path, monkeypatch):
    """What the package then says is what the bench says, to the float16 that both were saved in."""
    base = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    shared = ["--task", "depth", "--model", str(base)]
    command = ["--rows", row, "--epochs", "0.5", "--targets", "1", "--output-dir", str(tmp_path / "out")]
    kept = []

    def learn(net, *given):
        kept.extend((net, trained := train(net, *given)))
        return trained

    monkeypatch.setattr(run, "train", learn)
    assert run.main([*command, *shared, "--save", str(tmp_path / "rows")]) == 0
    folder = tmp_path / "rows" / row
    assert ship.main([str(folder), *shared]) == 0
    net, _ = finetune.load(folder, kind="sequence-classification", dtype=torch.float32)
    variant = Variant(**load_config()["rows"][row].get("variant", {}))
    dial = zsaa.dial.settings(net)
    assert dial["score"] == ("column_sum" if row == "paper" else "salience") and dial["schedule"] == variant.schedule
    assert 0 < dial["alpha_range"][0] < dial["alpha_range"][1] == 1
    ids, _, _ = tiny.tokens([150], vocab=90)
    bench, (probe, _) = kept
    alpha = 0.9
    with zsaa.at(net, alpha), torch.no_grad():
        found = net(ids).logits
        expected = logits_of(bench, ids, [150], alpha, variant, **({} if probe is None else {"scorer": probe}))[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert variant.counts(150, alpha, 4) == kept_counts(150, alpha, 4, variant.tau, variant.schedule)
    assert variant.counts(150, alpha, 4)[-1] < 150


def test_a_variant_that_the_package_lacks_is_not_shipped(tmp_path):
    spared, once = {"reference": 512}, {"schedule": "once", "reference": 512}
    with pytest.raises(ValueError, match="the package has no Variant.*, learned: its schedules"):
        ship.settings_of(tmp_path, Variant(), Training("ladder", distill=0.5, bends=True), [9])
    others = {"schedule": "once"}, {"schedule": "late"}, {"schedule": "rising:2"}, {"dropped": "merged"}, {"smooth": 3}
    for fields in (once, spared, *others):
        with pytest.raises(ValueError, match="the package has no Variant.*its schedules are geometric and rising"):
            ship.settings_of(tmp_path, Variant(**fields), Training(), [20])
    for probe in ("words", "evidence", "gradient"):
        with pytest.raises(ValueError, match=f"probe='{probe}'"):
            ship.settings_of(tmp_path, Variant(), Training(sampling="log", probe=probe), [20])
    with pytest.raises(ValueError, match="probe='wide', and salience.safetensors is not there"):
        ship.settings_of(tmp_path, Variant(), Training(sampling="ladder", probe="wide"), [20])


def test_what_drew_nothing_keeps_the_range_of_the_adapter_that_it_went_on_from(tmp_path):
    (tmp_path / "zsaa.json").write_text(json.dumps({"alpha_range": [0.5, 1.0]}))
    for start, known, schedule in ((str(tmp_path), [0.5, 1.0], "geometric"), ("", None, "rising")):
        training = Training(sampling="conventional", start=start)
        found = ship.settings_of(tmp_path, Variant(schedule=schedule), training, [20])
        rule = {"tau": 5, "score": "column_sum", "schedule": schedule}
        assert found == {"alpha": 1.0, **rule, "alpha_range": known}
