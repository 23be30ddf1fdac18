"""Drafts of a model's own first layers: what they learn, and that the text stays that of greedy decoding."""

import argparse
import json

import tiny
import torch

from zsaa.data.corpora import Corpus
from zsaa.depth import draft

WORDS = [f"w{3 + (7 * i) % 94}" for i in range(6000)]


def model():
    return tiny.make("llama", dtype=torch.float32)


def test_adapters_are_of_a_high_rank_below():
    net = draft.adapted(model(), 2)
    ranks = {name: w.shape[0] for name, w in net.named_parameters() if "lora_A" in name}
    for name, rank in ranks.items():
        below = int(name.split("layers.")[1].split(".")[0]) < 2
        assert rank == draft.RANKS[0 if below else 1], name
    assert len({name.split("layers.")[1].split(".")[0] for name in ranks}) == 4


def test_what_it_writes_is_its_greedy_text():
    rows = tiny.tokens([16], seed=1)[0].repeat(3, 1)
    with torch.no_grad():
        want = model().generate(rows[:1, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    found = draft.written(model(), rows, 2, together=1)
    assert torch.equal(found, want.repeat(2, 1)) and len(draft.written(model(), rows, 0)) == 0


def test_exits_learn_what_the_last_layer_says():
    rows = tiny.tokens([24] * 8, seed=3)[0]
    net, teacher = model(), model()
    options = argparse.Namespace(teach=80, rate=3e-3, batch=8, deadline=float("inf"))

    def apart(net):
        with torch.no_grad():
            states = net(rows, output_hidden_states=True).hidden_states[1]
            base = net.get_base_model() if hasattr(net, "get_base_model") else net
            return float(draft.divergence(base.lm_head(base.model.norm(states)), teacher(rows).logits, 1.0))

    before = apart(net)
    student, log = draft.taught(net, rows, [1], options)
    assert apart(student) < before / 2 and log["steps"] == 80


def test_a_run_teaches_and_measures(monkeypatch, tmp_path):
    texts = [" ".join(WORDS[40 * i : 40 * i + 300]) for i in range(30)]
    corpus = Corpus("wikitext-103", "words", texts[:8], texts[8:], False, "here: words", True, "WikiText-103")
    monkeypatch.setattr(draft, "load_corpus", lambda *_, **__: corpus)
    monkeypatch.setattr(draft, "load_model", lambda *_, **__: (model(), tiny.tokenizer()))
    given = ["--teach", "2", "--written", "2", "--batch", "2", "--exits", "1", "2", "--ahead", "2", "--new", "8"]
    more = ["--prompts", "2", "--alphas", "1.0", "0.8", "--output-dir", str(tmp_path)]
    assert draft.main([*given, *more]) == 0
    result = json.loads((tmp_path / "draft-smollm2-135m-taught.json").read_text())
    assert [(row["alpha"], row["depth"]) for row in result["rows"]] == [
        (alpha, depth) for alpha in (1.0, 0.8) for depth in (None, 1, 2)
    ]
    assert all(row["same_text"] == row["n"] == 2 for row in result["rows"])
    assert (tmp_path / "drafter/adapter_model.safetensors").is_file() and str(tmp_path) not in result["command"]
    again = ["--adapter", str(tmp_path / "drafter"), "--exits", "1", "--ahead", "2", "--prompts", "1", "--new", "4"]
    assert draft.main([*again, "--output-dir", str(tmp_path / "again")]) == 0
