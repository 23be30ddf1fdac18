"""Knowledge behind shots: what a question is, which answer counts, and what a result says of it."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ablation.answers import knowledge
from ablation.answers.knowledge import DIAL, TESTS, Question
from zsaa.learned.asked import Scorer, Shape

CONFIG = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                     num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip


def asked(seed: int, choices: int = 3) -> Question:
    rng = random.Random(seed)

    def ids(n):
        return tuple(rng.randrange(1, 97) for _ in range(n))

    answers = tuple(ids(rng.randrange(1, 4)) for _ in range(choices))
    return Question(ids(60 + seed), ids(7), answers, tuple(3 * len(a) + seed for a in answers), 0)


def test_a_question_is_what_stands_behind_the_shots():
    doc = {"query": "c d", "choices": ["e", "f g"], "gold": 1}
    assert knowledge.question(doc, "a b\n\nc d", list) == Question(
        tuple("a b\n\n"), tuple("c d"), (tuple(" e"), tuple(" f g")), (1, 3), 1
    )
    with pytest.raises(ValueError, match="does not end with its question"):
        knowledge.question(doc, "a b\n\nc", list)


@pytest.mark.parametrize("by_character", [False, True])
@torch.no_grad()
def test_the_likeliest_answer_counts(by_character):
    """As transformers' own model has it, whole and cut to the last tokens; the dial reads as many MACs less."""
    torch.manual_seed(0)
    lm, questions, data = LlamaForCausalLM(CONFIG).eval(), [asked(i) for i in range(6)], SimpleNamespace()
    for kind, reduction in (("whole", 1.0), ("last", 2.0)):
        got, reached = knowledge.chosen(lm, questions, by_character, data, "cpu", kind, reduction, None)
        assert reached == pytest.approx(reduction, rel=0.1)
        for number, (q, right) in enumerate(zip(questions, got)):
            prompt = q.shots + q.line
            if kind == "last":
                cut = knowledge.controls.cut(
                    q.sample(0), knowledge.cost.whole(knowledge.cost.shape_of(CONFIG), len(prompt), 2.0), "last", data,
                    random.Random(number),
                )  # fmt: skip
                prompt = cut.body + cut.line
                assert prompt == (q.shots + q.line)[-len(prompt) :] and len(prompt) < len(q.shots)
            worth = []
            for answer, characters in zip(q.choices, q.characters):
                logs = lm(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                value = sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))
                worth.append(value / characters if by_character else value)
            assert right == int(worth.index(max(worth)) == q.gold)
    scorer = Scorer(Shape(32, 16, chunk=8), torch.arange(97), torch.rand(97)).eval()
    shape, q = knowledge.cost.shape_of(CONFIG), questions[0]
    assert scorer.macs(len(q.shots), len(q.line)) < knowledge.cost.macs(shape, len(q.shots) + len(q.line)) / 4
    _, reached = knowledge.chosen(lm, questions, by_character, data, "cpu", DIAL, 2.0, scorer)
    assert reached == pytest.approx(2.0, rel=0.1)


def test_a_result_says_what_is_above_chance_and_by_how_much():
    """Of each test four questions with four answers each: 100% at 1x, 50 by the dial, 25 with shots dropped."""
    bits = {("whole", 1.0): [1, 1, 1, 1], (DIAL, 1.5): [1, 1, 0, 0], ("last", 1.5): [1, 0, 0, 0]}
    records = [{"origin": {"commit": "0" * 40}, "learned": 8, "read": dict.fromkeys(TESTS, 4)}]
    for row in ("plain", "dial", "last"):
        records += [
            {"row": row, "kind": kind, "test": test, "reduction": target, "reached": target, "right": right,
             "score": 25.0 * sum(right), "choices": 4}
            for test in TESTS for (kind, target), right in bits.items()
        ]  # fmt: skip
    made = knowledge.results([*records, {"row": "plain", "step": 200, "of": 200, "loss": 1.0, "seconds": 9}])
    assert {(r["kind"], r["share"]) for d in made.values() for r in d["rows"]} == {
        ("whole", 100.0), (DIAL, 33.3), ("last", 0.0)
    }  # fmt: skip
    assert made["plain"]["recipe"]["tuning"] == "lora" and made["dial"]["log"] == []
    read_ = knowledge.Read(made)
    mean, low, high = knowledge.gained(read_.all("dial", DIAL, 1.5), read_.all("last", "last", 1.5))
    assert mean == 25 and low < 25 < high and read_.all("dial", DIAL, 2.5) == []
    mean, low, high = knowledge.kept(read_.all("dial", DIAL, 1.5), read_.all("dial", "whole", 1.0))
    assert mean == pytest.approx(100 / 3) and low < mean < high
    lines = knowledge.table(read_)
    assert any(
        "33.3% [" in line for line in lines
    ) and f"dial: {knowledge.LABELS[DIAL]} 1.5x over last last 1.5: +25.0" in "\n".join(lines)
