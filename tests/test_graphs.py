"""Recorded prefills: what is replayed, what is not, and that nothing handed out is written again.

Without a GPU a stand-in for CUDA graphs runs the recorded function again and writes over the memory of the recording,
as a replay does: keys, copies, limits and fallbacks are those of the real thing. With a GPU the real one is tested too.
"""

import copy
import gc
import threading
import warnings
import weakref

import peft
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import zsaa
from zsaa.families import find_decoder
from zsaa.fast import dispatch, graphs, packing, plans, recorder, state

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


class StandIn:
    """Runs again into the same memory. Inputs that it was given elsewhere than in the recording's buffers go unseen."""

    def __init__(self, device, pool):
        pool[:] = ["pool"]

    def record(self, run):
        self.run, result = run, run()
        self.memory = result[1]
        return result, 1000

    def replay(self):
        for memory, tensor in zip(self.memory, self.run()[1], strict=True):
            if memory.stride(0):  # not what is one row for the whole batch, and always the same
                memory.copy_(tensor)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def interpreted(monkeypatch):
    """Copying kernels in Triton's interpreter, and little memory that may be shared. With a GPU real ones are tested:
    test_real_graphs_replay_bit_for_bit."""
    pytest.importorskip("triton")
    if GPU:
        pytest.skip("Triton compiles here")
    import test_kernels  # noqa: F401  sets the interpreter up

    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "copies", lambda device: True)
    monkeypatch.setattr(packing, "LIMIT", 5000)
    yield
    dispatch._without_triton.cache_clear()


def model_of(family="llama", head="causal-lm", alpha=0.7, **kwargs):
    return zsaa.enable(tiny.make(family, head), alpha=alpha, tau=3, **kwargs)


def everything(output):
    """Logits or states, and all that the cache holds."""
    tensors = [output.logits if "logits" in output else output.last_hidden_state]
    for layer in output.past_key_values.layers if output.past_key_values is not None else ():
        tensors += [layer.keys, layer.values, layer.columns]
    return tensors


def same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def held(model):
    return [(g["lengths"], g["alphas"][0], g["replays"]) for g in zsaa.captured(model)["graphs"]]


BATCHES = [([23, 23], "right"), ([23, 9, 30], "left")]


@torch.no_grad()
def test_a_recording_that_does_not_follow_its_input_is_never_used(stand_in, monkeypatch):
    monkeypatch.setattr(StandIn, "replay", lambda self: None)
    model, plain = model_of(graphs=True), model_of(graphs=False)
    ids = tiny.tokens([23, 23])[0]
    with pytest.warns(UserWarning, match="records no CUDA graphs .* differs from the prefill itself"):
        got = model(ids)
    same(everything(got), everything(plain(ids)))
    assert not held(model)


@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_a_model_that_overflows_is_recorded_like_any_other(stand_in):
    model, ids = model_of(graphs=True), tiny.tokens([23, 23])[0]
    model.model.layers[3].mlp.down_proj.weight[0] = float("nan")
    for _ in range(2):
        assert model(ids).logits.isnan().any()
    assert held(model) == [([23, 23], 0.7, 2)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("lengths", "padding"), BATCHES, ids=str)
@torch.no_grad()
def test_a_replay_equals_the_pass_that_it_replaces(stand_in, family, lengths, padding):
    model, plain = model_of(family, graphs=True), model_of(family, graphs=False)
    for seed in range(2):
        ids, mask, positions = tiny.tokens(lengths, seed, padding)
        given = dict(attention_mask=mask, position_ids=positions)
        for options in (given, {**given, "use_cache": False, "logits_to_keep": 1}):
            same(everything(model(ids, **options)), everything(plain(ids, **options)))
    assert held(model) == [(lengths, 0.7, 2)] * 2
    assert held(plain) == []


@pytest.mark.parametrize(("lengths", "padding"), BATCHES, ids=str)
@torch.no_grad()
def test_drops_before_the_first_layer_are_replayed_and_decoded_from(stand_in, lengths, padding):
    rule = dict(score="random", schedule="entry", alpha=0.5)
    model, plain = model_of(graphs=True, **rule), model_of(graphs=False, **rule)
    for seed in range(2):
        ids, mask, _ = tiny.tokens(lengths, seed, padding)
        whole, outputs = torch.cat([mask, mask[:, -1:]], dim=1), []
        for each in (model, plain):
            first = each(ids, attention_mask=mask)
            outputs.append(everything(first))
            outputs[-1] += everything(each(ids[:, -1:], attention_mask=whole, past_key_values=first.past_key_values))
        same(*outputs)
    assert held(model) == [(lengths, 0.5, 2)]


@pytest.mark.parametrize(("lengths", "padding"), BATCHES, ids=str)
@torch.no_grad()
def test_a_replay_reads_the_exempt_tokens_of_its_own_call(stand_in, lengths, padding):
    """The mask is an input of a recording; how many it names is part of the shapes."""
    model, plain = model_of(graphs=True), model_of(graphs=False)
    ids, mask, _ = tiny.tokens(lengths, 0, padding)
    for shift in range(3):
        given = dict(attention_mask=mask, exempt=((mask.cumsum(1) - 2 - shift) // 3 == 0) & (mask == 1))
        same(everything(model(ids, **given)), everything(plain(ids, **given)))
    model(ids, attention_mask=mask)
    assert held(model) == [(lengths, 0.7, 3), (lengths, 0.7, 1)]


@pytest.mark.parametrize("head", ["base", "sequence-classification"])
@torch.inference_mode()
def test_other_heads_and_inputs(stand_in, head):
    model, plain = model_of("gpt2", head, graphs=True), model_of("gpt2", head, graphs=False)
    for seed in range(2):
        ids, _, _ = tiny.tokens([20, 20], seed)
        same(everything(model(ids)), everything(plain(ids)))
        states = torch.randn(2, 20, 32, dtype=torch.float64)
        if head == "base":
            same(everything(model(inputs_embeds=states)), everything(plain(inputs_embeds=states)))
    assert len(held(model)) == (2 if head == "base" else 1)


@torch.no_grad()
def test_what_was_handed_out_is_never_written_again(stand_in):
    model = model_of(graphs=True)
    first = everything(model(tiny.tokens([23], seed=0)[0]))
    before = [x.clone() for x in first]
    second = everything(model(tiny.tokens([23], seed=1)[0]))
    same(first, before)
    assert not torch.equal(first[0], second[0])
    memory = {x.data_ptr() for g in model.model._zsaa.graphs.recordings.values() for x in g.outputs.tensors}
    assert not memory & {x.data_ptr() for x in (*first, *second)}


@torch.no_grad()
def test_a_replayed_cache_is_continued_like_any_other(stand_in):
    model, plain = model_of(graphs=True), model_of(graphs=False)
    for seed in range(2):
        ids, mask, _ = tiny.tokens([23, 9], seed, "left")
        for options in ({}, {"num_beams": 2}):
            settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
            assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    assert sum(replays for *_, replays in held(model)) == 4


@torch.no_grad()
def test_auto_waits_for_the_second_time(stand_in):
    model = model_of()
    ids = tiny.tokens([23])[0]
    for calls, replays in ((1, []), (2, [1]), (3, [2])):
        model(ids)
        assert [r for *_, r in held(model)] == replays, calls
    info = zsaa.captured(model)
    assert (info["mode"], info["off"], info["bytes"]) == ("auto", None, 1000 + ids.nbytes)
    assert info["graphs"][0]["capture_ms"] > 0


@torch.no_grad()
def test_every_setting_has_a_recording_of_its_own(stand_in):
    model, plain = model_of(graphs=True), model_of(graphs=False)
    ids = tiny.tokens([23])[0]
    changes = dict(alpha=0.5), dict(tau=9), dict(score="column_mean"), dict(schedule="rising"), dict(alpha=[0.5])
    for settings in changes:
        zsaa.enable(model, **settings), zsaa.enable(plain, **settings)
        same(everything(model(ids)), everything(plain(ids)))
        same(everything(model(ids)), everything(plain(ids)))
    assert [replays for *_, replays in held(model)] == [2, 2, 2, 4], "one alpha, or the same one for each request"
    zsaa.set_alpha(model, 1.0)
    zsaa.set_alpha(plain, 1.0)
    count = len(held(model))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert len(held(model)) == count, "alpha = 1 is the stock path"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch 2.9 brought these settings")
@torch.no_grad()
def test_tf32_by_pytorchs_newer_settings(stand_in, monkeypatch):
    """As transformers' Trainer switches it on; PyTorch then refuses to tell its setting of old."""
    model, ids = model_of(graphs=True), tiny.tokens([23])[0]
    want = everything(model(ids))
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends, "fp32_precision", precision)
        same(everything(model(ids)), want)
        same(everything(model(ids)), want)
    monkeypatch.undo()
    assert [replays for *_, replays in held(model)] == [1, 2, 2]


@torch.no_grad()
def test_new_values_in_the_same_weights_are_seen(stand_in):
    model = model_of(graphs=True)
    ids = tiny.tokens([23])[0]
    before = model(ids).logits
    model.model.layers[1].mlp.up_proj.weight.mul_(2)
    after = model(ids).logits
    zsaa.enable(model, graphs=False)
    assert torch.equal(after, model(ids).logits)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("mode", ["auto", pytest.param(True, marks=pytest.mark.full)])
@torch.no_grad()
def test_a_recording_casts_the_weights_itself(stand_in, monkeypatch, mode):
    """Autocast lets the weights that it has cast go when its block ends; a graph that read them would read on there."""
    cast, record = set(), StandIn.record

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                cast.add(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    def watched(self, run):
        with Casts():
            return record(self, run)

    monkeypatch.setattr(StandIn, "record", watched)
    model, ids = tiny.make("llama", dtype=torch.float32, layers=2), tiny.tokens([12])[0]
    zsaa.enable(model, alpha=0.7, tau=3, graphs=mode)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids), model(ids)
        assert torch.is_autocast_cache_enabled()
    assert len(held(model)) == 1
    assert {p.data_ptr() for n, p in model.model.layers.named_parameters() if n.endswith("proj.weight")} <= cast


def replace_weight(model):
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32, dtype=torch.float64))


def assign_state(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def replace_module(model):
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[0].mlp)


def change_data(model):
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = layer.weight.data * 1.5


@pytest.mark.parametrize("change", [replace_weight, assign_state, replace_module, change_data])
@torch.no_grad()
def test_other_weights_end_a_recording(stand_in, change):
    model = model_of(graphs=True)
    ids = tiny.tokens([23])[0]
    model(ids)
    recording = next(iter(model.model._zsaa.graphs.recordings.values()))
    change(model)
    after = model(ids).logits
    assert next(iter(model.model._zsaa.graphs.recordings.values())) is not recording
    zsaa.enable(model, graphs=False)
    assert torch.equal(after, model(ids).logits)


def other_type(model):
    """As a model that went to the CPU and came back in another precision, to where it had been."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.view(torch.bfloat16).copy_(tensor.data.clone())


def other_shape(model):
    """As pruning of neurons does it."""
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.data = part.weight.data[:24]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :24]


@pytest.mark.parametrize("change", [other_type, other_shape])
@torch.no_grad()
def test_other_weights_in_the_same_place_end_a_recording(stand_in, monkeypatch, change):
    monkeypatch.setattr(dispatch, "_chosen", "torch")
    model, ids = (
        zsaa.enable(tiny.make("llama", dtype=torch.float16), alpha=0.7, tau=3, graphs=True),
        tiny.tokens([23])[0],
    )
    model(ids)
    recording = next(iter(model.model._zsaa.graphs.recordings.values()))
    place = [p.data_ptr() for p in model.parameters()]
    change(model)
    assert [p.data_ptr() for p in model.parameters()] == place
    after = everything(model(ids))
    assert next(iter(model.model._zsaa.graphs.recordings.values())) is not recording
    zsaa.enable(model, graphs=False)
    same(after, everything(model(ids)))


@torch.no_grad()
def test_replays_do_not_walk_over_the_modules(stand_in, monkeypatch):
    """What a recording depends on is looked up in flat lists; a walk takes as long as a small model's replay."""
    model, ids = model_of(graphs=True), tiny.tokens([23])[0]
    model(ids)
    walks, walk = [], state.state_of
    monkeypatch.setattr(state, "state_of", lambda decoder, training=False: walks.append(1) or walk(decoder))
    model(ids)
    assert not walks
    layer = model.model.layers[1]
    weight = layer.mlp.up_proj.weight
    layer.mlp.up_proj.weight = torch.nn.Parameter(weight.detach())  # another object, the same memory
    model(ids), model(ids)
    assert (len(walks), [replays for *_, replays in held(model)]) == (1, [4]), "one walk, and all is as it was"


@torch.no_grad()
def test_replaced_weights_are_not_kept_alive(stand_in):
    model, ids = model_of(graphs=True), tiny.tokens([23])[0]
    model(ids)
    gone = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.float64))
    assert gone() is None
    decoder = weakref.ref(model.model)
    zsaa.enable(model, graphs=False)
    zsaa.enable(model, graphs=True)
    model(ids)
    del model
    gc.collect()
    assert decoder() is None


@torch.no_grad()
def test_adapters_are_switched_and_merged(stand_in):
    base = tiny.make("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.add_adapter("other", config)
    zsaa.enable(model.eval(), alpha=0.7, tau=3, graphs=True)
    ids = tiny.tokens([23])[0]

    def check():
        logits = model(ids).logits
        mode = zsaa.enable(model, graphs=False)
        assert torch.equal(logits, mode(ids).logits)
        zsaa.enable(model, graphs=True)
        return logits

    results = [check()]
    recordings = model.base_model.model.model._zsaa.graphs
    for change in (lambda: model.set_adapter("other"), model.merge_adapter, model.unmerge_adapter):
        model(ids)
        change()
        results.append(model(ids).logits)
        assert torch.equal(results[-1], check())
    with model.disable_adapter():
        results.append(check())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[-1], results[-2])
    assert recordings is not model.base_model.model.model._zsaa.graphs


def test_what_must_run_as_it_is(stand_in):
    model = model_of(graphs=True)
    ids = tiny.tokens([23])[0]
    model(ids).logits.sum().backward()  # gradients
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    with torch.no_grad():
        with zsaa.trace(model) as t:
            model(ids)
        assert len(t.kept) == 4
        assert len(model(ids, output_hidden_states=True).hidden_states) == 5
        assert isinstance(model(ids, return_dict=False), tuple)
        model.train()
        model(ids)
        model.eval()
        calls = []
        hook = model.model.layers[2].register_forward_hook(lambda *args: calls.append(1))
        model(ids), model(ids)
        assert len(calls) == 2
        hook.remove()
        layer = model.model.layers[2]
        layer.forward = lambda *args, **kwargs: calls.append(2) or type(layer).forward(layer, *args, **kwargs)
        model(ids)
        assert calls[-1] == 2
        del layer.forward
    assert held(model) == []
    with torch.no_grad():
        model(ids)
    assert len(held(model)) == 1, "transformers' own hooks, left behind by output_hidden_states, do no harm"


@torch.no_grad()
def test_what_watches_all_operations_or_modules_sees_them(stand_in, monkeypatch):
    replay = StandIn.replay

    def unseen(self):  # as a real one
        with torch.utils._python_dispatch._disable_current_modes():
            replay(self)

    monkeypatch.setattr(StandIn, "replay", unseen)
    model, plain, ids, calls = model_of(graphs=True), model_of(graphs=False), tiny.tokens([23])[0], []
    model(ids)
    flops = []
    for m in (model, plain):
        with FlopCounterMode(display=False) as counter:
            m(ids)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    try:
        model(ids)
        count = len(calls)
        plain(ids)
    finally:
        hook.remove()
    assert len(calls) == 2 * count
    assert held(model) == [([23], 0.7, 1)]


@torch.no_grad()
def test_a_hook_that_comes_later_ends_the_replays(stand_in):
    model = model_of(graphs=True)
    ids, calls = tiny.tokens([23])[0], []
    model(ids)
    model.model.layers[2].register_forward_hook(lambda *args: calls.append(1))
    model(ids)
    assert calls == [1]
    assert held(model) == []


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_before_and_says_so_once(stand_in, monkeypatch):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StandIn, "record", record)
    model, plain = model_of(graphs=True), model_of(graphs=False)
    ids = tiny.tokens([23])[0]
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        same(everything(model(ids)), everything(plain(ids)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(everything(model(ids)), everything(plain(ids)))
    assert "not permitted" in zsaa.captured(model)["off"]


@torch.no_grad()
def test_memory_is_bounded(stand_in, monkeypatch):
    monkeypatch.setattr(graphs.Graphs, "limit", 3)
    model = model_of(graphs=True)
    batches = {n: tiny.tokens([n])[0] for n in range(10, 30)}
    for n in (10, 11, 12, 13, 14):  # more than fit: the first three stay
        model(batches[n])
    assert [lengths for lengths, *_ in held(model)] == [[10], [11], [12]]
    for _ in range(4 * 3):
        model(batches[11])
    model(batches[13])  # 10 and 12 have not been used for long: the older one goes
    assert [lengths for lengths, *_ in held(model)] == [[11], [12], [13]]
    monkeypatch.setattr(graphs, "_budget", lambda device: 2500)
    zsaa.enable(model, graphs="auto")
    zsaa.enable(model, graphs=True)
    for n in (20, 21, 22, 20):
        model(batches[n])
    assert held(model) == [([20], 0.7, 2), ([21], 0.7, 1)]
    assert zsaa.captured(model)["off"] is None


@torch.no_grad()
def test_copies_share_no_recordings_and_disable_frees_them(stand_in):
    model = model_of(graphs=True)
    ids = tiny.tokens([23])[0]
    want = model(ids).logits
    twin = copy.deepcopy(model)
    assert held(twin) == []
    assert zsaa.captured(twin)["mode"] is True
    assert torch.equal(twin(ids).logits, want)
    assert len(held(model)) == len(held(twin)) == 1
    zsaa.disable(model)
    assert type(model.model) is type(tiny.make("llama").model)
    with pytest.raises(RuntimeError, match="not enabled"):
        zsaa.captured(model)
    model(ids)
    assert len(held(twin)) == 1


@torch.no_grad()
def test_threads_do_not_share_a_replay(stand_in):
    model, plain = model_of(graphs=True), model_of(graphs=False)
    batches = [tiny.tokens([23], seed)[0] for seed in range(4)]
    want, wrong = [plain(ids).logits for ids in batches], []

    @torch.no_grad()
    def work(i):
        wrong.extend(i for _ in range(5) if not torch.equal(model(batches[i]).logits, want[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_a_wrong_mode_is_named():
    with pytest.raises(ValueError, match=r"'always'"):
        zsaa.enable(tiny.make("llama"), graphs="always")


def half_precision(family, alpha=0.7, mode=True):
    torch.manual_seed(0)
    return zsaa.enable(tiny.make(family, dtype=torch.float16).cuda(), alpha=alpha, tau=3, graphs=mode)


@on_gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("lengths", "padding"), [*BATCHES, ([200, 200], "right")], ids=str)
@pytest.mark.parametrize("shared", [packing.LIMIT, 5000])
@torch.inference_mode()
def test_real_graphs_replay_bit_for_bit(monkeypatch, family, lengths, padding, shared):
    monkeypatch.setattr(packing, "LIMIT", shared)
    model, plain = half_precision(family), half_precision(family, mode=False)
    for seed in range(3):
        ids, mask, positions = (x.cuda() for x in tiny.tokens(lengths, seed, padding))
        given = dict(attention_mask=mask, position_ids=positions)
        same(everything(model(ids, **given)), everything(plain(ids, **given)))
        settings = dict(attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    assert zsaa.captured(model)["off"] is None
    assert sum(replays for *_, replays in held(model)) == 6
    outlets = {r.outlet is not None for r in find_decoder(model)[0]._zsaa.graphs.recordings.values()}
    assert family != "llama" or outlets == {shared == 5000}
    assert zsaa.captured(model)["bytes"] > 0


@on_gpu
@torch.no_grad()
def test_real_graphs_on_several_streams_and_settings():
    model, plain = half_precision("llama"), half_precision("llama", mode=False)
    batches = [tiny.tokens([150, 150], seed)[0].cuda() for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for alpha in (0.9, 0.5) * 3:
        for i, ids in enumerate(batches):
            with torch.cuda.stream(streams[i % 2]), zsaa.at(model, alpha):
                streams[i % 2].wait_stream(torch.cuda.default_stream())
                results.append((alpha, i, everything(model(ids))))
        plans._plan.cache_clear()  # what a replay reads must not depend on a cache elsewhere
        torch.full((1 << 20,), -1, device="cuda")
    torch.cuda.synchronize()
    for alpha, i, tensors in results:
        with zsaa.at(plain, alpha):
            same(tensors, everything(plain(batches[i])))


@on_gpu
@torch.inference_mode()
def test_real_graphs_take_turns_in_one_memory():
    from zsaa.bench.shapes import build

    model = zsaa.enable(build("smollm2-135m", 512, "cuda", torch.float16), graphs=True)
    ids = torch.randint(0, 49152, (32, 512), device="cuda")
    for alpha in (0.9, 0.8, 0.7, 0.5):
        with zsaa.at(model, alpha):
            model(ids)
    first, *others = (g["bytes"] - ids.nbytes for g in zsaa.captured(model)["graphs"])
    assert first > 50e6 and sum(others) < 0.1 * first  # what one holds the next may use


def test_the_stream_of_recordings_that_are_gone_serves_the_next(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(recorder.Pool, "idle", {})
    first, second = recorder.Pool(), recorder.Pool()
    for pool in (first, second, first):
        pool.open("cuda")
    streams = [first[1], second[1]]
    assert len(first) == 2 and streams[0] is not streams[1], "who may be at work at the same time has its own"
    del pool, first
    gc.collect()
    third, fourth = recorder.Pool(), recorder.Pool()
    third.open("cuda"), fourth.open("cuda")
    assert third[1] is streams[0] and fourth[1] not in streams


@on_gpu
@torch.no_grad()
def test_real_graphs_that_are_gone_leave_no_memory():
    ids, held = tiny.tokens([23, 23])[0].cuda(), []
    for _ in range(4):
        model = half_precision("llama")
        model(ids)
        assert len(zsaa.captured(model)["graphs"]) == 1
        del model
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] - held[1] < 8 << 20  # a workspace has 32


@on_gpu
@pytest.mark.parametrize("mode", [True, "auto"])
@torch.no_grad()
def test_real_graphs_outlive_an_autocast_block(mode):
    models = [zsaa.enable(tiny.make("llama").float().cuda(), alpha=0.7, tau=3, graphs=m) for m in (mode, False)]
    ids, noise = tiny.tokens([150, 150])[0].cuda(), []
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            model, plain = ([everything(m(ids)) for _ in range(2)] for m in models)
        same(model[-1], plain[-1])
        noise += [torch.full_like(p, float("nan"), dtype=torch.float16) for p in models[0].parameters()]
    assert sum(replays for *_, replays in held(models[0])) >= 3


@on_gpu
@torch.no_grad()
def test_a_real_failure_leaves_the_gpu_usable(monkeypatch):
    model, plain = half_precision("llama"), half_precision("llama", mode=False)
    ids = tiny.tokens([150])[0].cuda()
    norm = type(model.model.norm)
    stock = norm.forward

    def with_sync(self, x):
        x.sum().item()
        return stock(self, x)

    monkeypatch.setattr(norm, "forward", with_sync)
    with pytest.warns(UserWarning, match="records no CUDA graphs"):
        same(everything(model(ids)), everything(plain(ids)))
    same(everything(model(ids)), everything(plain(ids)))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.isfinite(torch.randn(100, device="cuda")).all()
    monkeypatch.undo()
    zsaa.enable(model, graphs=False)
    zsaa.enable(model, graphs=True)
    same(everything(model(ids)), everything(plain(ids)))
    assert len(held(model)) == 1


def test_the_number_of_calls_that_are_remembered_is_bounded(monkeypatch):
    """Of prefills, decoding steps and training passes."""
    monkeypatch.setattr(recorder, "MANY", 8)
    made = graphs.Graphs(True)
    for kept in (made, made.steps, made.training):
        for number in range(100):
            assert kept.find((number,), None, 2, None) is None
            assert kept.seen[(number,)] == 1 and len(kept.seen) <= 9


@torch.no_grad()
def test_weights_in_four_bits_are_recorded_and_in_eight_are_not(stand_in):
    bnb = pytest.importorskip("bitsandbytes")
    from zsaa.bench.shapes import build

    model, plain = (
        zsaa.enable(build("tiny", 64, "cpu", torch.float32, "nf4"), alpha=0.7, graphs=g) for g in (True, False)
    )
    for seed in range(2):
        ids = tiny.tokens([23, 23], seed)[0]
        same(everything(model(ids)), everything(plain(ids)))
    assert held(model) == [([23, 23], 0.7, 2)]
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4").to("cpu")
    model(ids)
    assert held(model) == [([23, 23], 0.7, 1)], "other weights are recorded anew"
    linear.weight = bnb.nn.Int8Params(torch.zeros(64, 128, dtype=torch.int8), requires_grad=False)
    assert state.state_of(model.model) is None


@torch.no_grad()
def test_sentences_have_no_fixed_shape_and_are_not_recorded(stand_in):
    """Chunks of a fixed size are; and both give what they give without graphs, with nothing said."""
    from zsaa.learned import asked, salience

    ids, kept = tiny.tokens([70, 70])[0], {}
    for sentences in (False, True):
        model = tiny.make("llama")
        scorer = asked.by_words(model, tiny.tokenizer(), chunk=4)
        if not sentences:
            scorer = asked.Scorer(asked.Shape(32, 0, chunk=4), scorer.canon, scorer.idf)
        salience.attach(model, scorer)
        zsaa.enable(model, alpha=0.6, score="asked", schedule="entry", graphs=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kept[sentences] = everything(model(ids))
        assert len(held(model)) == (not sentences)
        zsaa.enable(model, graphs=False)
        same(kept[sentences], everything(model(ids)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("lengths", "padding"), BATCHES, ids=str)
@torch.no_grad()
def test_large_caches_leave_as_they_are_made(stand_in, interpreted, family, lengths, padding):
    """Straight into memory that is new each time: none of it is the recording's, and the numbers are the pass's."""
    model, plain = model_of(family, graphs=True), model_of(family, graphs=False)
    outputs = []
    for seed in range(2):
        ids, mask, positions = tiny.tokens(lengths, seed, padding)
        given = dict(attention_mask=mask, position_ids=positions)
        outputs.append((model(ids, **given), everything(plain(ids, **given))))
    for got, wanted in outputs:  # the first still is what it was
        same(everything(got), wanted)
    (recording,) = find_decoder(model)[0]._zsaa.graphs.recordings.values()
    assert recording.outlet is not None and len(recording.outputs.tensors) == 1
    assert len(recording.outlet.table) > 1, "several pieces"
    mask = torch.cat([mask, mask[:, -1:]], dim=1)
    steps = [
        each(ids[:, -1:], attention_mask=mask, past_key_values=each(ids, **given).past_key_values)
        for each in (model, plain)
    ]
    same(*map(everything, steps))


@torch.no_grad()
def test_an_outlet_that_copies_something_else_is_not_used(stand_in, interpreted, monkeypatch):
    from zsaa.kernels import pack

    real = pack.put
    monkeypatch.setattr(pack, "put", lambda x, *place: real(x.flip(0), *place))
    model, plain = model_of(graphs=True), model_of(graphs=False)
    ids = tiny.tokens([23, 23])[0]
    with pytest.warns(UserWarning, match="copying kernel is not used: it copies something else"):
        got = model(ids)
    same(everything(got), everything(plain(ids)))
    assert held(model) == [([23, 23], 0.7, 1)]
