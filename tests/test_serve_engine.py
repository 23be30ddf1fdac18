"""The engines: batches in which nobody is influenced by anybody, and rows that keep to their own limits."""

import hypothesis
import pytest
import tiny
import torch
from hypothesis import strategies as st

import zsaa
from zsaa.serve.engine import Classifier, Completer, Row, Wish, _certain

WORDS = tuple(range(3, 97))
PROMPTS = [tuple(WORDS[(7 * k + 3 * i) % 94] for i in range(n)) for k, n in enumerate((9, 30, 17, 44))]
ALPHAS = [1.0, 0.7, 0.8, 0.6]


@pytest.fixture(scope="module")
def completer():
    return Completer(tiny.make("llama"), tiny.tokenizer())


@pytest.fixture(scope="module")
def classifier():
    return Classifier(tiny.make("llama", "sequence-classification"), tiny.tokenizer())


def texts(engine, wishes, alphas):
    found = [""] * len(wishes)

    def told(index, piece, reason):
        found[index] += piece

    rows = engine.run(wishes, alphas, told)
    return found, rows


@pytest.mark.parametrize("text", ["w5 w9  w7", "", "w5\nw6 w96 " * 40, "none of these"])
def test_tokens_are_those_of_transformers_and_set_limits_are_none_of_theirs(completer, text):
    assert completer.encode(text) == completer.tokenizer(text)["input_ids"]
    completer.tokenizer(text, truncation=True, max_length=3)  # leaves a limit behind
    assert completer.encode(text) == completer.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_completion_is_the_same_alone_and_in_a_batch(completer, temperature):
    wishes = [Wish(ids, 6 + k, temperature, 0.9, seed=k) for k, ids in enumerate(PROMPTS)]
    together, rows = texts(completer, wishes, ALPHAS)
    for wish, alpha, text, row in zip(wishes, ALPHAS, together, rows):
        (alone,), (again,) = texts(completer, [wish], [alpha])
        assert (alone, again.tokens, again.reason) == (text, row.tokens, row.reason)
    mates = [Wish(PROMPTS[k % 2], 3, 0.5, seed=9) for k in range(3)]
    other, _ = texts(completer, [*mates, wishes[3]], [0.5, 1.0, 0.9, ALPHAS[3]])
    assert other[3] == together[3]


def test_greedy_completions_are_what_generate_writes(completer):
    wish = Wish(PROMPTS[1], 8)
    _, (row,) = texts(completer, [wish], [0.7])
    ids = torch.tensor([wish.ids])
    expected = completer.model.generate(ids, alpha=0.7, max_new_tokens=8, do_sample=False)[0, len(wish.ids) :].tolist()
    assert row.tokens == expected


def test_seeds_decide_what_is_drawn(completer):
    drawn = {seed: texts(completer, [Wish(PROMPTS[0], 8, 2.0, seed=seed)], [1.0])[0][0] for seed in range(4)}
    assert len(set(drawn.values())) > 1
    assert drawn[2] == texts(completer, [Wish(PROMPTS[0], 8, 2.0, seed=2)], [1.0])[0][0]


def test_top_p_leaves_the_likeliest_words():
    scores = torch.tensor([1.0, 3.0, 2.9, -5.0])
    row = Row(Wish((1,), temperature=1.0, top_p=0.7), torch.Generator().manual_seed(0))
    assert {row.choose(scores) for _ in range(200)} == {1, 2}
    greedy = Row(Wish((1,), temperature=1.0, top_p=1e-9), torch.Generator().manual_seed(0))
    assert {greedy.choose(scores) for _ in range(20)} == {1}


def test_each_row_ends_at_its_own_length_and_stop(completer):
    free, _ = texts(completer, [Wish(PROMPTS[0], 6)], [1.0])
    words = free[0].split()
    wishes = [Wish(PROMPTS[0], 2), Wish(PROMPTS[0], 6, stop=(" " + words[3],)), Wish(PROMPTS[0], 6)]
    found, rows = texts(completer, wishes, [1.0] * 3)
    assert [row.reason for row in rows] == ["length", "stop", "length"]
    assert [len(row.tokens) for row in rows][::2] == [2, 6]
    assert found[1] == free[0].split(" " + words[3])[0] and found[2] == free[0]


def test_who_has_left_stops_the_batch(completer):
    asked = []

    def gone(index):
        asked.append(index)
        return len(asked) >= 3

    (row,) = completer.run([Wish(PROMPTS[0], 50)], [1.0], gone=gone)
    assert len(row.tokens) == 3


@hypothesis.given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_was_handed_on_is_never_taken_back(text, stops):
    """Whatever way the text grows: pieces add up to what stands before the first stop string."""
    row, sent = Row(Wish((1,), stop=tuple(stops)), torch.Generator()), ""
    for end in range(len(text) + 1):
        sent += row.spelled(text[:end], ended=end == len(text))
        if row.reason:
            break
    before = [text[: text.find(stop)] for stop in stops if stop in text[:end]]
    assert sent == (min(before, key=len) if before else text)


def test_half_a_character_waits():
    assert _certain("ab\ufffd", ()) == 2
    assert _certain("abST", ("STOP",)) == 2


def test_logits_are_the_same_alone_and_in_a_batch(classifier):
    together = classifier.run(PROMPTS, ALPHAS)
    for ids, alpha, logits in zip(PROMPTS, ALPHAS, together):
        assert classifier.run([ids], [alpha])[0] == pytest.approx(logits, abs=1e-6)  # float64, told in float32
    expected = tiny.make("llama", "sequence-classification")(input_ids=torch.tensor([PROMPTS[1]])).logits
    assert classifier.run([PROMPTS[1]], [1.0])[0] == expected.float().tolist()[0]


def test_labels_and_costs(classifier):
    assert classifier.labels == ["LABEL_0", "LABEL_1"]
    spent, stock = classifier.spent(44, 0.7)
    assert stock / spent == pytest.approx(zsaa.mac_reduction(classifier.model.config, 44, 0.7))
    with pytest.raises(ValueError, match="1 names, this model 2"):
        Classifier(classifier.model, classifier.tokenizer, labels=["good"])
