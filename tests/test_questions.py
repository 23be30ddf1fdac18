"""Language models that learn to answer questions about documents, and the scorer that is taught on the same rows."""

import json
import random

import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import TOLERANCE
from transformers import AutoModelForCausalLM

import zsaa
from zsaa import finetune
from zsaa.data import questions
from zsaa.data.questions import Asked
from zsaa.evaluation.answers import curve, judge
from zsaa.finetune import Recipe, teaching
from zsaa.finetune.questions import ASKS, BODY, STAYS, answer_logits, collate, encode
from zsaa.learned import asked, salience
from zsaa.models import AssetError
from zsaa.studies import command
from zsaa.studies.answers import dealt

QUICK = dict(batch_size=4, learning_rate=1e-3, precision="fp32")


def rows_of(count, seed=0, length=40):
    """The answer stands behind the word w3 of the document; the question's word, w4, stands elsewhere."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [f"w{draw.randrange(20, 90)}" for _ in range(length)]
        at, decoy = draw.sample(range(0, length - 4, 4), 2)
        words[at], words[decoy] = "w3", "w4"
        rows.append(Asked(" ".join(words), "w4 w10", (" ".join(words[at + 1 : at + 3]),)))
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def samples(tokenizer):
    return encode(rows_of(12), tokenizer, 512)


def model_of(tokenizer, family="llama", alpha=1.0, dtype=torch.float64, **kwargs):
    model = tiny.make(family, dtype=dtype, **kwargs)
    salience.attach(model, asked.by_words(model, tokenizer, chunk=4))
    return zsaa.enable(model, alpha=alpha, tau=1, score="asked", schedule="entry")


def test_rows_are_read_and_what_is_wrong_with_one_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"document": " A b. ", "question": "C?", "answer": "b "},
        {"document": "D", "question": "E?", "answers": ["f", "g"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert questions.read(path) == [Asked("A b.", "C?", ("b",)), Asked("D", "E?", ("f", "g"))]
    assert len(questions.read(path, 1)) == 1
    for line, says in [
        ('{"document": "D", "question": ""}', "line 1: question must be a text that is not empty, got ''"),
        ('{"document": "D", "question": "E?"}', "line 1: answer must be a text that is not empty, got None"),
        ('{"document": "D", "question": "E?", "answers": ["f", 3]}', "answer must be a text .* got 3"),
        ("[1]", "a row must be an object"),
        ("{", "line 1: .*Mend or remove it"),
        ("", "holds no row"),
    ]:
        path.write_text(line)
        with pytest.raises(AssetError, match=says):
            questions.read(path)
    with pytest.raises(AssetError, match="there is no file"):
        questions.read(tmp_path / "none.jsonl")


def test_samples_know_their_document_their_question_and_their_answer(tokenizer):
    row = rows_of(1, length=12)[0]
    (sample,) = encode([row], tokenizer, 99)
    prompt = sample["labels"].count(-100)
    assert tokenizer.decode(sample["input_ids"][prompt:]).strip() == f"{row.answers[0]}</s>"
    assert sample["labels"][prompt:] == sample["input_ids"][prompt:]
    said = {kind: [i for i, p in zip(sample["input_ids"], sample["part"]) if p == kind] for kind in (BODY, ASKS)}
    assert tokenizer.decode(said[BODY]).strip() == row.document and tokenizer.decode(said[ASKS]).strip() == "w4 w10"
    with pytest.warns(UserWarning, match="1 of 2 rows are longer than 40 tokens, and left out"):
        assert len(encode([row, rows_of(1)[0]], tokenizer, 40)) == 1
    with pytest.raises(ValueError, match="all 1 rows are longer than max_length=3 tokens: give a larger one"):
        encode([row], tokenizer, 3)
    chatty = tiny.tokenizer()
    chatty.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %} w7"
    (sample,) = encode([row], chatty, 99)
    assert sample["part"] == [STAYS] + [BODY] * 12 + [ASKS] * 2 + [STAYS] * 5


def test_a_step_computes_what_generate_does(family, tokenizer):
    """Padded prompts and answers, shortened: the logits of each answer are those with which it was written."""
    model = model_of(tokenizer, family)
    rows = [rows_of(1)[0], rows_of(1, seed=1, length=60)[0]]
    batch = collate(list(encode(rows, tokenizer, 512)))
    masks = {"exempt": (batch["part"] != BODY) & (batch["mask"] == 1), "question": batch["part"] == ASKS}
    for alpha in (1.0, 0.5):
        out = model.generate(
            batch["prompt"], attention_mask=batch["mask"], alpha=alpha, **masks, **tiny.QUIET, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        given = {**batch, "answer": out.sequences[:, -tiny.NEW :]}
        given["said"] = torch.ones_like(given["answer"])
        with zsaa.at(model, alpha), torch.no_grad():
            logits = answer_logits(model, given)
        wanted = torch.stack(out.logits, dim=1).to(logits.dtype)
        if (family, alpha) == ("gemma2", 1.0):  # stock, it gives none where more columns are padding than its window
            logits, wanted = logits[wanted.isfinite()], wanted[wanted.isfinite()]
        torch.testing.assert_close(logits, wanted, **TOLERANCE)


def test_padding_leaves_no_mark_on_what_is_learned_whole(family, tokenizer):
    """Of samples of very different lengths: the logits of each alone, and gradients that are numbers."""
    model = model_of(tokenizer, family)
    samples = list(encode([rows_of(1)[0], rows_of(1, seed=1, length=60)[0]], tokenizer, 512))
    logits = answer_logits(model, batch := collate(samples))
    F.cross_entropy(logits[batch["said"] == 1], batch["answer"][batch["said"] == 1]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for mine, sample in zip(logits, samples):
        said = sum(label != -100 for label in sample["labels"])
        alone = model(torch.tensor([sample["input_ids"]])).logits[0, -said - 1 : -1]
        torch.testing.assert_close(mine[:said], alone, **TOLERANCE)


def test_the_gradients_of_a_ladder_step(tokenizer, samples, tmp_path):
    """Of alpha = 1, and of two settings that also learn from it; the scorer and what it reads stand still."""
    ladder = dict(method="alpha-sampled", sampling="ladder", distill=0.5, strongest=3.0)
    recipe = Recipe.named("zsaa+", kind="causal-lm", max_steps=1, **ladder, **QUICK)
    model = model_of(tokenizer, dtype=torch.float32, dropout=0.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    seen = {}

    class Noting(finetune.loop.AnswerTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen.update(batch=inputs, alphas=self.alphas(inputs), loss=loss.item())
            seen["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.loop, "AnswerTrainer", Noting)
        finetune.fine_tune(model, tokenizer, samples, recipe, tmp_path, progress=False)
    again = model_of(tokenizer, dtype=torch.float32)
    batch, real = seen["batch"], seen["batch"]["said"] == 1
    total, teacher = 0.0, None
    for alpha in seen["alphas"]:
        with zsaa.at(again, alpha):
            said = answer_logits(again, batch)[real]
        loss = F.cross_entropy(said, batch["answer"][real])
        if teacher is not None:
            loss = 0.5 * loss + 0.5 * F.kl_div(said.log_softmax(-1), teacher, reduction="batchmean")
        teacher = said.detach().softmax(-1) if teacher is None else teacher
        total = total + loss / 3
    again.get_input_embeddings().requires_grad_(False)
    wanted = torch.autograd.grad(total, [p for p in again.parameters() if p.requires_grad])
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    assert seen["alphas"][0] == 1 > seen["alphas"][1] >= seen["alphas"][2] and seen["loss"] == pytest.approx(
        total.item()
    )
    assert set(names) == set(seen["gradients"]) and not any("asked" in name for name in names)
    for name, want in zip(names, wanted):
        torch.testing.assert_close(seen["gradients"][name], want, rtol=1e-3, atol=1e-5, msg=name)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == set(names)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_taught_tuned_saved_and_answering(tokenizer, tuning, tmp_path):
    """From rows to a folder that answers, as a user goes."""
    base = tmp_path / "base"
    tiny.make("llama", dtype=torch.float32).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    samples = encode(rows_of(12), tokenizer, 512)
    draws = torch.get_rng_state()
    finetune.teach(model, tokenizer, samples, steps=2, batch_size=4, chunk=4, width=8, held_out=0.3, progress=False)
    assert torch.equal(torch.get_rng_state(), draws) and not model.training
    recipe = Recipe.named("zsaa+", kind="causal-lm", tuning=tuning, max_steps=2, **QUICK)
    model, log = finetune.fine_tune(model, tokenizer, samples, recipe, tmp_path / "mine", progress=False)
    assert log["steps"] == 2 and zsaa.settings(model)["alpha_range"] is None
    again, loaded = finetune.load(tmp_path / "mine/model", kind="causal-lm")
    assert zsaa.dial.rule(again) == {"tau": 1, "score": "asked", "schedule": "entry"}
    row = rows_of(1, seed=5)[0]
    prompt = torch.tensor([finetune.questions.prompt_of(loaded, row.document, row.question)])
    told = dict(document=row.document, question=row.question, tokenizer=loaded, alpha=0.5, **tiny.QUIET)
    told["attention_mask"] = torch.ones_like(prompt)
    with zsaa.trace(again) as t:
        said = again.generate(prompt, **told)
    assert t.counts[0][0] == int(0.5 * prompt.shape[1])
    assert torch.equal(said, model.generate(prompt, **told))


@pytest.mark.full
def test_a_scorer_learns_where_answers_stand(tokenizer):
    """The question's own word misleads; what stands before the answer tells."""
    rows = rows_of(100)
    samples, model = encode(rows, tokenizer, 512), tiny.make("llama", dtype=torch.float32)
    pupils = [teaching._lesson(tokenizer, sample) for sample in samples]
    words = salience.attach(model, asked.by_words(model, tokenizer, [row.document for row in rows], chunk=4))
    before = teaching.recall(model, words, pupils)
    scorer, log = finetune.teach(
        model, tokenizer, samples, steps=60, batch_size=24, chunk=4, width=16, progress=False, learning_rate=5e-3
    )
    assert salience.scorers_of(model) == [scorer] and not any(p.requires_grad for p in scorer.parameters())
    (_, found) = max(log["recall"], key=lambda entry: sum(entry[1].values()))
    assert found[5] > before[5] + 30 and (log["samples"], log["held_out"], log["placed"]) == (90, 10, 100)
    held = random.Random(0).sample(pupils, 1)
    ids = torch.tensor([held[0].ids])
    part = torch.tensor([held[0].part])
    zsaa.enable(model, alpha=0.4, tau=1, score="asked", schedule="entry")
    with zsaa.trace(model) as t, torch.no_grad():
        model(ids, question=part == ASKS)
        scores, units = teaching._asked(model, scorer, held)
    kept, body = set(t.kept[0][0].tolist()), [i for i, kind in enumerate(held[0].part) if kind != ASKS]
    best = scores[0].argsort(descending=True)[0].item()
    assert {i for i, unit in zip(body, units[0]) if unit == best} <= kept, "it was taught on what it is asked later"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_what_heads_look_at_is_their_attention(name, tokenizer, samples):
    model = tiny.make(name, attn_implementation="eager")
    model.config.use_cache = False
    if name == "gemma3_text":  # windows are left out: the looks are of whole prompts
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        model.config.sliding_window = 999
    two = [samples[0], samples[1]]
    looks = teaching._looks(model, two, {1: [0, 3], 2: [1]})
    for sample, look in zip(two, looks):
        n = sample["labels"].count(-100)
        with torch.no_grad():
            seen = model(torch.tensor([sample["input_ids"]]), output_attentions=True).attentions
        rows = slice(n - 1, len(sample["input_ids"]) - 1)
        body = torch.tensor([p == BODY for p in sample["part"]])[:n]
        want = torch.stack([seen[layer][0, head, rows, :n].sum(0) * body for layer, head in ((1, 0), (1, 3), (2, 1))])
        torch.testing.assert_close(look, want.float(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_learned_is_refused(tokenizer, samples, tmp_path):
    plain, recipe = tiny.make("llama", dtype=torch.float32), Recipe.named("zsaa+", kind="causal-lm", **QUICK)

    def tune(model, recipe, data=samples):
        finetune.fine_tune(model, tokenizer, data, recipe, tmp_path, progress=False)

    with pytest.raises(ValueError, match="score='asked' needs a scorer that the model has not: teach one first"):
        tune(plain, recipe)
    model = model_of(tokenizer, dtype=torch.float32)
    ladder = dict(method="alpha-sampled", sampling="ladder")
    with pytest.raises(ValueError, match="crops is not for answers"):
        tune(model, recipe.changed(**ladder, crops=0.5))
    with pytest.raises(ValueError, match="gradient_checkpointing is not for answers"):
        tune(model, recipe.changed(gradient_checkpointing=True))
    plain_rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}]
    with pytest.raises(ValueError, match="sampling='ladder' .* needs a classifier.*questions.encode"):
        tune(model, recipe.changed(**ladder), plain_rows)
    with pytest.raises(ValueError, match="needs a classifier"):
        tune(model, Recipe.named("zsaa+", **QUICK))
    elsewhere = encode([Asked("w20 w21", "w4", ("w90",))] * 4, tokenizer, 99)
    with pytest.raises(ValueError, match="of 4 rows, 1 of them held out, none that could be judged on"):
        finetune.teach(plain, tokenizer, elsewhere, progress=False)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        finetune.teach(plain, tokenizer, samples, steps=0)


def test_answers_are_judged_by_squads_rules():
    assert judge("The  Ferry!", ["a ferry", "boat"]) == (1, 1)
    assert judge("ferry at nine", ["nine"]) == (0, pytest.approx(0.5))
    assert judge("", ["the"]) == (1, 1) and judge("x", ["y"]) == (0, 0) and judge("x y", ["z", "y x"]) == (0, 1)


def test_the_curve_of_answers_spends_what_it_says(tokenizer):
    """Each target is reached, the rivals get no more, and the whole prompt stands once."""
    model = model_of(tokenizer, dtype=torch.float32)
    rows = [rows_of(1, seed, length)[0] for seed, length in enumerate((120, 80, 100))]
    found = curve(model, tokenizer, rows, [1, 2, 3], new_tokens=3, progress=False)
    assert found == curve(model, tokenizer, rows, [1, 2, 3], new_tokens=3, batch_size=1, progress=False)
    assert [(row["control"], row["target"]) for row in found] == [
        ("alpha", 1), *((control, target) for target in (2, 3) for control in ("alpha", "bm25", "last"))
    ]  # fmt: skip
    for row in found:
        assert row["target"] <= row["mac_reduction"] < 1.15 * row["target"] and row["n"] == len(row["f1s"]) == 3
        assert row["f1"] == pytest.approx(sum(row["f1s"]) / 3, abs=0.05)
    stock = tiny.make("llama", dtype=torch.float32)
    for row in found:
        if row["control"] == "last" and row["target"] == 2:
            asked = rows[0]
            prompt = finetune.questions.prompt_of(tokenizer, asked.document, asked.question)
            left = zsaa.truncation_for(model.config, len(prompt), 2) - (len(prompt) - 120)
            words = " ".join(asked.document.split()[-left:])
            short = torch.tensor([finetune.questions.prompt_of(tokenizer, words, asked.question)])
            said = stock.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=3, pad_token_id=0)
            f1 = judge(tokenizer.decode(said[0, short.shape[1] :], skip_special_tokens=True), asked.answers)[1]
            assert row["f1s"][0] == round(100 * f1, 1)
    by_paper = zsaa.enable(model, score="column_sum", schedule="geometric")
    (row,) = curve(by_paper, tokenizer, rows[:1], [2], ["alpha"], new_tokens=2, progress=False)
    assert row["mac_reduction"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("recipe", [[], ["--recipe", "zsaa+", "--changes.tuning", "lora"]], ids=["as it is", "lora"])
def test_one_command_from_rows_to_answers(tokenizer, recipe, tmp_path):
    tiny.make("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [{"document": r.document, "question": r.question, "answer": r.answers[0]} for r in rows_of(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--objective", "answers", "--data", tmp_path / "rows.jsonl", "--model", tmp_path / "base"]
    given += ["--output", tmp_path / "out", "--settings.targets", "[1,1.5]", "--settings.new_tokens", "2", *recipe]
    given += ["--settings.scorer_steps", "2", "--settings.held_out", "0.3", "--progress", "false"]
    given += ["--changes.max_steps", "1", "--changes.batch_size", "2"] if recipe else []
    assert command.main(list(map(str, given))) == 0
    (file,) = (tmp_path / "out/results").glob("*.json")
    result = json.loads(file.read_text())
    train, test = dealt(questions.read(tmp_path / "rows.jsonl"), 0.3)
    assert not {r.document for r in train} & {r.document for r in test} and len(train) + len(test) == 16
    assert {row["n"] for row in result["rows"]} == {len(test)} and result["kind"] == "questions"
    assert ("train" in result) == bool(recipe) and result["task"]["fingerprint"]
    if recipe:
        assert result["train"]["scorer"]["heads"] and result["train"]["steps"] == 1
        model, _ = finetune.load(tmp_path / "out" / result["name"] / "model", kind="causal-lm")
        assert zsaa.settings(model)["score"] == "asked"
    with pytest.raises(ValueError, match="held_out=0.01 of 1 documents leaves none for the test"):
        dealt(train[:1], 0.01)


def test_the_hubs_squad_and_hotpotqa_from_a_folder(tmp_path):
    def parquet(config, split, rows):
        (tmp_path / config).mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / config / f"{split}-00000-of-00001.parquet")

    said = {"text": ["Mara", "Mara", "the cook"], "answer_start": [0, 0, 9]}
    for split in ("train", "validation"):
        squad = {"id": "1", "title": "t", "context": f" Mara left, {split}. ", "question": "Who?", "answers": said}
        parquet("plain_text", split, [squad, squad | {"answers": {"text": [], "answer_start": []}}])
        paragraphs = {"title": ["Lake", "Owl"], "sentences": [["It froze.", " Twice."], ["It sings."]]}
        parquet("distractor", split, [{"id": "2", "question": "Does it sing?", "answer": "yes", "context": paragraphs}])
    train, test, origin = questions.load("squad", str(tmp_path))
    assert train == [Asked("Mara left, train.", "Who?", ("Mara", "the cook"))] and origin == f"folder {tmp_path.name}"
    assert test == [Asked("Mara left, validation.", "Who?", ("Mara", "the cook"))]
    document = "Lake: It froze. Twice.\n\nOwl: It sings."
    assert questions.load("hotpotqa", str(tmp_path))[0] == [Asked(document, "Does it sing?", ("yes",))]
    with pytest.raises(AssetError, match="no such folder"):
        questions.load("squad", str(tmp_path / "none"))
