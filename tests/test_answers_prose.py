"""The study of running text: reductions are met with what choosing costs, no text depends on its batch mates."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ablation.answers import cost, prose
from ablation.answers.prose import Text
from ablation.answers.reader import read


@pytest.fixture(scope="module")
def lm():
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=20,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def text(n: int, seed: int, more: int = 4) -> Text:
    ids = torch.randint(1, 97, (n + more,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Text(tuple(ids), n)


def stock(lm, t: Text) -> float:
    logs = lm(torch.tensor([t.ids])).logits[0].log_softmax(-1)
    return -sum(float(logs[i - 1, t.ids[i]]) for i in range(t.start, len(t.ids)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["last", *prose.SCHEDULES])
def test_texts_are_read_as_alone_and_at_one_as_by_the_model(lm, name):
    texts = [text(60, 1), text(41, 2, 2), text(90, 3)]
    whole = prose.losses(lm, name, texts, 1.0, "cpu")
    assert whole.tolist() == pytest.approx([stock(lm, t) for t in texts], abs=1e-3)
    together = prose.losses(lm, name, texts, 2.0, "cpu")
    assert together.tolist() == pytest.approx([float(prose.losses(lm, name, [t], 2.0, "cpu")) for t in texts], abs=1e-3)
    assert (together - whole).abs().min() > 1e-3


@torch.no_grad()
def test_a_dial_keeps_the_latest_tokens_and_what_its_price_leaves(lm):
    b = prose.batch([text(200, 1)], "cpu")
    for name in prose.SCHEDULES:
        how, shape = prose.how(lm, name, b, 2.0), cost.shape_of(lm.config)
        kept = how["keep"][0].tolist()
        spent = cost.macs(shape, 200, prose.SCHEDULES[name], kept) + prose.price(lm.config, name, 200)
        assert 0.97 < cost.macs(shape, 200) / spent / 2 < 1.06
        places = read(lm, b, **how).place[0].tolist()
        assert len(places) == kept[-1] + 4 and places[:4] == [0, 1, 2, 3] and places[-5:] == [199, 200, 201, 202, 203]
        if name != "looks":
            assert places[4:] == list(range(200 - kept[-1] + 4, 204))


@torch.no_grad()
def test_looks_are_the_models_own_attention(lm):
    t = text(50, 1)
    eager = LlamaForCausalLM._from_config(lm.config, attn_implementation="eager").eval()
    eager.load_state_dict(lm.state_dict())
    out = eager(torch.tensor([t.ids]), output_attentions=True, output_hidden_states=True)
    found = prose.looks(lm, 6, out.hidden_states[6], prose.batch([t], "cpu"))[0]
    want = out.attentions[6][0, :, 50 - prose.ASKING : 50, :49].mean((0, 1))
    assert torch.allclose(found, want, atol=1e-5)


def test_a_prefix_is_cut_to_its_last_tokens_behind_the_sinks(lm):
    t = text(100, 1)
    short = prose.shortened(t, lm.config, 2.0)
    n = cost.whole(cost.shape_of(lm.config), 100, 2.0)
    assert short.start == n and short.ids == t.ids[:4] + t.ids[100 - n + 4 :]
    assert prose.shortened(t, lm.config, 1.0) == t


@pytest.mark.full
def test_a_row_learns_and_writes_what_it_reads(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(prose, "texts_of", lambda which: ([text(30, i) for i in range(40)], [text(30, 99)]))
    monkeypatch.setattr(prose.model, "load", lambda folder, device: LlamaForCausalLM(lm.config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["prose", "lambada", "plain", "funnel"])
    for key, value in (("TINY", "1"), ("RESULTS", str(tmp_path))):
        monkeypatch.setenv(key, value)
    prose.main()
    records = [json.loads(line) for line in (tmp_path / "prose-lambada.jsonl").read_text().splitlines()]
    read_ = [(r["row"], r["way"], r["reduction"]) for r in records if "nll" in r]
    assert ("plain", "looks", 3.0) in read_ and ("funnel", "funnel", 3.0) in read_ and len(set(read_)) == len(read_)
    assert [r["done"] for r in records if "done" in r] == [3, 3]
    monkeypatch.setattr(prose, "STEPS", 3)
    cut = [{**r, "done": 2} if r.get("row") == "funnel" and "done" in r else r for r in records]
    found = prose.results(cut, "lambada")["rows"]
    assert {r["row"] for r in found} == {"untuned", "plain"}
    assert all(r["times"] == 1 for r in found if r["target"] == 1) and all(r["perplexity"] > 1 for r in found)
