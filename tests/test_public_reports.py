"""Situations from public bug reports, tried with the dial on. docs/public_reports.md lists them, with their sources and
outcomes; those that belong to one module are tested there. What is expected comes from the masked reference, from stock
transformers, or from the sample alone."""

import copy
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import datasets
import peft
import pytest
import reference
import tiny
import tokenizers
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets.fingerprint import Hasher
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_model, save_model
from torch.nn.utils import prune
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import zsaa
from zsaa.evaluation import harness

ALPHA, TAU, NEW = 0.7, 3, 6
CLOSE = dict(rtol=1e-5, atol=1e-5)  # PyTorch's RMSNorm rounds to float32 on the way
FEW = ["llama", "gpt2"]
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=NEW)
TELL = dict(GREEDY, return_dict_in_generate=True, output_logits=True, output_scores=True)


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


few = pytest.mark.parametrize("family", FEW)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def _gradients():
    with torch.enable_grad():
        yield


trains = pytest.mark.usefixtures("_gradients")


def dialed(family, head="causal-lm", alpha=ALPHA, **options):
    return zsaa.enable(tiny.make(family, head, **options), alpha=alpha, tau=TAU)


def layers(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def by_reference(family, ids, prompt=None, model=None):
    """Logits [tokens, vocabulary] of ids [tokens], of which the first `prompt` (all, for None) are pruned."""
    model = tiny.make(family, attn_implementation="eager") if model is None else model
    logits = model.get_output_embeddings()(reference.run(model, ids, ALPHA, TAU, prompt=prompt)[0])
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def real(ids, mask):
    """The real tokens of each sample."""
    return [row[keep == 1] for row, keep in zip(ids, mask)]


def close(got, want, **options):
    torch.testing.assert_close(got.double(), want.double(), **{**CLOSE, **options})


# ------------------------------------------------------------------------------------------------------- generation


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


# ---------------------------------------------------------------------------------------------- inputs and outputs


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


def words(lengths):
    return [" ".join(f"w{i}" for i in tiny.tokens([n], seed=n)[0][0].clamp(min=3).tolist()) for n in lengths]


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


# --------------------------------------------------------------------------------------------- training and weights


def rows(lengths):
    texts = [tiny.tokens([n], seed=n)[0][0].tolist() for n in lengths]
    return datasets.Dataset.from_list([{"input_ids": t, "attention_mask": [1] * len(t), "labels": t} for t in texts])


def trainer(model, folder, data=None, collator=None, **options):
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    arguments = transformers.TrainingArguments(str(folder), **quiet, **options)
    return transformers.Trainer(model, arguments, train_dataset=data, data_collator=collator)


@trains
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_accumulation_is_one_large_batch(family, tmp_path):
    """Samples of different lengths: the loss is a mean over all tokens of the step, not of the means."""
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = dialed(family)
        options = dict(max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0)
        collator = transformers.DataCollatorForTokenClassification(tiny.tokenizer())
        batches = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer(model, tmp_path, rows([23, 9, 30, 12]), collator, **options, **batches).train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny.make(family).parameters()])
    assert not torch.equal(found[0], start)
    for other in found[1:]:
        close(other, found[0], rtol=1e-7, atol=1e-7)


@few
def test_trainer_predicts_for_padded_batches_what_the_model_says_of_each_sample(family, tmp_path):
    model, data = dialed(family, "sequence-classification"), rows([23, 9, 30, 12, 7])
    data = data.map(lambda row, i: {"labels": i % 2}, with_indices=True)
    collator = transformers.DataCollatorWithPadding(tiny.tokenizer())
    got = trainer(model, tmp_path, collator=collator, per_device_eval_batch_size=3).predict(data).predictions
    want = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data])
    close(torch.tensor(got), want, rtol=1e-9, atol=1e-9)


@trains
def test_deterministic_algorithms_change_nothing(family):
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for deterministic in (False, True):
        model = dialed(family)
        torch.use_deterministic_algorithms(deterministic)  # memory is then filled with NaN before it is used
        try:
            out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
            out.loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@trains
def test_checkpointing_the_whole_body_replays_the_same_choice(family):
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for wrapped in (False, True):
        model = dialed(family)

        def body(ids, model=model):
            return model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state

        states = torch.utils.checkpoint.checkpoint(body, ids, use_reentrant=False) if wrapped else body(ids)
        states.square().mean().backward()
        found.append([p.grad for p in model.base_model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@trains
@few
def test_functional_gradients_are_the_models(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    model(ids, labels=ids).loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (ids,), {"labels": ids}).loss)(weights)
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


@trains
def test_compiled_training_follows_the_dial(monkeypatch):
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 2
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: config)
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = dialed("llama").train()
        run = torch.compile(model, backend="eager") if compiled else model
        for alpha in (ALPHA, 0.5):
            zsaa.set_alpha(model, alpha)
            model.zero_grad()
            run(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(found[0], found[1])
    for plain, other in zip(found[:2], found[2:]):
        close(other, plain, rtol=1e-7, atol=1e-7)


def test_a_model_that_was_compiled_before_takes_the_dial_on_and_off(monkeypatch):
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 2
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: config)
    torch._dynamo.reset()
    ids = tiny.tokens([23])[0]
    stock, pruned = tiny.make("llama")(ids).logits, dialed("llama")(ids).logits
    model = tiny.make("llama")
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(ids).logits, stock)
    zsaa.enable(compiled, alpha=ALPHA, tau=TAU)
    assert torch.equal(compiled(ids).logits, pruned)
    assert torch.equal(compiled(ids, alpha=1.0).logits, stock)
    zsaa.disable(compiled)
    assert torch.equal(compiled(ids).logits, stock)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of its first use for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@few
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_that_accelerate_prepared_and_gave_back(family):
    """Mixed precision wraps its forward; unwrapping binds it anew."""
    ids = tiny.tokens([23])[0]
    plain = tiny.make(family, dtype=torch.float32)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny.make(family, dtype=torch.float32))
    zsaa.enable(prepared, alpha=ALPHA, tau=TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = zsaa.enable(copy.deepcopy(plain), alpha=ALPHA, tau=TAU)(ids).logits
    assert torch.equal(prepared(ids).logits, want.float())
    alone = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    with zsaa.at(alone, 1.0):
        assert torch.equal(alone(ids).logits, plain(ids).logits)


def lora(family, seed=1, **options):
    targets = {"target_modules": ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]}
    config = peft.LoraConfig(r=4, fan_in_fan_out=family == "gpt2", init_lora_weights=False, **{**targets, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(tiny.make(family), config).eval()


def test_an_adapter_that_is_swapped_while_it_is_in_use(family, tmp_path):
    ids = tiny.tokens([23])[0]
    for name, seed in (("first", 1), ("second", 2)):
        lora(family, seed).save_pretrained(tmp_path / name)
    first, second = (
        zsaa.enable(peft.PeftModel.from_pretrained(tiny.make(family), tmp_path / name).eval(), alpha=ALPHA, tau=TAU)
        for name in ("first", "second")
    )
    want = second(ids).logits
    assert not torch.allclose(first(ids).logits, want)
    hotswap_adapter(first, tmp_path / "second", adapter_name="default")
    assert torch.equal(first(ids).logits, want)
    with rescale_adapter_scale(first, 0.0):
        close(first(ids).logits, dialed(family)(ids).logits, rtol=1e-9, atol=1e-9)
    close(first.merge_and_unload(safe_merge=True)(ids).logits, want)


def test_trained_embeddings_and_head_survive_merging_saving_and_loading(family, tmp_path):
    """Also where they were tied before: then they no longer are."""
    trained = ["wte", "lm_head"] if family == "gpt2" else ["embed_tokens", "lm_head"]
    model, ids = lora(family, modules_to_save=trained), tiny.tokens([23])[0]
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.full_like(parameter, 0.2).cumsum(dim=-1) % 0.3)
    want = zsaa.enable(model, alpha=ALPHA, tau=TAU)(ids).logits
    merged = model.merge_and_unload()
    close(merged(ids).logits, want)
    merged.save_pretrained(tmp_path)
    how = dict(dtype=torch.float64, attn_implementation=merged.config._attn_implementation)
    loaded = zsaa.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval())
    assert zsaa.dial.settings(loaded)["alpha"] == ALPHA
    close(loaded(ids).logits, want)


def test_safetensors_files_hold_the_stock_model(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    other, stock = dialed(family, seed=3), tiny.make(family, seed=4)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model.safetensors")
        for empty in (other, stock):
            load_model(empty, f"{folder}/model.safetensors")
    assert torch.equal(other(ids).logits, model(ids).logits)
    zsaa.set_alpha(model, 1.0)
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_weights_that_torch_prunes_at_each_call_are_used(family):
    """torch.nn.utils.prune computes the weight in a hook of the linear layer."""
    models = [tiny.make(family, attn_implementation=how, dtype=torch.float32) for how in ("sdpa", "eager")]
    for model in models:
        for layer in layers(model):
            linear = layer.mlp.c_fc if family == "gpt2" else layer.mlp.up_proj
            prune.l1_unstructured(linear, "weight", amount=0.5)
    ids = tiny.tokens([23])[0]
    got = zsaa.enable(models[0], alpha=ALPHA, tau=TAU)(ids).logits[0]
    close(got, by_reference(family, ids[0], model=models[1]), rtol=1e-3, atol=1e-3)


@few
def test_a_data_set_that_was_mapped_at_another_alpha_is_not_taken_for_this_one(family):
    """datasets finds a finished map by a hash of the function, and of the model in it."""
    model = dialed(family)
    hashes = [Hasher.hash(model)]
    zsaa.set_alpha(model, 0.9)
    hashes.append(Hasher.hash(model))
    for alpha in (0.3, 0.2):
        with zsaa.at(model, alpha):
            hashes.append(Hasher.hash(model))
    assert len(set(hashes)) == 4
    model(tiny.tokens([23])[0])
    assert Hasher.hash(model) == hashes[1]


def test_two_decoders_in_one_module_are_refused_by_name():
    pair = torch.nn.ModuleDict({"student": tiny.make("llama"), "teacher": tiny.make("llama", seed=1)})
    with pytest.raises(zsaa.UnsupportedModelError, match=r"2 decoders \(student.model, teacher.model\)"):
        zsaa.enable(pair, alpha=ALPHA)
    encoder, config = tiny.make("gpt2", "base"), tiny.CONFIGS["gpt2"]()
    config.add_cross_attention = config.is_decoder = True
    both = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.GPT2LMHeadModel(config))
    with pytest.raises(zsaa.UnsupportedModelError, match="2 decoders"):
        zsaa.enable(both, alpha=ALPHA)
    zsaa.enable(pair["student"], alpha=ALPHA)
    shared = torch.nn.ModuleDict({"one": pair["student"], "again": pair["student"]})
    zsaa.set_alpha(shared, 0.5)
    assert zsaa.dial.settings(pair["student"])["alpha"] == 0.5


# ------------------------------------------------------------------------------------- other people's code in the model


def attention(model, layer=1):
    layer = layers(model)[layer]
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


def silence(output):
    return torch.zeros_like(output[0]), *output[1:]


def put_hook(module):
    module.register_forward_hook(lambda _, args, output: silence(output))


def put_pre_hook(module):
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)


def put_forward(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: silence(before(*args, **kwargs))


def put_class(module):
    class Silent(type(module)):
        def forward(self, *args, **kwargs):
            return silence(super().forward(*args, **kwargs))

    module.__class__ = Silent


@pytest.mark.parametrize("put", [put_hook, put_pre_hook, put_forward, put_class], ids=lambda put: put.__name__)
def test_what_hangs_on_an_attention_is_called_or_refused(family, put):
    """A pruned pass computes attention itself, so a hook there (kvpress, activation patching) would do nothing."""
    model, ids = dialed(family, alpha=1.0), tiny.tokens([23])[0]
    stock = tiny.make(family)
    for plain in (model, stock):
        put(attention(plain))
    assert torch.equal(model(ids).logits, stock(ids).logits)
    with zsaa.at(model, ALPHA), pytest.raises(RuntimeError, match="the attention of layer 1 has a (hook|forward)"):
        model(ids)


def test_hooks_that_transformers_leaves_behind_are_no_hindrance(family):
    """It records hidden states and attentions by hooks, which stay."""
    model, ids = dialed(family, attn_implementation="eager"), tiny.tokens([23])[0]
    want = model(ids).logits
    with zsaa.at(model, 1.0):
        model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(model(ids).logits, want)


def test_a_hook_on_a_layer_is_told_which_rows_it_sees(family):
    """One that treats all rows alike (steering) is right; one that looks for a column is warned."""
    ids, mask, positions = tiny.tokens([23, 9], padding="left")
    model, eager = dialed(family), tiny.make(family, attn_implementation="eager")
    push = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for plain in (model, eager):
        layers(plain)[1].register_forward_hook(
            lambda _, args, out: (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push
        )
    with pytest.warns(UserWarning, match="a hook on layer 1 of the decoder sees the rows that are alive"):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    for b, text in enumerate(real(ids, mask)):
        close(got[b, -1], by_reference(family, text, model=eager)[-1])


def test_attention_functions_of_ones_own_are_used_or_refused(family, monkeypatch):
    def cold(module, q, k, v, mask, **kwargs):
        return sdpa_attention_forward(module, 0.5 * q, k, v, mask, **{**kwargs, "softcap": None})

    if family == "gemma2":
        pytest.skip("transformers offers it no sdpa")
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "cold", cold)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "cold", sdpa_mask)
    model, ids = dialed(family), tiny.tokens([23])[0]
    want = model(ids).logits
    model.set_attn_implementation("cold")
    with pytest.raises(ValueError, match="attn_implementation='cold'"):
        model(ids)
    with zsaa.at(model, 1.0):
        assert not torch.allclose(model(ids).logits, tiny.make(family)(ids).logits)
    model.set_attn_implementation("eager")
    close(model(ids).logits, want)


def test_a_softcap_that_transformers_ignores_is_ignored(monkeypatch):
    """Gemma 3 still stores Gemma 2's, and does not apply it."""
    config = tiny.CONFIGS["gemma3_text"]()
    config.attn_logit_softcapping = 0.5
    monkeypatch.setitem(tiny.CONFIGS, "gemma3_text", lambda: config)
    ids = tiny.tokens([23])[0]
    close(dialed("gemma3_text")(ids).logits[0], by_reference("gemma3_text", ids[0]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dispatched_model_is_pruned_and_takes_the_dial_off_only_after_its_hooks(family, tmp_path):
    """accelerate gives each layer a forward of its own; here one layer's weights wait on the disk."""
    model, ids = dialed(family, dtype=torch.float32), tiny.tokens([23])[0]
    want, other = model(ids).logits, dialed(family, alpha=0.5, dtype=torch.float32)(ids).logits
    body = "transformer" if family == "gpt2" else "model"
    places = {name: "cpu" for name, _ in model.named_children() if name != body}
    places |= {f"{body}.{name}": "cpu" for name, _ in model.base_model.named_children() if name not in ("h", "layers")}
    blocks = f"{body}.{'h' if family == 'gpt2' else 'layers'}"
    places |= {f"{blocks}.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    accelerate.dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu")
    close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    zsaa.enable(model, alpha=0.5)
    close(model(ids).logits, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="remove_hook_from_submodules"):
        zsaa.disable(model)
    close(model(ids).logits, other, rtol=1e-4, atol=1e-4)


KEPT_LAYERS = {"fewer": [0, 1], "one left out": [0, 2, 3], "one twice": [0, 1, 1, 2, 3], "reversed": [3, 2, 1, 0]}


@pytest.mark.parametrize("which", KEPT_LAYERS)
@few
def test_layers_that_were_cut_out_after_enabling_are_noticed(family, which):
    """Depth pruning by hand. What is numbered anew and enabled again is right."""
    kept, ids = KEPT_LAYERS[which], tiny.tokens([23])[0]

    def cut(model):
        chosen = torch.nn.ModuleList([copy.deepcopy(layers(model)[i]) for i in kept])
        setattr(model.base_model, "h" if family == "gpt2" else "layers", chosen)
        model.config.num_hidden_layers = len(kept)

    def number(model):
        for i in range(len(kept)):
            attention(model, i).layer_idx = i

    eager = tiny.make(family, attn_implementation="eager")
    cut(eager)
    number(eager)
    want, model = by_reference(family, ids[0], model=eager), dialed(family)
    cut(model)
    if which == "fewer":
        close(model(ids, use_cache=False).logits[0], want)
    else:
        with pytest.raises(RuntimeError, match="layer_idx"):
            model(ids, use_cache=False)
    number(model)
    close(zsaa.enable(model)(ids).logits[0], want)


@few
def test_exporting_leaves_no_fake_tensors_behind(family):
    """What is kept for later passes (plans) must not be made of what torch.export traces with."""
    models, ids = [dialed(family) for _ in range(2)], tiny.tokens([37], seed=1)[0]  # a length that no other test has
    programs = [
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False) for model in models
    ]
    other = tiny.tokens([37], seed=2)[0]
    want = by_reference(family, other[0])
    close(models[0](other).logits[0], want)
    for program in programs:
        close(program.module()(input_ids=other, use_cache=False).logits[0], want)


def test_tracing_is_refused(monkeypatch):
    model = dialed("llama")
    model.config.use_cache = model.config.return_dict = False
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(model, (tiny.tokens([23])[0],), strict=False, check_trace=False)


# ------------------------------------------------------------------------------------------------ what is not there


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


# ------------------------------------------------------------------------------------------------------ the tools


def word_tokenizer(bos):
    """Words, with or without a BOS before each text, as Gemma's and Llama's tokenizers put there."""
    tokenizer = tiny.tokenizer()
    if bos:
        single = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer._tokenizer.post_processor = single
    return tokenizer


def lm_requests(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


LM_EVAL = {
    "plain": {},
    "add_bos_token": {"add_bos_token": True},
    "a tokenizer with BOS": {"bos": True},
    "both": {"bos": True, "add_bos_token": True},
    "prefix_token_id": {"prefix_token_id": 5},
    "max_length": {"max_length": 12},
    "truncation": {"max_length": 12, "truncation": True},
    "logits_cache": {"logits_cache": False},
    "think_end_token": {"think_end_token": "w5"},
}


@pytest.mark.parametrize("setting", LM_EVAL)
def test_lm_evals_settings_mean_the_same_as_without_the_dial(setting):
    """At an alpha that keeps every token the scores are lm-eval's own, of its own model class, whatever is set."""
    options = dict(LM_EVAL[setting])
    options |= {"tokenizer": word_tokenizer(options.pop("bos", False)), "batch_size": 2}
    ours, theirs = harness.ZsaaLM(tiny.make("llama"), 0.9999, 1000, **options), HFLM(tiny.make("llama"), **options)
    texts = words([30, 9, 1, 17])
    answers = " w3 w4", " w20", " w5 w3 w9", " w40"
    asked = lm_requests([*zip(texts, answers, strict=True), (texts[1], " w21"), ("", "w3 w4 w5")])
    scores = [model.loglikelihood(asked, disable_tqdm=True) for model in (ours, theirs)]
    for (mine, is_mine), (its, is_its) in zip(*scores, strict=True):
        assert mine == pytest.approx(its, rel=1e-9) and is_mine == is_its
    until = lm_requests([(text, {"max_gen_toks": 5, "until": ["w7"]}) for text in texts], "generate_until")
    assert ours.generate_until(until, disable_tqdm=True) == theirs.generate_until(until, disable_tqdm=True)


def test_a_bos_of_the_tokenizer_is_not_doubled_and_not_scored():
    """In perplexity tasks each piece is read after BOS and the tokens before it, N in all."""
    text, n = words([50])[0], 12
    model = harness.ZsaaLM(tiny.make("llama"), ALPHA, TAU, tokenizer=word_tokenizer(True), rolling_prefix=n)
    bos, *ids = word_tokenizer(True)(text).input_ids
    assert bos == 1 and len(ids) == 50
    want = 0.0
    for start in range(0, len(ids), n):
        context, piece = [bos, *ids[max(0, start - n + 1) : start]], ids[start : start + n]
        read = by_reference("llama", torch.tensor(context + piece[:-1]), len(context))[len(context) - 1 :]
        want += float(read.log_softmax(-1).gather(1, torch.tensor(piece)[:, None]).sum())
    got = model.loglikelihood_rolling(lm_requests([(text,), ("",)], "loglikelihood_rolling"), disable_tqdm=True)
    assert got == pytest.approx([want, 0.0], rel=1e-6)


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_names_tests_that_exist_and_all_of_this_file():
    tests = Path(__file__).parent
    text = (tests.parent / "docs/public_reports.md").read_text(encoding="utf-8")
    table = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 4 for row in table), "a row has a source, a situation, an outcome and a test"
    named = set()
    for *_, cell in (row for row in table if row[0].strip() != "source"):
        found = re.findall(r"`(test_\w+)::(test_\w+)`", cell)
        assert found, f"no test is named in: {cell}"
        for file, name in found:
            assert re.search(rf"^def {name}\(", (tests / f"{file}.py").read_text(encoding="utf-8"), re.M), (file, name)
        named |= {name for file, name in found if file == Path(__file__).stem}
    here = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.M))
    assert here - named == {"test_the_table_names_tests_that_exist_and_all_of_this_file"}
