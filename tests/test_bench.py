"""The benchmarks end to end in tiny sizes, the choice of backend, and that wrong numbers are not timed."""

import functools
import json
import time
from types import SimpleNamespace

import pytest
import tiny
import torch

import zsaa
from zsaa import bench
from zsaa.bench import command, prefill, question, recordings, rivals, scale
from zsaa.bench.device import ceilings, roofline_ms
from zsaa.fast import dispatch
from zsaa.finetune import losses
from zsaa.kit import points, store
from zsaa.kit.labels import method_of
from zsaa.measure import alternate
from zsaa.rule import Rule

rates = functools.cache(ceilings)  # of this machine, measured once


WRONG = {
    "--tokens 0": "--tokens must be a whole number, 1 or more, got 0",
    "--repeats 0": "--repeats must be a whole number, 1 or more, got 0",
    "--new -1": "--new must be a whole number, 1 or more, got -1",
    "--alphas 0.9 1.5": "--alphas must be in (0, 1], got 1.5",
    "--reductions 0.5": "--reductions must be in [1, inf), got 0.5",
    "--seconds nan": "--seconds must be in (0, inf), got nan",
    "--device nowhere": "--device nowhere is not there",
    "--output FILE/result.json": "FILE/result.json cannot be written: Not a directory",
    "--output .": ". cannot be written: Is a directory",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_no_bench_can_do_is_said_before_anything_is_timed(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(command.BENCHES, "prefill", None)
    (tmp_path / "FILE").touch()
    with pytest.raises(SystemExit) as ended:
        bench.main(["prefill", "--model", "tiny", "--output", "here/result.json", *given.split()])
    assert ended.value.code == 2 and WRONG[given] in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "FILE"]


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    for module in (prefill, question, scale):
        monkeypatch.setattr(module, "ceilings", rates)


def run(tmp_path, *arguments):
    path = tmp_path / "result.json"
    code = bench.main([*arguments, "--device", "cpu", "--dtype", "float32", "--repeats", "3", "--output", str(path)])
    return code, json.loads(path.read_text()) if path.exists() else None


def test_attention_is_checked_then_timed(tmp_path):
    code, record = run(tmp_path, "attention", "--tokens", "33")
    assert code == 0
    assert {check["tokens"] for check in record["checks"]} == {33, 12}
    assert {row["variant"] for row in record["rows"]} == {"sdpa", "attend_and_score"}
    assert all(row["latency_ms"] > 0 for row in record["rows"])


def test_wrong_scores_are_not_timed(tmp_path, monkeypatch, capsys):
    right = bench.attention.attend_and_score

    def wrong(*args, **kwargs):
        output, sums = right(*args, **kwargs)
        return output, sums * 1.001

    monkeypatch.setattr(bench.attention, "attend_and_score", wrong)
    code, record = run(tmp_path, "attention", "--tokens", "33")
    assert (code, record) == (1, None)
    assert "scores of" in capsys.readouterr().err


SPOILT = [
    (lambda x: x * float("nan"), "logits at alpha 0.5 are not finite"),
    (lambda x: x + torch.rand_like(x), "a repeat at alpha 0.5 differs: logits by up to"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_passes_that_are_no_numbers_or_differ_are_not_timed(tmp_path, monkeypatch, capsys, spoil, says):
    right = bench.prefill.prefill

    def wrong(*args):
        output = right(*args)
        output.logits = spoil(output.logits)
        return output

    monkeypatch.setattr(bench.prefill, "prefill", wrong)
    code, record = run(tmp_path, "prefill", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")
    assert (code, record) == (1, None)
    assert says in capsys.readouterr().err


def test_prefill_reports_against_stock_and_the_roofline(tmp_path):
    code, record = run(tmp_path, "prefill", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")
    assert code == 0
    stock, pruned = record["rows"]
    assert (stock["alpha"], stock["speedup"], stock["mac_reduction"], stock["realised"]) == (1.0, 1.0, 1.0, 1.0)
    assert pruned["mac_reduction"] > 1.5
    assert pruned["roofline_ms"] < stock["roofline_ms"]
    # keys and values, 2 heads of 16, float32: 40 tokens enter every layer of the stock model, 40, 20, 10 of the other
    assert stock["kv_bytes"] == 2 * 2 * 16 * 4 * 3 * 40
    assert pruned["kv_bytes"] == 2 * 2 * 16 * 4 * (40 + 20 + 10)


def test_where_others_share_the_cores_the_process_s_own_time_counts(tmp_path):
    given = ("prefill", "--model", "tiny", "--tokens", "40", "--alphas", "0.5", "--process-time")
    code, record = run(tmp_path, *given)
    assert (code, record["clock"]) == (0, "process") and all(row["latency_ms"] > 0 for row in record["rows"])
    own, wall = (alternate({"asleep": lambda: time.sleep(0.1)}, 3, clock=c) for c in (time.process_time, None))
    assert own["asleep"]["latency_ms"] < 50 < wall["asleep"]["latency_ms"]


def test_decode_leaves_the_caches_as_they_were(tmp_path):
    code, record = run(tmp_path, "decode", "--model", "tiny", "--tokens", "40", "--alphas", "0.5", "--new", "3")
    assert code == 0
    assert [row["kv_bytes"] for row in record["rows"]] == [2 * 2 * 16 * 4 * 120, 2 * 2 * 16 * 4 * 70]


def test_generation_is_timed_beside_stock(tmp_path):
    code, record = run(tmp_path, "generate", "--model", "tiny", "--tokens", "40", "--alphas", "0.5", "--new", "4")
    rows = record["rows"]
    assert (code, [(row["how"], row["alpha"]) for row in rows]) == (
        0, [("stock", 1), ("graphs", 0.5), ("by kernel", 0.5)])  # fmt: skip
    assert all(row["ms_per_token"] > 0 and row["latency_ms"] > 3 * 0.9 * row["ms_per_token"] for row in rows)
    assert rows[1]["token_speedup"] == pytest.approx(rows[0]["ms_per_token"] / rows[1]["ms_per_token"], rel=1e-2)


def test_a_model_is_spread_over_devices(tmp_path):
    """Here over two halves of one: its passes are checked, and go from half to half by accelerate's hooks."""
    code, record = run(tmp_path, "scale", "--model", "tiny", "--tokens", "24", "--alphas", "0.5")
    rows = record["rows"]
    assert (code, [row["alpha"] for row in rows]) == (0, [1.0, 0.5])
    assert rows[0]["flops"] > 1.5 * rows[1]["flops"] > 0 and all(row["devices"] == 2 for row in rows)
    assert all(row["several_ms"] > 0 and 0 < row["of_measured"] < 1.2 for row in rows)


def test_copies_are_timed_alone_and_together(tmp_path):
    code, record = run(tmp_path, "replicas", "--model", "tiny", "--tokens", "24", "--alphas", "0.5")
    assert (code, [(row["copies"], row["alpha"]) for row in record["rows"]]) == (0, [(1, 1.0), (1, 0.5)])
    assert all(row["together_per_second"] > 0 for row in record["rows"])


def test_training_steps_are_paired(tmp_path):
    code, record = run(
        tmp_path, "train", "--model", "tiny", "--tokens", "20", "--batch", "2", "--alpha-range", "0.4", "0.6"
    )
    (row,) = record["rows"]
    assert (code, row["steps"], row["batch"]) == (0, 3, 2)
    ratio = row["sampled_ms"] / row["conventional_ms"]
    assert row["sampled_over_conventional"] == pytest.approx(ratio, abs=1e-3)
    assert row["slowest_sampled_ms"] >= row["sampled_ms"] >= row["sampled_host_ms"] > 0
    assert row["conventional_ms"] >= row["conventional_host_ms"] > 0
    assert 0 < row["ideal"] < 1
    assert "ladder_ms" not in row and "profiles" not in record


def test_steps_by_graphs_are_timed_beside_them(tmp_path):
    options = ("--tokens", "24", "--batch", "2", "--ladder", "3", "--head", "sequence-classification", "--recorded")
    code, record = run(tmp_path, "train", "--model", "tiny", "--alpha-range", "0.4", "0.6", *options)
    (row,) = record["rows"]
    assert (code, row["recordings"], row["off"]) == (0, 0, None)  # there are none on a CPU: the same steps again
    for kind in ("sampled_recorded", "ladder_recorded"):
        ratio = row[f"{kind}_ms"] / row["conventional_ms"]
        assert row[f"{kind}_over_conventional"] == pytest.approx(ratio, abs=1e-3)


def test_steps_with_the_loss_in_chunks_are_timed_beside_them(tmp_path):
    options = ("--tokens", "24", "--batch", "2", "--ladder", "3", "--recorded", "--chunked-loss")
    code, record = run(tmp_path, "train", "--model", "tiny", "--alpha-range", "0.4", "0.6", *options)
    (row,) = record["rows"]
    kinds = {name.removesuffix("_host_ms") for name in row if name.endswith("_host_ms")}
    plain = {"sampled", "ladder", "sampled_recorded", "ladder_recorded"}
    assert (code, kinds) == (0, plain | {f"{kind}_chunked" for kind in (*plain, "conventional")} | {"conventional"})


def test_a_loss_in_chunks_that_is_another_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses._Summed, "apply", lambda states, *rest: 1.01 * states.sum())
    code, record = run(tmp_path, "train", "--model", "tiny", "--tokens", "24", "--chunked-loss")
    assert (code, record) == (1, None) and "the loss in chunks is" in capsys.readouterr().err


@pytest.mark.full
def test_ladder_steps_are_timed_beside_them(tmp_path):
    options = ("--tokens", "24", "--batch", "2", "--ladder", "3", "--head", "sequence-classification", "--profiled")
    code, record = run(tmp_path, "train", "--model", "tiny", "--alpha-range", "0.4", "0.6", *options)
    (row,) = record["rows"]
    assert (code, row["head"]) == (0, "sequence-classification")
    assert row["ladder_over_conventional"] == pytest.approx(row["ladder_ms"] / row["conventional_ms"], abs=1e-3)
    assert 1 + 1 / 3 < row["ladder_ideal"] < 3
    assert [(p["step"], len(p["alphas"])) for p in record["profiles"]] == [
        ("conventional", 1), ("sampled", 1), ("ladder", 3)]  # fmt: skip
    assert all(p["ms"] >= sum(k["ms"] for k in p["longest"]) - 0.1 > 0 for p in record["profiles"])


def test_memory_against_the_length(tmp_path):
    code, record = run(tmp_path, "memory", "--model", "tiny", "--tokens", "20", "40", "--alphas", "0.5")
    assert code == 0
    assert [(row["tokens"], row["alpha"]) for row in record["rows"]] == [(20, 1), (20, 0.5), (40, 1), (40, 0.5)]
    assert all(row["peak_bytes"] is None for row in record["rows"])  # of a GPU alone
    code, record = run(tmp_path, "memory", "--model", "tiny", "--tokens", "20", "--alphas", "0.5", "--no-stock")
    assert [(row["tokens"], row["alpha"]) for row in record["rows"]] == [(20, 0.5)]


def test_fused_kernels_can_be_left_out(tmp_path):
    arguments = ("prefill", "--model", "tiny", "--tokens", "20", "--alphas", "0.5")
    try:
        assert run(tmp_path, *arguments, "--no-fused")[1]["fused"] is False
    finally:
        assert run(tmp_path, *arguments)[1]["fused"] is True


@pytest.mark.full
def test_profile_accounts_for_the_whole(tmp_path):
    code, record = run(tmp_path, "profile", "--model", "tiny", "--tokens", "40", "--alphas", "0.5", "--top", "1000")
    assert code == 0
    for alpha in (1.0, 0.5):
        total, *parts = [row for row in record["rows"] if row["alpha"] == alpha]
        assert total["kernel"] == "all"
        assert sum(row["ms"] for row in parts) == pytest.approx(total["ms"], abs=0.0006 * len(parts))


def test_recorded_prefills_are_timed_beside_plain_ones(tmp_path, monkeypatch):
    from test_graphs import StandIn

    from zsaa.fast import graphs

    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    code, record = run(tmp_path, "prefill", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")
    stock, pruned = record["rows"]
    assert (code, stock["capture_ms"], stock["graph_bytes"]) == (0, None, None)
    assert pruned["graph_bytes"] == pruned["recorded_bytes"] == 1000 + 40 * 8
    assert pruned["capture_ms"] > 0
    assert stock["by_kernel_ms"] == stock["latency_ms"]
    assert pruned["by_kernel_ms"] != pruned["latency_ms"]


def test_recordings_are_weighed_by_every_way_in_which_a_cache_leaves(tmp_path, monkeypatch):
    from test_graphs import StandIn

    from zsaa.fast import graphs

    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    code, record = run(tmp_path, "recordings", "--model", "tiny", "--tokens", "40", "--alphas", "0.5", "0.9")
    stock, *rows = record["rows"]
    assert (code, stock["variant"], stock["recorded_bytes"], stock["peak_bytes"]) == (0, "stock", None, None)
    assert [(row["alpha"], row["variant"]) for row in rows] == [(a, way) for way in recordings.WAYS for a in (0.9, 0.5)]
    held = 1000 + 40 * 8  # of one, by the stand-in
    assert [row["recorded_bytes"] for row in rows] == [held, 2 * held] * 2
    assert all(row["latency_ms"] > 0 and row["off"] is None for row in rows)
    before = graphs.outlet_for
    with recordings.leaving(False):
        assert graphs.outlet_for([torch.zeros(1)]) is None
    assert graphs.outlet_for is before


def test_roofline_by_hand():
    """Slow arithmetic makes FLOPs decide, slow memory bytes."""
    config = bench.build("tiny", 10, torch.device("cpu"), torch.float32).config
    weights = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    head = 4 * 64 * 256
    flops = 3 * (2 * 10 * weights + 2 * 10 * 10 * 64)
    moved = 3 * 4 * (weights + 20 * 64 + 2 * 10 * 32) + head
    by_flops = roofline_ms(config, 1, 10, 1.0, Rule(), 4, {"flops_per_s": 1e3, "bytes_per_s": 1e12})
    by_bytes = roofline_ms(config, 1, 10, 1.0, Rule(), 4, {"flops_per_s": 1e12, "bytes_per_s": 1e3})
    assert by_flops == pytest.approx(flops, rel=1e-6)
    assert by_bytes == pytest.approx(moved, rel=1e-6)


def test_backends_on_a_cpu():
    assert dispatch.backends("cpu")["used"] == "torch" or dispatch.backends("cpu")["triton"] == "available"
    with pytest.raises(ValueError, match=r"'cuda'.*auto, torch, triton"):
        dispatch.use_backend("cuda")
    dispatch.use_backend("torch")
    assert dispatch.backends()["used"] == "torch"
    assert dispatch.kernels(torch.zeros(1, 1, 4, 64, dtype=torch.float16)) is None


def test_a_forced_backend_is_an_error_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_without_triton", lambda device: "they need an NVIDIA GPU")
    with pytest.raises(RuntimeError, match="does not run here: they need an NVIDIA GPU"):
        dispatch.use_backend("triton")
    monkeypatch.setattr(dispatch, "_without_triton", lambda device: None)
    dispatch.use_backend("triton")
    with pytest.raises(ValueError, match=r"float32 and 64.*use_backend"):
        dispatch.kernels(torch.zeros(1, 1, 4, 64))
    dispatch.use_backend("auto")
    assert dispatch.kernels(torch.zeros(1, 1, 4, 64)) is None


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("ZSAA_BACKEND", "torch")
    assert dispatch.backends()["chosen"] == "torch"
    monkeypatch.setattr(dispatch, "_chosen", None)
    monkeypatch.setenv("ZSAA_BACKEND", "gpu")
    with pytest.raises(ValueError, match="'gpu'"):
        dispatch.backends()


@pytest.mark.parametrize(("storage", "how"), [("float32", "eager"), ("nf4", "sdpa")])
def test_footprint_at_printed_and_at_solved_alphas(tmp_path, storage, how):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    code, record = run(
        tmp_path, "footprint", "--model", "tiny", "--tokens", "200", "--storage", storage, "--batch", "2",
        "--attention", how,
    )  # fmt: skip
    assert (code, record["kind"], "bitsandbytes" in record) == (0, "footprint", storage == "nf4")
    rows = record["rows"]
    assert [(r["control"], r["target"]) for r in rows] == [
        *(("alpha", t) for t in (1, 1.5, 2.5, 3.5)), *(("printed", t) for t in (1.5, 2.5, 3.5)), ("all", 1)
    ]  # fmt: skip
    assert [r["alpha"] for r in rows if r["control"] == "printed"] == [0.99, 0.98, 0.97]
    assert rows[-1]["kv_bytes"] == rows[0]["kv_bytes"] and rows[-1]["alpha"] < 1
    for row in rows:
        assert row["attention"] == how
        if row["control"] == "alpha":
            assert row["mac_reduction"] == pytest.approx(row["target"], rel=0.02)
        entering = [200, *zsaa.kept_counts(200, row["alpha"], 3)[:-1]]
        assert row["kv_bytes"] == 2 * 2 * 2 * 16 * 4 * sum(entering)
        assert row["peak_bytes"] is None and row["footprint_reduction"] is None, "a CPU keeps no count"


def test_a_footprint_that_does_not_fit_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    build = bench.build

    def small(name, tokens, device, dtype, storage="float16", **others):
        if storage == "float16":
            raise torch.OutOfMemoryError
        return build(name, tokens, device, dtype, storage, **others)

    monkeypatch.setattr(bench.memory, "build", small)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=15 * 2**30, name="small")
    )
    code, record = run(tmp_path, "footprint", "--model", "tiny", "--tokens", "200", "--storage", "float16", "float32")
    assert (code, record["too_large"]) == (0, ["tiny, float16"])
    assert {row["storage"] for row in record["rows"]} == {"float32"}
    assert "tiny in float16: not run (further), 15 GiB of GPU memory are too little" in capsys.readouterr().out


def test_a_footprint_that_is_cut_off_keeps_what_was_measured(tmp_path, monkeypatch):
    """Where memory is counted; and killed after its first shape."""
    peaks = iter([1000, 800, 500, 400, 900, 750, 700, 960])
    monkeypatch.setattr(bench.memory, "peak_bytes", lambda run, device: next(peaks))
    with pytest.raises(RuntimeError):  # of a generator whose `next` finds no more
        run(tmp_path, "footprint", "--model", "tiny", "--tokens", "200", "300", "--storage", "float32")
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"] is False and {r["tokens"] for r in record["rows"]} == {200}
    assert [r["footprint_reduction"] for r in record["rows"]][:3] == [1.0, 1.25, 2.0]
    assert [r["over_all"] for r in record["rows"]][:3] == [0.96, 1.2, 1.92]
    assert record["provenance"]["seconds"] > 0


def test_first_tokens_at_the_reductions_of_table_2(tmp_path):
    code, record = run(tmp_path, "ttft", "--model", "tiny", "--tokens", "60", "80", "--reductions", "1.5", "2")
    assert (code, record["kind"], record["name"], "complete" in record) == (0, "ttft", "result", False)
    assert [(r["tokens"], r["control"], r["target"]) for r in record["rows"]] == [
        (n, "alpha", t) for n in (60, 80) for t in (1, 1.5, 2)
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["mac_reduction"] == pytest.approx(row["target"], rel=0.05) and row["mac_reduction"] >= row["target"]
        assert row["by_kernel_speedup"] == row["speedup"] > 0
    assert torch.cuda.is_available() or record["provenance"]["gpu_joules"] is None
    assert "--reductions 1.5 2" in record["command"] and str(tmp_path) not in record["command"]


def test_stock_is_timed_compiled_too_and_what_fails_says_so(tmp_path, monkeypatch):
    import zsaa.bench.baselines as baselines

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)  # the compiler itself takes half a minute
    code, record = run(tmp_path, "baselines", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")
    found = {row["way"]: row for row in record["rows"]}
    assert code == 0 and list(found) == [
        "stock", "no mask", "compiled", "stock with a cache", "dial 0.5", "dial 0.5 by kernel",
    ]  # fmt: skip
    assert found["stock"]["speedup"] == 1 and found["dial 0.5"]["mac_reduction"] > 1 and record["not_run"] == {}
    fastest = min(row["latency_ms"] for way, row in found.items() if "dial" not in way)
    assert found["dial 0.5"]["over_best_stock"] == round(fastest / found["dial 0.5"]["latency_ms"], 3)

    def broken(model):
        model.forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no compiler here"))
        return model

    monkeypatch.setattr(baselines, "compiled", broken)
    _, record = run(tmp_path, "baselines", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")
    assert record["not_run"] == {"tiny, 1 x 40, compiled": "no compiler here"}
    assert "compiled" not in [row["way"] for row in record["rows"]]
    monkeypatch.setattr(
        baselines, "compiled", lambda model: torch.nn.init.zeros_(model.lm_head.weight) is None or model
    )
    assert run(tmp_path, "baselines", "--model", "tiny", "--tokens", "40", "--alphas", "0.5")[0] == 1


def test_the_page_on_speed_shows_the_baselines_as_they_came_out():
    """If this fails: zsaa.bench.baselines.table of these two files, and put it there."""
    folder = store.RESULTS / "speed/h200"
    names = ("llama3-8b", "smollm2-135m")
    results = [json.loads((folder / f"baselines-{name}.json").read_text(encoding="utf-8")) for name in names]
    page = (store.RESULTS.parent / "docs/findings/speed.md").read_text(encoding="utf-8")
    assert bench.baselines.table(results).to_markdown(index=False, disable_numparse=True) in page


def test_the_dial_fewer_layers_and_shorter_inputs_are_timed_side_by_side(tmp_path):
    code, record = run(tmp_path, "rivals", "--model", "tiny", "--tokens", "60", "--reductions", "1.5", "3")
    rows = {(row["control"], row["target"]): row for row in record["rows"]}
    sure = [("confidence", t) for t in (1, 1.5, 3)]
    assert code == 0 and list(rows) == [
        ("alpha", 1), *sure, *((c, t) for t in (1.5, 3) for c in ("alpha", "layers", "last"))
    ]  # fmt: skip
    assert (rows["layers", 1.5]["layers"], rows["layers", 3]["layers"], rows["alpha", 3]["layers"]) == (2, 1, 3)
    assert [rows[key]["layers"] for key in sure] == [3, 2, 1] and method_of(record, rows["confidence", 3]).endswith(
        "sure"
    )
    assert rows["layers", 3]["mac_reduction"] == 3 and rows["alpha", 3]["mac_reduction"] >= 3
    assert rows["last", 3]["kept"] < rows["last", 1.5]["kept"] < 60 and rows["last", 3]["mac_reduction"] >= 3


def test_a_text_that_is_timed_until_sure_leaves_where_it_is_said_to():
    model, ids = zsaa.disable(bench.build("tiny", 20, "cpu", torch.float32)), tiny.tokens([20])[0]
    model.score, ran = rivals.SureAt(model), []
    for at, layer in enumerate(model.model.layers, 1):
        layer.register_forward_hook(lambda *_, at=at: ran.append(at))
    for depth in (1, 3, 2):
        ran.clear()
        rivals.by_confidence(model, ids, depth)
        assert ran == [1, 2, 3][:depth]


def test_a_question_s_first_token_is_timed_beside_stock_the_papers_rule_and_a_cut(tmp_path):
    code, record = run(tmp_path, "question", "--model", "tiny", "--tokens", "300", "--reductions", "1.2")
    stock, asked, column_sum, cut = record["rows"]
    assert (code, record["kind"], [row["control"] for row in record["rows"]]) == (
        0, "bench-question", ["alpha", "asked", "alpha", "last"]
    )  # fmt: skip
    assert (stock["speedup"], stock["mac_reduction"], stock["kept"]) == (1.0, 1.0, 300)
    rule = {"score": "asked", "schedule": "entry"}
    config = bench.build("tiny", 300, "cpu", torch.float32).config
    assert asked["kept"] == cut["kept"] == zsaa.kept_counts(300, asked["alpha"], 3, **{"tau": 5, **rule})[-1]
    assert asked["mac_reduction"] == round(zsaa.mac_reduction(config, 300, asked["alpha"], **rule), 3) >= 1.2
    assert cut["mac_reduction"] > asked["mac_reduction"], "choosing is counted"
    assert asked["kv_bytes"] == cut["kv_bytes"] < column_sum["kv_bytes"] < stock["kv_bytes"]
    assert [(s["batch"], s["tokens"], s["latency_ms"] > 0) for s in record["scores"]] == [(1, 300, True)]
    methods = points.of([record | {"name": "q"}]).method.unique().tolist()
    assert methods == ["stock", "dial (score asked, schedule entry)", "dial", "last tokens only"]


def test_nf4_models_are_built_layer_by_layer_and_equal_what_loading_leaves(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    made = []
    params = bnb.nn.Params4bit

    def counted(weight, **kwargs):
        made.append(weight.numel())
        return params(weight, **kwargs)

    monkeypatch.setattr(bnb.nn, "Params4bit", counted)
    model = bench.build("tiny", 10, torch.device("cpu"), torch.float32, "nf4")
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == len(made) == 3 * 7 and all(isinstance(m, bnb.nn.Linear4bit) for m in linear)
    assert all(m.weight.quant_state.quant_type == "nf4" for m in linear)
    plain = bench.build("tiny", 10, torch.device("cpu"), torch.float32)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    # With its weights unpacked, the same model: logits of stock transformers.
    with torch.no_grad():
        for mine, theirs in zip(linear, [m for m in plain.model.layers.modules() if isinstance(m, torch.nn.Linear)]):
            theirs.weight.copy_(bnb.functional.dequantize_4bit(mine.weight.data, mine.weight.quant_state))
        plain.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        plain.lm_head.weight.copy_(model.lm_head.weight)
        ids = torch.arange(10)[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="GPT2Model has no nn.Linear"):
        bench.build("gpt2-124m", 10, torch.device("cpu"), torch.float32, "nf4")
