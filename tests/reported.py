"""What the tests of public reports share: models with the dial on, and what the masked reference says."""

import pytest
import reference
import tiny
import torch

import zsaa

ALPHA, TAU, NEW = 0.7, 3, 6
CLOSE = dict(rtol=1e-5, atol=1e-5)  # PyTorch's RMSNorm rounds to float32 on the way
FEW = ["llama", "gpt2"]
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=NEW)
TELL = dict(GREEDY, return_dict_in_generate=True, output_logits=True, output_scores=True)
few = pytest.mark.parametrize("family", FEW)
APART = ("gpt2", "llama", "gemma3_text")  # learned positions, rotary ones, layers of two kinds
trains = pytest.mark.usefixtures("gradients")


@pytest.fixture(autouse=True)
def no_gradients():
    """Around every test of a file that imports it; `trains` turns them on again."""
    with torch.no_grad():
        yield


@pytest.fixture(
    name="family", params=[f if f in APART else pytest.param(f, marks=pytest.mark.full) for f in tiny.FAMILIES]
)
def apart(request):
    """All of them in `make test-all`: test_exactness and its like hold the dial in each family."""
    return request.param


def dialed(family, head="causal-lm", alpha=ALPHA, **options):
    return zsaa.enable(tiny.make(family, head, **options), alpha=alpha, tau=TAU)


def layers(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def by_reference(family, ids, prompt=None, model=None):
    """Logits [tokens, vocabulary] of ids [tokens], of which the first `prompt` (all, for None) are pruned."""
    model = tiny.make(family, attn_implementation="eager") if model is None else model
    logits = model.get_output_embeddings()(reference.run(model, ids, ALPHA, TAU, prompt=prompt)[0])
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def real(ids, mask):
    """The real tokens of each sample."""
    return [row[keep == 1] for row, keep in zip(ids, mask)]


def close(got, want, **options):
    torch.testing.assert_close(got.double(), want.double(), **{**CLOSE, **options})


def words(lengths):
    return [" ".join(f"w{i}" for i in tiny.tokens([n], seed=n)[0][0].clamp(min=3).tolist()) for n in lengths]
