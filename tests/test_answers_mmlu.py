"""MMLU behind shots: a scorer reads the prompt in its own tokens; which letter counts; what whole shots are."""

import random
from types import SimpleNamespace

import pytest
import torch
from test_answers_knowledge import CONFIG
from transformers import LlamaForCausalLM

from ablation.answers import controls, cost, knowledge, mmlu
from ablation.answers.data import Sample
from ablation.answers.knowledge import DIAL, DIAL_SHOTS, Question, WholeShots
from ablation.answers.reader import batch, read
from zsaa.learned.asked import Scorer, Shape

PIECES = [chr(32 + i) if i > 1 else "ĊĊ" for i in range(95)] + ["ab", "cd"]  # of the model that reads


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) - 32 for c in text]}

    def convert_ids_to_tokens(self, ids):
        return [chr(32 + i) for i in ids]


def dial(scorer) -> mmlu.Through:
    return mmlu.Through(scorer, CONFIG, PIECES, Letters(), torch.nn.Embedding(97, 32))


def test_a_scorer_reads_the_same_bytes_in_its_own_tokens():
    own, to = dial(None).told((95, 33, 96))  # "ab", "A", "cd"
    assert own == [65, 66, 33, 67, 68] and to == [0, 2, 3]


@torch.no_grad()
def test_its_scores_are_those_of_its_own_tokens_and_its_cost_counts():
    torch.manual_seed(0)
    scorer = Scorer(Shape(32, 16, chunk=4), torch.arange(97), torch.rand(97)).eval()
    rng = random.Random(0)
    samples = [Sample(tuple(rng.choice([33, 40, 95, 96]) for _ in range(n)), (), (), (60, 61), (3,), None, ())
               for n in (40, 25)]  # fmt: skip
    d, b = dial(scorer), batch(samples, "cpu")
    how = d.how(b, 2.0)
    scores = how["choose"](None)
    for row, s in enumerate(samples):
        own, to = d.told(s.body)
        alone = batch([Sample(tuple(own), (), (), (60, 61), (), None, ())], "cpu", answers=False)
        want = mmlu.teach.look(scorer, d.embed(alone.ids), alone)[0]
        assert torch.allclose(scores[row, : len(want)], want, atol=1e-5)
        assert how["unit"][row, : len(to)].tolist() == [place // 4 for place in to]
    shape = cost.shape_of(CONFIG)
    price, kept = scorer.macs(len(d.told(samples[0].body)[0]), 2), int(how["keep"][0, 0])
    assert d.reached(b, 2.0)[0] == pytest.approx(cost.macs(shape, 42) / (cost.macs(shape, kept) + price))


@torch.no_grad()
def test_the_likeliest_letter_counts():
    torch.manual_seed(0)
    lm, letters = LlamaForCausalLM(CONFIG).eval(), (5, 9, 12, 20)
    rng = random.Random(1)
    answers = tuple((n,) for n in letters)
    asked = [
        Question(tuple(rng.randrange(1, 97) for _ in range(30 + i)), (7, 8), answers, (1,) * 4, i % 4) for i in range(8)
    ]
    data = SimpleNamespace(asked=asked, letters=list(letters), pieces=PIECES)
    for kind in ("whole", "none"):
        right, reached = mmlu.chosen(lm, data, "cpu", kind, 1.0, None)
        assert reached == 1 if kind == "whole" else reached > 10
        for q, bit in zip(asked, right):
            logits = lm(torch.tensor([(q.shots if kind == "whole" else ()) + q.line])).logits[0, -1]
            assert bit == int(max(range(4), key=lambda n, x=logits: float(x[letters[n]])) == q.gold)


SHOTS = ((10, 11, 0), (12, 13, 14, 0), (15, 0))
BODY = sum(SHOTS, ())


def test_whole_shots_stay_or_go():
    data = SimpleNamespace(pieces=PIECES, canon=list(range(97)), idf={})
    assert controls.paragraphs(BODY + (16,), data) == [(0, 3), (3, 7), (7, 9), (9, 10)]
    s = Sample(BODY, (), (), (12, 40), (), None, ())
    assert controls.cut(s, 6, "shots", data, random.Random(0)).body == SHOTS[1]  # the one that shares a word
    shape = cost.shape_of(CONFIG)
    assert knowledge.shortened(s, data, "none", shape, 1.0, random.Random(0)).body == ()


@torch.no_grad()
def test_a_dial_of_whole_shots_keeps_the_best_first():
    scorer = Scorer(Shape(32, 16, chunk=2), torch.arange(97), torch.rand(97)).eval()
    lm, data = LlamaForCausalLM(CONFIG).eval(), SimpleNamespace(pieces=PIECES)
    shots = tuple(tuple(range(i, i + 7)) + (0,) for i in (10, 20, 30, 40, 50, 60))
    b = batch([Sample(sum(shots, ()), (), (), (12, 13, 14), (3,), None, ())], "cpu")
    how = WholeShots(scorer, CONFIG, data).how(b, 1.5)
    assert how["unit"][0].tolist() == [i // 8 for i in range(48)]
    parts = WholeShots(scorer, CONFIG, data)
    plain = super(WholeShots, parts).how(b, 1.5)
    fine = plain["choose"](lm.model.embed_tokens(b.ids)).gather(1, plain["unit"])[0]
    coarse = how["choose"](lm.model.embed_tokens(b.ids))[0]
    assert torch.allclose(coarse, fine.view(6, 8).amax(1))
    how["keep"] = torch.tensor([[4 + 16 + 3]])
    places = read(lm, b, **how).place[0].tolist()
    best = coarse.argsort(descending=True).tolist()
    assert set(range(8 * best[0], 8 * best[0] + 8)) - {0, 1, 2, 3} <= set(places)


def test_a_result_says_what_is_above_chance():
    records = [{"origin": {"commit": "0" * 40}, "learned": 8, "read": 4}] + [
        {
            "row": row,
            "kind": kind,
            "reduction": target,
            "reached": target,
            "right": bits,
            "score": 25.0 * bits.count("1"),
        }
        for row in ("untuned", "dial")
        for kind, target, bits in (("whole", 1.0, "1110"), (DIAL, 1.5, "1100"))
    ]  # fmt: skip
    made = mmlu.results(records)
    assert {(r["kind"], r["share"]) for d in made.values() for r in d["rows"]} == {("whole", 100.0), (DIAL, 50.0)}
    assert made["untuned"]["provenance"]["train_samples"] == 0 and DIAL_SHOTS in knowledge.LABELS
