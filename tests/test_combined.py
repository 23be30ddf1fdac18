"""The table of fewer bits, fewer layers and fewer tokens: what is stored is what it says, and every cell is there."""

import json

import pytest
import tiny
import torch
from torch import nn

from zsaa.bench.baselines import without_mask
from zsaa.data.corpora import Corpus
from zsaa.depth import combined
from zsaa.kit.labels import method_of

WORDS = [f"w{3 + (7 * i) % 94}" for i in range(6000)]


@pytest.mark.parametrize(("storage", "kind"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_plain_weights_are_of_their_type(storage, kind):
    model = combined.stored(tiny.make("llama", dtype=torch.float32), storage)
    assert {p.dtype for p in model.parameters()} == {kind}


@pytest.mark.parametrize(("storage", "close"), [("int8", 0.03), ("nf4", 0.25), ("hqq", 0.15)])
def test_fewer_bits_are_near_what_they_were(storage, close):
    pytest.importorskip("hqq" if storage == "hqq" else "bitsandbytes")
    model = tiny.make("llama", dtype=torch.float32)
    before = combined.bytes_of(model)
    linear = model.model.layers[0].mlp.gate_proj
    given = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = linear(given)
        combined.stored(model, storage)
        apart = (model.model.layers[0].mlp.gate_proj(given) - whole).norm() / whole.norm()
    assert 0 < apart < close and combined.bytes_of(model) < before
    assert not any(type(m) is nn.Linear for m in model.model.layers.modules()) and type(model.lm_head) is nn.Linear


def test_hqq_gives_a_four_bit_file_s_blocks_back():
    pytest.importorskip("hqq")
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 16, (6, 3, 32), generator=draw)
    blocks[..., 0], blocks[..., 1] = 0, 15  # as a file has them, whose blocks use their range
    scale, least = (torch.rand(6, 3, 1, generator=draw) + 0.1 for _ in range(2))
    linear = nn.Linear(96, 6, bias=False)
    linear.weight.data = (blocks * scale - least).flatten(1)
    given, before = torch.randn(2, 96, generator=draw), linear.weight.clone()
    assert torch.allclose(combined._rounded(linear, "hqq")(given), given @ before.T, atol=1e-2)


def test_the_table_has_every_cell(monkeypatch, tmp_path):
    texts = [" ".join(WORDS[40 * i : 40 * i + 300]) for i in range(80)]
    corpus = Corpus("wikitext-103", "words", texts[:8], texts[8:], False, "here: words", True, "WikiText-103")
    monkeypatch.setattr(combined, "load_corpus", lambda *_, **__: corpus)
    monkeypatch.setattr(combined, "load_model", lambda *_, **__: (tiny.make("llama"), tiny.tokenizer()))
    given = ["--removed", "1", "--storage", "float32", "bfloat16", "--tokens", "24", "--batch", "2", "--new", "2"]
    more = ["--repeats", "1", "--windows", "4", "--compared", "4", "--output-dir", str(tmp_path)]
    assert combined.main([*given, *more]) == 0
    result = json.loads((tmp_path / "combined-smollm2-135m.json").read_text())
    cells = {(row["storage"], row["pruning"]): row for row in result["rows"]}
    assert set(cells) == {(s, p) for s in ("float32", "bfloat16") for p in ("all layers", "1 layers fewer")}
    assert cells["float32", "all layers"]["ratio"] == 1.0 and cells["float32", "1 layers fewer"]["layers"] == 3
    assert method_of(result, cells["float32", "all layers"]) == "float32, all layers"
    assert 0.9 < cells["bfloat16", "all layers"]["ratio"] < 1.1
    assert cells["float32", "all layers"]["by_tokens"]["2x by tokens"]["ratio"] != 1.0
    assert set(cells["float32", "all layers"]["times"]) == {
        f"{tokens}, {what}" for tokens in ("all tokens", "2x by tokens") for what in ("prefill", "answer")
    }
    assert str(tmp_path) not in result["command"] and "--removed 1" in result["command"]
    assert result["provenance"]["eval_samples"] == cells["float32", "all layers"]["n"] == 4


@pytest.mark.parametrize(("precision", "close"), [("f32", 1e-4), ("bf16", 0.05)])
def test_openvino_says_what_the_model_says(precision, close, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 if precision == "bf16" else 1)
    model = tiny.make("llama", dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[:, -1:]
    found = combined.openvino(without_mask(model), ids, precision)()
    assert (found - want).norm() < close * want.norm()


def test_one_thread_in_bf16_is_refused_before_openvino_ends_the_process(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(ValueError, match="divides by zero in bf16 on 1 thread: give it 2"):
        combined.openvino(tiny.make("llama"), torch.ones(1, 4, dtype=torch.long), "bf16")


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    def absent(*_):
        raise ImportError("No module named 'openvino'")

    monkeypatch.setattr(combined, "openvino", absent)
    given = ["--shape", "tiny", "--tokens", "16", "--removed", "--storage", "openvino", "--output-dir", str(tmp_path)]
    assert combined.main(given) == 0
    result = json.loads((tmp_path / "combined-tiny.json").read_text())
    (row,) = result["rows"]
    assert not result["provenance"].get("eval_samples")  # nothing was scored
    assert row["not_run"] == "No module named 'openvino'" and "times" not in row
