"""The loss of a language head in chunks: that of all logits at once, with its gradients, and never as much memory."""

import contextlib
import copy

import datasets
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zsaa
from zsaa.finetune import Recipe, fine_tune, losses

FAMILIES = [family for family in tiny.FAMILIES if family != "gemma2"]
IDS, MASK, _ = tiny.tokens([29, 17, 23])
LABELS = IDS.masked_fill(MASK == 0, -100)
GIVEN = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "use_cache": False}
SAME = dict(rtol=1e-11, atol=1e-13)  # float64: sums in another order


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(losses, "ELEMENTS", 97 * 5)  # five rows a chunk


def learner(family="llama", **settings):
    return zsaa.enable(tiny.make(family, **settings), tau=3)


def learnt(model, in_chunks, times=1.0, **more):
    """Loss and gradients of a pruned pass."""
    model.zero_grad()
    with zsaa.at(model, 0.6), losses.chunked(model) if in_chunks else contextlib.nullcontext():
        loss = model(**GIVEN, **more).loss
    (times * loss).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family):
    model = learner(family)
    (loss, gradients), (again, found) = learnt(model, False), learnt(model, True)
    torch.testing.assert_close(again.double(), loss.double(), rtol=1e-6, atol=0)  # theirs is float32
    assert gradients.keys() == found.keys() and len(found) > 10
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


def test_of_the_head_alone_they_are_exact_to_the_last_digits():
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 32, dtype=torch.float64, generator=generator) for n in (23, 97))
    labels = torch.randint(97, (23,), generator=generator)
    labels[::4] = -7
    states.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy(states @ weight.T, labels, ignore_index=-7, reduction="sum")
    found = losses._Summed.apply(states, weight, labels, -7)
    torch.testing.assert_close(found, expected, **SAME)
    for a, b in zip(
        torch.autograd.grad(3 * found, (states, weight)), torch.autograd.grad(3 * expected, (states, weight))
    ):
        torch.testing.assert_close(a, b, **SAME)


def test_a_vocabulary_that_is_filled_up_as_on_a_gpu_changes_nothing(monkeypatch):
    model = learner("gpt2")
    expected = learnt(model, True)
    monkeypatch.setattr(losses, "_filled", lambda weight, dtype: F.pad(weight.to(dtype), (0, 0, 0, 31)))
    torch.testing.assert_close(learnt(model, True), expected, rtol=1e-9, atol=1e-12)


def test_the_trainers_count_and_a_scaled_loss():
    model = learner()
    for more in ({"num_items_in_batch": torch.tensor(11)}, {"num_items_in_batch": 11}):
        (loss, gradients), (again, found) = (learnt(model, way, 8.0, **more) for way in (False, True))
        torch.testing.assert_close(again.double(), loss.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_in_16_bits_it_is_as_far_from_the_truth_as_all_logits_are():
    model = learner(dtype=torch.float32)
    _, exact = learnt(model, False)
    with torch.autocast("cpu", torch.bfloat16):
        (loss, whole), (again, found) = learnt(model, False), learnt(model, True)
    assert abs(again - loss) < 1e-3 * loss
    head = "lm_head.weight"
    far = [(x[head] - exact[head]).norm() / exact[head].norm() for x in (found, whole)]
    assert 0 < far[0] < 1.5 * far[1], far


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation leaves."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(result) if torch.is_tensor(x)), 0)
        return result


def test_logits_are_never_there_at_once():
    states = torch.randn(400, 8, requires_grad=True)
    weight, labels = torch.randn(97, 8, requires_grad=True), torch.randint(97, (400,))
    with Largest() as whole:
        F.cross_entropy(states @ weight.T, labels).backward()
    with Largest() as parts:
        losses._Summed.apply(states, weight, labels, -100).backward()
    assert whole.elements == 400 * 97 and parts.elements == 400 * 8


def test_a_head_that_stands_still_gets_no_gradient_and_evaluation_none_at_all():
    model = learner()
    model.lm_head.weight.requires_grad_(False)
    (_, gradients), (_, found) = learnt(model, False), learnt(model, True)
    assert gradients.keys() == found.keys() and "lm_head.weight" not in found
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-7)
    with torch.no_grad(), losses.chunked(model):
        assert not model(**GIVEN).loss.requires_grad


def test_the_model_is_left_as_it_was():
    model = learner()
    expected = model(**GIVEN).logits
    with pytest.raises(KeyError), losses.chunked(model):
        raise KeyError
    assert torch.equal(model(**GIVEN).logits, expected)
    assert "_loss_function" not in vars(model) and "forward" not in vars(model.lm_head)
    copy.deepcopy(model)


@pytest.mark.parametrize("change", ["gemma2", "bias", "hook", "own"])
def test_other_losses_are_refused(change):
    model = learner("gemma2" if change == "gemma2" else "llama")
    if change == "bias":
        model.lm_head = torch.nn.Linear(32, 97, dtype=torch.float64)
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    if change == "own":
        own = type("LlamaForCausalLM", (type(model),), {"forward": lambda self, **given: None})
        model.__class__ = own
    with pytest.raises(ValueError, match="comes in one piece: .* Leave chunked_loss=False"), losses.chunked(model):
        pass


def texts(count=16):
    ids = [tiny.tokens([20], seed=i)[0][0].tolist() for i in range(count)]
    return datasets.Dataset.from_list([{"input_ids": x, "attention_mask": [1] * 20, "labels": x} for x in ids])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_fine_tuning_ends_with_the_same_weights(tuning, tmp_path):
    recipe = Recipe(max_steps=3, batch_size=4, dropout=0.0, learning_rate=1e-3, tuning=tuning, precision="fp32")
    ends = []
    for in_chunks in (False, True):
        trained, log = fine_tune(
            tiny.make("llama", dtype=torch.float64), tiny.Padder(), texts(), recipe, tmp_path / str(in_chunks),
            log_steps=1, progress=False, chunked_loss=in_chunks,
        )  # fmt: skip
        ends.append((dict(trained.named_parameters()), log["loss"]))
    (weights, log), (found, again) = ends
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-6)  # Adam divides by small gradients
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in log], rel=1e-6)


def test_classifiers_have_no_such_loss(tmp_path):
    model = tiny.make("llama", "sequence-classification")
    rows = [{"input_ids": [9, 10], "attention_mask": [1, 1], "labels": i % 2} for i in range(4)]
    with pytest.raises(ValueError, match="chunked_loss=True is for language models"):
        fine_tune(model, tiny.Padder(), datasets.Dataset.from_list(rows), Recipe(), tmp_path, chunked_loss=True)
