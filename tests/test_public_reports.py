"""Situations from public bug reports, tried with the dial on. docs/public_reports.md lists them, with their sources and
outcomes; those that belong to one module are tested there. What is expected comes from the masked reference, from stock
transformers, or from the sample alone. Here: generation, inputs and outputs, what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import tiny
import torch
import transformers
from reported import (
    ALPHA,
    GREEDY,
    NEW,
    TAU,
    TELL,
    apart,  # noqa: F401 - the fixture `family` of every test here
    by_reference,
    close,
    dialed,
    few,
    no_gradients,  # noqa: F401 - of every test here
    real,
    words,
)

import zsaa

# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("other_lengths", [[17, 11], [31, 23]], ids=["shorter", "longer"])
def test_guidance_prunes_the_negative_prompt_too(family, other_lengths, use_cache):
    """Guidance runs the model a second time inside each step, on a text of its own."""
    # GPT-2's positions are absolute, and guidance gives none for a padded negative prompt: let it have no padding.
    other_lengths = [other_lengths[0]] * 2 if family == "gpt2" else other_lengths
    ids, mask, _ = tiny.tokens([23, 9], padding="left")
    other, other_mask, _ = tiny.tokens(other_lengths, seed=5, padding="left")
    guided = dict(guidance_scale=2.5, negative_prompt_ids=other, negative_prompt_attention_mask=other_mask)
    out = dialed(family).generate(ids, attention_mask=mask, use_cache=use_cache, **guided, **TELL)
    for b, (prompt, negative) in enumerate(zip(real(ids, mask), real(other, other_mask))):
        with_it, without = (
            by_reference(family, torch.cat([p, out.sequences[b, 23:]]), len(p))[len(p) - 1 : -1].log_softmax(-1)
            for p in (prompt, negative)
        )
        close(torch.stack([step[b] for step in out.scores]), without + 2.5 * (with_it - without), atol=1e-4)


@pytest.mark.parametrize("width", [9, 31])
@few
def test_other_texts_inside_generate_are_texts_of_their_own(family, width):
    """A processor of logits asks the model about another text, and has it continued."""
    model, ids, other = dialed(family), tiny.tokens([23])[0], tiny.tokens([width], seed=4)[0]
    want, said = model(other).logits, model.generate(other, **GREEDY)
    free = model.generate(ids, **GREEDY)
    seen = []

    class Asking(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((model(other).logits, model.generate(other, **GREEDY)))
            return scores

    assert torch.equal(model.generate(ids, logits_processor=[Asking()], **GREEDY), free)
    assert all(torch.equal(logits, want) and torch.equal(text, said) for logits, text in seen)


def test_a_pruned_prefix_goes_on_with_texts_of_several_lengths(family):
    """One prefix, prefilled once and repeated; padding lies between it and the shorter texts."""
    prefix, lengths = tiny.tokens([23])[0], [6, 3, 4]
    ids, mask, _ = tiny.tokens(lengths, seed=5, padding="left")
    model, cache = dialed(family), transformers.DynamicCache()
    model(prefix, past_key_values=cache)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    whole = torch.cat([prefix.expand(3, -1), ids], dim=1)
    mask = torch.cat([torch.ones(3, 23, dtype=torch.long), mask], dim=1)
    out = model.generate(whole, attention_mask=mask, past_key_values=cache, **TELL)
    for b, text in enumerate(real(whole, mask)):
        want = by_reference(family, torch.cat([text, out.sequences[b, 29:]]), 23)[len(text) - 1 : -1]
        close(torch.stack([step[b] for step in out.logits]), want)


def test_beams_over_a_pruned_prefix_score_as_the_reference(family):
    prefix, rest = tiny.tokens([23])[0], tiny.tokens([5], seed=5)[0]
    model, cache = dialed(family), transformers.DynamicCache()
    model(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    beams = dict(num_beams=3, num_return_sequences=3, length_penalty=0.0, past_key_values=cache)
    out = model.generate(torch.cat([prefix, rest], dim=1), **beams, **TELL)
    steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    close(steps.sum(dim=1), out.sequences_scores)
    for text, score in zip(out.sequences, out.sequences_scores):
        likelihoods = by_reference(family, text, 23)[27:-1].log_softmax(-1)
        close(score, likelihoods.gather(1, text[28:, None]).sum(), atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, ALPHA])
def test_generate_goes_on_from_the_last_token_of_a_prefill_of_ones_own(family, alpha):
    """generate is given one token and a mask for all: its positions must be those after the whole prompt."""
    ids, mask, positions = tiny.tokens([23, 9], padding="left")
    model, cache = dialed(family, alpha=alpha), transformers.DynamicCache()
    want = model.generate(ids, attention_mask=mask, **GREEDY)[:, 23:]
    prefill = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    first = prefill.logits[:, -1].argmax(dim=-1, keepdim=True)
    mask = torch.cat([mask, torch.ones_like(first)], dim=1)
    options = dict(GREEDY, max_new_tokens=NEW - 1)
    assert torch.equal(model.generate(first, attention_mask=mask, past_key_values=cache, **options), want)


def test_a_decoding_loop_of_ones_own_tries_candidates_on_copies_of_the_cache(family):
    """As contrastive search does: the cache is repeated for four candidates, one of them goes on."""
    seen = []

    def loop(model, input_ids, **_):
        cache, text = transformers.DynamicCache(), input_ids
        logits = model(input_ids, past_key_values=cache).logits[:, -1]
        for _ in range(NEW):
            candidates = logits.topk(4).indices[0]
            tried = copy.deepcopy(cache)
            tried.batch_repeat_interleave(4)
            every = model(candidates[:, None], past_key_values=tried).logits[:, -1]
            best = every.max(dim=-1).values.argmax()
            tried.batch_select_indices(best[None])
            cache, logits, text = tried, every[best][None], torch.cat([text, candidates[best][None, None]], dim=1)
            seen.append(logits)
        return text

    text = dialed(family).generate(tiny.tokens([23])[0], custom_generate=loop, **GREEDY)
    close(torch.cat(seen), by_reference(family, text[0], 23)[23:])


def test_verification_by_hand_crops_what_was_wrong(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    want = model.generate(ids, **GREEDY)[0, 23:].tolist()
    cache = transformers.DynamicCache()
    said = [int(model(ids, past_key_values=cache).logits[0, -1].argmax())]
    while len(said) < NEW:
        draft = [want[len(said)], (want[min(len(said) + 1, NEW - 1)] + 1) % 97]  # the second is wrong
        read = model(torch.tensor([[said[-1], *draft]]), past_key_values=cache).logits[0].argmax(-1).tolist()
        said += [draft[0], read[1]]
        cache.crop(-1)
    assert said[:NEW] == want


def test_samples_that_end_early_leave_the_others_as_they_are(family):
    ids, mask, _ = tiny.tokens([23, 9, 15], padding="left")
    model = dialed(family)
    free = model.generate(ids, attention_mask=mask, **GREEDY)[:, 23:]
    end = int(free[1, 2])
    ended = model.generate(ids, attention_mask=mask, **{**GREEDY, "eos_token_id": end})[:, 23:]
    for text, got in zip(free.tolist(), ended.tolist()):
        length = text.index(end) + 1 if end in text else NEW
        assert got[:length] == text[:length] and not any(got[length:])


# --------------------------------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_heads_that_read_every_row_get_the_states_of_the_reference(family, head, monkeypatch):
    """A dropped token has the state in which it entered its last layer; padding has none."""
    auto = getattr(transformers, f"AutoModelFor{head}")
    if type(tiny.CONFIGS[family]()) not in auto._model_mapping:
        pytest.skip(f"transformers has no {head} head for it")
    monkeypatch.setitem(tiny.HEADS, head, auto)
    eager, ids, mask = tiny.make(family, head, attn_implementation="eager"), *tiny.tokens([23, 9])[:2]
    out = dialed(family, head)(ids, attention_mask=mask)
    got = torch.stack([out.start_logits, out.end_logits], dim=-1) if "start_logits" in out else out.logits
    top = next(getattr(eager, name) for name in ("score", "classifier", "qa_outputs") if hasattr(eager, name))
    for b, text in enumerate(real(ids, mask)):
        close(got[b, : len(text)], top(reference.run(eager, text, ALPHA, TAU)[0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_sentence_embeddings_do_not_depend_on_the_batch(family, side):
    model = dialed(family, "base")
    ids, mask, positions = tiny.tokens([23, 9], padding=side)
    states = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    means = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    for mean, text in zip(means, real(ids, mask)):
        close(mean, model(text[None]).last_hidden_state[0].mean(dim=0), rtol=1e-9, atol=1e-9)


def test_feature_extraction_in_batches(family):
    pipe = transformers.pipeline("feature-extraction", model=dialed(family, "base"), tokenizer=tiny.tokenizer())
    texts = words([23, 9])
    for text, together in zip(texts, pipe(texts, batch_size=2)):
        alone = torch.tensor(pipe(text))[0]
        close(torch.tensor(together)[0, : len(alone)], alone, rtol=1e-9, atol=1e-9)


def test_zero_shot_classification_in_batches(family):
    model = tiny.make(family, "sequence-classification")
    model.config.label2id = {"contradiction": 0, "entailment": 1}
    tools = dict(tokenizer=tiny.tokenizer(), candidate_labels=["w5 w6", "w7"], hypothesis_template="w9 {}")
    pipe = transformers.pipeline("zero-shot-classification", model=zsaa.enable(model, alpha=ALPHA, tau=TAU), **tools)
    texts = words([23, 9])
    for alone, together in zip([pipe(text) for text in texts], pipe(texts, batch_size=4), strict=True):
        assert alone["labels"] == together["labels"]
        assert alone["scores"] == pytest.approx(together["scores"], rel=1e-9)


def test_holes_in_the_mask_are_hidden_as_stock_hides_them(family):
    """Words masked out inside a text (as prompt compression does). The pruned code path keeps all here, so stock is the
    reference, sliding windows included."""
    ids = tiny.tokens([23, 23])[0]
    mask = torch.ones_like(ids)
    mask[1, [3, 4, 11]] = 0
    where = torch.arange(23).expand(2, -1)
    model = dialed(family, alpha=1.0, dtype=torch.float32 if family == "gemma2" else torch.float64)
    want = model(ids, attention_mask=mask, position_ids=where).logits
    with zsaa.trace(model) as t:
        got = model(ids, attention_mask=mask, position_ids=where).logits
    assert t.lengths == [23, 20]
    close(got[mask == 1], want[mask == 1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_vision_language_model_is_its_language_model_on_the_same_embeddings(family):
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=tiny.CONFIGS[family](), image_token_index=5, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=torch.float64).eval()
    text = tiny.make(family)
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    for plain in (model, text):
        zsaa.enable(plain, alpha=ALPHA, tau=TAU)
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    ids = torch.cat([torch.tensor([[1, 7, 8]]), torch.full((1, 16), 5), tiny.tokens([9])[0].clamp(min=6)], dim=1)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True, prepend=True
    )
    got = model(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids)).logits
    hook.remove()
    close(got, text(inputs_embeds=seen[0]).logits, rtol=1e-9, atol=1e-9)
    out = model.generate(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(out[:, 28:], text.generate(inputs_embeds=seen[0], **GREEDY))


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
VARIANTS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 2}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("gemma2", {"query_pre_attn_scalar": 7}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"query_pre_attn_scalar": 7}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_what_a_configuration_may_say_is_heeded(family, changes, monkeypatch):
    config = tiny.CONFIGS[family]().to_dict()
    if family != "gemma3_text":  # made from the windows
        config.pop("layer_types", None)
    kind = type(tiny.CONFIGS[family]())
    monkeypatch.setitem(tiny.CONFIGS, family, lambda: kind(**{**config, **changes}))
    ids = tiny.tokens([30])[0]
    want = by_reference(family, ids[0])
    close(dialed(family)(ids).logits[0], want)
    with pytest.raises(AssertionError):
        close(tiny.make(family, attn_implementation="eager")(ids).logits[0, -1:], want[-1:])


# ---------------------------------------------------------------------------------------------------- what is not there


def test_prompts_that_end_in_padding_are_refused_by_generate(family):
    ids, mask, _ = tiny.tokens([23, 9])
    model = dialed(family)
    with pytest.raises(ValueError, match="sample 1 of the prompt ends in padding"):
        model.generate(ids, attention_mask=mask, **GREEDY)
    assert model.generate(ids, attention_mask=torch.ones_like(mask), **GREEDY).shape == (2, 23 + NEW)


def test_the_body_of_a_classifier_gives_every_token_a_state(family):
    """Sentence embeddings from a classifier's decoder: a mean over its rows."""
    ids = tiny.tokens([23])[0]
    model = dialed(family, "sequence-classification")
    want = dialed(family, "base")
    want.load_state_dict(model.base_model.state_dict())
    assert torch.equal(model.base_model(ids).last_hidden_state, want(ids).last_hidden_state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_early_layers_are_read_where_the_last_token_stands(family, side):
    """As DoLa does, which contrasts the last token's states of early and late layers."""
    ids, mask, positions = tiny.tokens([23, 9], padding=side)
    model = dialed(family)
    states = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
    assert all(layer.shape == (2, 23, 32) for layer in states)
    for b, text in enumerate(real(ids, mask)):
        alone = model(text[None], output_hidden_states=True).hidden_states
        last = 22 if side == "left" else len(text) - 1
        for layer, want in zip(states, alone, strict=True):
            close(layer[b, last], want[0, -1], rtol=1e-9, atol=1e-9)


@few
def test_caches_that_do_not_fit_are_named(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    stock = tiny.make(family)(ids, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        model(ids[:, :3], past_key_values=tuple((layer.keys, layer.values) for layer in stock.layers))
    config = tiny.CONFIGS[family]()
    config.num_hidden_layers = 6
    deeper = zsaa.enable(transformers.AutoModelForCausalLM.from_config(config).double().eval(), alpha=ALPHA)
    with pytest.raises(ValueError, match="filled by 4 layers, and the model now runs 6"):
        deeper(ids[:, :3], past_key_values=model(ids, use_cache=True).past_key_values)


@few
def test_assisted_decoding_over_a_filled_cache_is_refused(family):
    """transformers feeds it the whole text again, on top of the cache: stock's own answer is wrong there."""
    model, ids = dialed(family), tiny.tokens([23])[0]
    first = model.generate(ids, **TELL)
    again = torch.cat([first.sequences, tiny.tokens([6], seed=4)[0]], dim=1)
    with pytest.raises(ValueError, match="start from an empty cache"):
        model.generate(again, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3, **GREEDY)


def test_an_assistant_whose_text_ends_in_its_pad_token(family):
    """transformers infers its mask from the token, and takes it for padding."""
    ids = tiny.tokens([23])[0]
    ids[0, -1] = 0
    model, draft = dialed(family), dialed(family, alpha=0.5, seed=1)
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, assistant_model=draft, **GREEDY), want)


def test_copies_of_data_parallel_are_told_that_they_see_no_block():
    """Trainer's way with several GPUs in one process: each copy runs in a thread of its own."""
    model, ids = dialed("llama", alpha=1.0), tiny.tokens([23])[0]
    model.base_model._is_replica = True  # as torch.nn.DataParallel marks its copies
    with ThreadPoolExecutor(1) as thread:
        with zsaa.at(model, ALPHA), pytest.raises(RuntimeError, match="torch.nn.DataParallel"):
            thread.submit(model, ids).result()
        with zsaa.at(model, ALPHA):
            here, there = model(ids).logits, thread.submit(model, ids, alpha=ALPHA).result().logits
        zsaa.set_alpha(model, ALPHA)
        everywhere = thread.submit(model, ids).result().logits
    assert torch.equal(there, here) and torch.equal(everywhere, here)


def test_a_batch_without_samples_is_named():
    with pytest.raises(ValueError, match="the input has no samples"):
        dialed("llama")(torch.zeros(0, 5, dtype=torch.long))
