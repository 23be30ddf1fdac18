"""Perplexity: against the masked reference and a plain float64 sum, windows and their words, controls, intervals."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny
import torch
from datasets import Dataset

import zsaa
from zsaa import perplexity
from zsaa.data.corpora import Corpus
from zsaa.evaluation.language import Window, bootstrap, curve, score, unpack, windows
from zsaa.finetune import Recipe
from zsaa.studies import perplexity as study
from zsaa.studies import training


def texts(*lengths, seed=0):
    return [row[:n].tolist() for row, n in zip(tiny.tokens(lengths, seed)[0], lengths)]


def log_softmax_nll(logits, ids, start):
    """Plain: minus the log of each token's probability, one at a time."""
    found = []
    for t in range(start, len(ids)):
        row = logits[t - 1].double()
        found.append(math.log(float(torch.exp(row - row.max()).sum())) + float(row.max() - row[ids[t]]))
    return found


def logits_of(model, hidden):
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def close(family):
    """LLaMA-like families compute their norms in float32, whatever the model's dtype."""
    return 1e-9 if family == "gpt2" else 1e-5


CUT = [(20, 13), (26, 13), (20, 19), (17, 3)]  # (tokens, first that is scored), ragged on both sides


@pytest.mark.parametrize("name", ["column_sum", "column_mean"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_continued_cache_equals_the_masked_reference(family, name):
    """All of a continuation at once, in one ragged batch, through caches that were pruned: token for token what the
    stock model says of it where the dropped tokens are hidden."""
    samples = [(ids, start) for ids, (_, start) in zip(texts(*(n for n, _ in CUT)), CUT)]
    model = zsaa.enable(tiny.make(family), 0.6, tau=3, score=name)
    for (ids, start), (nll, likely) in zip(samples, score(model, samples)):
        with torch.no_grad():
            eager = tiny.make(family, attn_implementation="eager")
            hidden, kept = reference.run(eager, torch.tensor(ids), 0.6, tau=3, score=name, prompt=start)
            logits = logits_of(eager, hidden)
        assert start <= 3 or len(kept[-1]) < start  # something was dropped
        assert nll.tolist() == pytest.approx(log_softmax_nll(logits, ids, start), abs=close(family))
        assert likely.tolist() == logits[start - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_at_once_equals_token_by_token(family):
    (ids,) = texts(24)
    model = zsaa.enable(tiny.make(family), 0.6, tau=3)
    ((nll, _),) = score(model, [(ids, 15)])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids[:15]]), use_cache=True)
        for t in range(15, 24):
            step = torch.log_softmax(output.logits[0, -1].double(), -1)[ids[t]]
            assert float(-step) == pytest.approx(float(nll[t - 15]), abs=1e-9)
            output = model(input_ids=torch.tensor([[ids[t]]]), past_key_values=output.past_key_values)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_alpha_1_is_a_plain_sum_over_the_stock_model(family):
    samples = list(zip(texts(20, 31, 7), (5, 24, 1)))
    model = zsaa.enable(tiny.make(family))
    for carry in (False, True):
        for (ids, start), (nll, _) in zip(samples, score(model, samples, carry=carry)):
            with torch.no_grad():
                logits = tiny.make(family)(input_ids=torch.tensor([ids])).logits[0]
            assert nll.tolist() == pytest.approx(log_softmax_nll(logits, ids, start), abs=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_carry_through_scores_the_state_that_a_token_left_with(family):
    (ids,) = texts(22)
    model = zsaa.enable(tiny.make(family), 0.6, tau=3)
    ((nll, _),) = score(model, [(ids, 1)], carry=True)
    eager = tiny.make(family, attn_implementation="eager")
    with torch.no_grad():
        hidden, _ = reference.run(eager, torch.tensor(ids), 0.6, tau=3)
        assert nll.tolist() == pytest.approx(log_softmax_nll(logits_of(eager, hidden), ids, 1), abs=close(family))


def test_the_prefix_protocol_does_not_read_the_future_and_carry_through_does():
    (ids,) = texts(30)
    other = ids[:25] + texts(5, seed=9)[0]
    model = zsaa.enable(tiny.make("llama"), 0.6, tau=3)
    one, two = (score(model, [(t, 12)])[0][0][:13] for t in (ids, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    one, two = (score(model, [(t, 1)], carry=True)[0][0][:24] for t in (ids, other))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", ["column_sum", "random"])
def test_results_do_not_depend_on_the_batch(carry, name):
    samples = list(zip(texts(20, 31, 7, 25, 20), (5, 24, 3, 11, 13)))
    model = zsaa.enable(tiny.make("gpt2"), 0.6, tau=3, score=name)
    alone = [score(model, [sample], carry=carry)[0] for sample in samples]
    for batch_size in (2, 5):
        for (nll, likely), (one, its) in zip(score(model, samples, batch_size, carry=carry), alone):
            torch.testing.assert_close(nll, one, rtol=0, atol=1e-10)
            assert likely.tolist() == its.tolist()


# -------------------------------------------------------------------------------------------------- windows


def corpus(*texts, last_word=False, train=None):
    name = "lambada" if last_word else "ptb"
    return Corpus(name, "made up", list(texts), train, last_word, "made up for a test", True, "PTB")


def words(first, count):
    return " ".join(f"w{3 + i % 90}" for i in range(first, first + count))


def test_windows_tile_documents_and_never_cross_them():
    found = windows(corpus(words(0, 23), words(30, 9), words(40, 20)), tiny.tokenizer(), prefix=7, continuation=3)
    assert [(w.ids[0] - 3, len(w.ids), w.start, w.words, w.unit) for w in found] == [
        (0, 10, 7, 3, 0), (10, 10, 7, 3, 0), (40, 10, 7, 3, 2), (50, 10, 7, 3, 2)
    ]  # fmt: skip
    found = windows(corpus(words(0, 23), words(30, 9)), tiny.tokenizer(), prefix=7, continuation=3, stride=3)
    scored = [t - 3 for w in found for t in w.ids[w.start :]]
    assert scored == list(range(7, 22))  # each once, but for the first 7 and what fills no window
    (stream,) = {len(windows(corpus(words(0, 40)), tiny.tokenizer(), "carry-through", 7, 3))}
    assert stream == 4
    units = [w.unit for w in windows(corpus(words(0, 40)), tiny.tokenizer(), prefix=7, continuation=3)]
    assert units == [0, 1, 2, 3]  # of a stream, windows are drawn


def test_carry_through_scores_all_but_the_first_token():
    (window,) = windows(corpus(words(0, 12), words(0, 2)), tiny.tokenizer(), "carry-through", 7, 3, stride=1)
    assert (len(window.ids), window.start, window.words) == (10, 1, 9)


def test_windows_are_drawn_by_seed():
    data = corpus(words(0, 80), words(5, 80))
    drawn = [windows(data, tiny.tokenizer(), prefix=4, continuation=4, count=6, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 6
    assert len(windows(data, tiny.tokenizer(), prefix=4, continuation=4, count=999)) == 20


@pytest.fixture(scope="module")
def bpe():
    """Pieces of words, as GPT-2's: a word has several tokens, and its space belongs to the first."""
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, show_progress=False, special_tokens=["<s>"])
    model.train_from_iterator(["the cat sat on the mat"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<s>")


def test_words_are_counted_where_they_begin(bpe):
    text = "the  sat cat\n\nmatcat sat on the mat the cat"
    count = len(bpe(text).input_ids)
    pieces = windows(corpus(text, ""), bpe, prefix=1, continuation=count - 1)
    assert pieces[0].words == len(text.split()) - 1  # "the" is one token, and no token of it is scored
    found = windows(corpus(text, ""), bpe, prefix=2, continuation=1, stride=1)
    begun = windows(corpus(text, ""), bpe, prefix=2, continuation=count - 2)[0].words
    assert sum(w.words for w in found) == begun and {w.words for w in found} == {0, 1}


def test_bos_begins_each_window_as_a_part_of_the_prefix(bpe):
    import tokenizers
    import transformers

    marked = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.backend_tokenizer.to_str()), bos_token="<s>", pad_token="<s>"
    )
    marked.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    text = "the cat sat on the mat the cat sat on the mat"
    plain = bpe(text).input_ids
    found = windows(corpus(text, ""), marked, prefix=3, continuation=2)
    assert [w.ids for w in found[:2]] == [[0, *plain[:4]], [0, *plain[5:9]]] and found[0].start == 3
    (whole,) = windows(corpus("the mat mat", last_word=True), marked)
    assert whole.ids == [0, *bpe("the mat mat").input_ids] and whole.start == 1 + len(bpe("the mat").input_ids)


def test_last_words_are_scored_alone(bpe):
    found = windows(corpus("the cat sat", "cat", "the cat on matcat", last_word=True), bpe, "prefix")
    assert [bpe.decode(w.ids[w.start :]) for w in found] == [" sat", " matcat"]
    assert [(w.words, w.unit) for w in found] == [(1, 0), (1, 2)]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prefix=0), "prefix is 0"),
        (dict(continuation=1.5), "continuation is 1.5"),
        (dict(count=True), "count is True"),
        (dict(prefix=100), "no text of made up for a test has 132 tokens"),
        (dict(protocol="backwards"), "unknown protocol 'backwards'"),
        (dict(protocol="last-word"), "running text"),
    ],
)
def test_bad_windows(options, message):
    with pytest.raises(ValueError, match=message):
        windows(corpus(words(0, 80)), tiny.tokenizer(), **options)


def test_last_words_are_never_dropped(bpe):
    with pytest.raises(ValueError, match="use protocol='last-word'"):
        windows(corpus("the cat", last_word=True), bpe, "carry-through")


# ----------------------------------------------------------------------------------------- curves, intervals


def test_the_bootstrap_draws_documents_and_pairs_settings():
    random = np.random.RandomState(1)
    nll, counts = random.gamma(2, 2, 300), np.full(300, 2)
    logs = bootstrap(nll, counts, range(300), draws=4000)
    assert logs.mean() == pytest.approx(nll.sum() / counts.sum(), abs=0.01)
    assert logs.std() == pytest.approx(nll.std() / 2 / math.sqrt(300), rel=0.1)  # the textbook's standard error
    one_voice = bootstrap(np.repeat(nll[:30], 10), counts, np.repeat(range(30), 10))
    assert one_voice.std() > 2 * logs.std()  # ten windows of a document are not ten documents
    np.testing.assert_allclose(bootstrap(nll + 1, counts, range(300)) - bootstrap(nll, counts, range(300)), 0.5)


def test_a_curve_and_its_controls(capsys):
    model = zsaa.enable(tiny.make("llama"), tau=2)
    found = [Window(ids, 40, 7, i // 2) for i, ids in enumerate(texts(*[48] * 6))]
    rows = curve(model, tiny.tokenizer(), found, targets=(1, 1.5, 2, 99), batch_size=4, progress=False)
    names = {(r["control"], r["score"]) for r in rows if r["target"] == 2}
    dial = {("alpha", "column_sum"), ("alpha", "column_mean"), ("random", "random")}
    assert names == dial | {(c, None) for c in ("first", "last", "ends")}
    assert not [r for r in rows if r["target"] == 99] and rows[0]["target"] == 1  # out of reach with tau
    stock = rows[0]
    plain = [n for n, _ in score(model, [(w.ids, w.start) for w in found])]
    assert stock["nll_sum"] == pytest.approx(float(sum(map(torch.sum, plain))), abs=1e-3)
    assert stock["perplexity"] == pytest.approx(math.exp(stock["nll_sum"] / 48), rel=1e-4)
    assert stock["word_perplexity"] == pytest.approx(math.exp(stock["nll_sum"] / 42), rel=1e-4)
    assert (stock["tokens"], stock["words"], stock["n"]) == (48, 42, 6)
    assert (stock["ratio"], stock["ratio_ci95"], stock["agreement"]) == (1, [1, 1], 100)
    for row in rows:
        assert row["mac_reduction"] >= row["target"] - 1e-3
        assert sum(unpack(row["nll"])) == pytest.approx(row["nll_sum"], abs=1e-2)
        assert row["ci95"][0] <= row["perplexity"] <= row["ci95"][1] and 0 <= row["agreement_first"] <= 100
    # The cut controls are the stock model on fewer tokens, whatever score the dial has.
    last = next(r for r in rows if (r["control"], r["target"]) == ("last", 2))
    k = last["keep_tokens"]
    with torch.no_grad():
        nll = 0.0
        for w in found:
            logits = tiny.make("llama")(input_ids=torch.tensor([w.ids[40 - k :]])).logits[0]
            nll += sum(log_softmax_nll(logits, w.ids[40 - k :], k))
    assert last["nll_sum"] == pytest.approx(nll, abs=1e-3)
    assert zsaa.dial.settings(model)["score"] == "column_sum" and zsaa.dial.settings(model)["alpha"] == 1
    carried = curve(model, tiny.tokenizer(), found, True, targets=(2,), scores=["column_mean"], progress=False)
    assert [(r["control"], r["score"]) for r in carried] == [("alpha", "column_mean"), ("random", "random")]
    with pytest.raises(ValueError, match="unknown score or control 'best'"):
        curve(model, tiny.tokenizer(), found, scores=["best"])


def test_a_curve_without_a_row_or_without_numbers_is_refused():
    model = zsaa.enable(tiny.make("gpt2"), tau=3)
    found = [Window(ids, 20, 4, i) for i, ids in enumerate(texts(24, 24))]
    tokenizer, options = SimpleNamespace(bos_token_id=None), {"progress": False, "scores": ("column_sum",)}
    alone = curve(model, tokenizer, found, targets=(2,), controls=("last",), **options)
    assert [(row["control"], row["target"]) for row in alone] == [("last", 2)] and alone[0]["ratio"] > 0
    for carry, targets, controls in ((False, (99,), ("alpha",)), (False, (), ("alpha",)), (True, (2,), ("last",))):
        with pytest.raises(ValueError, match="leave no row"):
            curve(model, tokenizer, found, carry, targets=targets, controls=controls, **options)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the likelihood of sample [01] is no number"):
        curve(model, tokenizer, found, targets=(1,), **options)
    with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more, got 0"):
        score(model, [([3, 4], 1)], batch_size=0)


@pytest.fixture
def saved(tmp_path):
    """A tiny GPT-2 with its tokenizer, as a folder; and a corpus in the hub's layout."""
    tiny.make("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "tiny-gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny-gpt2")
    folder = tmp_path / "ptb" / "penn_treebank"
    for split, first in (("test", 0), ("train", 50)):
        rows = [{"sentence": words(first + 7 * i, 12)} for i in range(30)]
        (folder / split).mkdir(parents=True)
        Dataset.from_list(rows).to_json(folder / split / "0000.jsonl")
    return tmp_path


COMMON = ["--prefix", "40", "--continuation", "8", "--tau", "2", "--targets", "1", "2", "--no-progress"]


def command(saved, *more):
    return [
        "--model", str(saved / "tiny-gpt2"), "--corpus", "ptb", "--source", str(saved / "ptb"),
        "--output-dir", str(saved / "out"), *COMMON, *more,
    ]  # fmt: skip


def test_the_command_writes_one_result_file(saved, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "hf"))
    assert perplexity.main(command(saved, "--latency-repeats", "0")) == 0
    (path,) = (saved / "out" / "results").glob("*")
    assert path.name == "ptb-prefix-tiny-gpt2-untuned.json" and "TTFT not run" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert (
        result["kind"] == "perplexity" and result["task"]["paper_column"] == "PTB" and not result["task"]["substitute"]
    )
    assert result["recipe"]["method"] == "untuned" and result["model"]["name"] == "tiny-gpt2"
    assert result["protocol"]["reads_future"] is False and result["protocol"]["windows"] == 7
    assert "speedup" not in result["rows"][1] and str(saved) not in json.dumps(
        {**result, "command": None, "unit": None}
    )
    # A second run finds it, unless it asks for something else.
    monkeypatch.setattr(study, "curve", lambda *_: 1 / 0)
    assert perplexity.main(command(saved, "--latency-repeats", "0")) == 0
    with pytest.raises(ZeroDivisionError):
        perplexity.main(command(saved, "--latency-repeats", "0", "--seed", "1"))


def test_fine_tuned_and_timed(saved, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "hf"))
    arguments = command(
        saved, "--fine-tune", "--train", "30", "--max-steps", "6", "--learning-rate", "1e-2", "--dropout", "0",
        "--protocol", "carry-through", "--latency-repeats", "2", "--controls", "alpha", "--scores", "column_sum",
        "--schedule", "rising",
    )  # fmt: skip
    assert perplexity.main(arguments) == 0
    (path,) = (saved / "out" / "results").glob("*")
    result = json.loads(path.read_text())
    assert result["recipe"]["method"] == "alpha-sampled" and result["train"]["steps"] == 6
    assert result["recipe"]["schedule"] == "rising"
    assert result["protocol"]["reads_future"] is True
    assert all(row["speedup"] > 0 and row["latency_tokens"] == 48 for row in result["rows"])
    # It learnt: the same windows are likelier than to the model as it was.
    perplexity.main(command(saved, "--protocol", "carry-through", "--latency-repeats", "0", "--name", "before"))
    before = json.loads((saved / "out/results/before.json").read_text())
    assert result["rows"][0]["perplexity"] < before["rows"][0]["perplexity"]


def test_a_model_is_scored_under_the_settings_that_it_was_trained_for(saved, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "hf"))
    where = {"corpus": "ptb", "source": str(saved / "ptb"), "output_dir": saved / "out"}
    how = {"prefix": 40, "continuation": 8, "targets": (1, 2), "scores": ("column_sum",)}
    options = {**where, **how, "controls": ("alpha",), "latency_repeats": 0, "progress": False}
    recipe = Recipe(schedule="rising", tau=2, max_steps=1)
    tuned = perplexity.run(model=str(saved / "tiny-gpt2"), recipe=recipe, train=30, **options)
    (folder,) = (saved / "out/trained").glob("*/model")
    again = perplexity.run(model=str(folder), name="again", **options)
    for result in (again, tuned):
        assert (result["recipe"]["schedule"], result["recipe"]["tau"]) == ("rising", 2)
    assert [r["alpha"] for r in again["rows"]] == [r["alpha"] for r in tuned["rows"]]
    want = zsaa.alpha_for(tiny.CONFIGS["gpt2"](), [40], 2, tau=2, schedule="rising")
    assert tuned["rows"][1]["alpha"] == want
    eq2 = perplexity.run(model=str(folder), name="eq2", schedule="geometric", **options)
    assert eq2["recipe"]["schedule"] == "geometric" and eq2["rows"][1]["alpha"] != want
    typed = command(saved, "--model", str(folder), "--controls", "alpha", "--name", "typed", "--latency-repeats", "0")
    where_tau = typed.index("--tau")
    perplexity.main(typed[:where_tau] + typed[where_tau + 2 :])
    assert json.loads((saved / "out/results/typed.json").read_text())["recipe"]["tau"] == 2
    asked = perplexity.run(model=str(folder), name="asked", tau=4, **options)
    assert asked["recipe"]["tau"] == 4
    with pytest.raises(ValueError, match="tau must be"):
        perplexity.run(model="no such model", tau=0, **options)
    with pytest.raises(ValueError, match="unknown schedule 'x'"):
        perplexity.run(model="no such model", schedule="x", **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--targets", "99"], "leave no row.*99 is out of reach"),
        (["--targets", "0"], r"--targets must be in \[1, inf\)"),
        (["--eval-batch-size", "0"], "batch_size must be a whole number, 1 or more"),
        (["--latency-repeats", "-1"], "latency_repeats must be a whole number, 0 or more"),
        (["--train", "0"], "train must be a whole number, 1 or more"),
        (["--epochs", "0"], r"epochs must be in \(0, inf\)"),
        (["--learning-rate", "1e30", "--latency-repeats", "0"], "has diverged"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_leaves_no_result_is_refused(saved, given, message, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "hf"))
    if "1e30" not in given:
        monkeypatch.setattr(training, "fine_tune", lambda *a, **k: pytest.fail("it was trained"))
    with pytest.raises((ValueError, SystemExit)) as caught:
        perplexity.main(command(saved, "--fine-tune", "--max-steps", "3", *given))
    assert re.search(message, capsys.readouterr().err + str(caught.value))
    assert not [p for p in (saved / "out").rglob("*") if p.is_file()]


def test_windows_beyond_what_the_model_reads(saved, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(saved / "hf"))
    with pytest.raises(ValueError, match="windows of 308 tokens are too long for a model with 256 positions"):
        perplexity.run(
            model=str(saved / "tiny-gpt2"), corpus="ptb", source=str(saved / "ptb"), prefix=300, continuation=8
        )
