"""The card of all resources: what is computed against counters, what is measured against the clock's and memory's own
counts, and every number said to be one or the other."""

import json

import matplotlib.pyplot as plt
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import zsaa
from zsaa.card import PRICES, Prices, build, measure, show
from zsaa.card.__main__ import main
from zsaa.cost import attention_widths
from zsaa.kit import points

GPU = torch.cuda.is_available()
N, NEW, ALPHA = 40, 4, 0.7
PHASES = ["prefill", "decoding, per token", "fine-tuning step"]


def model_of(family="llama", head="causal-lm", **kwargs):
    return zsaa.enable(tiny.make(family, head, dtype=torch.float32, attn_implementation="eager", **kwargs), tau=3)


def counted(run, *arguments, linear=False):
    """FLOPs of all products, or of linear layers alone."""
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for name, n in by_operation.items() if not linear or str(name) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
def test_operations_are_those_that_a_counter_counts(family, head):
    """Within 2%: norms, activations and rotary tables have no products, or hardly any. Of pruned steps the linear
    layers alone: the counter does not know PyTorch's attention on a CPU."""
    model = model_of(family, head)
    made = zsaa.card(model, N, ALPHA, batch=2, new=NEW, measure=False)
    phases = measure.Phases(model, torch.randint(1, 97, (2, N)), NEW)
    for alpha in (1.0, ALPHA):
        assert made.value("prefill", "FLOPs", alpha) == pytest.approx(counted(phases.prefill, alpha), rel=0.02)
    assert made.value("fine-tuning step", "FLOPs") == pytest.approx(counted(phases.step, 1.0), rel=0.02)
    entering, pair = [N, *zsaa.kept_counts(N, ALPHA, 4, tau=3)][:-1], 2 * 2 * 2 * attention_widths(model.config)[0]
    step = made.value("fine-tuning step", "FLOPs", ALPHA) - 3 * pair * sum(n * n for n in entering)
    assert step == pytest.approx(counted(phases.step, ALPHA, linear=True), rel=0.02)
    if head == "causal-lm":
        stock = counted(phases.answer, 1.0) - counted(phases.prefill, 1.0)
        assert NEW * made.value("decoding, per token", "FLOPs") == pytest.approx(stock, rel=0.02)
        linear = counted(phases.answer, ALPHA, linear=True) - counted(phases.prefill, ALPHA, linear=True)
        looked = pair * sum(n + (NEW + 1) // 2 for n in entering)
        assert NEW * (made.value("decoding, per token", "FLOPs", ALPHA) - looked) == pytest.approx(linear, rel=0.02)


def test_the_cache_and_the_weights_are_those_that_are_there():
    model = model_of()
    made = zsaa.card(model, N, ALPHA, batch=2, measure=False)
    phases = measure.Phases(model, torch.randint(1, 97, (2, N)), NEW)
    for alpha in (1.0, ALPHA):
        cache = phases.prefill(alpha).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert made.value("prefill", "KV cache", alpha) == held
    assert made.value("prefill", "weights") == sum(p.nbytes for p in model.parameters())
    stages = [N, *zsaa.kept_counts(N, ALPHA, 4, tau=3)]
    assert made.value("prefill", "between devices, pipeline", ALPHA) == 4 * 2 * 32 * stages[2]


def test_each_number_says_how_it_came_about(tmp_path):
    model = model_of().eval()
    made = zsaa.card(model, N, (1, ALPHA), new=2, repeats=2, seconds=0.01)
    assert made.alphas == [1.0, ALPHA] and list(dict.fromkeys(made.table.phase)) == PHASES
    assert {row["how"].split()[0].rstrip(":") for row in made.rows} <= {"measured", "computed", "estimated", "not"}
    assert all((row["value"] is None) == row["how"].startswith("not measured") for row in made.rows)
    times = [row for row in made.rows if row["metric"] == "time"]
    assert len(times) == 6 and all(row["how"] == "measured" and row["value"] > 0 for row in times)
    assert not model.training and all(p.grad is None for p in model.parameters()), "the model is as it was"
    held = json.loads(made.save(tmp_path / "card.json").read_text())
    assert (held["kind"], held["rows"]) == ("card", json.loads(json.dumps(made.rows)))
    of_file = points.of([{**held, "name": "card"}])
    assert set(of_file.task) == set(PHASES) and set(of_file.method) == {"stock", "dial"}
    assert made.value("prefill", "MACs", ALPHA) in of_file[of_file.metric == "MACs, MAC"].value.tolist()
    figure = made.figure()
    assert len(figure.axes) >= 3 * 4
    assert "fine-tuning step" in repr(made) and "<table>" in made._repr_html_()
    assert repr(made).endswith(f"Prices: {PRICES.date}.") and PRICES.date in made._repr_html_()
    computed = zsaa.card(model, N, ALPHA, measure=False)
    assert not [row for row in computed.rows if row["how"].startswith(("measured", "estimated"))]
    assert computed.value("prefill", "MACs") == made.value("prefill", "MACs")


def test_money_follows_the_clock_and_the_prices():
    prices = Prices(hours={"cpu": 2.0, "NVIDIA": 2.0}, kwh=0.5, date="today")
    made = zsaa.card(model_of(), N, 1.0, new=2, train=False, repeats=2, seconds=0.01, prices=prices)
    cores = 1 if GPU else made.about["provenance"]["hardware"]["cores"]
    hours = made.value("prefill", "time") / 3.6e6
    rent = made.value("prefill", "rent of the device, per million tokens")
    assert rent == pytest.approx(1e6 * 2 * cores * hours / N)
    spent = made.value("prefill", "energy")
    power = made.value("prefill", "electricity, per million tokens")
    assert (power is None) == (spent is None)
    assert spent is None or power == pytest.approx(1e6 * 0.5 * spent / 3.6e6 / N)
    assert Prices().of("NVIDIA A100", 1) is None and Prices().of("NVIDIA H100 80GB HBM3", 1) == ("H100", 3.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(n=0), "n must be a whole number"),
        (dict(alphas=1.5), "1.5"),
        (dict(parts=1), "parts must be a whole number, 2 or more"),
        (dict(seconds=0), "seconds must be in"),
    ],
)
def test_bad_settings_are_named(options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        zsaa.card(model_of(), **{"n": N, **options})
    with pytest.raises(ValueError, match="-1.*0 or more"):
        Prices(kwh=-1)
    with pytest.raises(RuntimeError, match="not enabled"):
        zsaa.card(tiny.make("llama"), N)
    with zsaa.at(model := model_of(), depth=2), pytest.raises(ValueError, match=r"depth is 2.*counts all 4.*depth=4"):
        zsaa.card(model, N)


def test_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "card.json"
    options = ("--tokens", "24", "--new", "2", "--alphas", "0.5", "--seconds", "0.01", "--repeats", "2")
    assert main(["--shape", "tiny", *options, "--output", str(path)]) == 0
    assert (
        json.loads(path.read_text())["model"] == {"name": "tiny"} and path.with_suffix(".png").stat().st_size > 10_000
    )
    assert "KV cache" in capsys.readouterr().out


def test_what_it_cannot_do_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(main.__globals__, "card", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(OSError, match=r"cannot be written: Is a directory"):
        main(["--shape", "tiny", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="--tokens must be a whole number, 1 or more, got 0"):
        main(["--shape", "tiny", "--tokens", "0", "--output", str(tmp_path / "card.json")])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_memory_and_joules_are_those_of_its_counters():
    """Memory within 5% of PyTorch's own count of one pass; joules between an idle card's and a full one's."""
    model = zsaa.enable(tiny.make("llama", dtype=torch.float16).cuda(), tau=3)
    made = zsaa.card(model, 200, ALPHA, new=8, repeats=3, seconds=2.0)
    phases = measure.Phases(model, torch.randint(1, 97, (1, 200), device="cuda"), 8)
    torch.cuda.reset_peak_memory_stats()
    phases.prefill(ALPHA)
    assert made.value("prefill", "peak memory", ALPHA) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)
    pytest.importorskip("pynvml")
    spent, ms = made.value("prefill", "energy"), made.value("prefill", "time")
    if spent is not None:
        assert 30 < spent / (ms / 1000) < 1500, "watts"


def test_a_model_on_the_cpu_is_priced_as_one_where_a_gpu_is_there_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    build._hardware.cache_clear()
    rent, _ = build._money(36.0, None, 10, build.NOT, Prices(hours={"cpu": 1.0, "H100": 1e6}), torch.device("cpu"))
    build._hardware.cache_clear()
    assert rent["value"] == pytest.approx(build._hardware(torch.device("cpu"))["cores"])


def test_electricity_from_an_estimate_is_an_estimate():
    for how, mark in (("estimated (codecarbon: ...)", "~"), ("measured (NVML)", "*")):
        _, power = build._money(36.0, 2.0, 10, how, PRICES, torch.device("cpu"))
        assert show.mark(power["how"]) == mark and power["value"] > 0


def test_more_tokens_than_a_model_has_positions_for_are_refused():
    most = tiny.make("gpt2").config.n_positions
    with pytest.raises(ValueError, match=rf"n \+ new must be in \[1, {most}\], .* got {most + 1}"):
        zsaa.card(model_of("gpt2"), most - 1, 0.9, new=2, measure=False)
    assert zsaa.card(model_of("gpt2"), most - 1, 0.9, new=1, measure=False).rows


def test_a_classifier_s_card_speaks_of_no_new_tokens_and_the_picture_names_its_axis():
    classifier = zsaa.enable(tiny.make("llama", "sequence-classification"))
    made = zsaa.card(classifier, N, ALPHA, measure=False)
    assert "new ones" not in repr(made) and "new ones" in repr(zsaa.card(model_of(), N, ALPHA, measure=False))
    figure = made.figure()
    assert next(axis.get_xlabel() for axis in figure.axes if axis.get_subplotspec().is_last_row()) == "alpha"
    plt.close(figure)
