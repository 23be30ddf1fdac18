"""The document and the question of a prompt told by their text, and the score that goes by words alone."""

import pytest
import tiny
import tokenizers
import torch
import transformers
from tiny import QUIET

import zsaa
from zsaa import finetune
from zsaa.heads.texts import find
from zsaa.learned import asked, salience

DOCUMENT = " ".join(f"w{3 + i * 7 % 90}" for i in range(60))
QUESTION = "w10 w94 w95"


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.padding_side = "left"
    made.chat_template = "{% for m in messages %}w3 w4 {{ m['content'] }} w5 {% endfor %}w6 w7"
    return made


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of byte pairs, as most language models have: a character may take several tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>"])
    backend.train_from_iterator(["the ferry left the harbour at nine"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def model_of(tokenizer, family="llama", alpha=0.5, texts=(), **settings):
    model = tiny.make(family)
    salience.attach(model, asked.by_words(model, tokenizer, texts, chunk=4))
    return zsaa.enable(model, alpha=alpha, **{"score": "asked", "schedule": "entry", **settings})


def prompts(tokenizer, *contents):
    chats = [[{"role": "user", "content": content}] for content in contents]
    return tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)


def test_a_chat_s_document_is_shortened_and_all_else_stays(family, tokenizer):
    """A batch with an alpha and a question each gives what masks made by hand and each sample alone give."""
    others = f"{DOCUMENT} w44", "w90 w91"
    given = prompts(tokenizer, f"{DOCUMENT} w8 {QUESTION}", f"w9 {others[0]} w8 {others[1]}")
    model = model_of(tokenizer, family)
    told = {"document": [DOCUMENT, others[0]], "question": [QUESTION, others[1]]}
    with zsaa.trace(model) as t:
        together = model.generate(**given, **told, tokenizer=tokenizer, alpha=[0.5, 0.4], **QUIET)
    document, question = (torch.zeros_like(given["input_ids"], dtype=torch.bool) for _ in range(2))
    width = document.shape[1]
    for b, (tail, asks, size) in enumerate([(3, 3, 60), (3, 2, 61)]):
        question[b, width - tail - asks : width - tail] = True
        document[b, width - tail - asks - 1 - size : width - tail - asks - 1] = True
    exempt = ~document & (given["attention_mask"] == 1)
    by_hand = model.generate(**given, exempt=exempt, question=question, alpha=[0.5, 0.4], **QUIET)
    assert torch.equal(together, by_hand)
    for b, alpha in enumerate((0.5, 0.4)):
        n = int(given["attention_mask"][b].sum())
        stay = torch.where(exempt[b][-n:])[0].tolist()
        assert set(stay) <= set(t.kept[0][b].tolist()) and t.counts[0][b] == int(alpha * n)
        one = {name: x[b : b + 1, -n:] for name, x in given.items()}
        mine = {name: texts[b] for name, texts in told.items()}
        alone = model.generate(**one, **mine, tokenizer=tokenizer, alpha=alpha, **QUIET)
        assert torch.equal(alone[0, n:], together[b, width:])


def test_the_words_of_the_question_decide(tokenizer):
    """The chunks that hold its words stay, before all others; by whatever rule, the one text counts for all samples."""
    model = model_of(tokenizer, alpha=0.2)
    given = prompts(tokenizer, f"{DOCUMENT} {QUESTION}")
    with zsaa.trace(model) as t:
        model.generate(**given, document=DOCUMENT, question=QUESTION, tokenizer=tokenizer, **QUIET)
    at = 2 + DOCUMENT.split().index("w10")
    assert set(range(at // 4 * 4, at // 4 * 4 + 4)) <= set(t.kept[0][0].tolist()) and t.counts[0] == [int(0.2 * 68)]
    zsaa.disable(model)
    zsaa.enable(model, alpha=0.3, score="column_sum", schedule="geometric")
    both = prompts(tokenizer, f"{QUESTION} {DOCUMENT}", f"{DOCUMENT} {QUESTION} w9")
    with zsaa.trace(model) as t:
        model.generate(**both, exempt=QUESTION, tokenizer=tokenizer, **QUIET)
    assert {2, 3, 4} <= set(t.kept[-1][0].tolist()) and {62, 63, 64} <= set(t.kept[-1][1].tolist())


def test_without_a_document_a_chat_s_closing_marks_stay(tokenizer):
    model = model_of(tokenizer, alpha=0.2)
    given = prompts(tokenizer, f"{DOCUMENT} {QUESTION}")
    with zsaa.trace(model) as t:
        model.generate(**given, question=QUESTION, tokenizer=tokenizer, **QUIET)
    assert set(range(62, 68)) | set(range(4)) <= set(t.kept[0][0].tolist())
    first = prompts(tokenizer, f"{QUESTION} {DOCUMENT}")  # where a document follows it is no closing mark
    with zsaa.trace(model) as t:
        model.generate(**first, question=QUESTION, tokenizer=tokenizer, **QUIET)
    assert t.counts[0] == [int(0.2 * 68)] and set(range(5)) <= set(t.kept[0][0].tolist())


def test_pipelines_beams_and_no_cache(tokenizer):
    model = model_of(tokenizer)
    text, told = f"{DOCUMENT} {QUESTION}", dict(document=DOCUMENT, question=QUESTION, tokenizer=tokenizer)
    given = tokenizer(text, return_tensors="pt")
    want = model.generate(**given, **told, **QUIET)
    for how in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(**given, **told, **how, **QUIET), want), how
    mask = torch.arange(63)[None] >= 60
    beams = dict(QUIET, num_beams=2)
    by_hand = model.generate(**given, exempt=mask, question=mask, **beams)
    assert torch.equal(model.generate(**given, **told, **beams), by_hand)
    run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (out,) = run(text, return_tensors=True, **told, **QUIET)
    assert out["generated_token_ids"] == want[0].tolist()


@pytest.mark.parametrize("score", ["asked", "column_sum"])
def test_a_document_that_is_the_whole_prompt(tokenizer, score):
    schedule = {"asked": "entry", "column_sum": "geometric"}[score]
    model = model_of(tokenizer, score=score, schedule=schedule)
    given = tokenizer([DOCUMENT, DOCUMENT[: DOCUMENT.index(" ", 120)]], return_tensors="pt", padding=True)
    lengths = given["attention_mask"].sum(1).tolist()
    texts = [DOCUMENT, DOCUMENT[: DOCUMENT.index(" ", 120)]]
    with zsaa.trace(model) as t:
        model.generate(**given, document=texts, tokenizer=tokenizer, **QUIET)
    least = 36 if score == "asked" else 5
    assert t.counts[0] == [min(n, max(n // 2, least)) for n in lengths] and lengths[1] < 60


def test_it_is_saved_with_the_model_and_comes_back(tokenizer, tmp_path):
    base = tmp_path / "base"
    tiny.make("llama", dtype=torch.float32).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    salience.attach(model, asked.by_words(model, tokenizer, [DOCUMENT], chunk=4))
    zsaa.enable(model.eval(), score="asked", schedule="entry")
    finetune.save(model, tokenizer, tmp_path / "model")
    again, loaded = finetune.load(tmp_path / "model", kind="causal-lm")
    given = prompts(loaded, f"{DOCUMENT} {QUESTION}")
    told = dict(document=DOCUMENT, question=QUESTION, tokenizer=loaded, alpha=0.3, **QUIET)
    assert torch.equal(again.generate(**given, **told), model.generate(**given, **told))


def test_rare_words_count_more(pieces, tokenizer):
    canon, idf = asked.words_of(97, tokenizer, ["w3 w4", "w3 w5", "w3 w6"])
    assert idf[3] < idf[4] == idf[6] < idf[7] and (idf >= 0).all() and (idf <= asked.RAREST).all()
    assert len(canon) == len(idf) == max(97, len(tokenizer))
    canon, idf = asked.words_of(400, pieces)
    assert len(canon) == 400 and not idf[:255].any() and (idf[256:].diff() > 0).all()
    the = [i for i, p in enumerate(pieces.convert_ids_to_tokens(range(len(pieces)))) if p in ("the", "Ġthe")]
    assert len({canon[i].item() for i in the}) == 1


@pytest.mark.parametrize("text", ["the ferry left", "naïve 漢字 😀?", " nine. ", "cafe\u0301"])
def test_a_text_is_found_whatever_its_characters_take(pieces, text):
    before, after = "the harbour 😀 ", " at nine 漢"
    ids = pieces(before + text + after)["input_ids"]
    place = find(pieces, ids, text)
    said = pieces.decode(ids[place.start : place.stop])
    assert text.strip() in said and len(place) < len(ids)
    for fewer in (ids[place.start + 1 : place.stop], ids[place.start : place.stop - 1]):
        assert text.strip() not in pieces.decode(fewer)
    twice = pieces(f"{before}{text}{after}{before}{text}{after}")["input_ids"]
    assert find(pieces, twice, text).start > len(ids) - 2, "its last place counts"
    assert find(pieces, ids, "nobody") is None and find(pieces, ids, "  ") is None


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        ({"question": "w96 w96"}, ValueError, "question='w96 w96' is not in sample 0 of the prompt.*word for word"),
        ({"question": [QUESTION, QUESTION]}, ValueError, "question has 2 texts, and the prompt 1 samples: give one"),
        ({"question": QUESTION, "tokenizer": None}, ValueError, "is a text, which is found by.*give tokenizer="),
        ({"document": torch.ones(1, 68, dtype=torch.bool)}, TypeError, "document must be a text.*exempt=~mask"),
        ({"document": ""}, ValueError, "document='' is not in sample 0"),
        ({"question": [QUESTION, 3]}, TypeError, "question must be a bool tensor"),
    ],
    ids=str,
)
def test_texts_that_do_not_fit_are_refused(tokenizer, told, error, says):
    model = model_of(tokenizer)
    with pytest.raises(error, match=says):
        model.generate(**prompts(tokenizer, f"{DOCUMENT} {QUESTION}"), **{"tokenizer": tokenizer, **told}, **QUIET)


def test_embeddings_hold_no_text(tokenizer):
    model = zsaa.enable(tiny.make("llama"), alpha=0.5)
    embeds = model.model.embed_tokens(tiny.tokens([9])[0])
    with pytest.raises(ValueError, match="exempt='w3' is a text, and this call gives no input_ids"):
        model.generate(inputs_embeds=embeds, exempt="w3", tokenizer=tokenizer, **QUIET)
    with pytest.raises(TypeError, match="exempt must be a bool tensor .*got a str"):
        model(tiny.tokens([9])[0], exempt="w3")
