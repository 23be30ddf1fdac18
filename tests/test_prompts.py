"""Plain ways to shorten a prompt, what a dial kept of it, and the pictures of notebook 11."""

import math

import pytest
import tiny
import torch

import zsaa
from zsaa.evaluation import prompts
from zsaa.kit import figures
from zsaa.learned import asked, salience

DOCUMENT = """The ferry left at nine. "Where is Mara?" asked the cook! Nobody knew

The clock struck thirteen. A note lay between two wheels. It spoke of late children."""


def test_passages_and_sentences_lose_no_word():
    found = prompts.passages(DOCUMENT)
    assert len(found) == 2 and prompts.words(" ".join(found)) == prompts.words(DOCUMENT)
    assert prompts.sentences(found[0]) == [
        "The ferry left at nine.",
        '"Where is Mara?"',
        "asked the cook!",
        "Nobody knew",
    ]
    assert prompts.sentences("A 3.5 mile walk. So?\nYes") == ["A 3.5 mile walk.", "So?", "Yes"]
    assert prompts.sentences("  ") == [] and prompts.passages("\n \n") == []


def test_bm25_by_hand():
    """Of texts of the same length a word that is in one tells more than a word that is in two of three."""

    def bm25(question, texts):
        return prompts.bm25({*prompts.words(question)}, [prompts.words(text) for text in texts])

    worth = bm25("Clock, note?", ["the clock and note", "the clock and cook", "a b c d"])
    common, rare = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    assert worth == [pytest.approx(common + rare), pytest.approx(common), 0]
    assert bm25("nothing", []) == [] and bm25("", ["a"]) == [0.0]


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **how):
        return "".join(map(chr, ids))


def test_a_document_is_shortened_to_its_best_sentences_or_its_last_tokens():
    letters, question = Letters(), "What note lay in the clock?"
    best = prompts.shortened(DOCUMENT, question, 59, letters)
    assert best == "The clock struck thirteen. A note lay between two wheels."
    more = prompts.shortened(DOCUMENT, question, 68, letters)
    assert more == "asked the\n\nThe clock struck thirteen. A note lay between two wheels.", (
        "what fits in part, in its place"
    )
    assert prompts.shortened(DOCUMENT, question, 14, letters, "last") == "late children."
    assert prompts.shortened(DOCUMENT, question, 9, letters, "last") == "children."
    for how in prompts.WAYS:
        assert prompts.shortened(DOCUMENT, question, 0, letters, how) == ""
        assert prompts.words(prompts.shortened(DOCUMENT, question, 999, letters, how)) == prompts.words(DOCUMENT)
    with pytest.raises(ValueError, match="how must be one of bm25, last, got 'first'"):
        prompts.shortened(DOCUMENT, question, 5, letters, "first")
    with pytest.raises(ValueError, match="tokens must be a whole number"):
        prompts.shortened(DOCUMENT, question, -1, letters)


def test_shares_of_what_was_kept():
    letters = Letters()
    ids = letters(DOCUMENT)["input_ids"]
    nine = DOCUMENT.index("nine")
    assert prompts.kept_shares(letters, ids, ["nine", "ferry", "ferry left"], [nine, nine + 1, 4]) == [0.5, 0.2, 0.1]
    with pytest.raises(ValueError, match="'zebra' is not in the prompt"):
        prompts.kept_shares(letters, ids, ["zebra"], [])


def test_rivals_get_what_the_dial_spends():
    model = tiny.make("llama")
    scorer = salience.attach(model, asked.Scorer(asked.Shape(32, 32), torch.arange(97), torch.ones(97)))
    zsaa.enable(model, score="asked", schedule="entry")
    config, asking = model.config, 20
    spent = zsaa.macs(config, 90) + scorer.macs(300 - asking, asking)
    tokens = prompts.at_equal_macs(model, 300, 90, asking)
    assert zsaa.macs(config, tokens) <= spent < zsaa.macs(config, tokens + 1) and tokens > 90
    assert prompts.at_equal_macs(model, 300, 300, asking) == 300


def test_pictures_of_a_prompt(tmp_path):
    names = prompts.passages(DOCUMENT)
    grid = figures.passages_figure({1.0: [1.0, 1.0], 0.3: [0.0, 0.9]}, names)
    assert grid.axes[0].images[0].get_array().tolist() == [[1.0, 0.0], [1.0, 0.9]]
    assert [t.get_text() for t in grid.axes[0].get_xticklabels()] == ["1", "0.3"]
    rows = [{"way": "the dial", "tokens": n, "first token, ms": n / 2} for n in (300, 90)]
    rows += [{"way": "BM25 sentences", "tokens": 92, "first token, ms": 40}]
    clock = figures.first_token_figure(rows)
    assert clock.axes[0].lines[0].get_xydata().tolist() == [[90, 45], [300, 150]]
    for number, figure in enumerate((grid, clock)):
        figures.save_figure(figure, tmp_path / str(number))
