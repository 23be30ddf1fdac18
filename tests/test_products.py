"""The matrix products of a pruned pass: the layers' own, in any precision, and with nothing kept of them afterwards."""

import ctypes
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaModel

import zsaa


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_pruned_passes_in_float32_agree_with_float64(family):
    ids, mask, _ = tiny.tokens([23, 9])
    exact = zsaa.enable(tiny.make(family, "sequence-classification"), alpha=0.6, tau=3)
    single = zsaa.enable(tiny.make(family, "sequence-classification").to(torch.float32), alpha=0.6, tau=3)
    want = exact(ids, attention_mask=mask).logits
    torch.testing.assert_close(single(ids, attention_mask=mask).logits.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["mlp", "mlp.down_proj", "self_attn.v_proj"])
@torch.no_grad()
def test_hooks_run_at_every_alpha(where):
    model, ids = zsaa.enable(tiny.make("llama").to(torch.float32)), tiny.tokens([23])[0]
    ran = []
    model.model.layers[1].get_submodule(where).register_forward_hook(lambda *_: ran.append(1))
    for alpha in (1.0, 0.6):
        zsaa.set_alpha(model, alpha)
        model(ids)
    assert ran == [1, 1]


def held_mib() -> float:
    """Anonymous memory of this process, without what its allocator could give back."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc to give memory back")
@torch.inference_mode()
def test_texts_of_ever_other_lengths_leave_nothing_behind():
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = zsaa.enable(LlamaModel(LlamaConfig(vocab_size=64, **size)).eval(), alpha=0.7)
    ids = torch.randint(64, (1, 260), generator=torch.Generator().manual_seed(0))
    model(ids)
    before = held_mib()
    for n in range(100, 260):
        model(ids[:, :n])
    assert held_mib() - before < 40
