"""Healing: what is scored against plain arithmetic, and a run from end to end on a tiny model."""

import gzip
import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from zsaa.data.corpora import Corpus
from zsaa.depth import heal, remove_layers

WORDS = " ".join(f"w{3 + (7 * i) % 94}" for i in range(6000)).split()


def model():
    return tiny.make("llama", dtype=torch.float32)


QUESTIONS = [
    {"task": "a", "context": "w5 w6 w7", "choices": ["w8", "w9 w10"], "answer": 1},
    {"task": "b", "context": "w11", "choices": ["w12 w13 w14", "w15", "w16"], "answer": 0},
    {"task": "a", "context": "w17 w18", "choices": ["w19", "w20"], "answer": 0},
]


def test_a_choice_is_the_likeliest_a_character():
    net, tokenizer = tiny.make("llama"), tiny.tokenizer()
    right = {"a": [], "b": []}
    for question in QUESTIONS:
        nats = []
        for choice in question["choices"]:
            head = tokenizer(question["context"], add_special_tokens=False).input_ids
            tail = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                said = net(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            total = sum(float(said[len(head) - 1 + i, token]) for i, token in enumerate(tail))
            nats.append(total / (len(choice) + 1))
        right[question["task"]].append(int(nats.index(max(nats)) == question["answer"]))
    for together in (1, 8):
        found = heal.choose(net, tokenizer, QUESTIONS, together)
        assert {task: tally["correct"] for task, tally in found.items()} == {t: sum(r) for t, r in right.items()}
        assert {task: tally["n"] for task, tally in found.items()} == {"a": 2, "b": 1}


def test_the_divergence_is_of_softened_verdicts():
    torch.manual_seed(0)
    said, taught = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (taught / 2).softmax(-1), (said / 2).softmax(-1)
    torch.testing.assert_close(heal.divergence(said, taught, 2.0), 4 * (p * (p / q).log()).sum(-1).mean())
    assert heal.divergence(said, said) < 1e-6


def test_pieces_are_the_texts_one_behind_the_other():
    rows = heal.pieces(tiny.tokenizer(), ["w5 w6 w7", "w8 w9", "w10 w11 w12"], length=4)
    assert sorted(rows.tolist()) == [[5, 6, 7, 2], [8, 9, 2, 10]]


def test_pieces_of_two_kinds_come_in_turn():
    one, two = torch.zeros(3, 4, dtype=torch.long), torch.tensor([[1] * 4, [2] * 4])
    assert heal.mixed(one, two)[:, 0].tolist() == [0, 1, 0, 2, 0, 1] and heal.mixed(one, two[:0]) is one


@pytest.fixture
def small(monkeypatch):
    texts = [" ".join(WORDS[40 * i : 40 * i + 300]) for i in range(80)]
    corpus = Corpus("wikitext-103", "words", texts[:8], texts[8:], False, "here: words", True, "WikiText-103")
    monkeypatch.setattr(heal, "load_corpus", lambda *_, **__: corpus)
    monkeypatch.setattr(heal, "load_model", lambda *_, **__: (model(), tiny.tokenizer()))


@pytest.mark.full
def test_it_is_healed_and_judged(small, tmp_path):
    given_exam = tmp_path / "exam.json.gz"
    asked = {"task": "coqa", "context": "w5 w6 w7", "references": ["w8 w9"]}
    told = [{"text": " ".join(WORDS[:600])}]
    given_exam.write_bytes(gzip.compress(json.dumps([*QUESTIONS, asked, *told]).encode()))
    given = ["--removed", "1", "--steps", "25", "--batch", "4", "--rate", "1e-2", "--rank", "4", "--windows", "5"]
    assert (
        heal.main([*given, "--exam", str(given_exam), "--save", str(tmp_path / "kept"), "--output-dir", str(tmp_path)])
        == 0
    )
    result = json.loads((tmp_path / "heal-smollm2-135m.json").read_text())
    whole, left, text, distilled = result["rows"]
    assert [row["healed"] for row in result["rows"]] == ["untuned", "untuned", "text", "distilled"]
    assert whole["ratio"] == 1.0 and left["layers"] == text["layers"] and len(left["layers"]) == 1
    assert text["perplexity"] < left["perplexity"] and text["log"]["steps"] == 25 and "--steps 25" in result["command"]
    assert text["answers"]["coqa"]["n"] == 1 and "--exam exam.json.gz" in result["command"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"3-layers-text", "3-layers-distilled"}
    assert distilled["log"]["loss"][-1] < distilled["log"]["loss"][0] and whole["choices"]["a"]["n"] == 2
    less = remove_layers(model(), left["layers"])
    window = heal.windows(heal.load_corpus(), tiny.tokenizer(), count=5)[0]
    with torch.no_grad():
        said = less(torch.tensor([window.ids])).logits[0]
    nats = F.cross_entropy(said[223:-1], torch.tensor(window.ids[224:]), reduction="sum")
    assert float(left["nll"].split()[0]) == pytest.approx(float(nats), rel=1e-3)


def test_a_model_learns_to_predict_from_lower_layers(small, tmp_path):
    given = ["--exits", "1", "2", "--steps", "30", "--batch", "4", "--rate", "1e-2", "--rank", "4", "--windows", "5"]
    assert heal.main([*given, "--name", "exits", "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "exits-smollm2-135m.json").read_text())["rows"]
    before, after = ({row["depth"]: row for row in rows if row["trained"] is on} for on in (False, True))
    assert set(before) == set(after) == {1, 2, 4} and before[4]["agreement"] == after[4]["agreement"] == 100
    for depth in (1, 2):
        assert after[depth]["perplexity"] < before[depth]["perplexity"]
    assert (tmp_path / "exits-adapter" / "adapter_model.safetensors").is_file()


def test_no_step_begins_behind_the_deadline():
    log = heal.learn(heal.adapted(model(), 2), torch.ones(4, 8, dtype=torch.long), 5, None, 1e-3, 2, deadline=0.0)
    assert (log["steps"], log["asked"], log["tokens"]) == (0, 5, 0)
