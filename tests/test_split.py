"""A budget for both dials: against every setting tried by hand."""

import math

import pytest
import tiny
import torch

import zsaa
from zsaa.budget import calibration as calibrations

N, RULE = 60, {"tau": 2, "score": "column_sum", "schedule": "geometric"}
CONFIG = tiny.CONFIGS["llama"]()


def reduction(alpha, depth):
    return zsaa.mac_reduction(CONFIG, [N], alpha, depth=depth, **RULE)


@pytest.mark.parametrize("target", [1.0, 1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_a_share_of_the_reduction_is_of_layers(target, share):
    found = zsaa.split_for(CONFIG, N, target, share=share, tau=2)
    assert found.depth == max(1, math.ceil(4 / target**share - 1e-9)) and found.accuracy is None
    assert found.mac_reduction == pytest.approx(reduction(found.alpha, found.depth)) and found.mac_reduction >= target
    if found.alpha < 1:
        assert reduction(min(1.0, found.alpha + 2e-2), found.depth) < target, "the largest alpha"
    if share == 0:
        assert found.alpha == zsaa.alpha_for(CONFIG, N, target, tau=2)
    assert zsaa.alpha_for(CONFIG, N, target, tau=2, depth=found.depth) == found.alpha


def test_a_table_chooses_the_depth_that_is_best_at_the_budget():
    """Accuracies on a grid; tokens are dear in the first rows, layers in the last."""
    table = [
        {"alpha": alpha, "depth": depth, "accuracy": 100 - 30 * (1 - alpha) * (depth / 4) - 3 * (4 - depth)}
        for alpha in (1.0, 0.8, 0.6, 0.4, 0.2)
        for depth in (2, 3, 4)
    ]
    for target in (1.3, 2.0, 3.0, 4.0):
        best = {}
        for depth in (2, 3, 4):
            rows = sorted((math.log(reduction(r["alpha"], depth)), r["accuracy"]) for r in table if r["depth"] == depth)
            if rows[0][0] > math.log(target):  # fewer layers alone save more than that
                best[depth] = rows[0][1]
                continue
            alpha = zsaa.alpha_for(CONFIG, N, target, tau=2, depth=depth)
            at = math.log(reduction(alpha, depth))
            low = max((r for r in rows if r[0] <= at + 1e-12), key=lambda r: r[0])
            high = min((r for r in rows if r[0] >= at - 1e-12), key=lambda r: r[0])
            step = 0 if high[0] == low[0] else (at - low[0]) / (high[0] - low[0])
            best[depth] = low[1] + step * (high[1] - low[1])
        found = zsaa.split_for(CONFIG, N, target, table=table, tau=2)
        assert found.accuracy == pytest.approx(max(best.values()), abs=1e-6), best
        assert best[found.depth] == pytest.approx(found.accuracy, abs=1e-6) and found.mac_reduction >= target
    alone = zsaa.split_for(CONFIG, N, 2.0, table=table, depths=[4], tau=2)
    assert alone.depth == 4 and alone.alpha < 1


def test_a_latency_is_split_by_calibrations_of_each_depth(monkeypatch):
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32), tau=2)
    asked = []

    def calibrated(net, n, batch=1, *, tau=None, schedule=None, depth=None):
        """Milliseconds that follow MACs."""
        asked.append(depth)
        rule = {**RULE, "depth": depth}
        rows = [{"alpha": a, "latency_ms": zsaa.macs(net.config, n, a, **rule) / 1e4, "latency_ms_quartiles": [1, 1]}
                for a in calibrations.timed_alphas(net.config, n, RULE)]  # fmt: skip
        return calibrations.Calibration(net.config, {"n": n, "batch": batch, **rule}, rows, {})

    monkeypatch.setattr("zsaa.budget.split.calibrate", calibrated)
    whole = zsaa.macs(CONFIG, N) / 1e4
    found = zsaa.split_for(model, N, latency_ms=whole / 3)
    assert found.depth == 3 and {4, 3} == set(asked)
    assert found.latency_ms == pytest.approx(zsaa.macs(CONFIG, N, found.alpha, **RULE, depth=3) / 1e4, rel=0.02)
    assert found.latency_ms <= whole / 3 and found.mac_reduction == pytest.approx(3, rel=0.05)


def test_a_calibration_is_of_its_depth(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path))
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32), tau=2)
    ran = []
    for layer in range(4):
        model.model.layers[layer].mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    half = zsaa.calibrate(model, 20, depth=2, seconds=0.1, progress=False)
    assert set(ran) == {0, 1} and half.key["depth"] == 2
    ran.clear()
    zsaa.set_depth(model, 3)
    assert zsaa.calibrate(model, 20, seconds=0.1, progress=False).key["depth"] == 3 and set(ran) == {0, 1, 2}
    table = zsaa.report(model, 20, [1.0, 0.5])
    assert table["MAC reduction"].tolist()[0] == pytest.approx(1.33) and table.attrs["depth"] == 3
    assert len(table.attrs["tokens_per_layer"][0.5]) == 3


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, TypeError, "give one budget"),
        ({"mac_reduction": 2, "latency_ms": 3.0}, TypeError, "give one budget"),
        ({"mac_reduction": 2, "table": [], "share": 0.5}, TypeError, "a table of measurements or a share"),
        ({"mac_reduction": 2, "share": 1.5}, ValueError, "share must be from 0"),
        ({"mac_reduction": 2, "table": []}, ValueError, "the table is empty"),
        ({"mac_reduction": 2, "table": "rows.json"}, TypeError, "a list of dicts with alpha, depth and accuracy"),
        ({"mac_reduction": 2, "table": [{"alpha": 1.0, "depth": 2}]}, ValueError, "has no accuracy"),
        ({"mac_reduction": 2, "depths": [5]}, ValueError, "from 1 to 4"),
        ({"mac_reduction": 9e9}, ValueError, "no depth keeps to the budget"),
        ({"latency_ms": 3.0}, TypeError, "needs a model to time"),
        (
            {"mac_reduction": 3, "table": [{"alpha": 1.0, "depth": 4, "accuracy": 9}]},
            ValueError,
            "1.00x to 1.00x of it",
        ),
    ],
)
def test_what_cannot_be_split_is_said(given, error, said):
    with pytest.raises(error, match=said):
        zsaa.split_for(CONFIG, N, tau=2, **given)
