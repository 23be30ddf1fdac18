"""lm-evaluation-harness: scores against an independent reference and against lm-eval's own, MMLU through zsaa-eval."""

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import reference
import tiny
import tokenizers
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import zsaa
from zsaa import finetune
from zsaa.evaluation import harness
from zsaa.evaluation.harness import ZsaaLM
from zsaa.models import AssetError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ALPHA, TAU = 0.7, 3
ROOT = Path(__file__).resolve().parent.parent
# transformers' RMSNorm rounds to float32 on the way, also in a float64 model; GPT-2 has none.
TOLERANCE = dict.fromkeys(tiny.FAMILIES, 1e-6) | {"gpt2": 1e-12}

SUBJECTS = ("anatomy", "algebra")
TEMPLATE = "The following are multiple choice questions ( with answers ) about : Question Answer . ? A B C D"
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def _leave_nothing_behind(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval sets it
    # lm-eval reads 14,000 task files at each start, which takes 10 s: let it read ours only.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words with fewer than the tiny models' 97 ids."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *TEMPLATE.split(), *SUBJECTS, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert len(vocab) <= 97
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def lm(words, family="gpt2", alpha=ALPHA, tau=TAU, batch_size=8, **kwargs):
    return ZsaaLM(tiny.make(family), alpha, tau, tokenizer=words, batch_size=batch_size, **kwargs)


def stock(words, family="gpt2", batch_size=8, **kwargs):
    return HFLM(tiny.make(family), tokenizer=words, batch_size=batch_size, **kwargs)


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[int(i) for i in torch.randint(1, 97, (n,), generator=generator)] for n in lengths]


def requests():
    """Contexts of many lengths, some asked for several times; continuations of 1 to 6 tokens, one of them twice."""
    contexts, continuations = texts([23, 9, 1, 30, 4]), texts([1, 6, 2, 1, 1, 3], seed=1)
    asked = [
        (c, continuations[i]) for c, which in zip(contexts, ["012345", "03", "1", "24", "5"]) for i in map(int, which)
    ]
    asked += asked[:1]
    return [(None, *pair) for pair in asked]


def instances(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(pairs)]


@functools.cache
def eager(family):
    return tiny.make(family, attn_implementation="eager")


def by_reference(family, context, continuation, alpha=ALPHA, tau=TAU):
    """Log-probability of each token of `continuation`: the context pruned by masks, the rest attending to what is left.
    Without a line of zsaa."""
    model = eager(family)
    with torch.no_grad():
        hidden, _ = reference.run(model, torch.tensor(context + continuation[:-1]), alpha, tau, prompt=len(context))
        logits = model.lm_head(hidden[len(context) - 1 :])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0], logits.argmax(-1).tolist()


# --------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_are_the_references_at_every_batch_size(words, family):
    asked, scores = requests(), {}
    for size in (1, 3, 8):
        scores[size] = lm(words, family, batch_size=size)._loglikelihood_tokens(asked, disable_tqdm=True)
    for size in (3, 8):
        assert [score for score, _ in scores[size]] == pytest.approx([score for score, _ in scores[1]], rel=1e-12)
        assert [greedy for _, greedy in scores[size]] == [greedy for _, greedy in scores[1]]
    for (score, is_greedy), (_, context, continuation) in zip(scores[1], asked, strict=True):
        tokens, greedy = by_reference(family, context, continuation)
        assert score == pytest.approx(float(tokens.sum()), rel=TOLERANCE[family])
        assert is_greedy == (greedy == continuation)
    full = [by_reference(family, c, a, alpha=1.0)[0].sum() for _, c, a in asked[:6]]
    assert all(abs(score[0] - float(f)) > 1e-3 for score, f in zip(scores[1], full)), "pruning must show in the scores"


def test_greedy_continuations_are_recognised(words):
    model = lm(words)
    contexts = texts([23, 9, 30])
    answers = []
    for context in contexts:
        ids = torch.tensor([context])
        out = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answers.append(out[0, len(context) :].tolist())
    right = [(None, c, a) for c, a in zip(contexts, answers)]
    wrong = [(None, c, a[:-1] + [(a[-1] + 1) % 97]) for c, a in zip(contexts, answers)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(right + wrong)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
def test_likelihoods_are_probabilities(words, family):
    """Over all continuations they sum to 1. They would not if what is kept depended on the continuation."""
    model = lm(words, family)
    (context,), first, vocabulary = texts([23]), 17, range(97)
    one = model._loglikelihood_tokens([(None, context, [v]) for v in vocabulary], disable_tqdm=True)
    two = model._loglikelihood_tokens([(None, context, [first, v]) for v in vocabulary], disable_tqdm=True)
    assert sum(math.exp(score) for score, _ in one) == pytest.approx(1, rel=1e-5)
    assert sum(math.exp(score) for score, _ in two) == pytest.approx(math.exp(one[first][0]), rel=1e-5)
    assert sum(greedy for _, greedy in one) == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_pruning_scores_are_lm_evals(words, family):
    """tau above every length keeps all tokens, in the code path of alpha < 1: truncation, shifts, padding and caches
    are then held against lm-eval's own scores."""
    pairs = [
        ("w1 w2 w3 w4 w5", " w6"), ("w1 w2 w3 w4 w5", " w7"), ("w1 w2 w3 w4 w5", " w6 w8 w9"),
        ("w1 w2 ", "w3"),                                         # the space moves into the continuation
        ("", "w1"), ("", "w1 w2 w3"), ("", "<s> w4"),             # no context: BOS, or the text's own
        (" ".join(WORDS), " w1 w2"), (" ".join(WORDS), " w3"),    # too long: loses its beginning
        ("w5", " " + " ".join(WORDS[:16])),                       # a continuation as long as the model can read
    ]  # fmt: skip
    want = stock(words, family, max_length=16).loglikelihood(instances(pairs), disable_tqdm=True)
    for size in (1, 8):
        model = lm(words, family, tau=1000, batch_size=size, max_length=16)
        got = model.loglikelihood(instances(pairs), disable_tqdm=True)
        assert [score for score, _ in got] == pytest.approx([score for score, _ in want], rel=TOLERANCE[family])
        assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


@pytest.mark.parametrize("size", [1, 8])
def test_alpha_one_is_lm_evals_bit_for_bit(words, size):
    pairs = instances([("w1 w2 w3", " w4"), ("w1 w2 w3", " w4 w5"), ("", "w6 w7"), (" ".join(WORDS), " w8")])
    long = instances([(" ".join(WORDS),), ("w1 w2",)], "loglikelihood_rolling")
    until = instances([(" ".join(WORDS[:9]), {"until": ["w3"], "max_gen_toks": 6}), ("w1", {"max_gen_toks": 6})])
    want, got = stock(words, batch_size=size, max_length=40), lm(words, alpha=1, batch_size=size, max_length=40)
    assert got.loglikelihood(pairs) == want.loglikelihood(pairs)
    assert got.loglikelihood_rolling(long) == want.loglikelihood_rolling(long)
    assert got.generate_until(until) == want.generate_until(until)


def test_overlong_contexts_lose_their_beginning_before_pruning(words):
    (context,), (continuation,) = texts([60]), texts([3], seed=1)
    for size in (1, 8):
        model = lm(words, batch_size=size, max_length=24)
        ((score, _),) = model._loglikelihood_tokens([(None, context, continuation)])
        want, _ = by_reference("gpt2", context[-22:], continuation)  # 22 + 3 - 1 tokens are read
        assert score == pytest.approx(float(want.sum()), rel=1e-10)


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 25)])
def test_requests_that_cannot_be_scored_are_named(words, context, continuation):
    with pytest.raises(ValueError, match="request 0 .*max_length"):
        lm(words, max_length=24)._loglikelihood_tokens([("key", context, continuation)])
    assert lm(words)._loglikelihood_tokens([]) == []


@pytest.mark.parametrize("alpha", [1.0, ALPHA])
def test_a_model_without_numbers_gets_no_score(words, alpha):
    """lm-eval takes the NaN among the answers' likelihoods for the largest."""
    spoilt = lm(words, alpha=alpha)
    with torch.no_grad():
        spoilt.model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the log-likelihood of 13 of 13 requests is NaN.*dtype=float32"):
        spoilt._loglikelihood_tokens(requests(), disable_tqdm=True)


def test_a_context_is_prefilled_once(words):
    model, shapes = lm(words, batch_size=4), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    contexts = texts([20] * 8)
    model._loglikelihood_tokens([(None, c, [answer]) for c in contexts for answer in (5, 6, 7, 8)])
    assert shapes == [(4, 20), (4, 20)]  # two batches of four contexts serve 32 requests
    shapes.clear()
    model._loglikelihood_tokens([(None, c, [answer, 9, 9]) for c in contexts[:4] for answer in (5, 6, 7, 8)])
    assert shapes == [(4, 20)] + [(4, 2)] * 4


def test_automatic_batch_size(words):
    auto = lm(words, batch_size="auto", max_batch_size=4, max_length=64)
    scores = [score for score, _ in auto._loglikelihood_tokens(requests(), disable_tqdm=True)]
    assert scores == pytest.approx([s for s, _ in lm(words)._loglikelihood_tokens(requests())], rel=1e-10)


def test_turning_the_dial_later_turns_the_scores(words):
    model = lm(words, alpha=1.0)
    at_one = model._loglikelihood_tokens(requests())
    with zsaa.at(model.model, ALPHA):
        assert model._loglikelihood_tokens(requests()) == lm(words)._loglikelihood_tokens(requests()) != at_one
    assert model._loglikelihood_tokens(requests()) == at_one


def test_perplexity_scores_each_piece_after_the_pruned_piece_before_it(words):
    text = " ".join(WORDS[:50])
    tokens = [1, *words(text).input_ids]
    n = 12
    want = by_reference("gpt2", tokens[:1], tokens[1 : n + 1])[0].sum()
    for start in range(n + 1, len(tokens), n):
        want += by_reference("gpt2", tokens[start - n : start], tokens[start : start + n])[0].sum()
    for size in (1, 8):
        model = lm(words, batch_size=size, rolling_prefix=n)
        assert model.loglikelihood_rolling(instances([(text,), ("",)])) == pytest.approx([float(want), 0.0], rel=1e-10)
    stock_windows = lm(words, alpha=1, rolling_prefix=n).loglikelihood_rolling(instances([(text,)]))
    assert stock_windows == pytest.approx(
        lm(words, tau=99, rolling_prefix=n).loglikelihood_rolling(instances([(text,)]))
    )
    with pytest.raises(ValueError, match="rolling_prefix=N"):
        lm(words).loglikelihood_rolling(instances([(text,)]))
    for wrong in (0, 129, 1.5, True):
        with pytest.raises(ValueError, match="from 1 to 128"):
            lm(words, rolling_prefix=wrong)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3_text"])
def test_generation_at_every_batch_size(words, family):
    asked = [" ".join(WORDS[i : i + n]) for i, n in ((0, 30), (3, 9), (7, 1), (20, 17))]
    model = zsaa.enable(tiny.make(family), ALPHA, TAU)
    want = []
    for text in asked:
        encoded = words(text, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=0)
        want.append(words.decode(out[0, encoded.input_ids.shape[1] :], skip_special_tokens=True))
    for size in (1, 8):
        until = instances([(text, {"max_gen_toks": 8}) for text in asked], "generate_until")
        assert lm(words, family, batch_size=size).generate_until(until, disable_tqdm=True) == want


# --------------------------------------------------------------------------------------- MMLU through zsaa-eval


def question(number):
    pick = texts([14], seed=100 + number)[0]
    w = [WORDS[i % 60] for i in pick]
    return {
        "question": f" {' '.join(w[:8])} ?",
        "subject": "anatomy",
        "choices": [w[8], w[9], f"{w[10]} {w[11]}", f"{w[12]} {w[13]} {w[0]}"],
        "answer": pick[0] % 4,
    }


DEV, TEST = [question(i) for i in range(5)], [question(i) for i in range(5, 15)]


@pytest.fixture(scope="module")
def saved(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.make("llama").save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory):
    """A folder of tasks in MMLU's layout, in lm-eval's own formats: its templates, with the data set swapped."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, rows in (("dev", DEV), ("test", TEST)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    for name, template in (
        ("letters", "default/_default_template_yaml"),
        ("words", "continuation/_continuation_template_yaml"),
    ):
        task = {
            "include": str(templates / template),
            "task": f"tiny_mmlu_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("dev", "test")}},
            "description": "The following are multiple choice questions (with answers) about anatomy.\n\n",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def evaluate(monkeypatch, out, task, mmlu, model_args, batch_size, model="zsaa", extra=()):
    """(lm-eval's result file, [scores of the four answers of each sample]) of one zsaa-eval command."""
    line = ["zsaa-eval", "--model", model, "--model_args", model_args, "--tasks", task, "--num_fewshot", "5"]
    line += ["--include_path", str(mmlu), "--batch_size", str(batch_size), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*line, "--output_path", str(out), "--log_samples", *extra])
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks pip for every package
    harness.main()
    (results,), (samples,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results.read_text()), [[float(score) for score, _ in row["filtered_resps"]] for row in rows]


def letters_prompt(row):
    def one(row):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
        return f"{row['question'].strip()}\n{listed}\nAnswer:"

    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    return head + "".join(f"{one(shot)} {'ABCD'[shot['answer']]}\n\n" for shot in DEV) + one(row), list("ABCD")


def words_prompt(row):
    def one(row):
        return f"Question: {row['question'].strip()}\nAnswer:"

    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    shots = "".join(f"{one(shot)} {shot['choices'][shot['answer']]}\n\n" for shot in DEV)
    return head + shots + one(row), row["choices"]


def directly(words, prompt, alpha):
    """Scores and accuracy by plain model calls: each answer alone, token by token, no batch and no padding."""
    model = zsaa.enable(tiny.make("llama"), alpha, TAU)
    scores = []
    for row in TEST:
        text, answers = prompt(row)
        scores.append([])
        for answer in answers:
            total, out = 0.0, None
            read = words(text, return_tensors="pt").input_ids
            for token in words(answer).input_ids:
                with torch.no_grad():
                    out = model(read, past_key_values=None if out is None else out.past_key_values, use_cache=True)
                total += float(out.logits[0, -1].log_softmax(-1)[token])
                read = torch.tensor([[token]])
            scores[-1].append(total)
    right = [max(range(4), key=four.__getitem__) == row["answer"] for four, row in zip(scores, TEST)]
    return scores, sum(right) / len(right)


@pytest.mark.parametrize("alpha", [pytest.param(1.0, marks=pytest.mark.full), 0.7])
@pytest.mark.parametrize(
    ("task", "prompt"),
    [("letters", letters_prompt), pytest.param("words", words_prompt, marks=pytest.mark.full)],
)
def test_mmlu_through_zsaa_eval(words, saved, mmlu, tmp_path, monkeypatch, alpha, task, prompt):
    want, accuracy = directly(words, prompt, alpha)
    for size in (1, 8):
        args = f"pretrained={saved},alpha={alpha},tau={TAU},dtype=float64"
        results, scores = evaluate(monkeypatch, tmp_path / str(size), f"tiny_mmlu_{task}", mmlu, args, size)
        for got, expected in zip(scores, want, strict=True):
            assert got == pytest.approx(expected, rel=1e-6)
        assert results["results"][f"tiny_mmlu_{task}"]["acc,none"] == accuracy
        assert results["n-shot"] == {f"tiny_mmlu_{task}": 5}
        config = results["config"]
        assert (config["alpha"], config["tau"], config["score"]) == (alpha, TAU, "column_sum")
        assert config["model_args"]["alpha"] == alpha
        assert config["zsaa_version"] == zsaa.__version__


@pytest.mark.full
def test_pruning_shows_and_other_kinds_of_models_stay_usable(words, saved, mmlu, tmp_path, monkeypatch):
    args = f"pretrained={saved},dtype=float64"
    _, hf = evaluate(monkeypatch, tmp_path / "hf", "tiny_mmlu_letters", mmlu, args, 8, model="hf")
    _, one = evaluate(monkeypatch, tmp_path / "one", "tiny_mmlu_letters", mmlu, f"{args},alpha=1", 8)
    _, pruned = evaluate(monkeypatch, tmp_path / "pruned", "tiny_mmlu_letters", mmlu, f"{args},alpha=0.5", 8)
    assert one == hf
    assert all(abs(a - b) > 1e-3 for four, stock in zip(pruned, one) for a, b in zip(four, stock))


@pytest.mark.full
def test_example_task_asks_for_the_sentence_that_comes_next(words, saved, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("endings", ROOT / "examples" / "endings.py")
    endings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(endings)
    reviews = [
        f"review {i} begins like this. <br />review {i} goes on here! review {i} comes third now. End."
        for i in range(70)
    ]
    monkeypatch.setattr(endings, "load_task", lambda name: SimpleNamespace(test={"text": ["Short. One.", *reviews]}))
    endings.main(tmp_path)
    dev, test = (
        [*map(json.loads, (tmp_path / f"{split}.jsonl").read_text().splitlines())] for split in ("dev", "test")
    )
    assert (len(dev), len(test)) == (5, 40)
    for row in dev + test:
        number = row["question"].split()[1]
        assert row["question"] == f"review {number} begins like this. review {number} goes on here!"
        assert row["choices"][row["answer"]] == f"review {number} comes third now."
        assert len({*row["choices"]}) == 4 and all("comes third now" in choice for choice in row["choices"])
    args = f"pretrained={saved},alpha=0.9"
    for task in ("endings_letters", "endings_text"):
        results, _ = evaluate(monkeypatch, tmp_path / task, task, tmp_path, args, 8, extra=("--limit", "2"))
        assert results["n-samples"][task]["effective"] == 2
    assert os.access(ROOT / "examples" / "evaluate.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / "examples" / "evaluate.sh"]).returncode == 0


# --------------------------------------------------------------------------------------- models and settings


def test_folders_and_adapters_with_the_dials_settings(words, saved, tmp_path):
    base = zsaa.enable(tiny.make("llama"), 1.0, 4, "column_mean", schedule="rising")
    zsaa.dial.trained_for(base, (0.8, 1.0))
    finetune.save(base, words, tmp_path / "full")
    with pytest.warns(UserWarning, match="below the range"):
        model = ZsaaLM(str(tmp_path / "full"), 0.7, dtype="float64", batch_size=4)
    info = model.get_model_info()
    names = ("alpha", "tau", "score", "schedule", "alpha_range")
    assert [info[k] for k in names] == [0.7, 4, "column_mean", "rising", (0.8, 1.0)]
    others = {"tau": 2, "score": "column_sum", "schedule": "geometric"}
    again = ZsaaLM(str(tmp_path / "full"), 0.9, **others, dtype="float64").get_model_info()
    assert [again[k] for k in names[:4]] == [0.9, *others.values()]

    import peft

    plain = tiny.make("llama")
    plain.name_or_path = plain.config._name_or_path = str(saved)
    lora = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    zsaa.enable(lora, 1.0, 4)
    finetune.save(lora, words, tmp_path / "lora")
    zsaa.set_alpha(lora, ALPHA)
    (context,) = texts([23])
    with torch.no_grad():
        want = float(lora(torch.tensor([context])).logits[0, -1].log_softmax(-1)[5])
    # The folder as it was trained, though the tokenizer has fewer words than the model; peft= as lm-eval does it.
    model = ZsaaLM(str(tmp_path / "lora"), ALPHA, dtype="float64")
    assert model.get_model_info()["tau"] == 4
    assert model._loglikelihood_tokens([(None, context, [5])])[0][0] == pytest.approx(want, rel=1e-10)
    with pytest.raises(ValueError, match="a second one"):
        ZsaaLM(str(tmp_path / "lora"), peft=str(tmp_path / "lora"))
    # Earlier versions had other schedules, or wrote none.
    file = tmp_path / "lora" / finetune.SETTINGS_FILE
    now = json.loads(file.read_text())
    file.write_text(json.dumps({**now, "schedule": "once"}))
    with pytest.raises(ValueError, match="with schedule 'once'"):
        ZsaaLM(str(tmp_path / "lora"), ALPHA, dtype="float64")
    file.write_text(json.dumps({**now, "schedule": "rising"}))
    assert ZsaaLM(str(tmp_path / "lora"), ALPHA, dtype="float64").get_model_info()["schedule"] == "rising"
    file.write_text(json.dumps({k: v for k, v in now.items() if k != "schedule"}))
    by_peft = {"pretrained": str(saved), "peft": str(tmp_path / "lora"), "dtype": "float64"}
    model, hf = ZsaaLM(alpha=ALPHA, **by_peft), HFLM(device="cpu", **by_peft)
    assert model.get_model_info()["tau"] == 4
    zsaa.set_alpha(model.model, 1)
    asked = [(None, [i % 86 for i in context], [5, 6])]
    assert model._loglikelihood_tokens(asked) == hf._loglikelihood_tokens(asked)


def test_a_gguf_file_is_named_by_its_path(tmp_path):
    from test_models import write_gguf

    write_gguf(tmp_path / "m.gguf")
    reader = ZsaaLM(str(tmp_path / "m.gguf"), ALPHA, TAU, device="cpu", dtype="float32")
    want = ZsaaLM(tiny.make("llama", dtype=torch.float32), ALPHA, TAU, device="cpu", tokenizer=reader.tokenizer)
    asked = [(None, [*range(3, 23)], [7, 8])]
    assert reader._loglikelihood_tokens(asked, disable_tqdm=True) == want._loglikelihood_tokens(
        asked, disable_tqdm=True
    )


@pytest.mark.assets
def test_packaged_names(monkeypatch, saved):
    monkeypatch.setattr(harness.models, "convert", lambda name: saved)
    monkeypatch.setattr(harness.models, "resolve", lambda name: {"sha256": f"sha of {name}"})
    assert ZsaaLM("smollm2-135m", 0.9).get_model_info()["model_sha"] == "sha of smollm2-135m"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"alpha": 0}, ValueError, r"alpha must be in \(0, 1\], got 0"),
        ({"alpha": 1.1}, ValueError, r"alpha must be in \(0, 1\], got 1.1"),
        ({"alpha": "high"}, TypeError, "alpha must be a number"),
        ({"tau": 0}, ValueError, "tau must be >= 1, got 0"),
        ({"score": "row_sum"}, ValueError, "column_sum"),
        ({"schedule": "once"}, ValueError, "unknown schedule 'once'. Available: geometric, rising"),
        ({"parallelize": True}, ValueError, "one device"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(settings, error, message):
    with pytest.raises(error, match=message):
        ZsaaLM("/there/is/no/such/model", **settings)


def test_a_hub_that_does_not_answer_is_said_with_the_remedy(monkeypatch):
    def unreached(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'") from ConnectionError("no route to host")

    monkeypatch.setattr(HFLM, "__init__", unreached)
    with pytest.raises(AssetError, match="'someone/nothing' is not in the local cache.*hf download someone/nothing"):
        ZsaaLM("someone/nothing")


def test_models_that_cannot_be_scored_are_refused(words, tmp_path, saved):
    opt = transformers.OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32)
    with pytest.raises(zsaa.UnsupportedModelError, match="opt.*Supported model types: gpt2"):
        ZsaaLM(transformers.AutoModelForCausalLM.from_config(opt), tokenizer=words)
    finetune.save(zsaa.enable(tiny.make("llama", "sequence-classification")), words, tmp_path / "classifier")
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is a classifier"):
        ZsaaLM(str(tmp_path / "classifier"), 0.9)
    import peft

    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        ZsaaLM(peft.get_peft_model(tiny.make("llama"), soft), 0.9, tokenizer=words)


def test_a_response_cache_serves_one_setting_only(words, saved, tmp_path):
    file, asked = str(tmp_path / "answers.db"), instances([("w1 w2 w3 w4 w5 w6 w7 w8 w9", " w4 w5")])
    first = CachingLM(lm(words), file)
    assert (
        first.loglikelihood(asked) == CachingLM(lm(words), file).loglikelihood(asked) == lm(words).loglikelihood(asked)
    )
    with pytest.raises(ValueError, match="cache of its own"):
        CachingLM(lm(words, alpha=0.9), file)
    CachingLM(stock(words), str(tmp_path / "hf.db")).loglikelihood(asked)
    with pytest.raises(ValueError, match="another kind of model"):
        CachingLM(lm(words), str(tmp_path / "hf.db"))


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("zsaa_harness_again", harness.__file__)
    with pytest.raises(ImportError, match=r"pip install -U 'zsaa\[harness\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_script_and_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = importlib.metadata.EntryPoint("zsaa-eval", project["scripts"]["zsaa-eval"], "console_scripts")
    assert script.load() is harness.main
    (entry,) = project["entry-points"]["lm_eval.models"].items()
    model_registry.register("zsaa-by-entry-point", target=importlib.metadata.EntryPoint(*entry, "lm_eval.models"))
    try:
        assert get_model("zsaa-by-entry-point") is get_model("zsaa") is ZsaaLM
    finally:
        del model_registry._objs["zsaa-by-entry-point"]
