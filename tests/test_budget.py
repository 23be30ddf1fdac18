"""Budgets: bytes and counts against real caches and traces; calibrations under a clock that the test winds."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsaa
from zsaa import measure
from zsaa.budget import calibration as calibrations
from zsaa.budget import saved
from zsaa.cost import kv_bytes
from zsaa.dial import settings as dial_settings
from zsaa.measure import clock as clocks
from zsaa.measure import origin
from zsaa.rule import SCHEDULES

N = 60
RULE = {"tau": 5, "score": "column_sum", "schedule": "geometric"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrations, "REPEATS", 1)  # this clock has no noise
    monkeypatch.setattr(calibrations, "POINTS", 4)
    return tmp_path / "cache" / "latency"


def affine(model, alpha, batch, n):
    """Milliseconds that rise with the MACs, and a stock code path that is twice as fast per MAC."""
    work = batch * zsaa.macs(model.config, n, alpha, dial_settings(model)["tau"]) / 1e5
    return 7 + (work / 2 if alpha == 1 else work)


class Clock:
    """Stands in for the time module in zsaa.measure: only forward passes of `model` take time, by `cost`."""

    def __init__(self, monkeypatch, model, cost=affine):
        self.now, self.model, self.cost, self.calls = 0.0, model, cost, []
        monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        model.register_forward_hook(self.tick, with_kwargs=True)

    def tick(self, model, args, kwargs, output):
        alpha, shape = dial_settings(model)["alpha"], kwargs["input_ids"].shape
        self.calls.append((alpha, kwargs))
        self.now += self.cost(model, alpha, *shape) / 1000


@pytest.fixture
def llama():
    return tiny.make("llama", dtype=torch.float32)


@pytest.fixture
def clock(monkeypatch, llama):
    return Clock(monkeypatch, llama)


# ------------------------------------------------------------------------------------------- what an alpha costs


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str
)
def test_kv_bytes_are_those_of_a_real_cache(family, dtype):
    """The tiny models' windows of 9 bite: the stock cache evicts, the pruned one does not."""
    model = zsaa.enable(tiny.make(family, dtype=dtype), tau=3)
    for n, alpha, batch in ((40, 1.0, 1), (40, 0.8, 2), (40, 0.1, 1), (7, 1.0, 3), (7, 0.9, 1), (2, 0.5, 1), (9, 1, 1)):
        with zsaa.at(model, alpha), torch.no_grad():
            cached = model(tiny.tokens([n] * batch)[0], use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.layers)
        assert zsaa.report(model, n, [alpha], batch)["KV bytes"].item() == held, (n, alpha, batch)
        assert kv_bytes(model.config, n, alpha, 3, batch, dtype.itemsize) == held


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_report_counts_what_a_trace_sees(family):
    model = zsaa.enable(tiny.make(family), tau=3)
    table = zsaa.report(model, N, [1.0, 0.8, 0.3], batch=2)
    assert list(zsaa.report(model, N, 0.8).index) == [0.8]
    assert list(table.index) == [1.0, 0.8, 0.3] and table.index.name == "alpha"
    for alpha, row in table.iterrows():
        with zsaa.at(model, alpha), zsaa.trace(model) as trace, torch.no_grad():
            model(tiny.tokens([N, N])[0])
        counts = [layer[0] for layer in trace.counts]
        assert table.attrs["tokens_per_layer"][alpha] == counts
        assert [row["first layer"], row["median layer"], row["last layer"]] == [
            counts[0],
            sorted(counts)[1],
            counts[-1],
        ]
        assert row["kept"] == round(sum(counts) / (4 * N), 3)
        assert row["GMACs"] == round(2 * zsaa.macs(model.config, N, alpha, 3) / 1e9, 3)
        assert row["MAC reduction"] == round(zsaa.mac_reduction(model.config, N, alpha, 3), 2)


def test_without_a_calibration_no_time_is_reported(llama, clock):
    table = zsaa.report(llama, N)
    assert table[["predicted ms", "measured ms", "speed-up"]].isna().all(axis=None)
    assert table.attrs["timing"] == f"not measured; zsaa.calibrate(model, {N}, 1) measures them"
    assert table.attrs["provenance"] is None and not clock.calls, "a report measures nothing"


def test_the_report_prints_whole(llama, clock, capsys, monkeypatch):
    """No column is cut to "...", no NaN, alphas as one types them; what has no time shows none."""
    monkeypatch.setenv("COLUMNS", "60")
    print(zsaa.report(llama, 1024))
    untimed = capsys.readouterr().out
    assert "..." not in untimed and "nan" not in untimed.lower() and "zsaa.calibrate(model, 1024, 1)" in untimed
    heads = untimed.split("\n---")[0].split()
    assert heads == [
        "alpha",
        "first",
        "median",
        "last",
        "kept",
        "GMACs",
        "MACs",
        "KV",
        "layer",
        "layer",
        "layer",
        "bytes",
    ]
    assert [line.split()[0] for line in untimed.splitlines()[3:-1]][-1] == "0.0048"
    calibration = zsaa.calibrate(llama, N)
    print(zsaa.report(llama, N, [1.0, 0.8765]))
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[3:5])
    assert (first[0], first[-2]) == ("1", f"{calibration.stock_ms:.2f}")
    assert (second[0], second[-2]) == ("0.8765", f"~{calibration.predict(0.8765):.2f}"), "predicted, and marked so"
    page = zsaa.report(llama, N, [1.0])._repr_html_()
    assert page.startswith("<table>") and "~" not in page and "nan" not in page.lower()
    part = zsaa.report(llama, N, [1.0])[["kept"]]
    assert type(part) is pd.DataFrame, "what is made of it prints as pandas prints"


def test_times_in_the_report_are_those_of_the_calibration(llama, clock):
    calibration = zsaa.calibrate(llama, N)
    table = zsaa.report(llama, N)
    assert list(table["measured ms"]) == [round(row["latency_ms"], 2) for row in calibration.rows]
    assert list(table["speed-up"]) == [round(calibration.stock_ms / row["latency_ms"], 2) for row in calibration.rows]
    np.testing.assert_allclose(table["predicted ms"], table["measured ms"], atol=0.01)
    other = zsaa.report(llama, N, [0.8765])
    assert math.isnan(other["measured ms"].item()), "timed at other alphas only"
    assert other["predicted ms"].item() == round(calibration.predict(0.8765), 2)
    assert other["speed-up"].item() == round(calibration.stock_ms / calibration.predict(0.8765), 2)
    assert zsaa.report(llama, N + 1)["measured ms"].isna().all(), "another length"
    assert zsaa.report(llama, N, batch=2)["measured ms"].isna().all(), "another batch"
    assert table.attrs["provenance"]["hardware"]["device"] == "cpu" and "20" in table.attrs["timing"]
    about = {"model": "LlamaForCausalLM", "n": N, "batch": 1, "tau": 5, "score": "column_sum", "device": "cpu"}
    assert about.items() <= table.attrs.items() and table.attrs["dtype"] == "torch.float32"
    assert isinstance(table, pd.DataFrame) and "<table" in table._repr_html_()


# ---------------------------------------------------------------------------------------------------- calibration


def test_a_calibration_times_stock_and_pruned_settings_in_turn(llama, clock, monkeypatch):
    monkeypatch.setattr(calibrations, "REPEATS", 15)
    monkeypatch.setattr(calibrations, "POINTS", 8)
    calibration = zsaa.calibrate(llama, N, batch=2, seconds=math.inf)
    alphas = [row["alpha"] for row in calibration.rows]
    assert alphas[:2] == [1.0, 0.999] and alphas == sorted(set(alphas), reverse=True) and 5 <= len(alphas) <= 9
    assert alphas[-1] == 0.083 < 5 / N, "below it nothing changes any more"
    assert zsaa.kept_counts(N, alphas[-1], 4) == zsaa.kept_counts(N, 1e-5, 4) != zsaa.kept_counts(N, 0.12, 4)
    assert [alpha for alpha, _ in clock.calls] == alphas * 17, "2 rounds to warm up, 15 that count"
    zsaa.enable(llama)
    for row in calibration.rows:
        assert row["latency_ms"] == pytest.approx(affine(llama, row["alpha"], 2, N), abs=1e-3)
    _, given = clock.calls[0]
    assert given["input_ids"].shape == (2, N) and given["use_cache"] is True and given["logits_to_keep"] == 1


def test_slow_models_are_timed_in_fewer_rounds(llama, monkeypatch):
    monkeypatch.setattr(calibrations, "REPEATS", 15)
    clock = Clock(monkeypatch, llama, lambda *_: 10_000)
    rows = zsaa.calibrate(llama, N, seconds=30).rows
    assert len(clock.calls) == 5 * len(rows), "2 rounds to warm up, and never fewer than 3 that count"


@pytest.mark.parametrize("n", [1, 4, 5, 6, 250])
def test_any_length_can_be_calibrated(llama, clock, n):
    calibration = zsaa.calibrate(llama, n)
    assert [row["alpha"] for row in calibration.rows][:2] == [1.0, 0.999]
    assert calibration.alpha_for(1e9) == 1.0


@pytest.mark.parametrize("head", tiny.HEADS)
def test_every_head_can_be_calibrated(monkeypatch, head):
    model = tiny.make("gpt2", head, dtype=torch.float32)
    clock = Clock(monkeypatch, model)
    assert zsaa.calibrate(model, N, batch=2).rows
    assert ("logits_to_keep" in clock.calls[0][1]) == (head == "causal-lm")


def test_a_peft_model_is_timed_like_its_base(monkeypatch, llama):
    peft = pytest.importorskip("peft", minversion="0.21")  # older ones pass over the hook that keeps this clock

    calls = Clock(monkeypatch, llama).calls
    plain = zsaa.calibrate(llama, N)
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    before = len(calls)
    lora = zsaa.calibrate(model, N)
    assert len(calls) == 2 * before, "LoRA's extra products take time: no use of the base's calibration"
    assert calls[-1][1]["logits_to_keep"] == 1 and lora.rows == plain.rows


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(0.01, 0.998))
def test_time_that_rises_with_macs_is_predicted_exactly(alpha):
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32))
    rows = [
        {"alpha": a, "latency_ms": affine(model, a, 1, N)} for a in calibrations.timed_alphas(model.config, N, RULE)
    ]
    calibration = calibrations.Calibration(model.config, {"n": N, "batch": 1, **RULE}, rows, {})
    assert calibration.predict(alpha) == pytest.approx(affine(model, alpha, 1, N))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_smallest_alpha_that_is_timed_is_the_largest_of_two_digits_that_leaves_tau(schedule):
    config = tiny.CONFIGS["llama"]()
    assert calibrations.timed_alphas(config, 1024, RULE)[-1] == 0.0048 and calibrations._two_digits(0.25) == 0.25
    low = calibrations.timed_alphas(config, N, {**RULE, "score": "random", "schedule": schedule})[-1]
    assert zsaa.kept_counts(N, low, 4, schedule=schedule) == [5] * 4
    assert zsaa.kept_counts(N, 1.4 * low, 4, schedule=schedule)[0] > 5


times = st.lists(st.floats(0.01, 100), min_size=9, max_size=9)


def test_a_busy_machine_is_pointed_out(llama, monkeypatch, recwarn):
    monkeypatch.setattr(calibrations, "REPEATS", 5)
    waves = iter(np.tile([10, 10, 10, 20, 20, 40, 40.0], 99))
    Clock(monkeypatch, llama, lambda *_: 1000)
    assert zsaa.calibrate(llama, N).scatter == 0 and not [w for w in recwarn if "scatter" in str(w.message)]
    assert zsaa.report(llama, N).attrs["timing"].endswith("medians, scatter 0%")
    Clock(monkeypatch, llama, lambda *_: next(waves))
    with pytest.warns(UserWarning, match=r"the readings scatter by \d+%.*refresh=True"):
        assert zsaa.calibrate(llama, N, refresh=True).scatter > 0.25


def noisy(values):
    config = tiny.CONFIGS["llama"]()
    alphas = [1.0, 0.999, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 5 / N]
    rows = [{"alpha": alpha, "latency_ms": value} for alpha, value in zip(alphas, values)]
    return calibrations.Calibration(config, {"n": N, "batch": 1, **RULE}, rows, {})


@settings(deadline=None)
@given(values=times, budgets=st.tuples(st.floats(0.01, 120), st.floats(0.01, 120)))
def test_alpha_for_keeps_to_the_budget_and_rises_with_it(values, budgets):
    """Whatever noise the readings hold."""
    calibration = noisy(values)
    found = []
    for ms in sorted(budgets):
        try:
            alpha = calibration.alpha_for(ms)
        except ValueError:
            least = min(calibration.stock_ms, calibration.predict(5 / N))
            assert ms < least and calibration.alpha_for(least) > 0, "what the error offers can be had"
            continue
        found.append(alpha)
        assert calibration.predict(alpha) <= ms and alpha <= 1
        if alpha < calibrations.NEAR:
            assert calibration.predict(min(alpha + 2e-5, calibrations.NEAR)) > ms, "no larger alpha would do"
    assert found == sorted(found)


@given(values=times)
def test_predictions_never_fall_with_alpha(values):
    calibration = noisy(values)
    predicted = [calibration.predict(alpha) for alpha in (0.05, 0.09, 0.19, 0.3, 0.42, 0.7, 0.85, 0.97, 0.999)]
    assert predicted == sorted(predicted)


# ------------------------------------------------------------------------------------------------------ alpha_for


def test_a_latency_budget(llama, clock):
    calibration = zsaa.calibrate(llama, N)
    slowest, fastest = (calibration.predict(alpha) for alpha in (0.999, 5 / N))
    assert calibration.stock_ms < slowest, "this clock's pruned path is slower per MAC: stock is no upper end"
    assert zsaa.alpha_for(llama, N, latency_ms=calibration.stock_ms) == 1.0
    assert zsaa.alpha_for(llama, N, latency_ms=math.inf) == 1.0
    middle = (fastest + calibration.stock_ms) / 2
    alpha = zsaa.alpha_for(llama, N, latency_ms=middle)
    zsaa.enable(llama)
    assert affine(llama, alpha, 1, N) <= middle + 1e-3
    assert affine(llama, alpha + 0.02, 1, N) > middle
    assert zsaa.alpha_for(llama, np.array([N, 3, 8]), latency_ms=middle) == alpha, "the longest text must keep to it"
    assert zsaa.alpha_for(llama, N, latency_ms=fastest) >= 5 / N
    with pytest.raises(
        ValueError, match=rf"1 x {N} tokens.* {calibration.stock_ms:.4g} ms in the.*{fastest:.4g} ms at"
    ):
        zsaa.alpha_for(llama, N, latency_ms=fastest * 0.99)


def test_where_pruning_is_slower_than_stock_the_error_says_so(llama, monkeypatch):
    Clock(monkeypatch, llama, lambda model, alpha, batch, n: 10 if alpha == 1 else 20)
    assert zsaa.alpha_for(llama, N, latency_ms=10) == 1.0
    with pytest.raises(ValueError, match=r"10 ms in the stock model \(alpha = 1\) and 20 ms .*Allow 10 ms or more"):
        zsaa.alpha_for(llama, N, latency_ms=9)


def test_a_mac_budget_takes_a_model_or_its_config(llama):
    alpha = zsaa.alpha_for(llama.config, N, 3)
    assert alpha == zsaa.alpha_for(llama, N, 3) == zsaa.alpha_for(llama, [N, N], mac_reduction=3)
    assert zsaa.alpha_for(llama, N, 3, 12) == zsaa.alpha_for(llama.config, N, 3, tau=12) != alpha
    zsaa.enable(llama, tau=12)
    assert zsaa.alpha_for(llama, N, 3) == zsaa.alpha_for(llama.config, N, 3, 12) != alpha, "the dial's tau"


@pytest.mark.parametrize("budgets", [{}, {"mac_reduction": 2, "latency_ms": 5}], ids=["neither", "both"])
def test_exactly_one_budget(llama, budgets):
    with pytest.raises(TypeError, match="give one budget, mac_reduction or latency_ms"):
        zsaa.alpha_for(llama, N, **budgets)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"latency_ms": 0}, ValueError, "latency_ms must be > 0"),
        ({"latency_ms": -3.5}, ValueError, "got -3.5"),
        ({"latency_ms": math.nan}, ValueError, "got nan"),
        ({"latency_ms": "120"}, TypeError, "got '120'"),
        ({"latency_ms": True}, TypeError, "got True"),
        ({"mac_reduction": "3"}, TypeError, "mac_reduction must be a number > 0, got '3'"),
        ({"mac_reduction": 0}, ValueError, "mac_reduction must be > 0, got 0"),
        ({"mac_reduction": 0.5}, ValueError, "0.5 is out of reach"),
        ({"latency_ms": 5, "batch": 0}, ValueError, "batch must be a whole number >= 1, got 0"),
        ({"latency_ms": 5, "n": 257}, ValueError, "n must be at most 256"),
        ({"latency_ms": 5, "n": 0}, ValueError, "n must be a whole number >= 1, got 0"),
        ({"latency_ms": 5, "n": []}, ValueError, "empty"),
        ({"latency_ms": 5, "tau": 0}, ValueError, "tau must be >= 1"),
        ({"latency_ms": 5, "schedule": "once"}, ValueError, "unknown schedule 'once'"),
        ({"mac_reduction": 2, "schedule": "once"}, ValueError, "unknown schedule 'once'"),
    ],
)
def test_budgets_out_of_range(llama, clock, arguments, error, text):
    with pytest.raises(error, match=text):
        zsaa.alpha_for(llama, **{"n": N, **arguments})
    assert not clock.calls


def test_a_config_cannot_be_timed(llama):
    with pytest.raises(TypeError, match="latency_ms needs a model to time, not a LlamaConfig"):
        zsaa.alpha_for(llama.config, N, latency_ms=5)
    with pytest.raises(ValueError, match="no MAC count for a str of model_type None. Supported: gpt2"):
        zsaa.alpha_for("gpt2", N, 3)


# ---------------------------------------------------------------------------------------------- the model survives


def state(model):
    modules = list(model.modules())
    return {
        "classes": [type(module) for module in modules],
        "modes": [module.training for module in modules],
        "hooks": [len(module._forward_pre_hooks) for module in modules],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.sum().item()) for p in model.parameters()],
        "config": model.config.to_dict(),
        "dial": dial_settings(model) if hasattr(model.model, "_zsaa") else None,
        "graphs": id(model.model._zsaa.graphs) if hasattr(model.model, "_zsaa") else None,
    }


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_the_model_comes_out_as_it_went_in(llama, clock, cache, enabled, error):
    llama.train()
    llama.model.layers[1].eval()  # someone froze it
    llama.model(tiny.tokens([9])[0]).last_hidden_state.sum().backward()
    llama.lm_head.weight.requires_grad_(False)
    llama.config.zsaa = {"tau": 4, "score": "column_sum", "alpha": 0.7, "alpha_range": None}  # as saved with a model
    if enabled:
        zsaa.enable(llama, alpha=0.7, tau=3)
    clock.calls.clear()
    before, random = state(llama), torch.get_rng_state()
    if error is None:
        assert zsaa.calibrate(llama, N).key["tau"] == (3 if enabled else 4)
    else:

        def fail(*_):
            if len(clock.calls) == 4:
                raise error

        handle = llama.register_forward_pre_hook(fail)
        with pytest.raises(type(error)):
            zsaa.calibrate(llama, N)
        handle.remove()
        assert not list(cache.glob("*")), "nothing is saved of a broken measurement"
    assert state(llama) == before and torch.equal(torch.get_rng_state(), random)


def test_a_calibration_within_a_trace_leaves_the_trace_alone(llama, clock):
    zsaa.enable(llama, alpha=0.5)
    with zsaa.trace(llama) as trace:
        calibration = zsaa.calibrate(llama, N)
        with pytest.raises(RuntimeError, match="no prefill has run"):
            _ = trace.counts
        llama(input_ids=tiny.tokens([8])[0])
    assert trace.lengths == [8]
    assert calibration.stock_ms == pytest.approx(affine(llama, 1, 1, N), abs=1e-3)


def test_trained_ranges_neither_warn_nor_use_up_their_warning(llama, clock, recwarn):
    from zsaa.dial import trained_for

    trained_for(zsaa.enable(llama), (0.5, 1.0))
    zsaa.calibrate(llama, N)
    assert not [w for w in recwarn if "fine-tuned for" in str(w.message)]
    with pytest.warns(UserWarning, match="fine-tuned for"):
        zsaa.set_alpha(llama, 0.1)


# --------------------------------------------------------------------------------------------- saved calibrations


def test_a_calibration_is_measured_once(llama, clock, cache):
    first = zsaa.calibrate(llama, N)
    calls = len(clock.calls)
    (file,) = cache.iterdir()
    llama.train()
    zsaa.enable(llama, alpha=0.4)
    llama.config._name_or_path = "elsewhere"
    with torch.no_grad():
        llama.lm_head.weight.add_(1)
    assert zsaa.calibrate(llama, N) == first and len(clock.calls) == calls, "alpha, mode and weights take no time"
    assert zsaa.alpha_for(llama, N, latency_ms=1e9) == 1.0 and len(clock.calls) == calls
    clock.cost = lambda *_: 5
    assert zsaa.calibrate(llama, N, refresh=True).stock_ms == 5 and len(clock.calls) > calls
    assert zsaa.calibrate(llama, N).stock_ms == 5 and list(cache.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"latency_ms": ', '"latency_ms": 1', 1),
        lambda text: text.replace('"batch": 1', '"batch": 2'),
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: "\udc80",
    ],
    ids=["empty", "half", "digit", "key", "list", "null", "nothing", "not utf-8"],
)
def test_damaged_files_are_measured_again(llama, clock, cache, damage):
    first = zsaa.calibrate(llama, N)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(damage(file.read_text()), errors="surrogateescape")
    assert zsaa.report(llama, N)["measured ms"].isna().all()
    calls = len(clock.calls)
    assert zsaa.calibrate(llama, N).rows == first.rows and len(clock.calls) == 2 * calls
    assert json.loads(file.read_text())["rows"] == whole["rows"] and list(cache.iterdir()) == [file]


def test_a_file_of_another_setting_is_not_taken_for_this_one(llama, clock, cache):
    zsaa.calibrate(llama, N)
    (other,) = cache.iterdir()
    first = other.read_text()
    other.unlink()
    zsaa.calibrate(llama, N + 1)
    (file,) = cache.iterdir()
    file.write_text(first)  # whole, and about N tokens
    calls = len(clock.calls)
    assert zsaa.calibrate(llama, N + 1).key["n"] == N + 1 and len(clock.calls) > calls


CHANGES = {
    "n": lambda model, patch: {"n": N + 1},
    "batch": lambda model, patch: {"batch": 2},
    "tau": lambda model, patch: {"tau": 6},
    "the dial's tau": lambda model, patch: zsaa.enable(model, tau=6) and {},
    "score": lambda model, patch: zsaa.enable(model, score="column_mean") and {},
    "schedule": lambda model, patch: {"schedule": "rising"},
    "the dial's schedule": lambda model, patch: zsaa.enable(model, schedule="rising") and {},
    "dtype": lambda model, patch: model.to(torch.float64) and {},
    "attention": lambda model, patch: model.set_attn_implementation("eager"),
    "config": lambda model, patch: setattr(model.config, "rms_norm_eps", 1e-5),
    "threads": lambda model, patch: patch.setattr(torch, "get_num_threads", lambda: 96),
    "hardware": lambda model, patch: patch.setattr(origin, "_cpu_name", lambda: "another"),
    "versions": lambda model, patch: patch.setattr(saved, "version", lambda package: "99"),
    "zsaa": lambda model, patch: patch.setattr(zsaa, "__version__", "99"),
    "code": lambda model, patch: patch.setattr(saved, "_code", lambda: "edited"),
    "matmul": lambda model, patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "backend": lambda model, patch: patch.setattr(saved, "backends", lambda device: {"used": "another"}),
    "graphs": lambda model, patch: zsaa.enable(model, graphs=False) and {},
    "compiled": lambda model, patch: model.lm_head.compile(backend="eager"),
    "modules": lambda model, patch: setattr(model.model, "norm", torch.nn.Identity()),
}

if hasattr(torch.backends, "fp32_precision"):  # PyTorch 2.9
    CHANGES["TF32"] = lambda model, patch: patch.setattr(torch.backends, "fp32_precision", "tf32")


@pytest.mark.parametrize("change", CHANGES)
def test_what_bears_on_the_time_is_measured_anew(llama, clock, cache, monkeypatch, change):
    arguments = {"model": llama, "n": N}
    zsaa.calibrate(**arguments)
    calls = len(clock.calls)
    arguments |= CHANGES[change](llama, monkeypatch) or {}
    zsaa.calibrate(**arguments)
    assert len(clock.calls) > calls and len(list(cache.iterdir())) == 2


@pytest.mark.full
def test_autocast_is_calibrated_on_its_own(llama, clock):
    zsaa.calibrate(llama, N)
    calls = len(clock.calls)
    with torch.autocast("cpu", torch.bfloat16):
        zsaa.calibrate(llama, N)
    assert len(clock.calls) == 2 * calls


def test_a_cache_that_cannot_be_written_is_no_obstacle(llama, clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be saved"):
        assert zsaa.calibrate(llama, N).rows


def test_hardware_names_the_device_that_was_asked_for():
    assert measure.hardware(torch.device("cpu"))["device"] == "cpu"


def test_alternate_shows_progress_and_stops_in_time(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def run():
        now[0] += 1.0

    timed = measure.alternate({"a": run}, repeats=20, seconds=6.5, progress="waiting")
    assert now[0] == 7 and timed["a"]["latency_ms"] == 1000 and "waiting" in capsys.readouterr().err
    measure.alternate({"a": run}, repeats=2)
    assert now[0] == 10 and not capsys.readouterr().err


def test_the_code_that_a_calibration_is_of_is_all_of_the_package(tmp_path, monkeypatch):
    """In each of its folders, and the kernels': an edit anywhere is measured anew."""
    hashed = []
    monkeypatch.setattr(saved, "hash_of", lambda texts: hashed.extend(texts))
    saved._code.__wrapped__()
    root = Path(zsaa.__file__).parent
    sources = {*root.rglob("*.py"), *(root.parent / "kernels").rglob("*.py")}
    assert {path.parent.name for path in sources} >= {"zsaa", "budget", "models", "finetune", "kit", "fast", "kernels"}
    assert {path.read_text(encoding="utf-8") for path in sources} <= {*hashed}
