"""generate(), pipelines, chats and caches under the dial, against the masked reference, for every family."""

import threading

import pytest
import reference
import tiny
import torch
import transformers

import zsaa

ALPHA, TAU, NEW = 0.7, 3, 7
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
QUIET = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)


def dialed(family, alpha=ALPHA, seed=0):
    return zsaa.enable(tiny.make(family, seed=seed), alpha=alpha, tau=TAU)


def reference_logits(family, ids, prompt, alpha=ALPHA, score="column_sum"):
    """Logits [tokens, vocabulary] of ids [tokens], of which the first `prompt` are pruned and the rest decoded."""
    eager = tiny.make(family, attn_implementation="eager")
    with torch.no_grad():
        hidden, _ = reference.run(eager, ids, alpha, TAU, score, prompt)
        logits = eager.get_output_embeddings()(hidden)
    cap = getattr(eager.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def check_logits(family, out, b, prompt, row=None, alpha=ALPHA):
    """Every step's logits of sample b equal the reference's along the text that was generated."""
    row = b if row is None else row
    text = torch.cat([prompt, out.sequences[row, -NEW:]])
    want = reference_logits(family, text, len(prompt), alpha)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack([step[row] for step in out.logits]).double(), want, **TOLERANCE)


@pytest.mark.parametrize(
    "strategy", [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 1.3}], ids=str
)
def test_each_step_of_a_left_padded_batch_equals_the_reference(family, strategy):
    lengths = [23, 9, 30]
    ids, mask, _ = tiny.tokens(lengths, padding="left")
    torch.manual_seed(0)
    options = dict(QUIET, output_logits=True, return_dict_in_generate=True, **strategy)
    out = dialed(family).generate(ids, attention_mask=mask, **options)
    for b in range(len(lengths)):
        check_logits(family, out, b, ids[b][mask[b] == 1])


def test_beam_search_scores_are_the_references(family):
    ids = tiny.tokens([23])[0]
    options = dict(QUIET, num_beams=3, num_return_sequences=3, output_scores=True, return_dict_in_generate=True)
    out = dialed(family).generate(ids, length_penalty=0.0, do_sample=False, **options)
    for row in range(3):
        logits = reference_logits(family, out.sequences[row], 23)[22:-1]
        total = logits.log_softmax(-1).gather(1, out.sequences[row, 23:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row].double(), total, rtol=1e-4, atol=1e-4)


def test_a_second_turn_continues_the_pruned_cache(family):
    """Turn 2 is appended as it is; the logits along turn 2 equal the reference with only turn 1's prompt pruned."""
    first, second = tiny.tokens([23])[0], tiny.tokens([6], seed=4)[0]
    model = dialed(family)
    options = dict(QUIET, do_sample=False, return_dict_in_generate=True, output_logits=True)
    one = model.generate(first, **options)
    history = torch.cat([one.sequences, second], dim=1)
    mask = torch.ones_like(history)
    two = model.generate(history, attention_mask=mask, past_key_values=one.past_key_values, **options)
    assert torch.equal(two.sequences[:, : history.shape[1]], history)
    want = reference_logits(family, two.sequences[0], 23)[history.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.cat(two.logits).double(), want, **TOLERANCE)
    sizes = [layer.keys.shape[2] for layer in two.past_key_values.layers]
    entered = [23, *zsaa.kept_counts(23, ALPHA, 4, TAU)[:-1]]
    assert sizes == [n + two.sequences.shape[1] - 1 - 23 for n in entered]


@pytest.mark.parametrize("draft", ["itself", "another", "another-with-dial", "prompt-lookup"])
def test_assisted_decoding_gives_the_greedy_text(family, draft):
    """Candidates follow the prompt in the very first pass: they must neither vote nor be dropped."""
    if draft in ("itself", "another") and family in (*tiny.MIXED_CACHES, "mistral"):
        pytest.importorskip("transformers", minversion="5.18", reason="older ones cannot crop a sliding stock cache")
    ids = tiny.tokens([23])[0].repeat(1, 2)  # repeats, so that prompt lookup finds something
    model = dialed(family)
    options = dict(QUIET, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    want = model.generate(ids, **options)
    if draft == "prompt-lookup":
        how = {"prompt_lookup_num_tokens": 3}
    else:
        other = tiny.make(family, seed=0 if draft == "itself" else 1)
        other = zsaa.enable(other, alpha=0.5, tau=TAU) if draft == "another-with-dial" else other
        other.generation_config.num_assistant_tokens = 4
        how = {"assistant_model": other}
    seen = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    got = model.generate(ids, **options, **how)
    hook.remove()
    assert torch.equal(got, want)
    assert draft != "itself" or (seen[0] > ids.shape[1] and len(seen) < 20), "no candidate was ever tried"


def test_streaming_and_stop_strings(family):
    tokenizer = tiny.tokenizer()
    model = dialed(family)
    ids = tiny.tokens([23])[0]
    want = model.generate(ids, **QUIET, do_sample=False)[0, 23:]
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = dict(QUIET, inputs=ids, do_sample=False, streamer=streamer)
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == tokenizer.decode(want)
    thread.join()
    stop = tokenizer.decode(want[3])
    first = want.tolist().index(want[3].item())
    options = dict(max_new_tokens=NEW, pad_token_id=0, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    options["eos_token_id"] = None
    assert model.generate(ids, **options)[0, 23:].tolist() == want[: first + 1].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_alpha_per_request_equals_separate_calls(family, side):
    lengths, alphas = [23, 9, 30, 23], [0.7, 0.5, 1.0, 0.31]
    ids, mask, positions = tiny.tokens(lengths, padding=side)
    model = dialed(family)
    zsaa.set_alpha(model, torch.tensor(alphas))  # float32: 0.7 must still mean 0.7
    with zsaa.trace(model) as t:
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for b, (n, alpha) in enumerate(zip(lengths, alphas)):
        assert [layer[b] for layer in t.counts] == zsaa.kept_counts(n, alpha, 4, TAU)
        with zsaa.at(model, alpha):
            alone = model(ids[b][mask[b] == 1][None]).logits[0]
        torch.testing.assert_close(logits[b][mask[b] == 1], alone, **TOLERANCE)
    if side == "left":
        for how in ({"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2, "do_sample": False}):
            together = model.generate(ids, attention_mask=mask, **QUIET, **how)[:, -NEW:].unflatten(0, (4, -1))
            for b, alpha in enumerate(alphas):
                with zsaa.at(model, alpha):
                    alone = model.generate(ids[b][mask[b] == 1][None], **QUIET, **how)
                assert torch.equal(together[b], alone[:, -NEW:])


def test_alphas_that_do_not_fit_the_batch():
    model = zsaa.enable(tiny.make("llama"), alpha=[0.5, 0.9])
    assert zsaa.dial.settings(model)["alpha"] == (0.5, 0.9)
    with pytest.raises(ValueError, match="alpha has 2 values, one per request, but the batch holds 3 samples"):
        model(tiny.tokens([5, 5, 5])[0])
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got 1.5"):
        zsaa.set_alpha(model, torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="alpha is empty"):
        zsaa.set_alpha(model, [])
    with pytest.raises(TypeError, match="alpha must be a number"):
        zsaa.set_alpha(model, [0.5, "x"])
    zsaa.set_alpha(model, torch.tensor(0.7))
    assert zsaa.dial.settings(model)["alpha"] == 0.7


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_pipelines(family, task):
    tokenizer = tiny.tokenizer()
    head = "causal-lm" if task == "text-generation" else "sequence-classification"
    texts = ["w7 w8 w9 " * 9, "w3 w4 w5 w6 " * 3]
    tokenizer.padding_side = "left" if task == "text-generation" else "right"
    results = {}
    for alpha in (0.99, ALPHA):
        model = zsaa.enable(tiny.make(family, head), alpha=alpha, tau=TAU)
        run = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        more = dict(QUIET, do_sample=False, return_full_text=False) if task == "text-generation" else {"top_k": None}
        more.pop("pad_token_id", None)
        together = run(texts, batch_size=2, **more)
        alone = [run(text, **more) for text in texts]
        results[alpha] = together
        if task == "text-generation":
            assert [t[0]["generated_text"] for t in together] == [a[0]["generated_text"] for a in alone]
            ids = tokenizer(texts[0], return_tensors="pt").input_ids
            want = model.generate(ids, **QUIET, do_sample=False)[0, ids.shape[1] :]
            assert together[0][0]["generated_text"] == tokenizer.decode(want, skip_special_tokens=True)
        else:
            for t, a in zip(together, alone):
                assert sorted((x["label"], round(x["score"], 5)) for x in t) == sorted(
                    (x["label"], round(x["score"], 5)) for x in (a[0] if isinstance(a[0], list) else a)
                )
    assert results[0.99] != results[ALPHA]


def test_chunked_prefill_prunes_the_first_chunk_only(family):
    """Blocks appended to a pruned cache are not pruned, whoever appends them."""
    ids = tiny.tokens([30])[0]
    options = dict(QUIET, do_sample=False, output_logits=True, return_dict_in_generate=True, prefill_chunk_size=16)
    out = dialed(family).generate(ids, **options)
    want = reference_logits(family, out.sequences[0], 16)[29:-1]
    torch.testing.assert_close(torch.cat(out.logits).double(), want, **TOLERANCE)


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"cache_implementation": "offloaded"}], ids=str)
def test_other_caches_are_refused_by_name(how):
    model = dialed("llama")
    with pytest.raises(NotImplementedError, match="DynamicCache only"):
        model.generate(tiny.tokens([23])[0], **QUIET, do_sample=False, **how)


def test_a_cache_of_an_unknown_kind_is_refused_by_name():
    class OwnCache(transformers.DynamicCache):
        pass

    model = dialed("llama")
    with pytest.raises(NotImplementedError, match="DynamicCache only.*, got OwnCache"):
        model(tiny.tokens([23])[0], past_key_values=OwnCache())


def test_cropping_gives_back_generated_tokens(family):
    """Six tokens decoded, three given back, three others decoded: as if only the latter had ever been there."""
    ids, more, other = tiny.tokens([23, 23])[0], tiny.tokens([6, 6], seed=3)[0], tiny.tokens([3, 3], seed=8)[0]
    model = dialed(family)
    cache = model(ids, use_cache=True).past_key_values
    model(more, past_key_values=cache)
    cache.crop(-3)
    got = model(other, past_key_values=cache).logits
    for b in range(2):
        want = reference_logits(family, torch.cat([ids[b], more[b, :3], other[b]]), 23)[-3:]
        torch.testing.assert_close(got[b], want, **TOLERANCE)


@pytest.mark.parametrize("head", tiny.HEADS)
def test_save_and_load_keep_the_settings(family, head, tmp_path):
    model = zsaa.enable(tiny.make(family, head), alpha=0.6, tau=4, score="column_mean", schedule="rising")
    zsaa.dial.trained_for(model, (0.5, 1.0))
    ids = tiny.tokens([23])[0]
    want = model(ids)[0]
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        stock = tiny.HEADS[head].from_pretrained(tmp_path, dtype=torch.float64)
    if family == "gemma2":
        stock.set_attn_implementation("eager")
    reloaded = zsaa.enable(stock)
    found = zsaa.dial.settings(reloaded)
    rule = {"tau": 4, "score": "column_mean", "schedule": "rising"}
    assert found == {"alpha": 0.6, **rule, "alpha_range": (0.5, 1.0), "depth": None, "depth_range": None}
    torch.testing.assert_close(reloaded(ids)[0], want, rtol=1e-9, atol=1e-9)
    with pytest.warns(UserWarning, match="below the range"):
        zsaa.set_alpha(reloaded, 0.4)


def test_what_is_saved_is_a_stock_model(family, tmp_path):
    """Bit for bit the folder that stock transformers writes, but for one entry of config.json."""
    for name, model in (("stock", tiny.make(family)), ("dialed", dialed(family))):
        model.save_pretrained(tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "stock").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "dialed").iterdir())
    assert (tmp_path / "stock/model.safetensors").read_bytes() == (tmp_path / "dialed/model.safetensors").read_bytes()
    stock, config = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("stock", "dialed"))
    assert config.pop("zsaa")["alpha"] == ALPHA
    assert stock.pop("_name_or_path") != config.pop("_name_or_path")
    assert stock == config
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dialed", dtype=torch.float64)
    ids = tiny.tokens([23])[0]
    assert not hasattr(loaded.base_model, "_zsaa")
    if family != "gemma2":
        torch.testing.assert_close(loaded(ids).logits, tiny.make(family)(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.full
def test_compiled_models_give_the_same_text_without_a_recompilation_per_token(family):
    """A graph for each (length, alpha) of a prefill, at most one more for its decoding, none for a longer answer."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    ids = tiny.tokens([30])[0]
    model = zsaa.enable(tiny.make(family, dtype=torch.float32), alpha=ALPHA, tau=TAU)
    options = dict(do_sample=False, pad_token_id=0)
    want = {}
    for alpha in (ALPHA, 0.5):
        zsaa.set_alpha(model, alpha)
        want[alpha] = model.generate(ids, min_new_tokens=12, max_new_tokens=12, **options)
    counter = CompileCounter()
    model.forward = torch.compile(model.forward, backend=counter)
    compiled = []
    for alpha, new in ((ALPHA, 4), (ALPHA, 12), (0.5, 12), (ALPHA, 12)):
        zsaa.set_alpha(model, alpha)
        got = model.generate(ids, min_new_tokens=new, max_new_tokens=new, **options)
        assert torch.equal(got, want[alpha][:, : 30 + new])
        compiled.append(counter.frame_count)
    assert 0 < compiled[0] == compiled[1], "a longer answer compiled again"
    assert compiled[1] < compiled[2] <= compiled[1] + 2, "more than two graphs for another alpha"
    assert compiled[3] == compiled[2], "a known alpha compiled again"
