"""The score that is asked by the question, against the independent masked reference and the study's own reader."""

import base64
import copy

import pytest
import reference
import tiny
import torch
import transformers
from tiny import NEW, QUIET, TOLERANCE

import zsaa
from ablation.answers import teach
from ablation.answers.data import Sample
from ablation.answers.reader import at_answers, batch, chunks_of, ranks, read
from zsaa import finetune
from zsaa.learned import asked, salience
from zsaa.learned.asked import Scorer, Shape

ALPHA, TAU, CHUNK = 0.4, 3, 4
LENGTHS = [61, 40, 83]


def scorer_of(width=32, chunk=CHUNK, vocab=97):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        scorer = Scorer(Shape(32, width, chunk=chunk), torch.arange(vocab) // 2, torch.rand(vocab) * 5)
        for p in scorer.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return scorer.requires_grad_(False).eval()


def model_of(family, head="causal-lm", schedule="entry", alpha=ALPHA, scorer=None, **kwargs):
    model = tiny.make(family, head, **kwargs)
    salience.attach(model, scorer or scorer_of())
    return zsaa.enable(model, alpha=alpha, tau=TAU, score="asked", schedule=schedule)


def judge(scorer, ids, part):
    """Scores of one text's tokens, and the places that never leave, written out for lists. part: of each token."""
    body = [i for i, p in enumerate(part) if p != 3]
    head = [i for i, p in enumerate(part) if p > 0]

    def score(layer, hidden):
        x = hidden[0].float()
        parts = torch.tensor([[part[i] for i in head]])
        with torch.no_grad():
            chunks = scorer(
                x[None, body], ids[None, body], torch.tensor([len(body)]), x[None, head], ids[None, head], parts
            )[0]
        best = sorted(range(len(chunks)), key=lambda c: (-chunks[c].item(), c))
        out = torch.zeros(1, len(part))
        for place, i in enumerate(body):
            out[0, i] = -(best.index(place // scorer.shape.chunk) * scorer.shape.chunk + place % scorer.shape.chunk)
        return out

    return score, sorted({*range(min(4, len(part))), *(i for i, p in enumerate(part) if p == 3)})


def once(score):
    """Given at the first layer, as the package does, and kept for those above."""
    held = []

    def scores(layer, hidden):
        held.extend([score(layer, hidden)] if layer == 0 else [])
        return held[-1]

    return scores


def last_ask(n):
    return [3 if n - i <= 32 else 0 for i in range(n)]


@pytest.mark.parametrize("schedule", ["entry", "geometric"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("given", [False, True], ids=["last", "question"])
def test_pruned_equals_masked_reference(family, padding, schedule, given):
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    alpha = ALPHA if schedule == "entry" else 0.8
    parts = [last_ask(n) for n in LENGTHS]
    more = {}
    if given:  # a question of another length in each, with turns before it, not all at the end
        parts = [[0] * (n - 15 - b) + [1] * 3 + [2] * 4 + [3] * (5 + b) + [0] * 3 for b, n in enumerate(LENGTHS)]
        question = torch.zeros_like(mask)
        for b, part in enumerate(parts):
            question[b][mask[b] == 1] = torch.tensor(part)
        more = {"question": question, "exempt": (mask.cumsum(1) == 9) & (mask == 1)}
    model = model_of(family, "base", schedule, alpha)
    eager = tiny.make(family, "base", attn_implementation="eager")
    with zsaa.trace(model) as t, torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, **more).last_hidden_state
    for b, n in enumerate(LENGTHS):
        row = ids[b][mask[b] == 1]
        score, stay = judge(model.asked, row, parts[b])
        stay = sorted({*stay, *([8] if given else [])})
        entry = {"entry": schedule == "entry"}
        with torch.no_grad():
            want, kept = reference.run(eager, row, alpha, TAU, once(score), exempt=stay, **entry)
        assert [layer[b].tolist() for layer in t.kept] == kept and len(kept[-1]) < n
        torch.testing.assert_close(out[b][mask[b] == 1], want, **TOLERANCE)
        alone = model(row[None], **{name: x[b][mask[b] == 1][None] for name, x in more.items()})
        torch.testing.assert_close(alone.last_hidden_state[0], want, **TOLERANCE)


@pytest.mark.parametrize("width", [0, 32])
def test_it_equals_the_study(width):
    """The study's reader, on the study's prompts: the same tokens stay, and the same answers follow."""
    lm = tiny.make("llama", dtype=torch.float32)
    scorer = scorer_of(width)
    generator = torch.Generator().manual_seed(3)

    def some(n):
        return tuple(torch.randint(1, 97, (n,), generator=generator).tolist())

    samples = [Sample(some(n), some(6), some(5), some(9), some(3), None, ("a",)) for n in (50, 71)]
    b = batch(samples, "cpu")
    scores = teach.look(scorer, lm.model.embed_tokens(b.ids), b)
    keep = torch.tensor([[30], [41]])
    logs, _, owner = at_answers(lm, read(lm, b, (0,), keep, lambda x: scores, unit=chunks_of(b, CHUNK)), b)
    salience.attach(lm, scorer)
    for i, s in enumerate(samples):
        n, k = int(b.prompt[i]), int(keep[i])
        prompt = b.ids[i : i + 1, :n]
        question = torch.tensor([[0] * len(s.body) + [1] * 6 + [2] * 5 + [3] * 9])
        zsaa.enable(lm, alpha=k / n, tau=1, score="asked", schedule="entry")
        with zsaa.trace(lm) as t, torch.no_grad():
            first = lm(prompt, question=question)
            rest = lm(torch.tensor([s.answer[:-1]]), past_key_values=first.past_key_values).logits
        stays = ranks(scores, b, chunks_of(b, CHUNK))[i, :n] < k
        assert t.kept[0][0].tolist() == torch.where(stays)[0].tolist()
        found = torch.cat([first.logits[:, -1:], rest], dim=1)[0].log_softmax(-1)
        torch.testing.assert_close(found, logs[owner == i], rtol=1e-4, atol=1e-4)
        zsaa.disable(lm)
        salience.attach(lm, scorer)


def test_generate_pipelines_and_alphas_of_requests(family):
    ids, mask, _ = tiny.tokens(LENGTHS, padding="left")
    question = torch.arange(83).expand(3, -1) >= 73
    model = model_of(family)
    for how in ({}, {"num_beams": 2}, {"use_cache": False}):
        together = model.generate(ids, attention_mask=mask, question=question, alpha=[0.4, 0.7, 0.5], **QUIET, **how)
        for b, alpha in enumerate((0.4, 0.7, 0.5)):
            row, mine = ids[b][mask[b] == 1][None], question[b][mask[b] == 1][None]
            alone = model.generate(row, question=mine, alpha=alpha, **QUIET, **how)
            assert torch.equal(together[b, -NEW:], alone[0, -NEW:])
    run = transformers.pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), device="cpu")
    text = "w7 w8 w9 w3 " * 15
    with zsaa.trace(model) as t:
        run(text, question=torch.arange(60)[None] >= 50, max_new_tokens=2, do_sample=False)
    assert set(range(50, 60)) | {0, 1, 2, 3} <= set(t.kept[0][0].tolist()) and t.counts[0] == [24]
    with zsaa.trace(model) as t:
        run([text, text[:100]], batch_size=2, max_new_tokens=2, do_sample=False)
    assert t.lengths == [60, 34] or t.lengths == [60, 33]


def test_a_chat_s_last_tokens_ask():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}w4"
    model = model_of("llama", alpha=0.6)
    said = [{"role": "user", "content": "w9 " * 60 + "w7 " * 20}]
    given = tokenizer.apply_chat_template(said, return_tensors="pt", add_generation_prompt=True, return_dict=True)
    with zsaa.trace(model) as t:
        model.generate(**given, **QUIET)
    n = given["input_ids"].shape[1]
    assert set(range(n - 32, n)) <= set(t.kept[0][0].tolist()) and t.counts[0] == [int(0.6 * n)]


def test_short_prompts_are_kept_whole():
    ids = tiny.tokens([36])[0]
    model = model_of("llama", alpha=0.1)
    with zsaa.trace(model) as t:
        got = model(ids).logits
    assert t.counts == [[36]] * 4
    torch.testing.assert_close(got, tiny.make("llama")(ids).logits, **TOLERANCE)


def test_it_stays_in_float32_and_chooses_in_training_as_ever():
    model = model_of("llama", dtype=torch.float32)
    ids = tiny.tokens([70])[0]
    with zsaa.trace(model) as t:
        model(ids)
        want = t.kept[0][0].tolist()
        model.train()
        model(ids)
        assert t.kept[0][0].tolist() == want, "no dropout decides"
        model.eval().to(torch.bfloat16)
        model(ids)
    assert {x.dtype for x in model.model.asked.parameters()} == {torch.float32}
    assert not any("asked" in name for name in zsaa.disable(model).state_dict())


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_is_saved_apart_and_comes_back(adapter, tmp_path):
    base = tmp_path / "base"
    tiny.make("llama", dtype=torch.float32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = finetune.add_lora(model, finetune.Recipe(tuning="lora"))
        names = {name for name, _ in model.named_modules()}
        assert any("lora" in name for name in names)
    salience.attach(model, scorer_of())
    if adapter:
        assert not any("lora" in name for name, _ in model.named_modules() if "asked" in name)
    zsaa.enable(model.eval(), 1.0, tau=3, score="asked", schedule="entry")
    ids = tiny.tokens([70])[0]
    with torch.no_grad():
        want = model(ids, alpha=0.5).logits
    folder = tmp_path / "model"
    finetune.save(model, tiny.tokenizer(), folder)
    assert (folder / asked.FILE).is_file()
    again, _ = finetune.load(folder, kind="causal-lm")
    rule = zsaa.dial.rule(again)
    assert rule == {"tau": 3, "score": "asked", "schedule": "entry"}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids, alpha=0.5).logits, want)
    if not adapter:
        plain = zsaa.enable(transformers.AutoModelForCausalLM.from_pretrained(folder), alpha=0.5)
        torch.testing.assert_close(plain(ids).logits, want)
        weights = {**scorer_of().state_dict()}
        assert {k for k in weights if k.startswith(("canon", "idf"))} == {"canon", "idf"}


def test_what_has_no_scorer_or_another_models_is_told(tmp_path):
    model = tiny.make("llama")
    with pytest.raises(ValueError, match='score="asked" is learned, and this model has none'):
        zsaa.enable(model, score="asked", schedule="entry")
    salience.save(scorer_of(vocab=50), tmp_path)
    with pytest.raises(ValueError, match="is not a scorer for this llama .32 wide, 97 token ids.: .* 50 token ids"):
        asked.read(model.config, tmp_path)
    wide = copy.copy(model.config)
    wide.hidden_size = 64
    with pytest.raises(ValueError, match="is not a scorer .* it is for states 32 wide"):
        asked.read(wide, tmp_path)
    (tmp_path / asked.FILE).rename(tmp_path / "gone")
    salience.save(salience.Salience(model.config, range(4)), tmp_path)
    (tmp_path / salience.FILE).rename(tmp_path / asked.FILE)
    with pytest.raises(ValueError, match="is not a scorer for this llama"):
        asked.read(model.config, tmp_path)


@pytest.mark.parametrize(
    ("question", "error", "says"),
    [
        (torch.zeros(1, 70, dtype=torch.bool), ValueError, "question names no real token of sample 0"),
        (torch.full((1, 70), 4), ValueError, "or parts that there are not"),
        (torch.full((1, 70), 2), ValueError, "question names no real token of sample 0"),
        (torch.ones(1, 70), TypeError, "question must be a bool tensor.*got a tensor of torch.float32"),
        (torch.ones(1, 60, dtype=torch.bool), ValueError, r"question has shape \(1, 60\)"),
    ],
    ids=str,
)
def test_questions_that_do_not_fit_are_refused(question, error, says):
    with pytest.raises(error, match=says):
        model_of("llama")(tiny.tokens([70])[0], question=question)


def test_what_it_cannot_see_is_refused():
    model, ids = model_of("llama"), tiny.tokens([70])[0]
    with pytest.raises(ValueError, match='score="asked" compares words, and this call gives inputs_embeds'):
        model(inputs_embeds=model.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="prefill_chunk_size shows the first piece alone"):
        model.generate(ids, prefill_chunk_size=16, **QUIET)
    other = zsaa.enable(tiny.make("llama"), alpha=0.5)
    with pytest.raises(ValueError, match='question= is read by score="asked" alone'):
        other(ids, question=torch.ones_like(ids, dtype=torch.bool))


def test_macs_count_the_scorer_once():
    config = tiny.CONFIGS["llama"]()
    price = Shape(config.hidden_size).macs(500 - 32, 32)
    rule = {"score": "asked", "schedule": "entry"}
    assert zsaa.macs(config, 500, 0.3, **rule) == zsaa.macs(config, 150) + price
    assert zsaa.macs(config, 500, 0.01, **rule) == zsaa.macs(config, 36) + price
    assert zsaa.macs(config, 500, 1.0, **rule) == zsaa.macs(config, 500)
    spread = zsaa.macs(config, 500, 0.9, score="asked")
    assert spread == zsaa.macs(config, 500, 0.9) + price
    assert zsaa.kept_counts(500, 0.01, 4, 1, "entry", "asked") == [36] * 4
    assert zsaa.kept_counts(20, 0.01, 4, score="asked") == [20] * 4
    large = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_hidden_layers=30
    )
    alpha = zsaa.alpha_for(large, 800, 3.0, **rule)
    assert 2.99 < 3 <= zsaa.mac_reduction(large, 800, alpha, **rule) < 3.02


@pytest.mark.parametrize("schedule", ["entry", "geometric"])
def test_what_is_foretold_of_counts_and_bytes_knows_what_never_leaves(schedule):
    model = model_of("llama", schedule=schedule, alpha=0.2)
    counts = zsaa.kept_counts(70, 0.2, 4, TAU, schedule, "asked")
    with torch.no_grad(), zsaa.trace(model) as t:
        cache = model(tiny.tokens([70])[0], use_cache=True).past_key_values
    assert counts == [layer[0] for layer in t.counts] == [36] * 4
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    rule = {"tau": TAU, "score": "asked", "schedule": schedule}
    assert zsaa.cost.kv_bytes(model.config, 70, 0.2, itemsize=8, **rule) == held
    row = zsaa.report(model, 70, [0.2]).iloc[0]
    assert row["KV bytes"] == held and row["last layer"] == 36
    assert (zsaa.report(model, 70)["last layer"] >= 36).all()


@pytest.mark.full
def test_the_slider_shows_what_this_score_keeps():
    pytest.importorskip("anywidget")
    slider = zsaa.slider(model_of("llama", alpha=0.2), tiny.tokenizer(), " w5 w6" * 35, accuracy=None, prefetch=False)
    try:
        assert slider.wait(60) and list(slider.meta["scores"]) == ["asked"] and slider.score == "asked"
        costs, n = slider._engine.costs(slider._texts[slider.text][0], slider.alphas, [TAU]), 4
        low = costs["slot"][str(TAU)][0]
        assert costs["top"][low] == 36 and costs["share"][low] == 36 / 70
        depth = list(base64.b64decode(slider.point(slider.alphas[0], TAU)["depth"]))
        assert sorted(depth) == [0] * 34 + [n] * 36
        with pytest.raises(ValueError, match="this slider has no score 'random'. It offers: asked"):
            slider.score = "random"
    finally:
        slider.close()
