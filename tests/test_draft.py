"""Drafts of a model's own first layers: what they learn, and that the text stays that of greedy decoding."""

import argparse
import json

import pytest
import tiny
import torch
from test_graphs import StandIn
from transformers import cache_utils

from zsaa.data.corpora import Corpus
from zsaa.depth import draft
from zsaa.depth.speculate import Before, Exit, Reader, continued
from zsaa.fast import graphs
from zsaa.kit.labels import method_of

WORDS = [f"w{3 + (7 * i) % 94}" for i in range(6000)]


def model(**kwargs):
    return tiny.make("llama", dtype=torch.float32, **kwargs).eval().requires_grad_(False)


def greedy(net, prompt, new):
    with torch.no_grad():
        out = net.generate(prompt[None], max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def drafts(kind, recorded):
    return {
        "none": lambda: None,
        "before": lambda: Before(3),
        "right": lambda: Exit(Reader(model(), 80, recorded=recorded), 4),
        "wrong": lambda: Exit(Reader(model(seed=1), 80, recorded=recorded), 4),
        "paced": lambda: Exit(Reader(model(), 80, recorded=recorded), 2, most=6),
        "first": lambda: Exit(Reader(draft.first(model(), 2), 80, recorded=recorded), 1),
    }[kind]()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["none", "before", "right", "wrong", "paced", "first"])
def test_whatever_is_drafted_the_text_is_the_greedy_one(kind, recorded, monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    prompt, net = tiny.tokens([23])[0][0], model()
    reader, before = Reader(net, 80, recorded=recorded), dict(vars(cache_utils.DynamicLayer))
    for _ in range(2):  # the reader's cache is written over
        text, passes = continued(reader, prompt, 20, drafts(kind, recorded))
        assert text == greedy(net, prompt, 20)
        assert passes == 5 if kind == "right" else passes <= 20  # 1 + 4 of five tokens each; else one a token at most
    assert dict(vars(cache_utils.DynamicLayer)) == before, "nothing of transformers is changed"
    assert bool(reader.recordings) == recorded


def test_drafts_reach_as_far_as_they_are_right():
    ahead = Exit(Reader(model(), 80), 2, most=5)
    text = tiny.tokens([23])[0][0]
    ahead.begin(text)
    text, drafted = text.tolist(), []
    for right in (True, True, False, False, True):
        drafted.append(len(ahead(text)))
        text += [1] * (drafted[-1] + 1 if right else 1)
    assert drafted == [2, 4, 5, 4, 3]


def test_what_stood_before_is_drafted():
    assert list(Before(3)([5, 1, 2, 3, 9, 8, 7, 1, 2, 3])) == [9, 8, 7]
    assert list(Before(3)([4, 3, 9, 1, 2, 3])) == [9, 1, 2], "of the last token alone, where no more of it is known"
    assert list(Before(3)([1, 1])) == [1, 0, 0] and Before(3)([1, 2, 3]) == []


def test_drafts_may_have_some_words_alone():
    words = torch.tensor([5, 7, 60])
    assert set(Reader(model(), 40, words)(tiny.tokens([23])[0][0], 0).tolist()) <= {5, 7, 60}


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="tokens 0 to 23 of a text do not fit a room of 20"):
        Reader(model(), 20)(tiny.tokens([23])[0][0], 0)
    for family in ("gemma2", "mistral"):
        with pytest.raises(NotImplementedError, match="look at a window of tokens"):
            Reader(tiny.make(family), 20)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(NotImplementedError, match=r"head .* is a peft.*lora.*Linear.*merge_and_unload"):
        Reader(adapted, 20)


def test_the_first_layers_begin_as_they_are():
    ids, net = tiny.tokens([23])[0], model()
    less = draft.first(net, 2)
    with torch.no_grad():
        states = net(ids, output_hidden_states=True).hidden_states[2]
        assert torch.allclose(less(ids).logits, net.lm_head(net.model.norm(states)), atol=1e-5)
    assert len(net.model.layers) == 4 and less.model.layers[0].mlp.up_proj.weight is not net.model.layers[0].mlp.up_proj


def test_first_layers_learn_to_go_on_as_all_do():
    net = model()
    rows = draft.written(net, tiny.tokens([12] * 8, seed=3)[0])
    assert rows[0, 12:].tolist() == greedy(net, rows[0, :12], 12)
    options = argparse.Namespace(steps=60, rate=3e-3, batch=8)
    words = rows[:, 12:].unique()
    assert len(draft.written(net, rows, together=3, deadline=0.0)) == 3, "some, though the time is out"
    before = draft.foretold(draft.first(net, 1), rows, words)
    student, log = draft.taught(net, 1, rows, words, options, float("inf"))
    assert draft.foretold(student.merge_and_unload(), rows, words) > before + 30 and log["steps"] == 60


@pytest.mark.full
def test_a_run_teaches_and_another_measures(monkeypatch, tmp_path):
    texts = [" ".join(WORDS[40 * i : 40 * i + 300]) for i in range(30)]
    corpus = Corpus("wikitext-103", "words", texts[:8], texts[8:], False, "here: words", True, "WikiText-103")
    monkeypatch.setattr(draft, "load_corpus", lambda *_, **__: corpus)
    monkeypatch.setattr(draft, "load_model", lambda *_, **__: (model(), tiny.tokenizer()))
    monkeypatch.setattr(draft, "PROMPT", 12)
    there = ["--exits", "1", "2", "--output-dir", str(tmp_path)]
    assert draft.main(["--steps", "2", "--written", "4", "--batch", "2", "--said", "50", *there]) == 0
    made = json.loads((tmp_path / "drafters-smollm2-135m.json").read_text())
    assert [row["depth"] for row in made["rows"]] == [1, 2] and made["written"] == 4
    given = ["--drafters", str(tmp_path), "--ahead", "2", "3", "--choose", "2", "--prompts", "2", "--new", "6"]
    assert draft.main([*given, *there]) == 0
    result = json.loads((tmp_path / "draft-smollm2-135m.json").read_text())
    assert [row["way"] for row in result["rows"]] == [
        *("generate", "lookup", "assisted", "plain", "before", "exit", "paced")
    ]
    assert [method_of(result, row) for row in result["rows"]][:2] == ["stock", "drafts, lookup"]
    assert len(result["tried"]) == 14 and str(tmp_path) not in result["command"]
    assert all(row["same_text"] == row["n"] == 2 for row in result["rows"] + result["tried"])
    assert result["rows"][0]["passes_per_token"] == result["rows"][3]["passes_per_token"] == 1.0
    assert draft.main(["--exits", *given[2:], "--output-dir", str(tmp_path / "plain")]) == 0
    result = json.loads((tmp_path / "plain/draft-smollm2-135m.json").read_text())
    assert [row["way"] for row in result["rows"]] == ["generate", "lookup", "plain", "before"]
    with pytest.raises(FileNotFoundError, match="holds no drafter-3"):
        draft.main([*given, "--exits", "3", "--output-dir", str(tmp_path)])
