"""Tokens that leave early and stay as keys and values: as a plain loop has it, at the MACs that were asked for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ablation.answers import cost, stays
from ablation.answers.prose import Text, batch
from ablation.answers.reader import SINKS, at_answers, norm, projections, read, rope, turn

AT = 2


def random_lm(layers: int, row: str | None = None) -> LlamaForCausalLM:
    """A model whose layers share one head of keys, as `reference` reads it; with a row's adapters, random as well."""
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        if row is not None:
            stays.adapt(model, row)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def lm():
    return random_lm(5, f"stays-{AT}")


def text(n: int, seed: int, more: int = 4) -> Text:
    ids = torch.randint(1, 97, (n + more,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Text(tuple(ids), n)


def reference(lm, t: Text, kept: int) -> torch.Tensor:
    """Log-probabilities behind the prefix, token by token, each layer over all of them."""
    n, places = t.start, torch.arange(len(t.ids))
    goes = (places < SINKS) | (places >= n - (kept - SINKS))
    x = lm.model.embed_tokens(torch.tensor([t.ids]))
    by = rope(places[None], lm.config, x.dtype)
    hidden = places[None] > places[:, None]
    for number, layer in enumerate(lm.model.layers):
        part, y = layer.self_attn, norm(layer.input_layernorm, x)
        q, k, v = projections(part, lm.config, y, by)
        if number >= AT:
            old_k, old_v = turn(part.left_k_proj(y).view(1, 1, len(t.ids), -1), by), part.left_v_proj(y)[:, None]
            k, v = (torch.where(goes[:, None], new, old) for new, old in ((k, old_k), (v, old_v)))
        p = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        o = part.o_proj((p @ v).transpose(1, 2).reshape(1, len(t.ids), -1))
        new = x + o
        new = new + layer.mlp(norm(layer.post_attention_layernorm, new))
        x = new if number < AT else torch.where(goes[:, None], new, x)
    return lm.lm_head(norm(lm.model.norm, x))[0, n - 1 : -1].log_softmax(-1)


def test_it_is_a_plain_loop_over_all_tokens_in_any_batch(lm):
    texts, kept = [text(40, 1), text(25, 2, 2)], [12, 9]
    b = batch(texts, "cpu")
    found = at_answers(lm, stays.pass_(lm, b, AT, torch.tensor(kept)), b)[0]
    want = torch.cat([reference(lm, t, k) for t, k in zip(texts, kept)])
    whole = at_answers(lm, read(lm, b), b)[0]
    assert torch.allclose(found, want, atol=1e-4) and (found - whole).abs().max() > 0.01
    assert torch.allclose(at_answers(lm, stays.pass_(lm, b, AT, b.prompt), b)[0], whole, atol=1e-4)


@pytest.mark.parametrize("reduction", [1.5, 2.0, 3.0])
def test_a_prefix_spends_what_it_may(reduction):
    shape = (576, 9, 3, 64, 1536, 30)
    assert stays.macs(shape, 200, 4, 200) == cost.macs(shape, 200)
    kept = stays.solve(shape, 200, 4, 5, reduction)
    spent, more = (cost.macs(shape, 200) / stays.macs(shape, 200, 4, k) for k in (kept, kept + 1))
    assert more < reduction <= spent and kept < 200 / reduction  # what is left behind costs something
    assert stays.solve(shape, 200, 15, 5, 3.0) == 5  # half of the layers alone cost more


def test_how_many_layers_read_all():
    assert [stays.depth_of("deep-70", 30, r) for r in (1.5, 2.0, 3.0)] == [14, 10, 7]
    assert stays.depth_of("stays-4", 30, 2.0) == 4 and stays.depth_of("last", 30, 2.0) is None


def test_at_the_start_what_left_is_seen_as_the_others_are():
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    stays.adapt(model, "stays-1")
    y = torch.rand(1, 3, 32)
    assert not hasattr(model.model.layers[0].self_attn, "left_k_proj")
    part = model.model.layers[1].self_attn
    torch.nn.init.normal_(part.k_proj.up)
    assert torch.equal(part.left_k_proj(y), part.k_proj(y))
    torch.nn.init.normal_(part.left_k_proj.up)
    assert not torch.equal(part.left_k_proj(y), part.k_proj(y))


def test_a_result_says_how_many_times_the_perplexity_of_1x():
    def record(row, reduction, nll):
        return {"row": row, "way": row, "split": "test", "seed": 0, "reduction": reduction, "reached": reduction,
                "nll": nll}  # fmt: skip

    records = [{"origin": {"commit": "0" * 40}, "learned": 8, "read": {"test": 2}},
               {"row": "stays-4", "seed": 0, "done": 9},
               {**record("more", 1.0, [1.0, 2.0]), "way": "last"},
               record("stays-4", 1.0, [1.0, 2.0]),
               record("stays-4", 2.0, [1.5, 2.5])]  # fmt: skip
    records.append({"row": "stays-4", "seed": 0, "step": 1, "of": 9, "loss": 2.0})
    result = stays.results(records, "lambada")
    rows = result["rows"]
    assert result["recipe"]["steps"] == {"stays-4": 9} and result["recipe"]["done"] == {"stays-4-0": 9}
    assert [(r["row"], r["times"]) for r in rows] == [("more", 1), ("stays-4", 1), ("stays-4", 1.6487)]
    assert rows[2]["over"]["times_ci95"] == [1.6487, 1.6487] and rows[2]["perplexity"] == pytest.approx(
        7.3891, abs=1e-4
    )
