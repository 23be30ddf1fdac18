"""The loop that trains adapters: against AdamW written out, and against the losses of two studies written out."""

import copy
import random
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from test_answers_stays import AT, random_lm, reference

from ablation.answers import prose, stays
from ablation.answers.descent import descend, rounds
from ablation.answers.model import adapt
from ablation.answers.prose import Text


def by_hand(weights, rates, losses, warm=20):
    """Moves `weights` along the losses, one a step, as AdamW without decay does behind clipping."""
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step, loss in enumerate(losses):
        share = min(1, (step + 1) / warm) * max(0.02, 1 - step / len(losses))
        slopes = torch.autograd.grad(loss(), weights)
        length = sum(float((g**2).sum()) for g in slopes) ** 0.5
        with torch.no_grad():
            for w, g, m, v, rate in zip(weights, slopes, first, second, rates):
                g = g / max(1.0, length)
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.98 * v + 0.02 * g**2)
                w -= rate * share * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)


def test_its_steps_are_adamw_s_written_out():
    torch.manual_seed(0)
    start, aims = [torch.randn(3, 2), torch.randn(4)], torch.randn(30)
    mine, want = ([w.clone().requires_grad_() for w in start] for _ in range(2))

    def loss(weights, step):
        return 3 * ((weights[0].sum() - aims[step]) ** 2 + (weights[1] ** 2).sum() * weights[0][0, 0] ** 2)

    seen = []

    def gradients(step):
        found = loss(mine, step)
        found.backward()
        return found.item()

    groups = [{"params": mine[:1], "lr": 0.1}, {"params": mine[1:], "lr": 0.02}]
    assert descend(groups, 30, gradients, 9.0, warm=5, log=lambda **told: seen.append(told), every=10) == 30
    by_hand(want, (0.1, 0.02), [lambda step=step: loss(want, step) for step in range(30)], warm=5)
    for a, b, begun in zip(mine, want, start):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert (a - begun).abs().max() > 0.05
    assert [told["step"] for told in seen] == [1, 11, 21, 30] and seen[0]["loss"] == round(loss(start, 0).item(), 4)


def test_it_ends_with_the_time_and_its_rate_comes_down_to_that():
    weight, now, moves = torch.zeros(1, requires_grad=True), [0.0], []

    def gradients(step):
        weight.grad = torch.ones(1)
        moves.append(weight.item())
        now[0] += 25
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now[0])
        assert descend([weight], 1000, gradients, 0.1, warm=1, until=100) == 4
    steps = [a - b for a, b in pairwise(moves)] + [moves[-1] - weight.item()]
    assert steps == pytest.approx([0.1, 0.075, 0.05, 0.025], rel=1e-3)


def test_each_thing_comes_once_before_one_comes_again():
    taken = rounds(range(7), 3, random.Random(0))
    for _ in range(5):
        some = next(taken) + next(taken)
        assert len({*some}) == 6 and {*some} <= {*range(7)}, "the seventh waits for no lot that is not full"


@pytest.fixture
def lm():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield random_lm(4)


TEXTS = [Text(tuple(torch.randint(1, 97, (n + 4,), generator=torch.Generator().manual_seed(n)).tolist()), n)
         for n in (22, 31, 27, 40, 25)]  # fmt: skip
STEPS, SIZE = 6, 2  # five texts: the order is drawn anew in the third step


def stock(model, text: Text):
    """Log-probabilities where the continuation is foretold."""
    return model(torch.tensor([text.ids])).logits[0, text.start - 1 : -1].float().log_softmax(-1)


def gold(text: Text):
    return torch.tensor(text.ids[text.start :])


def taken(seed: int) -> list[list[Text]]:
    rng, parts, order = random.Random(seed), [], []
    for _ in range(STEPS):
        order = rng.sample(TEXTS, len(TEXTS)) if len(order) < SIZE else order
        parts.append([order.pop(0) for _ in range(SIZE)])
    return parts


def same(mine, want, begun):
    """Most moves alike to a hundredth: where a gradient is nearly 0, rounding decides what AdamW makes of it."""
    for a, b, start in zip(mine, want, begun):
        apart, moved = (a - b).abs(), (b - start).abs()
        assert moved.max() > 1e-5 and apart.median() < 1e-3 * moved.max() and apart.mean() < 0.01 * moved.mean()


def test_running_text_is_learned_as_written_out(lm, monkeypatch):
    """ablation.answers.prose: the loss of continuations behind whole prefixes, by transformers' own pass."""
    monkeypatch.setattr(prose, "SIZE", SIZE)
    by = copy.deepcopy(lm)
    assert prose.fit(lm, "plain", TEXTS, STEPS, "cpu", lambda **told: None, float("inf"), None) == STEPS
    torch.manual_seed(0)
    weights = adapt(by, rank=prose.RANK)
    begun = [w.detach().clone() for w in weights]

    def loss(part):
        return F.nll_loss(torch.cat([stock(by, t) for t in part]), torch.cat([gold(t) for t in part]))

    by_hand(weights, [prose.RATE] * len(weights), [lambda part=part: loss(part) for part in taken(0)])
    same([p for p in lm.parameters() if p.requires_grad], [p for p in by.parameters() if p.requires_grad], begun)


def test_tokens_that_stay_are_learned_as_written_out(lm, monkeypatch):
    """ablation.answers.stays: half by the text, half by a teacher behind whole prefixes, two rates."""
    monkeypatch.setattr(stays, "DRAWN", (2.0,))
    monkeypatch.setattr(stays, "elsewhere", lambda text, rng: text)
    teacher = copy.deepcopy(lm)
    torch.nn.init.normal_(teacher.model.layers[0].mlp.down_proj.weight, std=0.3)
    stays.adapt(lm, f"stays-{AT}")
    by, seed = copy.deepcopy(lm), 3
    row = f"stays-{AT}"
    done = stays.fit(lm, teacher, row, TEXTS, STEPS, SIZE, "cpu", lambda **told: None, float("inf"), seed)
    named = [(n, p) for n, p in by.named_parameters() if p.requires_grad]
    rates = [stays.RATE_APART if ".left_" in n and ".base." not in n else stays.RATE for n, _ in named]
    weights, begun = [p for _, p in named], [p.detach().clone() for _, p in named]

    def loss(part):
        shape, b = stays.cost.shape_of(by.config), prose.batch(part, "cpu")
        kept = [stays.solve(shape, n, AT, e, 2.0) for n, e in zip(b.prompt.tolist(), b.exempt.tolist())]
        logs = torch.cat([reference(by, t, k) for t, k in zip(part, kept)])
        wanted = torch.cat([stock(teacher, t) for t in part])
        told = (wanted.exp() * (wanted - logs)).sum(-1).mean()
        return (F.nll_loss(logs, torch.cat([gold(t) for t in part])) + told) / 2

    by_hand(weights, rates, [lambda part=part: loss(part) for part in taken(seed)])
    assert done == STEPS and {*rates} == {stays.RATE, stays.RATE_APART}
    same([p for p in lm.parameters() if p.requires_grad], weights, begun)
