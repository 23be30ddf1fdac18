"""What of Tables 2 and 3 no weight decides, from files that the benchmarks wrote: here of tiny models under the names
of the paper's shapes, on a CPU, with the cache and a constant in place of the GPU's memory."""

import copy
import json

import pytest
import torch

from zsaa import bench
from zsaa.bench.prefill import cache_bytes
from zsaa.kit import claims, figures, points, printed, report, tables, verdicts
from zsaa.kit.report import view
from zsaa.kit.store import RESULTS

OVERHEAD = 3000  # bytes that no setting saves
TINY_GEMMA = dict(
    model_type="gemma2", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, head_dim=16, vocab_size=97, sliding_window=256,
)  # fmt: skip

pytestmark = pytest.mark.full  # a bench of two models first


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    shared = ["--device", "cpu", "--dtype", "float32", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in (("llama3-8b", bench.MODELS["tiny"]), ("gemma2-2b", TINY_GEMMA)):
            patch.setitem(bench.MODELS, name, shape)
        patch.setitem(bench.MODELS, "gpt2-124m", dict(model_type="gpt2", n_embd=32, n_layer=4, n_head=4, vocab_size=97))
        patch.setattr(bench.memory, "peak_bytes", lambda run, _: OVERHEAD + cache_bytes(run().past_key_values))
        given = ["--models", "llama3-8b", "gemma2-2b", "--storage", "nf4", "float32", "--tokens", "120", "160", "200"]
        assert bench.main(["footprint", *given, *shared, "--output", str(folder / "footprint.json")]) == 0
        given = ["--models", "gpt2-124m", "--tokens", "60", "80", "--batches", "1", "2"]
        assert bench.main(["ttft", *given, *shared, "--output", str(folder / "ttft-gpt2.json")]) == 0
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()} | {"folder": folder}


def test_footprints_are_facts_of_the_shape_over_lengths(results):
    rows = results["footprint"]["rows"]
    cells = [c for c in tables.table_3_cells([results["footprint"]]) if c.column.endswith("GPU footprint")]
    assert len(cells) == 2 * 3 * 2  # models, reductions, and alpha as solved and as printed: 4 bits only
    for cell in cells:
        shape = {"LLaMA-3-8B-4bit": "llama3-8b", "Gemma-2-2B-4bit": "gemma2-2b"}[cell.column.split(":")[0]]
        control = "printed" if "as printed" in cell.protocol else "alpha"
        mine = sorted(
            round(row["footprint_reduction"], 2) for row in rows
            if (row["model"], row["storage"], row["control"]) == (shape, "nf4", control)
            and f"{row['target']}x" == cell.row
        )  # fmt: skip
        assert len(mine) == 3 and (cell.ours, cell.interval) == (mine[1], (mine[0], mine[2]))
        assert cell.verdict == ("substitute" if mine[0] <= cell.published <= mine[2] else "differs")
        assert "random weights, nf4" in cell.subject and "prompts of 120 tokens" in cell.protocol
        assert cell.substitute in ("", "prompts") and cell.n is None
    by_hand = next(r for r in rows if (r["control"], r["target"], r["tokens"]) == ("alpha", 2.5, 200))
    stock = next(r for r in rows if (r["control"], r["target"], r["tokens"]) == ("alpha", 1, 200))
    want = (OVERHEAD + stock["kv_bytes"]) / (OVERHEAD + by_hand["kv_bytes"])
    assert by_hand["footprint_reduction"] == by_hand["over_all"] == pytest.approx(want, abs=1e-3)


def test_a_number_in_the_range_is_not_called_the_papers(results):
    """Some length would give it; whether the paper's prompts do is not known. Outside, no length does."""
    made = copy.deepcopy(results["footprint"])
    for row in made["rows"]:
        if row["control"] == "printed":
            row["footprint_reduction"] = {120: 1.6, 160: 1.65, 200: 1.71}[row["tokens"]]
    cells = {
        (c.column, c.row): c for c in tables.table_3_cells([made]) if "as printed" in c.protocol
    }  # the printed ones
    assert cells["LLaMA-3-8B-4bit: GPU footprint", "1.5x"].verdict == "substitute"
    assert cells["LLaMA-3-8B-4bit: GPU footprint", "2.5x"].verdict == "differs"
    shown = tables.table_3([made])["Gemma-2-2B-4bit: GPU footprint"]
    heading = next(name for name in shown if name.endswith("printed alpha"))
    assert shown[heading].tolist() == ["-", *["1.65 [1.60, 1.71], substitute"] * 3]
    assert heading.startswith("gemma2-2b's true shape, random weights, nf4, batch 1, CPU")


def test_without_a_count_of_memory_nothing_is_claimed(results):
    bare = copy.deepcopy(results["footprint"])
    for row in bare["rows"]:
        row.update(peak_bytes=None, footprint_reduction=None, over_all=None)
    assert {c.verdict for c in tables.table_3_cells([bare])} == {"not run"}
    assert figures.footprint_figure(points.of([bare])) is None and figures.footprint_figure(points.of([])) is None
    assert set(tables.footprint_table(points.of([bare]))["over stock"]) == {"-"}
    assert printed._measured_footprints([bare]) == []


def test_first_tokens_stand_in_for_the_papers_device(results):
    result = results["ttft-gpt2"]
    cells = [c for c in tables.table_2_cells([result]) if c.column == "TTFT"]
    assert [(c.row, c.published, c.verdict, c.substitute) for c in cells] == [
        (f"{t}x", t, "substitute", "device") for t in (2, 3) for _ in (1, 2)
    ]
    speeds = sorted(
        round(row["speedup"], 2) for row in result["rows"] if (row["batch"], row["target"]) == (2, 3)
    )  # fmt: skip
    assert cells[-1].interval == (speeds[0], speeds[-1]) and "batch 2" in cells[-1].subject
    on_a_t4 = copy.deepcopy(result)
    on_a_t4["provenance"]["hardware"]["device"] = "Tesla T4"
    for row in on_a_t4["rows"]:
        row["speedup"] = row["target"] * (1.05 if row["tokens"] == 60 else 0.9)
    assert {c.verdict for c in tables.table_2_cells([on_a_t4]) if c.column == "TTFT"} == {"reproduced"}
    other = copy.deepcopy(result)
    for row in other["rows"]:
        row["model"] = "gpt2-355m"
    assert {c.substitute for c in tables.table_2_cells([other]) if c.column == "TTFT"} == {"device, model"}
    apart = copy.deepcopy(result)  # two lengths of a tiny model may take the same time, and are then no range
    for row in apart["rows"]:
        row["speedup"] *= 1 + row["tokens"] / 100
    table = tables.table_2(tables.table_2_cells([apart]))
    clock = table[table["corpus"].str.startswith("any")]
    assert list(clock["1x"]) == ["1x"] * 3 and clock["2x"].iloc[0] == "2x" and "[" in clock["3x"].iloc[1]
    assert list(clock["verdict"])[1:] == ["substitute"] * 2
    assert verdicts.counts(tables.table_2_cells([result]))["substitute"] == 2


def test_tables_with_every_setting(results):
    footprints = tables.footprint_table(points.of([results["footprint"]]))
    assert len(footprints) == len(results["footprint"]["rows"]) == 2 * 2 * 3 * 8
    assert footprints["over stock"].str.endswith("x").all()
    assert sum(footprints["alpha"] == "1") == 2 * 2 * 3
    clocks = tables.ttft_table(points.of([results["ttft-gpt2"]]))
    assert len(clocks) == 2 * 2 * 3 and set(clocks["without CUDA graphs"]) == {"-"}
    measured = RESULTS / "speed/h100/prefill-small.json", RESULTS / "speed/h100/prefill-small-no-fused.json"
    fused, plain = (json.loads(path.read_text()) for path in measured)
    prefills = tables.prefill_table(points.of([fused, plain]))
    assert len(prefills) == len(fused["rows"]) + len(plain["rows"])
    between = dict.fromkeys(zip(prefills["alpha"] == "1", prefills["kernels between"]))
    assert [*between] == [(True, "PyTorch's"), (False, "fused"), (False, "PyTorch's")]
    for row in plain["rows"]:  # as on a CPU
        row.update(peak_bytes=None, graph_bytes=None, capture_ms=None)
    assert {*prefills} - {*tables.prefill_table(points.of([plain]))} == {
        "kernels between", "peak, MB", "graph, MB", "recording a graph, ms"
    }  # fmt: skip


def test_the_figure_has_a_line_for_each_length(results, tmp_path):
    figure = figures.footprint_figure(points.of([results["footprint"]]))
    assert [axis.get_title() for axis in figure.axes] == [
        "llama3-8b, nf4\nsdpa attention",
        "gemma2-2b, nf4\neager attention",
    ]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["120 tokens", "160 tokens", "200 tokens", "cache alone, 200 tokens", "printed in Table 3"]
    assert "random weights" in figure.get_label() and "Hollow" in figure.get_label()
    figures.save_figure(figure, tmp_path / "footprint")
    assert (tmp_path / "footprint.png").stat().st_size > 10_000


def test_the_claims_take_them_up(results):
    found = [results["footprint"], results["ttft-gpt2"]]
    said = {c.quote: c for c in claims.claims(found)}
    foot = next(c for quote, c in said.items() if quote.startswith("the GPU memory footprint"))
    assert "Measured (nf4, random weights, prompts of 120 to 200 tokens, cpu)" in foot.evidence
    assert "Gemma-2-2B-4bit (eager), alphas as printed" in foot.evidence and foot.verdict == "against its own numbers"
    first = next(c for quote, c in said.items() if "Time-to-First-Token" in quote)
    assert "gpt2-124m's shape, batch 2 of 60 to 80 tokens" in first.evidence
    for factor, verdict in ((0.9, "borne out"), (0.5, "not borne out")):
        made = copy.deepcopy(results["ttft-gpt2"])
        for row in made["rows"]:
            row["by_kernel_speedup"] = factor * row["target"]
        assert {c.quote: c.verdict for c in claims.claims([made])}[first.quote] == verdict


def test_the_report_shows_them(results, tmp_path, monkeypatch):
    root, out = tmp_path / "repository", tmp_path / "out"
    for folder in (root / "results", root / "docs", out / "results"):
        folder.mkdir(parents=True)
    for name in ("footprint", "ttft-gpt2"):
        (out / f"results/{name}.json").write_text(json.dumps(results[name]))
    monkeypatch.setattr(view, "ROOT", root)
    text = report.index(out).read_text()
    for expected in ("true shape, random weights, nf4", "over the dial&#39;s own code", "without CUDA graphs", "TTFT"):
        assert expected in text, expected
    shown = view.gather(view.Sources({"this run": out, "committed": root}, out))
    summary = {s["title"]: s["summary"]["this run"] for s in shown["sections"] if s["summary"]}
    assert summary["Table 2"]["substitute"] == 2 and summary["Table 3"]["not run"] == 8 + 6  # scores and alphas
    assert summary["Table 3"]["substitute"] + summary["Table 3"]["differs"] == 6


def test_random_weights_are_made_on_the_device(monkeypatch):
    """The linear layers of a true shape would not fit a small machine in float32: each is made where it will be."""
    places = []
    normal = torch.randn

    def seen(*size, **kwargs):
        places.append(kwargs.get("device"))
        return normal(*size, **kwargs)

    monkeypatch.setattr(torch, "randn", seen)
    bench.build("tiny", 10, torch.device("cpu"), torch.float16, "nf4")
    assert len(places) == 3 * 7 and set(places) == {torch.device("cpu")}
