"""Evaluation, latency and result files, on a tiny model: counts, plans and controls must mean what they say."""

import json
import zlib

import datasets
import pytest
import tiny
import torch

import zsaa
from zsaa import measure
from zsaa.data.batching import pad
from zsaa.dial import settings
from zsaa.evaluation import accuracy as evaluate
from zsaa.evaluation import language, latency
from zsaa.kit import store
from zsaa.measure import stats, write_json
from zsaa.score import FUNCTIONS, seeded


class Tokens:
    bos_token_id = None


@pytest.fixture
def model():
    return zsaa.enable(tiny.make("llama", "sequence-classification", dtype=torch.float32), tau=3)


@pytest.fixture
def data(model):
    """40 samples whose label is what the stock model says, but for every fourth."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 97, (int(n),), generator=generator).tolist() for n in torch.randint(20, 60, (40,))]
    labels = []
    for i, sample in enumerate(samples):
        says = int(model(torch.tensor([sample])).logits.argmax())
        labels.append(1 - says if i % 4 == 0 else says)
    return datasets.Dataset.from_dict({"input_ids": samples, "labels": labels})


def test_predictions_do_not_depend_on_the_batch(model, data):
    for alpha in (1.0, 0.7):
        with zsaa.at(model, alpha):
            one, many = (evaluate.predict(model, data["input_ids"], batch) for batch in (1, 16))
            alone = [int(model(torch.tensor([s])).logits.argmax()) for s in data["input_ids"]]
        assert one == many == alone


def test_whoever_trains_goes_on_training():
    """An evaluation in between is one in eval mode, and leaves each module in the mode that it was in."""
    net = zsaa.enable(tiny.make("llama", "sequence-classification", dropout=0.5)).train()
    net.model.layers[0].eval()
    modes, texts = [module.training for module in net.modules()], [[5, 6, 7, 8], [9, 10]]
    said = evaluate.predict(net, texts)
    assert [module.training for module in net.modules()] == modes
    assert said == evaluate.predict(net.eval(), texts)
    lm = zsaa.enable(tiny.make("llama")).train()
    language.score(lm, [([5, 6, 7, 8], 2)])
    assert lm.training


def test_curve_counts_and_controls(model, data):
    rows = evaluate.curve(model, Tokens(), data, targets=(1, 2, 4), progress=False)
    order = ("alpha", "first", "last", "ends", "random")
    assert [(r["control"], r["target"]) for r in rows] == [("alpha", 1), *((c, t) for t in (2, 4) for c in order)]
    stock = rows[0]
    assert (stock["correct"], stock["n"], stock["accuracy"], stock["mac_reduction"]) == (30, 40, 75.0, 1.0)
    bits = f"{int(stock['right'], 16):040b}"
    assert [i for i, bit in enumerate(bits) if bit == "0"] == list(range(0, 40, 4)), "sample 0 first"
    for row in rows:
        assert row["mac_reduction"] >= row["target"] - 1e-9
        assert f"{int(row['right'], 16):b}".count("1") == row["correct"]
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    first = next(r for r in rows if r["control"] == "first" and r["target"] == 4)
    cut = [s[: first["keep_tokens"]] for s in data["input_ids"]]
    right = [int(model(torch.tensor([s])).logits.argmax()) == y for s, y in zip(cut, data["labels"])]
    assert sum(right) == first["correct"]


def test_f1_rows_hold_what_paired_tests_need(model, data):
    rows = evaluate.curve(model, Tokens(), data, targets=(1, 3), controls=("alpha",), progress=False, metric="f1")
    assert [r["accuracy"] for r in rows] == [
        r["accuracy"] for r in evaluate.curve(model, Tokens(), data, (1, 3), ("alpha",), progress=False)
    ]
    for row in rows:
        with zsaa.at(model, row["alpha"]):
            predicted = evaluate.predict(model, data["input_ids"])
        assert store.per_sample(row) == (list(data["labels"]), predicted)
        assert row["f1"] == round(stats.f1(data["labels"], predicted), 2) == store.measured(row)
        assert row["ci95"] == list(stats.f1_interval(data["labels"], predicted))


def test_bits_keep_leading_zeros():
    for flags in ([0, 0, 1], [0] * 9, [1, 0, 0, 0, 1, 1], [1] * 8):
        assert stats.from_bits(stats.to_bits(flags), len(flags)) == flags


def test_targets_that_tau_keeps_out_of_reach_are_left_out(model):
    rows = evaluate.plan(model, [6, 7, 8], targets=(1, 2, 50))
    assert {r["target"] for r in rows} <= {1, 2}


@pytest.mark.parametrize(
    ("targets", "controls", "message"),
    [
        ((50, 60), ("alpha",), r"\[50, 60\] and the controls \['alpha'\] leave no row.*50 is out of reach.*from 1 to"),
        ((1,), ("first",), "leave no row: give a target above 1 and a control, or the target 1 and"),
        ((), ("alpha",), "leave no row"),
        ((2,), (), "leave no row"),
        ((0.5, 1), ("alpha",), r"a target, .* must be in \[1, inf\), got 0.5"),
        ((float("nan"),), ("alpha",), r"must be in \[1, inf\), got nan"),
        (("2",), ("alpha",), r"got '2', which is text"),
        ((2,), ("both",), "unknown control 'both'; these are known: alpha, first"),
    ],
)  # fmt: skip
def test_a_curve_without_a_row_is_refused(model, data, targets, controls, message):
    with pytest.raises(ValueError, match=message):
        evaluate.curve(model, Tokens(), data.select([0]), targets, controls, progress=False)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_model_without_numbers_gets_no_accuracy(model, data, spoilt):
    """Of NaN, argmax makes class 0: half of a balanced set would be right."""
    with torch.no_grad():
        model.score.weight[:, 0] = spoilt
    assert model(torch.tensor([data["input_ids"][0]])).logits.isnan().any() or spoilt == float("inf")
    for call in (
        lambda: evaluate.predict(model, data["input_ids"], batch_size=4),
        lambda: evaluate.curve(model, Tokens(), data, targets=(1,), progress=False),
    ):
        with pytest.raises(
            ValueError, match=rf"logits for sample 0 are not finite \(so for {len(data)} of {len(data)}\)"
        ):
            call()
    for size in (0, -1, 2.0):
        with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more"):
            evaluate.predict(model, data["input_ids"], batch_size=size)


def test_cut_keeps_a_leading_bos():
    assert evaluate.cut([1, 2, 3, 4, 5], 3, "last", bos=1) == [1, 4, 5]
    assert evaluate.cut([1, 2, 3, 4, 5], 3, "last") == [3, 4, 5]
    assert evaluate.cut([1, 2, 3, 4, 5], 3, "first", bos=1) == [1, 2, 3]
    assert evaluate.cut([1, 2], 3, "last") == evaluate.cut([1, 2], None, "first") == [1, 2]


def test_half_of_each_end():
    ids = list(range(9))
    assert evaluate.cut(ids, 4, "ends") == [0, 1, 7, 8] and evaluate.cut(ids, 5, "ends") == [0, 1, 2, 7, 8]
    assert evaluate.cut(ids, 1, "ends") == [0] and evaluate.cut(ids, 2, "ends", bos=0) == [0, 8]
    assert evaluate.cut(ids, 9, "ends") == ids


def kept_at_random(model, samples):
    """Per sample what each layer keeps, all samples in one batch."""
    ids, mask = pad(samples, 0, "cpu")
    row = {"control": "random", "alpha": 0.7}
    with evaluate.applied(model, row), zsaa.trace(model) as t, seeded([zlib.crc32(bytes(s)) for s in samples]):
        model(input_ids=ids, attention_mask=mask)
    return [[tuple(layer[i].tolist()) for layer in t.kept] for i in range(len(samples))], t.counts


def test_random_keeps_as_many_as_the_dial_but_others(model, data):
    samples = data["input_ids"][:12]
    samples = [*samples, samples[0], [9, *samples[0][1:]]]  # the same text again, and another of the same length
    together, counts = kept_at_random(model, samples)
    with zsaa.at(model, 0.7), zsaa.trace(model) as t:
        ids, mask = pad(samples, 0, "cpu")
        model(input_ids=ids, attention_mask=mask)
    assert counts == t.counts and settings(model)["score"] == "column_sum", "the same schedule, and only in the block"
    assert all(kept[-1] == len(s) - 1 for s, layers in zip(samples, together) for kept in layers), "the read-out token"
    alone = [kept_at_random(model, [s])[0][0] for s in samples]
    assert alone == together == [*reversed(kept_at_random(model, samples[::-1])[0])], "whatever the batch and its order"
    assert together[12] == together[0] != together[13], "draws are a sample's own"
    first, second = (kept_at_random(tiny_with(seed), samples)[0] for seed in (1, 2))
    assert first == second == together, "and nothing of the text or the model enters them"


def tiny_with(seed):
    model = tiny.make("llama", "sequence-classification", seed=seed, dtype=torch.float32)
    return zsaa.enable(model, tau=3)


def test_random_draws_are_even_and_fresh_in_each_layer():
    """Of 40 rows 20 go on. Over 4,000 samples each row goes on half of the time, whatever its place; and which of the
    rows that survived go on to the next layer does not follow from the layer before. Bounds: 5 standard deviations."""
    n, count = 40, 4000
    with seeded(list(range(count))):
        before, after = (FUNCTIONS["random"](torch.zeros(count, m), torch.full((count,), m)) for m in (n, n // 2))
    kept = before.argsort(1, descending=True)[:, : n // 2].sort(1).values
    often = torch.bincount(kept.flatten(), minlength=n) / count
    assert (often - 0.5).abs().max() < 5 * 0.5 / count**0.5
    again = torch.zeros(count, n // 2).scatter_(1, after.argsort(1, descending=True)[:, : n // 4], 1.0)
    assert (again.mean(0) - 0.5).abs().max() < 5 * 0.5 / count**0.5
    rank = before.gather(1, kept).argsort(1).argsort(1).float() - (n / 2 - 1) / 2
    assert abs(torch.corrcoef(torch.stack([rank.flatten(), again.flatten()]))[0, 1]) < 5 / (count * n / 2) ** 0.5


def test_the_random_rows_of_a_curve_do_not_depend_on_the_batch(model, data):
    options = dict(targets=(2, 3), controls=("random",), progress=False)
    one, many = (evaluate.curve(model, Tokens(), data, batch_size=b, **options) for b in (1, 16))
    assert one == many and [r["control"] for r in one] == ["random"] * 2
    turned = data.select(reversed(range(len(data))))
    assert [r["correct"] for r in evaluate.curve(model, Tokens(), turned, **options)] == [r["correct"] for r in one]


def test_wilson_interval():
    """Against values from the textbook formula, worked out by hand for 8 of 10 and the edges."""
    assert evaluate.interval(8, 10) == (49.02, 94.33)
    assert evaluate.interval(0, 10)[0] == 0 and evaluate.interval(10, 10)[1] == 100


def test_latency_rows_say_what_was_timed(model, data):
    rows = evaluate.plan(model, map(len, data["input_ids"]), targets=(1, 2), controls=("alpha", "first"))
    batch = latency.longest(data["input_ids"], 3)
    rows = latency.time_batch(model, rows, Tokens(), batch, repeats=2)
    lengths = [len(s) for s in batch]
    assert sorted(map(len, data["input_ids"]))[-3:] == sorted(lengths)
    for row in rows:
        assert row["latency_ms"] > 0 and row["latency_batch"] == 3 and row["latency_tokens"] == max(lengths)
        assert row["latency_ms_quartiles"][0] <= row["latency_ms"] <= row["latency_ms_quartiles"][1]
    want = zsaa.mac_reduction(model.config, lengths, rows[1]["alpha"], tau=3)
    assert rows[1]["latency_mac_reduction"] == pytest.approx(want, abs=1e-4)


def test_alternate_runs_every_variant_in_turn():
    calls = []
    timed = measure.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert timed["a"]["speedup"] == 1.0


@pytest.mark.parametrize("gpu, rounds", [(False, 1), (True, 2)])
def test_a_gpu_is_warmed_up_until_its_graphs_are_recorded(gpu, rounds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    measure.alternate({"a": lambda: calls.append("a")}, repeats=1)
    assert len(calls) == rounds + 1


def test_provenance_is_complete():
    p = measure.provenance(seed=3, eval_samples=5)
    assert p["seed"] == 3 and p["eval_samples"] == 5
    assert measure.provenance(torch.device("cpu"))["hardware"]["device"] == "cpu"
    assert p["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # some builds add a name to one
    assert {"device", "cpu", "cores", "threads", "memory_gib"} == set(p["hardware"])
    json.dumps(p, allow_nan=False)


def test_result_files_appear_in_one_piece(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="[Oo]ut of range float"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"a": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
