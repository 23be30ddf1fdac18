"""Decoding steps over caches of unequal length: the kernels, the slots that they write, and the graphs of them."""

import copy

import pytest
import tiny
import torch
from test_graphs import StandIn, stand_in  # noqa: F401 - a fixture

import zsaa
from zsaa.attention import attend, rotate, visible
from zsaa.cache import PrunedLayer
from zsaa.fast import attention as fast_attention
from zsaa.fast import dispatch, slots, steps
from zsaa.learned import salience

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def kernels(monkeypatch):
    import test_kernels  # noqa: F401  sets Triton's interpreter up
    from zsaa.kernels import decode

    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    for family, config in tiny.CONFIGS.items():
        monkeypatch.setitem(tiny.CONFIGS, family, wide(family, config))
    if not GPU:  # the interpreter is slow: all but the steps' own kernels are PyTorch's
        monkeypatch.setattr(dispatch, "row_kernels", lambda x: None)
        monkeypatch.setattr(dispatch, "layer_kernels", lambda x: None)
        monkeypatch.setattr(dispatch, "copies", lambda device: False)
        monkeypatch.setattr(fast_attention, "attend_and_score", lambda *args, **kwargs: None)
    yield decode
    dispatch._without_triton.cache_clear()


def wide(family, config):
    """With heads of 16, as the kernels need them, and few of them."""

    def made():
        found = config()
        found.num_attention_heads = 2
        if family != "gpt2":
            found.head_dim, found.num_key_value_heads = 16, 1
        setattr(found, "n_layer" if family == "gpt2" else "num_hidden_layers", 2)
        if getattr(found, "layer_types", None):
            found.layer_types = found.layer_types[1:3]  # one of each kind
        return found

    return made


def a_cache(counts, batch, kv_heads, dim, dtype):
    """A pruned cache whose layers hold so many rows, as a prefill leaves one."""
    layers = []
    for rows in counts:
        layer = PrunedLayer()
        keys, values = (torch.randn(batch, rows, kv_heads, dim, device=DEVICE).to(dtype).transpose(1, 2) for _ in "kv")
        columns = torch.stack([torch.randperm(50, device=DEVICE)[:rows].sort().values for _ in range(batch)])
        if batch > 1:
            columns[-1, rows // 2 :] = -1  # a sample with fewer tokens
        layer.extend(keys, values, columns, batch == 1, 50)
        layers.append(layer)
    return layers


SHAPES = [
    pytest.param(1, 4, 2, 16, [9, 1], None, None, marks=pytest.mark.full),
    (2, 6, 2, 24, [47, 5], None, 30.0),
    (3, 3, 3, 64, [33], 12, None),
    pytest.param(2, 8, 1, 256, [21], 8, 5.0, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "dim", "counts", "window", "softcap"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_a_step_is_as_near_to_the_exact_numbers_as_pytorchs(
    kernels, monkeypatch, batch, heads, kv_heads, dim, counts, window, softcap, dtype, turned
):
    """Unused slots are full of NaN: nothing may look at them."""
    monkeypatch.setattr(kernels, "CHUNK", 32)  # several chunks
    torch.manual_seed(0)
    layers = a_cache(counts, batch, kv_heads, dim, dtype)
    for layer, rows in enumerate(counts):
        before = layers[layer].keys.clone(), layers[layer].values.clone(), layers[layer].columns.clone()
        slots.settle(layers)
        poison(layers)
        q, k, v = (torch.randn(batch, h, 1, dim, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads))
        angles = 6 * torch.rand(batch, 1, dim, device=DEVICE)
        tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if turned else None
        table = torch.tensor(slots.lines(layers), device=DEVICE)
        chunks = -(-(rows + 1) // kernels.CHUNK)
        settings = dict(scale=dim**-0.5, softcap=softcap)
        got = kernels.append(q, k, v, tables, table, layer)
        more = [kernels.attend(got, kv_heads, table, layer, n, window=window, **settings) for n in (chunks, 4 * chunks)]
        assert torch.equal(*more), "the bound decides nothing"
        slots.advance(layers)

        step = q, k, v, tables, *before, window, settings
        exact, plain = by_pytorch(*step, torch.float64), by_pytorch(*step, dtype)
        held = layers[layer]
        for ours, theirs, right in zip((more[0], held.keys, held.values), plain, exact):
            rounding = torch.finfo(dtype).eps * right.abs().max()
            assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + rounding
        assert torch.equal(held.columns, exact[3])
        slots.advance(layers, -1)


def by_pytorch(q, k, v, tables, keys, values, columns, window, settings, kind):
    """Output, keys, values and columns of a step in PyTorch, in this type."""
    q, k, v, keys, values = (x.to(kind) for x in (q, k, v, keys, values))
    q, k = (q, k) if tables is None else rotate(q, k, *(x.to(kind) for x in tables))
    columns = torch.cat([columns, torch.full((len(q), 1), 50, device=DEVICE)], dim=1)
    keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
    output = attend(q, keys, values, visible(columns[:, -1:], columns, window), **settings)
    return output.transpose(1, 2).flatten(2), keys, values, columns


def poison(layers):
    for layer in layers:
        room = vars(layer)["room"]
        for tensor in (room.keys, room.values):
            tensor[:, :, layer.rows :] = float("nan")
        room.columns[:, layer.rows :] = 7


def half(family="llama", alpha=0.7, graphs=True, head="causal-lm"):
    torch.manual_seed(0)
    return zsaa.enable(tiny.make(family, head, dtype=torch.float16).to(DEVICE), alpha=alpha, tau=3, graphs=graphs)


def prompt(lengths, padding="left", seed=0):
    ids, mask, positions = (x.to(DEVICE) for x in tiny.tokens(lengths, seed, padding))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def walk(model, given, tokens, poisoned=False):
    """Last states after each of the tokens, and the cache."""
    output, mask, states = model(**given, use_cache=True), given["attention_mask"], []
    cache, positions = output.past_key_values, given["position_ids"][:, -1:]
    for token in tokens:
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), positions + 1
        ids = torch.full((len(mask), 1), token, device=DEVICE)
        if poisoned and all(isinstance(layer, slots.RoomyLayer) for layer in cache.layers):
            poison(cache.layers)
        states.append(
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        )
    return states, cache


def rows_of(cache):
    return [(layer.keys, layer.values, layer.columns) for layer in cache.layers]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def recorded(model):
    return [(s["batch"], s["rows"], s["replays"]) for s in zsaa.captured(model)["steps"]]


FEW = ("llama", [6, 13]), ("gemma2", [13])
CASES = [(family, lengths) for family in tiny.FAMILIES for lengths in ([13], [6, 13])]
MORE = [pytest.param(*case, marks=() if GPU else pytest.mark.full) for case in CASES if case not in FEW]


@pytest.mark.parametrize(("family", "lengths"), [*FEW, *MORE], ids=str)
@pytest.mark.usefixtures("stand_in")
@torch.no_grad()
def test_steps_equal_those_that_grow_their_cache(kernels, monkeypatch, family, lengths):
    """Replays and single kernels bit for bit, whatever lies in unused slots; and as near to the model in float64 as a
    cache grown by PyTorch."""
    monkeypatch.setattr(slots, "LEAST", 2)  # the room is used up on the way
    given, tokens = prompt(lengths), [5, 9, 60]
    model, single = half(family), half(family, graphs=False)
    got, cache = walk(model, given, tokens, poisoned=True)
    want, other = walk(single, given, tokens)
    assert equal(got, want)
    assert all(equal(a, b) for a, b in zip(rows_of(cache), rows_of(other), strict=True))
    assert recorded(model) == [(len(lengths), 256, len(tokens))]
    assert recorded(single) == []
    monkeypatch.setattr(dispatch, "_chosen", "torch")
    plain, grown = walk(half(family, graphs=False), given, tokens)
    assert not any(isinstance(layer, slots.RoomyLayer) for layer in grown.layers)
    for a, b in zip(got, plain, strict=True):
        assert torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min() > 0.999
    for ours, theirs in zip(cache.layers, grown.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape and torch.equal(ours.columns, theirs.columns)
        assert (ours.seen, ours.removable) == (theirs.seen, theirs.removable)


@pytest.mark.usefixtures("stand_in")
@torch.no_grad()
def test_what_changes_a_cache_meanwhile_is_seen(kernels):
    """Crops, copies and beams give plain layers again, and nothing that was looked at is written anew."""
    given = prompt([13])
    model, single = half(), half(graphs=False)

    def told(each):
        states, cache = walk(each, given, [5, 9])
        seen = rows_of(cache)
        kept = [tuple(x.clone() for x in row) for row in seen]
        twin = copy.deepcopy(cache)
        ids, mask = torch.full((1, 1), 7, device=DEVICE), torch.ones(1, 16, dtype=torch.long, device=DEVICE)
        states += [each(ids, attention_mask=mask, past_key_values=c).logits for c in (cache, twin)]
        cache.crop(-2)
        assert type(cache.layers[0]) is PrunedLayer
        states += [each(ids + t, attention_mask=mask[:, : 15 + t], past_key_values=cache).logits for t in range(2)]
        assert all(equal(a, b) for a, b in zip(seen, kept, strict=True)), "what was handed out is as it was"
        twin.batch_repeat_interleave(2)
        states.append(each(ids.repeat(2, 1), attention_mask=mask.new_ones(2, 17), past_key_values=twin).logits)
        return states, rows_of(cache) + rows_of(twin)

    got, want = told(model), told(single)
    assert equal(got[0], want[0])
    assert all(equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    assert [batch for batch, *_ in recorded(model)] == [1, 1, 2]  # with use_cache=True, and without


@pytest.mark.usefixtures("stand_in")
@torch.no_grad()
def test_a_recorded_step_ends_where_anything_changes(kernels):
    model, given = half(), prompt([13])
    walk(model, given, [5])
    first = next(iter(model.model._zsaa.graphs.steps.recordings.values()))
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data * 1.5
    states, _ = walk(model, given, [5])
    assert next(iter(model.model._zsaa.graphs.steps.recordings.values())) is not first
    zsaa.enable(model, graphs=False)
    assert equal(states, walk(model, given, [5])[0])
    assert recorded(model) == []


@pytest.mark.usefixtures("stand_in")
@torch.no_grad()
def test_a_step_that_does_not_follow_its_input_is_never_used(kernels, monkeypatch):
    monkeypatch.setattr(StandIn, "replay", lambda self: None)
    model, given = half(), prompt([13])
    with pytest.warns(UserWarning, match="records no CUDA graphs"):
        states, _ = walk(model, given, [5])
    assert equal(states, walk(half(graphs=False), given, [5])[0])
    assert recorded(model) == []


class Another(PrunedLayer):
    """As one that holds its rows in fewer bits."""


@pytest.mark.usefixtures("stand_in")
@torch.no_grad()
def test_what_cannot_go_over_slots_grows_its_cache(kernels):
    model, given = half(), prompt([13, 9])

    def kinds(change):
        cache = model(**given).past_key_values
        ids, mask = torch.full((2, 1), 7, device=DEVICE), torch.ones(2, 14, dtype=torch.long, device=DEVICE)
        mask[1, :4] = 0
        change(dict(past_key_values=cache, attention_mask=mask, input_ids=ids))
        return {type(layer) for layer in cache.layers}

    def hidden(call):
        call["attention_mask"][0, 3] = 0  # a token of the prompt, hidden now
        model(**call)

    def two(call):
        mask = call["attention_mask"]
        model(
            **{
                **call,
                "input_ids": call["input_ids"].repeat(1, 2),
                "attention_mask": torch.cat([mask, mask[:, -1:]], 1),
            }
        )

    def gradients(call):
        with torch.enable_grad():
            model(**call)

    def counted(call):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            model(**call)

    def of_another_kind(call):
        for layer in call["past_key_values"].layers:
            layer.__class__ = Another
        model(**call)

    assert kinds(lambda call: model(**call)) == {slots.RoomyLayer}
    assert kinds(of_another_kind) == {Another}
    assert [kinds(change) for change in (hidden, two, gradients, counted)] == [{PrunedLayer}] * 4


def test_bounds_are_few():
    def bound(*rows):
        return steps.chunks_of([type("Layer", (), {"rows": n}) for n in rows])

    assert [bound(n, 3) for n in (0, 255, 256, 511, 512, 700, 8191, 8192)] == [1, 1, 2, 2, 4, 4, 32, 64]


@on_gpu
@pytest.mark.parametrize("lengths", [[200], [230, 40, 111]], ids=str)
@torch.inference_mode()
def test_real_steps_generate_what_single_kernels_do(kernels, family, lengths):
    model, single = half(family, graphs="auto"), half(family, graphs=False)
    given = prompt(lengths)
    del given["position_ids"]
    for settings in (dict(do_sample=False), dict(do_sample=False, num_beams=2)):
        options = dict(max_new_tokens=20, min_new_tokens=20, pad_token_id=0, **settings)
        assert torch.equal(model.generate(**given, **options), single.generate(**given, **options))
    assert zsaa.captured(model)["off"] is None
    assert sum(replays for *_, replays in recorded(model)) >= 30


@on_gpu
@torch.inference_mode()
def test_real_steps_of_several_caches_and_streams(kernels):
    model, single = half(alpha=0.9), half(alpha=0.9, graphs=False)
    prompts = [prompt([150], seed=seed) for seed in range(3)]
    streams, caches, found = [torch.cuda.Stream() for _ in prompts], [], []
    for given in prompts:
        caches.append(model(**given).past_key_values)
    torch.cuda.synchronize()
    for token in (5, 7, 11):
        for stream, cache in zip(streams, caches):
            with torch.cuda.stream(stream):
                found.append(model(torch.full((1, 1), token, device="cuda"), past_key_values=cache).logits)
    torch.cuda.synchronize()
    want = [walk(single, given, [5, 7, 11])[0] for given in prompts]
    assert equal(found, [want[i][step] for step in range(3) for i in range(3)])


@pytest.mark.full
@pytest.mark.parametrize("how", ["exempt", "entry", "asked"])
@torch.inference_mode()
def test_graphs_of_prompts_with_masks_and_other_rules(kernels, how, request):
    """Prefills and steps; without a GPU by the stand-in."""
    if not GPU:
        request.getfixturevalue("stand_in")
    entry = {"exempt": {}, "entry": {"score": "random"}, "asked": {"score": "asked"}}[how]
    rule = entry and {**entry, "schedule": "entry"}
    models = [half(graphs=mode) for mode in (True, False)]
    for model in models:
        if how == "asked":
            from test_asked import scorer_of

            salience.attach(model, scorer_of().to(DEVICE))
        zsaa.enable(model, **rule)
    for seed in range(3):
        given = prompt([150, 40] if GPU else [20, 9], seed=seed)
        del given["position_ids"]
        mask = given["attention_mask"]
        if how != "entry":
            given["exempt" if how == "exempt" else "question"] = (mask.cumsum(1) % 9 == 1) & (mask == 1)
        options = dict(max_new_tokens=3, min_new_tokens=3, pad_token_id=0, do_sample=False)
        made = [model.generate(**given, **options) for model in models]
        assert torch.equal(*made)
    held = zsaa.captured(models[0])
    assert held["off"] is None and sum(g["replays"] for g in held["graphs"]) >= 2 and recorded(models[0])
