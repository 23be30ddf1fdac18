"""What a call is told, and by whom: alpha per call, thread, task and generator; where the prompt ends; which row a
classifier's head reads; which cached tokens are real. All families, float64."""

import asyncio
import contextlib
import copy
import gc
import pickle
import threading
import warnings

import numpy as np
import pytest
import reference
import tiny
import torch
import transformers
from transformers import DynamicCache

import zsaa
from zsaa.dial import trained_for

ALPHA, TAU = 0.7, 3
TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # rotary tables are float32


def dialed(family, head="causal-lm", alpha=ALPHA, **options):
    return zsaa.enable(tiny.make(family, head, **options), alpha=alpha, tau=TAU)


def alpha_of(model):
    return zsaa.settings(model)["alpha"]


# ------------------------------------------------------------------------------------- the row that a head reads


ENDINGS = {
    "ends in the pad": (1, True),
    "ends in three pads": (3, True),
    "right padding without a mask": (6, None),
    "right padding": (6, False),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("alpha", [0.95, 0.7, 0.3])
def test_a_classifier_reads_the_row_that_its_head_reads(family, alpha, ending):
    """Tokens after that row cannot influence it: with them the text has the very logits that it has without."""
    model, (ids, _, _) = dialed(family, "sequence-classification", alpha), tiny.tokens([23, 23])
    pads, real = ENDINGS[ending]
    longer = torch.cat([ids, torch.zeros(2, pads, dtype=torch.long)], dim=1)
    mask = None if real is None else (torch.ones_like(longer) if real else (longer != 0).long())
    with torch.no_grad():
        want, got = model(ids).logits, model(longer, attention_mask=mask).logits
    assert want.abs().min() > 0
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_a_text_that_ends_in_the_pad_in_a_left_padded_batch(family):
    model = dialed(family, "sequence-classification")
    ids, mask, positions = tiny.tokens([23, 12], padding="left")
    ids[1, -2:] = 0  # real, and equal to the pad
    with torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=positions).logits[1]
        want = model(ids[1:, 11:21]).logits[0]
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_such_texts_teach(family):
    """A text that ends in the pad gives gradients as the one without."""
    model, ids = dialed(family, "sequence-classification").train(), tiny.tokens([23])[0]
    ended = torch.cat([ids, torch.zeros(1, 1, dtype=torch.long)], dim=1)
    gradients = []
    for text in (ids, ended):
        model.zero_grad()
        model(text, attention_mask=torch.ones_like(text), labels=torch.tensor([1])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(g.abs().sum() > 0 for g in gradients[0][:3])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_head_that_reads_padding_is_refused():
    model = dialed("llama", "sequence-classification")
    ids, mask, _ = tiny.tokens([23, 9])
    ids[1, 9:] = 5  # padded with another token than the model's
    with pytest.raises(
        ValueError, match=r"reads column 22 of sample 1 .*not 0, the pad.*padding by its attention_mask"
    ):
        model(ids, attention_mask=mask)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"reads column 22 of sample 1 .*inputs_embeds"):
        model(inputs_embeds=embeds, attention_mask=mask)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no pad_token_id"):
        model(ids[1:], attention_mask=mask[1:])


class OwnHead(transformers.LlamaForSequenceClassification):
    """Reads the last token that the mask calls real."""

    def forward(self, input_ids, attention_mask, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        return self.score(hidden[torch.arange(len(last)), last])


class Renamed(transformers.LlamaForSequenceClassification):
    pass


def test_heads_of_ones_own():
    """A subclass that keeps the forward is a classifier; one with a forward of its own may read any row, and where that
    is in doubt it is refused."""
    ids, mask, _ = tiny.tokens([23, 9])
    ended = ids.clone()
    ended[1, 8] = 0
    renamed, own = (
        zsaa.enable(cls(tiny.CONFIGS["llama"]()).eval(), alpha=ALPHA, tau=TAU) for cls in (Renamed, OwnHead)
    )
    with torch.no_grad():
        torch.testing.assert_close(renamed(ended, attention_mask=mask).logits[1], renamed(ids[1:, :8]).logits[0])
        torch.testing.assert_close(own(ids, mask)[1], own(ids[1:, :9], mask[1:, :9])[0])
        with pytest.raises(
            ValueError, match=r"sample 1 ends in tokens equal to the pad token \(0\).*forward of its own"
        ):
            own(ended, mask)


# --------------------------------------------------------------------------------------------- the mask of a cache


def chat(model, ids, second, eos):
    """Logits of the second turn's first answer, after a first turn in which samples may end early."""
    options = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    one = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=eos, **options)
    said = one.sequences[:, ids.shape[1] :]
    mask = torch.cat([torch.ones_like(ids), (said != 0).long(), torch.ones_like(second)], dim=1)
    history = torch.cat([one.sequences, second], dim=1)
    two = model.generate(
        history, attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=4, eos_token_id=96, **options
    )
    return two.logits[0], said


@pytest.mark.parametrize("alpha", [0.9, 0.7])
def test_a_chat_in_which_one_sample_ended_early(family, alpha):
    """The pads that generate put behind it are masked in the second turn: it answers as it does alone."""
    model, ids, second = dialed(family, alpha=alpha), tiny.tokens([21, 21])[0], tiny.tokens([5, 5], seed=3)[0]
    eos = model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -1].item()
    together, said = chat(model, ids, second, eos)
    alone, _ = chat(model, ids[:1], second[:1], eos)
    assert (said[0] == 0).any() and not (said[1] == 0).any()
    torch.testing.assert_close(together[0], alone[0], **TOLERANCE)


@pytest.mark.parametrize("hidden", [slice(0, 4), slice(24, 27), slice(30, 31)], ids=["prompt", "decoded", "newest"])
def test_hidden_tokens_of_a_cache_are_hidden(family, hidden):
    """Any cached token can be masked later; masking none is no mask."""
    model, ids, more, new = dialed(family), *(tiny.tokens([n, n], seed=n)[0] for n in (23, 8, 3))
    eager = tiny.make(family, attn_implementation="eager")
    mask = torch.ones(2, 34, dtype=torch.long)
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for _ in range(3)]
        for cache in caches:
            model(more, past_key_values=cache)
        plain = model(new, past_key_values=caches[0]).logits
        assert torch.equal(model(new, attention_mask=mask, past_key_values=caches[1]).logits, plain)
        mask[1, hidden] = 0
        got = model(new, attention_mask=mask, position_ids=torch.arange(31, 34)[None], past_key_values=caches[2]).logits
        torch.testing.assert_close(got[0], plain[0], **TOLERANCE)
        if tiny.CONFIGS[family]().to_dict().get("sliding_window") and family != "llama":
            return  # windows count real tokens: the reference, which counts columns, is another
        want = masked_reference(eager, torch.cat([ids[1], more[1], new[1]]), 23, hidden)[-3:]
    torch.testing.assert_close(got[1], want, **TOLERANCE)


def masked_reference(eager, ids, prompt, hidden):
    """As reference.run, for which the tokens in `hidden` are no keys from the 31st token on."""
    base, layers = reference.parts(eager)
    hooks = []

    def hide(module, args, kwargs):
        mask = args[2] if len(args) > 2 else kwargs["attention_mask"]
        mask[:, :, 31:, hidden] = float("-inf")

    def lift(module, args, kwargs, output):
        hooks.extend(layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers)

    # reference.run puts its masks in by hooks of its own on the layers; ours must come after them.
    first = base.get_input_embeddings().register_forward_hook(lambda *_: lift(None, None, None, None))
    try:
        states, _ = reference.run(eager, ids, ALPHA, TAU, prompt=prompt)
    finally:
        first.remove()
        for hook in hooks:
            hook.remove()
    return eager.get_output_embeddings()(states)


def test_padding_that_was_left_out_cannot_become_real(family):
    model, (ids, mask, _) = dialed(family), tiny.tokens([23, 9], padding="left")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has a 1 where it had a 0 when the prompt was given"):
        model(ids[:, :2], attention_mask=torch.ones(2, 25), past_key_values=cache)


# ------------------------------------------------------------------------------------------ alpha of a call


def rows_seen(model):
    """Rows that reach the last layer's MLP, call by call."""
    decoder = model.base_model
    layers, seen = (decoder.h if hasattr(decoder, "h") else decoder.layers), []
    layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


def test_alpha_can_be_given_with_the_call(family):
    model, ids = dialed(family, alpha=1.0), tiny.tokens([40])[0]
    stock, seen = tiny.make(family)(ids).logits, rows_seen(model)
    with zsaa.at(model, 0.5):
        want, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(model(ids, alpha=1.0).logits, stock)
    assert torch.equal(model(ids, alpha=0.5).logits, want)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, alpha=0.5), text)
    assert torch.equal(model.base_model(ids, alpha=0.5)[0], model.base_model(ids, alpha=np.float32(0.5))[0])
    assert torch.equal(model(ids).logits, stock) and alpha_of(model) == 1.0
    assert seen[:5] == [3, 3, 1, 1, 40]
    both = model(ids.repeat(2, 1), alpha=[0.5, 1.0]).logits
    torch.testing.assert_close(both, torch.cat([want, stock]), **TOLERANCE)
    for bad in (0, 1.5, "a", [0.5, 0.6, 0.7]):
        with pytest.raises((TypeError, ValueError), match="alpha"):
            model(ids, alpha=bad)
    zsaa.disable(model)
    with pytest.raises(ValueError, match="alpha"):
        model.generate(ids, max_new_tokens=3, alpha=0.5)


@pytest.mark.parametrize("head", ["sequence-classification", "token-classification", "question-answering"])
def test_alpha_with_the_call_of_other_heads(family, head):
    classes = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
    }
    try:
        model = classes[head].from_config(tiny.CONFIGS[family](), attn_implementation="eager").eval()
    except ValueError:
        pytest.skip(f"{family} has no such head")
    zsaa.enable(model, tau=TAU)
    ids = tiny.tokens([40])[0]
    with torch.no_grad():
        with zsaa.at(model, 0.5):
            want = model(ids)[0]
        assert torch.equal(model(ids, alpha=0.5)[0], want) and not torch.equal(model(ids)[0], want)


def test_threads_do_not_see_each_others_blocks():
    model, log = dialed("llama", alpha=1.0), []
    inside, over = threading.Event(), threading.Event()

    def first():
        with zsaa.at(model, 0.5):
            inside.set()
            over.wait(60)
            log.append(alpha_of(model))

    def second():
        inside.wait(60)
        with zsaa.at(model, 0.8):
            over.set()
            one.join()
            log.append(alpha_of(model))

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start(), two.start(), two.join()
    assert log == [0.5, 0.8] and alpha_of(model) == 1.0


def test_a_thread_started_in_a_block_is_given_alpha_with_the_call():
    model, ids = dialed("llama", alpha=1.0), tiny.tokens([40])[0]
    seen = rows_seen(model)
    for alpha in (0.5, None) * 3:
        options = dict(max_new_tokens=1, do_sample=False, **({} if alpha is None else {"alpha": alpha}))
        with zsaa.at(model, 0.8):
            thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
            thread.start()
        thread.join()
    assert seen == [3, 40] * 3


def test_tasks_do_not_see_each_others_blocks():
    model = dialed("llama", alpha=1.0)

    async def ask(alpha):
        with zsaa.at(model, alpha):
            await asyncio.sleep(0)
            first = alpha_of(model)
            await asyncio.sleep(0.001)
            return first, alpha_of(model)

    async def main():
        return await asyncio.gather(*(ask(alpha) for alpha in (0.3, 0.5, 0.9)))

    assert asyncio.run(main()) == [(0.3, 0.3), (0.5, 0.5), (0.9, 0.9)] and alpha_of(model) == 1.0


def test_generators():
    """A block in a generator holds while that runs, in whichever thread, and leaves nothing behind."""
    model = dialed("llama", alpha=1.0)

    def stream(alpha):
        with zsaa.at(model, alpha):
            while True:
                yield alpha_of(model)

    one, two = stream(0.5), stream(0.8)
    with pytest.warns(UserWarning, match="in the generator 'stream', which is suspended"):
        assert [next(one), alpha_of(model), next(two), next(one), alpha_of(model)] == [0.5, 1.0, 0.8, 0.5, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zsaa.at(model, 0.9):  # the generator's own block is the inner one, the caller's the outer one
            assert (next(one), alpha_of(model)) == (0.5, 0.9)
        got = []
        thread = threading.Thread(target=lambda resume=two.__next__: got.append(resume()))
        thread.start(), thread.join()
        assert got == [0.8] and alpha_of(model) == 1.0
    one.close()  # not in the order in which they began
    del two, thread
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alpha_of(model) == 1.0


def test_a_generator_of_contextlib_is_its_callers_block():
    model = dialed("llama", alpha=1.0)

    @contextlib.contextmanager
    def fast():
        with zsaa.at(model, 0.5):
            yield

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast():
            assert alpha_of(model) == 0.5
        with contextlib.ExitStack() as stack:
            stack.enter_context(fast())
            stack.enter_context(zsaa.at(model, 0.6))
            assert alpha_of(model) == 0.6
        assert alpha_of(model) == 1.0

    @fast()
    def decorated():
        return alpha_of(model)

    assert decorated() == 0.5


def test_traces_are_of_their_own_thread():
    model, ids = dialed("llama"), tiny.tokens([40])[0]
    with zsaa.trace(model) as t:
        model(ids)
        thread = threading.Thread(target=model, args=(ids[:, :20],))
        thread.start(), thread.join()
    assert t.lengths == [40]


def test_what_is_set_inside_a_block_is_the_models_and_the_blocks(tmp_path):
    model = dialed("llama", alpha=1.0)
    with zsaa.at(model, 0.9):
        zsaa.enable(model, tau=7)
        assert (alpha_of(model), model.config.zsaa["alpha"]) == (0.9, 1.0)
        model.save_pretrained(tmp_path / "inside")
        zsaa.set_alpha(model, 0.5)
        assert alpha_of(model) == 0.5
    assert (alpha_of(model), model.config.zsaa["alpha"], model.config.zsaa["tau"]) == (0.5, 0.5, 7)
    model.save_pretrained(tmp_path / "after")
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert alpha_of(zsaa.enable(load(tmp_path / "inside"))) == 1.0
    with pytest.warns(UserWarning, match="alpha = 0.5 was saved with this model, and is taken"):
        assert alpha_of(zsaa.enable(load(tmp_path / "after"))) == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert alpha_of(zsaa.enable(load(tmp_path / "after"), alpha=0.6)) == 0.6


def test_an_untrained_alpha_of_a_call_warns_once():
    model = dialed("llama", alpha=1.0)
    trained_for(model, (0.5, 1.0))
    ids = tiny.tokens([20])[0]
    with pytest.warns(UserWarning, match=r"alpha = 0.4 is below the range \[0.5, 1.0\]"):
        model(ids, alpha=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, alpha=0.3)


# ---------------------------------------------------------------------------------------- where the prompt ends


@pytest.mark.parametrize("padding", ["right", "left"])
def test_logits_to_keep_keeps_logits_and_nothing_else(family, padding):
    model, (ids, mask, positions) = dialed(family), tiny.tokens([23, 9], padding=padding)
    given = dict(attention_mask=mask, position_ids=positions)
    step, longer = torch.tensor([[5], [6]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        caches = [DynamicCache(), DynamicCache(), DynamicCache()]
        whole = model(ids, past_key_values=caches[0], **given).logits
        for cache, keep in zip((*caches[1:], None), (5, torch.tensor([3, 20]), 5)):
            got = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep, **given).logits
            assert torch.equal(got, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])
        after = dict(attention_mask=longer, position_ids=mask.sum(1, keepdim=True))
        next_logits = [model(step, past_key_values=cache, **after).logits for cache in caches]
    assert torch.equal(next_logits[0], next_logits[1]) and torch.equal(next_logits[0], next_logits[2])


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.7])
def test_early_exit_drafts_give_the_greedy_text(family, alpha):
    if family == "gpt2" and alpha == 1:
        pytest.skip("stock GPT-2 runs all its layers, and more than its cache has")
    if alpha == 1:
        pytest.importorskip("transformers", minversion="5.18", reason="older ones cannot crop layers without rows")
    model, ids = dialed(family, alpha=alpha), tiny.tokens([23])[0]
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **options), want)
    assert model.config.num_hidden_layers == 4 and model(ids).logits.shape == (1, 23, 97)


def test_a_decoder_told_to_run_fewer_layers(family):
    """Is the model of those layers."""
    if family == "gpt2":
        pytest.skip("GPT-2 runs all its layers, whatever it is told")
    model, ids = dialed(family), tiny.tokens([23])[0]
    eager = tiny.make(family, attn_implementation="eager")
    whole = model(ids, use_cache=True).past_key_values
    for net in (model, eager):
        net.config.num_hidden_layers = 2
    base, layers = reference.parts(eager)
    del layers[2:]
    with torch.no_grad():
        want, kept = reference.run(eager, ids[0], ALPHA, TAU)
        with zsaa.trace(model) as t:
            got = model.base_model(ids).last_hidden_state[0]
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert [layer[0].tolist() for layer in t.kept] == kept
    short = model(ids, use_cache=True).past_key_values
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="filled by 2 layers, and the model now runs 4"):
        model(ids[:, :1], past_key_values=short)
    model(ids[:, :1], past_key_values=whole)


@pytest.mark.parametrize("padding", [False, True])
def test_without_a_cache_generate_gives_the_same_text(family, padding):
    model = dialed(family)
    ids, mask, _ = tiny.tokens([23, 9] if padding else [23], padding="left")
    options = dict(attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, use_cache=False, **options), want)
    out = model.generate(ids, use_cache=False, return_dict_in_generate=True, output_hidden_states=True, **options)
    assert torch.equal(out.sequences, want) and out.past_key_values is None
    widths = [[state.shape[1] for state in step] for step in out.hidden_states]
    assert widths == [[ids.shape[1] + n] * 5 for n in range(9)]


def test_chunks_of_a_padded_batch_are_refused_by_name(family):
    model, (ids, mask, _) = dialed(family), tiny.tokens([23, 9], padding="left")
    options = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with pytest.raises(ValueError, match=r"prefill_chunk_size cuts this prompt of 23 columns after 8.*\[8, 0\]"):
        model.generate(ids, prefill_chunk_size=8, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=30, **options), model.generate(ids, **options))


# ------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification", "base"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_hidden_states_are_of_all_tokens(family, head, as_tuple):
    """[batch, tokens, hidden] per layer: what entered it, and of dropped tokens the state in which they left."""
    model = dialed(family, head)
    ids, mask, positions = tiny.tokens([23, 9], padding="left")
    given = dict(attention_mask=mask, position_ids=positions, use_cache=False)
    with torch.no_grad(), zsaa.trace(model) as t:
        plain = model(ids, **given)[0]
        out = model(ids, output_hidden_states=True, return_dict=not as_tuple, **given)
    states = next(x for x in out if isinstance(x, tuple)) if as_tuple else out.hidden_states
    assert torch.equal(out[0], plain) and [tuple(s.shape) for s in states] == [(2, 23, 32)] * 5
    seen = {}
    eager = tiny.make(family, "base", attn_implementation="eager")
    eager.load_state_dict(tiny.make(family, head).base_model.state_dict())
    for number, layer in enumerate(reference.parts(eager)[1]):
        entering = lambda _, args, n=number: seen.update({n: args[0][0]})  # noqa: E731
        layer.register_forward_pre_hook(entering)
    for b, n in ((0, 23), (1, 9)):
        with torch.no_grad():
            last, kept = reference.run(eager, ids[b, 23 - n :], ALPHA, TAU)
        alive, want = list(range(n)), None
        for number in range(4):
            fresh = seen[number]
            want = fresh.clone() if want is None else want
            want[alive] = fresh[alive]
            torch.testing.assert_close(states[number][b, 23 - n :], want, **TOLERANCE)
            alive = kept[number]
        torch.testing.assert_close(states[4][b, 23 - n :], last, **TOLERANCE)
    assert t.lengths == [23, 9]


def test_selected_hidden_states():
    pytest.importorskip("transformers", minversion="5.20", reason="older ones give all")
    model, ids = dialed("llama"), tiny.tokens([23])[0]
    whole = model(ids, output_hidden_states=True).hidden_states
    some = model(ids, output_hidden_states=[1, -1]).hidden_states
    assert [s is not None for s in some] == [False, True, False, False, True]
    assert torch.equal(some[1], whole[1]) and torch.equal(some[4], whole[4])


# -------------------------------------------------------------------------------- configurations, caches, numbers


def test_models_that_share_a_configuration(family, tmp_path):
    a = dialed(family, alpha=0.5)
    cls = tiny.HEADS["causal-lm"]
    b = type(tiny.make(family))(a.config).double().eval()
    c = cls.from_config(a.config)
    zsaa.enable(b)
    assert alpha_of(b) == 1.0 and alpha_of(zsaa.enable(c)) == 1.0
    zsaa.set_alpha(b, 0.8)
    assert alpha_of(a) == 0.5
    for name, model in (("a", a), ("b", b)):
        model.save_pretrained(tmp_path / name)
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).zsaa["alpha"] == alpha_of(model)
        (model.base_model).save_pretrained(tmp_path / f"{name}-base")
        assert transformers.AutoConfig.from_pretrained(tmp_path / f"{name}-base").zsaa["alpha"] == alpha_of(model)
    for model in (a, b):
        zsaa.disable(model)
        assert not hasattr(model.config, "zsaa")
        assert type(model) is type(tiny.make(family)) and type(model.base_model) is type(tiny.make(family).base_model)
    zsaa.disable(b)


def test_copies_have_settings_of_their_own(tmp_path):
    model, ids = dialed("llama"), tiny.tokens([23])[0]
    want = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, want)
        zsaa.set_alpha(other, 0.4)
        assert (alpha_of(model), alpha_of(other), other.config.zsaa["alpha"]) == (ALPHA, 0.4, 0.4)
        assert torch.equal(model.generate(ids, max_new_tokens=3, alpha=0.4), other.generate(ids, max_new_tokens=3))
        assert model.config.zsaa["alpha"] == ALPHA


@pytest.mark.parametrize("how", ["reset", "failed", "failed later"])
@pytest.mark.parametrize("next_alpha", [1.0, 0.5])
def test_a_cache_that_is_empty_again(family, how, next_alpha):
    model, (ids, _, _) = dialed(family), tiny.tokens([23])
    want = dialed(family, alpha=next_alpha)(ids).logits
    cache = DynamicCache()
    if how == "reset":
        model(ids, past_key_values=cache)
        cache.reset()
    elif how == "failed":
        with pytest.raises(IndexError):
            model(torch.tensor([[999, 1]]), past_key_values=cache)
    else:
        decoder = model.base_model
        layer = (decoder.h if hasattr(decoder, "h") else decoder.layers)[2]
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="this key/value cache is incomplete"):
            model(ids[:, :2], past_key_values=cache)
        cache.reset()
    zsaa.set_alpha(model, next_alpha)
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, want)
    model(ids[:, :2], past_key_values=cache)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 24 and model(ids[:, :2].repeat(2, 1), past_key_values=cache).logits.shape[0] == 2


@pytest.mark.parametrize(
    "given",
    [torch.tensor(0.7), np.float32(0.7), np.float16(0.7), np.array(0.7), torch.tensor(0.7, dtype=torch.bfloat16)],
)
def test_numbers_mean_what_they_are_written_as(given):
    model = zsaa.enable(tiny.make("llama"), alpha=given)
    assert alpha_of(model) == 0.7 and zsaa.kept_counts(1000, given, 2) == [700, 490]
    for several in ([given, 0.9], (given, np.float64(0.9)), np.array([0.7, 0.9], dtype=np.float32)):
        zsaa.set_alpha(model, several)
        assert alpha_of(model) == (0.7, 0.9)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        zsaa.set_alpha(model, np.array([[0.7, 0.9]]))


def test_a_trace_holds_positions_and_nothing_else():
    model, ids = dialed("llama"), tiny.tokens([64])[0]

    def living():
        gc.collect()
        return {id(x): x.untyped_storage().nbytes() for x in gc.get_objects() if isinstance(x, torch.Tensor)}

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(ids)  # what is kept between passes, such as plans, is there
            before = living()
            with zsaa.trace(model) as t:
                model(ids, use_cache=False)
            new = {key: size for key, size in living().items() if key not in before}
        assert sum(new.values()) <= 2 * 8 * 64 * 5 and not any(p.requires_grad for layer in t.kept for p in layer)


# --------------------------------------------------------------------------------------------------------- errors


def test_errors_say_what_is_wrong():
    ids = tiny.tokens([23])[0]
    llama, gemma = dialed("llama"), dialed("gemma2")
    for stock in (llama, tiny.make("llama")):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            stock()
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            stock(ids, inputs_embeds=stock.get_input_embeddings()(ids))
    with pytest.raises(NotImplementedError, match="DynamicCache only.*, got StaticCache"):
        gemma.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"the input has no tokens: its shape is \(1, 0\)"):
        llama(ids[:, :0])


@pytest.mark.parametrize("given", [None, "gpt2", 3, transformers.LlamaForCausalLM])
def test_what_is_no_model_is_said(given):
    for use in (zsaa.enable, zsaa.disable, zsaa.settings, lambda it: zsaa.set_alpha(it, 0.5)):
        with pytest.raises(zsaa.UnsupportedModelError, match="a model is needed, and .* is a .*Give the loaded model"):
            use(given)


def test_a_pipeline_is_told_its_model():
    pipeline = transformers.pipeline("text-generation", model=tiny.make("llama"), tokenizer=tiny.tokenizer())
    with pytest.raises(zsaa.UnsupportedModelError, match=r"Pipeline.*, or its \.model"):
        zsaa.enable(pipeline)


@pytest.mark.parametrize("given", [{"tau": 2}, {"score": "random"}, {"schedule": "rising"}])
def test_settings_of_the_model_are_not_ignored_where_a_call_gives_them(given):
    ids, model, name = tiny.tokens([23])[0], dialed("llama"), next(iter(given))
    with pytest.raises(TypeError, match=f"{name}=.* came with a call.*zsaa.enable\\(model, {name}=...\\)"):
        model(ids, **given)


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_text_is_written_without_a_cache_while_checkpointing_trains(use_cache):
    """Stock does, and writes another text; without `use_cache` the pruned pass had no cache to look into."""
    ids, model = tiny.tokens([23])[0], dialed("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"keeps none while the model trains.*model\.eval\(\)"):
        model.generate(ids, use_cache=use_cache, **tiny.QUIET)
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.eval().generate(ids, **tiny.QUIET), dialed("llama").generate(ids, **tiny.QUIET))


def test_a_mask_for_each_kind_of_layer_is_a_models_around_the_decoder():
    text = dict(tiny.CONFIGS["gemma3_text"]().to_dict(), pad_token_id=None)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=28)
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 14})
    model = zsaa.enable(transformers.Gemma3ForConditionalGeneration(config).eval(), alpha=ALPHA, tau=TAU)
    with pytest.raises(ValueError, match=r"got a dict one.*load the language model alone \(Gemma3ForCausalLM\)"):
        model(tiny.tokens([23])[0])


def test_alpha_in_a_generation_config_is_not_ignored():
    config = transformers.GenerationConfig(max_new_tokens=2, alpha=0.5)
    for given in ((config,), ()):
        with pytest.raises(TypeError, match=r"alpha=0.5 stands in a generation_config, .*generate\(..., alpha=...\)"):
            dialed("llama").generate(tiny.tokens([23])[0], *given, **({} if given else {"generation_config": config}))


def test_a_configuration_that_holds_no_settings_is_named():
    model = tiny.make("llama")
    model.config.zsaa = 0.9
    with pytest.raises(ValueError, match="config.zsaa is 0.9, and holds a dial's settings by name"):
        zsaa.enable(model)


def test_one_dimensional_positions_and_several_choices_of_gpt2():
    ids, model = tiny.tokens([23])[0], dialed("gpt2")
    want = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(23)).logits, want)
    double = transformers.GPT2DoubleHeadsModel(tiny.CONFIGS["gpt2"]()).eval()
    zsaa.enable(double, alpha=ALPHA, tau=TAU)
    choices, mask, _ = tiny.tokens([23, 9, 23, 17])
    with torch.no_grad():
        out = double(choices.unflatten(0, (2, 2)), attention_mask=mask.unflatten(0, (2, 2)))
        for i, n in enumerate((23, 9, 23, 17)):
            alone = double(choices[i : i + 1, None, :n]).logits[0, 0]
            torch.testing.assert_close(out.logits[i // 2, i % 2, :n], alone)
