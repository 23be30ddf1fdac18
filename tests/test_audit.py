"""Table 4's facts, what Eq. 2 says about the paper's tables, and the Cells of Tables 3 and 4."""

import json
import re

import pytest
import transformers

from zsaa import cost, rule
from zsaa.kit import architectures, audit, claims, figures, paper, points, store, tables, verdicts
from zsaa.kit.architectures import config
from zsaa.measure.stats import to_bits

# ------------------------------------------------------------------------------------------------ Table 4


def by_formula(name):
    """The number of parameters, from the architecture's definition."""
    c = architectures.PUBLISHED[name][2]
    if c["model_type"] == "gpt2":
        h, layers = c["n_embd"], c["n_layer"]
        layer = (h * 3 * h + 3 * h) + (h * h + h) + (4 * h * h + 4 * h) + (4 * h * h + h) + 4 * h
        return c["vocab_size"] * h + c["n_positions"] * h + layers * layer + 2 * h
    h, layers, heads, kv = (
        c[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    d = c.get("head_dim", h // heads)
    norms = 4 if c["model_type"] == "gemma2" else 2
    layer = 2 * h * heads * d + 2 * h * kv * d + 3 * h * c["intermediate_size"] + norms * h
    return (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * h + layers * layer + h


@pytest.mark.parametrize("name", architectures.PUBLISHED)
def test_parameters_by_formula_and_facts_by_configuration(name):
    facts, c = architectures.facts(name), config(name)
    assert facts["parameters"] == by_formula(name)
    assert (facts["layers"], facts["heads"], facts["hidden size"]) == (
        c.num_hidden_layers, c.num_attention_heads, c.hidden_size
    )  # fmt: skip
    assert facts["key/value heads"] == getattr(c, "num_key_value_heads", c.num_attention_heads)


def test_facts_of_other_shapes_are_told_apart(monkeypatch):
    base = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    for kv, kind in ((4, "MHA"), (2, "GQA"), (1, "MQA")):
        shape = ("x", "x", dict(base, model_type="llama", num_key_value_heads=kv, hidden_act="gelu"))
        monkeypatch.setitem(architectures.PUBLISHED, "x", shape)
        facts = architectures.facts("x")
        assert (facts["attention"], facts["activation"], facts["residual"]) == (kind, "GeGLU", "Pre-Norm")
    with pytest.raises(ValueError, match="'bert'; these are known: gpt2-124m"):
        config("bert")


def test_published_values_are_what_transformers_has_as_defaults():
    """A second source where there is one: these classes' defaults are these checkpoints."""
    for name, kind in (("gpt2-124m", transformers.GPT2Config), ("gemma2-2b", transformers.Gemma2Config)):
        for key, value in architectures.PUBLISHED[name][2].items():
            assert getattr(kind(), key) == value, key
    mistral = transformers.MistralConfig()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(mistral, key) == architectures.PUBLISHED["mistral-7b"][2][key]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return [architectures.run(folder), audit.run(folder), folder]


def test_table_4(known):
    cells = {(c.row, c.subject, c.column): c for c in tables.table_4_cells(known[:1])}
    assert len(cells) == 8 * (4 + 1)  # GPT-2 has two checkpoints
    verdict = {key: cell.verdict for key, cell in cells.items()}
    assert {k for k, v in verdict.items() if k[1] == "openai-community/gpt2-medium" and v != "consistent"} == set()
    assert {k[2] for k, v in verdict.items() if k[1] == "openai-community/gpt2" and v == "differs"} == {
        "size", "layers", "heads", "hidden size"
    }  # fmt: skip
    assert {k[2] for k, v in verdict.items() if k[0] == "Gemma 2" and v == "differs"} == {
        "size", "activation", "residual", "attention"
    }  # fmt: skip
    assert {v for k, v in verdict.items() if k[0] in ("Mistral", "LLaMA 3")} == {"consistent"}
    assert cells["Gemma 2", "google/gemma-2-2b", "attention"].ours == "GQA"
    assert cells["GPT-2", "openai-community/gpt2-medium", "size"].ours == "355M"
    found = verdicts.counts(cells.values())
    assert found == {"reproduced": 0, "consistent": 28, "differs": 4, "substitute": 0, "not run": 0}, "none was run"
    assert {c.verdict for c in tables.table_4_cells([])} == {"not run"} and len(tables.table_4_cells([])) == 32
    wide = tables.table_4(known[:1])
    assert wide.loc["google/gemma-2-2b", "attention"] == "[GQA]" and wide.loc["Gemma 2 (paper)", "attention"] == "MQA"


# ------------------------------------------------------------------------------------------------ the audit


@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-2b", "gpt2-124m"])
def test_cost_is_macs_without_rounding(name):
    c = config(name)
    for alpha, tolerance in ((1.0, 1e-12), (0.97, 2e-4)):
        mine = audit.cost(c, 100_000, [alpha] * c.num_hidden_layers)
        assert mine == pytest.approx(cost.macs(c, 100_000, alpha, 1), rel=tolerance)
    half = audit.cost(c, 512, [1.0] * c.num_hidden_layers, attention="causal half")
    none = audit.cost(c, 512, [1.0] * c.num_hidden_layers, attention="left out")
    assert 2 * half == pytest.approx(none + cost.macs(c, 512))
    head = audit.cost(c, 512, [0.5] + [1.0] * (c.num_hidden_layers - 1), head="every position")
    assert head - audit.cost(c, 512, [0.5] + [1.0] * (c.num_hidden_layers - 1)) == 256 * c.vocab_size * c.hidden_size
    early = audit.reduction(c, 512, [0.9] * c.num_hidden_layers, place="before attention")
    assert early > audit.reduction(c, 512, [0.9] * c.num_hidden_layers)


def test_eq_2_explains_no_row_of_table_3_and_alpha_cubed_all():
    found = audit.hypotheses((256, 1024))
    eq2 = [row for row in found if row["schedule"] == "alpha^1 in every layer"]
    assert len(eq2) == 3 * 2 * 2 * 2 and all(row["rows"] == 0 for row in eq2)
    assert found[0]["schedule"] == "alpha^3 in every layer" and found[0]["rows"] == 6 and found[0]["off"] < 1.12
    summed = {row["schedule"]: row for row in audit.by_schedule(found)}
    assert len(summed) == len(audit.SCHEDULES)
    assert summed["alpha^1 in every layer"]["rows"] == 0 and summed["alpha^2 in every layer"]["rows"] < 6
    exponents = audit.exponents()
    assert len(exponents) == 6
    for row in exponents:
        assert row["low"] < row["k"] < row["high"] and row["low"] > 1.3
    low, high = max(row["low"] for row in exponents), min(row["high"] for row in exponents)
    assert low < 3 < high


def test_a_schedule_that_made_the_numbers_is_found(monkeypatch):
    """The search would find Eq. 2, had the paper's numbers followed it."""
    made = {}
    for name, shape in audit.TABLE_3.items():
        c = config(shape)
        made[name] = {1: paper.TABLE_3[name][1]}
        for alpha in (0.99, 0.97, 0.9):
            times = round(audit.reduction(c, 512, [alpha] * c.num_hidden_layers), 1)
            made[name][times] = {"alpha": alpha, "GPU footprint": 1.0, "MMLU": 50.0}
    monkeypatch.setattr(paper, "TABLE_3", made)
    best = audit.by_schedule(audit.hypotheses((512,)))[0]
    assert (best["schedule"], best["rows"]) == ("alpha^1 in every layer", 6)
    assert all(row["low"] <= 1 <= row["high"] for row in audit.exponents())


def test_schedules_are_what_they_say():
    layers, alpha = 4, 0.9
    product = {}
    for name, shares in audit.SCHEDULES.items():
        kept, left = 1.0, []
        for share in shares(alpha, layers):
            kept *= share
            left.append(round(kept, 9))
        product[name] = left
    assert product["alpha^1 in every layer"] == [round(0.9**i, 9) for i in (1, 2, 3, 4)]
    assert product["alpha^2 in every layer"] == [round(0.81**i, 9) for i in (1, 2, 3, 4)]
    assert product["2 x (1 - alpha) of the prompt dropped by every layer"] == [0.8, 0.6, 0.4, 0.2]
    assert product["3 x (1 - alpha) of the prompt dropped by every layer"][3] == 0
    assert product["alpha^l in layer l"] == [round(0.9**i, 9) for i in (1, 3, 6, 10)]
    assert product["alpha once, in the first layer"] == [0.9] * 4


def test_reach_is_the_shortest_input_that_will_do():
    gpt2 = config("gpt2-124m")
    for row in audit.reach():
        n, times = row["tokens"], row["speed-up"]
        assert cost.mac_reduction(gpt2, n, 1e-9) >= times > cost.mac_reduction(gpt2, n - 1, 1e-9)
    assert {r["column"]: r["speed-up"] for r in audit.reach()} | {"SST-2": 5, "IMDB": 11, "PTB": 3} == {
        r["column"]: r["speed-up"] for r in audit.reach()
    }
    assert audit.most(gpt2, [20, 300]) == pytest.approx(cost.mac_reduction(gpt2, [20, 300], 1e-9))
    with pytest.raises(ValueError, match="out of reach at any length"):
        audit.tokens_needed(gpt2, 60.0)


def test_footprints_are_bounded_by_the_last_layer():
    for row in audit.table_3():
        assert 1 < row["kv"] < row["last_layer"] < row["last_layer_rounded"]
        layers = config(audit.TABLE_3[row["model"]]).num_hidden_layers
        left = rule.kept_counts(100_000, row["alpha"], layers, 1)
        assert row["last_layer"] == pytest.approx(100_000 / left[-1], rel=1e-3)
        assert audit.table_3(100_000, 1)[0]["kv"] == pytest.approx(
            32 / sum(0.99**i for i in range(32)), rel=1e-3
        )  # fmt: skip


def test_curves_pass_through_the_table():
    for row in audit.curves(512):
        c = config(audit.TABLE_3[row["model"]])
        for key, k in (("eq2", 1), ("cubed", 3)):
            assert row[key] == audit.reduction(c, 512, [row["alpha"] ** k] * c.num_hidden_layers)


def test_reach_of_measured_lengths():
    def lengths(name, column, shape="gpt2"):
        return {"name": name, "kind": "lengths", "recipe": {"shape": shape}, "model": {"name": "m"},
                "tokens_mean": 27.0, "task": {"name": name, "source": "s", "paper_column": column},
                "rows": [{"target": 1}, {"target": 4.5}]}  # fmt: skip

    rows = audit.measured_reach(
        [lengths("sst2", "SST-2"), lengths("imdb", "IMDB"), lengths("x", None), lengths("imdb", "IMDB", None)]
    )
    assert [(r["within reach"], r["column"], r["printed"], r["enough"]) for r in rows] == [
        ("4.5x", "SST-2", "5x", False), ("4.5x", "IMDB", "11x", False), ("4.5x", None, "-", True)
    ]  # fmt: skip
    rising = lengths("sst2", "SST-2")
    rising["recipe"]["schedule"] = "rising"
    assert audit.measured_reach([rising]) == [], "another schedule says nothing of Eq. 2"


@pytest.mark.full
def test_the_audits_figures_are_drawn(known, tmp_path):
    for name in ("reductions", "exponents", "reach"):
        figures.save_figure(getattr(figures, f"audit_{name}_figure")(known[1]), tmp_path / name)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    chosen = score([])
    drawn = figures.choice_figure(points.of([chosen, {**chosen, "model": {**chosen["model"], "name": "other"}}]))
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == ["dial", "dial at the paper's printed alphas", "last tokens"] and len(drawn.axes) == 2


def test_floored_by_hand():
    alphas = [0.02 + 0.98 * (i + 0.5) / 50 for i in range(50)]
    want = sum(rule.kept_counts(300, a, 12, 5)[-1] == 5 for a in alphas) / 50
    assert audit.floored(steps=50) == want and 0.5 < want < 0.9


def test_claims_follow_the_results():
    committed = {c.quote: c for c in claims.claims(store.load_results())}
    nothing = {c.quote: c for c in claims.claims([])}
    assert list(committed) == list(nothing)
    assert all(c.verdict in claims.VERDICTS for c in (*committed.values(), *nothing.values()))
    untested = [c for c in nothing.values() if c.verdict == "not tested"]
    assert all(not c.evidence for c in untested) and len(untested) >= 6
    quote = next(q for q in committed if q.startswith("stably accelerates"))
    assert committed[quote].verdict == "partly" and "by the recipe zsaa+" in committed[quote].evidence
    papers = [r for r in store.load_results() if r["kind"] != "curve" or r["recipe"]["method"] != "zsaa+"]
    assert {c.quote: c for c in claims.claims(papers)}[quote].verdict == "not borne out"
    better = json.loads(json.dumps(store.load_results(kind="curve")))
    for result in better:
        for row in result["rows"]:
            if result["recipe"]["method"] == "alpha-sampled":
                row.update(accuracy=93.0, ci95=[92.0, 94.0])
    assert {c.quote: c for c in claims.claims(better)}[quote].verdict == "borne out"
    for result in better:
        result["recipe"]["schedule"] = "rising"
    assert {c.quote: c for c in claims.claims(better)}[quote].verdict == "not tested", "not the paper's schedule"


def test_what_chance_could_have_answered_bears_no_claim_out_nor_refutes_it():
    def said(whole):
        rows = [
            scored(*row) for row in (("alpha", 1, whole, 1.0), ("alpha", 1.5, 40.0, 0.98), ("random", 1.5, 60.0, 0.98))
        ]
        quote = "the soft-score determines the contribution of each hidden activation to the layer output"
        return next(c.verdict for c in claims.claims([{**score([]), "rows": rows}]) if c.quote == quote)

    assert (said(62.0), said(28.0)) == ("not borne out", "not tested")


def test_claims_say_what_the_printed_numbers_say():
    said = {c.where: c.evidence for c in claims.claims([]) if c.verdict == "against its own numbers"}
    glue = next(e for e in said.values() if "on average" in e)
    assert "7.3x on average" in glue
    numbers = re.findall(r"(\d\.\d\d)x at 0\.9\d", " ".join(c.evidence for c in claims.claims([])))
    assert [float(x) for x in numbers] == pytest.approx([1.19, 1.40, 1.62, 1.16, 1.49, 1.69], abs=0.011)


# ------------------------------------------------------------------------------------------------ Table 3


def scored(control, target, accuracy, alpha):
    return {"control": control, "target": target, "alpha": alpha, "keep_tokens": None, "mac_reduction": 1.49, "n": 200,
            "accuracy": accuracy, "ci95": [accuracy - 5, accuracy + 5],
            "right": to_bits([int(i < 2 * accuracy) for i in range(200)])}  # fmt: skip


def score(differs, **model):
    return {"name": "choice-x", "kind": "choice", "differs_from_the_paper": differs,
            "model": {"name": "m", "quantization": None, "stands_for": "LLaMA-3-8B-4bit", **model},
            "recipe": {"method": "none", "tuning": "none"},
            "provenance": {"seed": 0, "commit": None, "hardware": {"device": "A GPU"}},
            "task": {"name": "MMLU", "form": "letters", "shots": 5, "substitute": False, "source": "made up"},
            "rows": [scored("alpha", 1, 62.0, 1.0), scored("alpha", 1.5, 50.0, 0.98),
                     scored("printed", 1.5, 57.0, 0.99), scored("last", 1.5, 60.0, None)]}  # fmt: skip


def test_table_3_cells(known):
    empty = tables.table_3_cells([])
    assert len(empty) == 2 * (4 + 3 * 2) and {c.verdict for c in empty} == {"not run"}
    footprint = {"name": "footprint", "kind": "footprint", "rows": [
        {"model": "llama3-8b", "storage": "nf4", "attention": "sdpa", "batch": 1, "tokens": 2048, "control": "printed",
         "target": 2.5, "alpha": 0.98, "peak_bytes": peak, "footprint_reduction": 1.3, "over_all": 1.2}
        for peak in (100, None)], "provenance": {"hardware": {"device": "A GPU"}}}  # fmt: skip
    cells = tables.table_3_cells([*known[:2], footprint, score([]), score(["data", "no nf4"])])
    at = {}
    for c in cells:
        at.setdefault((c.column, c.row), []).append(c)
    rising = {**score([]), "recipe": {"method": "none", "tuning": "none", "schedule": "rising"}}
    assert tables.table_3_cells([rising]) == empty, "the paper's schedule alone counts"
    one = at["LLaMA-3-8B-4bit: MMLU", "1x"]
    assert [(c.verdict, c.ours, c.n, c.substitute) for c in one] == [
        ("reproduced", 62.0, 200, ""), ("substitute", 62.0, 200, "data, nf4")
    ]  # fmt: skip
    solved, printed, *_ = at["LLaMA-3-8B-4bit: MMLU", "1.5x"]
    assert (solved.verdict, printed.verdict) == ("differs", "reproduced")
    assert "solved" in solved.protocol and "as printed" in printed.protocol
    (foot,) = at["LLaMA-3-8B-4bit: GPU footprint", "2.5x"]
    assert (foot.verdict, foot.ours, foot.interval, foot.substitute) == ("differs", 1.3, (1.3, 1.3), "")
    alphas = [c for (column, _), found in at.items() if column.endswith("alpha") for c in found]
    assert len(alphas) == 6 and all(c.verdict == "differs" and c.ours < c.published for c in alphas)
    assert at["Gemma-2-2B-4bit: MMLU", "3.5x"][0].verdict == "not run"
    wide = tables.table_3([*known[:2], footprint, score([])])
    mine = "m, untuned; MMLU, chance 25% (the paper's), choice-x"
    assert wide["LLaMA-3-8B-4bit: MMLU"][mine].tolist() == [
        "62.0 [57.0, 67.0], reproduced", "50.0 [45.0, 55.0], differs", "not run", "not run"
    ]  # fmt: skip
    assert wide["LLaMA-3-8B-4bit: MMLU"][f"{mine}, printed alpha"]["1.5x"] == "57.0 [52.0, 62.0], reproduced"
    tuned = score(["model", "data"], name="s", quantization="nf4") | {
        "recipe": {"method": "alpha-sampled", "tuning": "lora", "batch_size": 8, "gradient_accumulation": 2, "seed": 3},
        "train": {"steps": 375, "processes": 1},
        "provenance": {**score([])["provenance"], "seed": 3, "train_samples": 2000},
    }  # fmt: skip
    how = "s nf4, alpha-sampled LoRA fine-tuning; 375 steps of 16 of 2,000 questions, seed 3"
    beside = tables.table_3([score([]), tuned])["LLaMA-3-8B-4bit: MMLU"]
    assert f"{how}; MMLU, chance 25% (substitute: model, data), choice-x" in beside and mine in beside
    assert how in figures.choice_figure(points.of([tuned])).get_label()
    foot = "llama3-8b's true shape, random weights, nf4, batch 1, A GPU, footprint, printed alpha"
    shown = wide["LLaMA-3-8B-4bit: GPU footprint"][foot].tolist()
    assert shown == ["-", "not run", "1.30 [1.30, 1.30], differs", "not run"]
    assert list(wide.index) == ["1x", "1.5x", "2.5x", "3.5x"]
    assert wide["LLaMA-3-8B-4bit: MMLU"]["paper"].tolist() == ["62.95", "58.28", "54.32", "49.95"]
    assert "not run" in set(wide["Gemma-2-2B-4bit: MMLU"]["ours"])


def test_result_files_are_whole(known):
    for name in ("architectures", "audit"):
        result = json.loads((known[2] / f"{name}.json").read_text())
        assert result["kind"] == result["name"] == name and result["provenance"]["versions"]["transformers"]


@pytest.mark.parametrize("tokens", [100.0, "512", 0])
def test_prompt_tokens_are_a_whole_number(tokens, tmp_path):
    """papermill's -p makes 1e2 a float, and leaves what it does not know as text."""
    with pytest.raises(ValueError, match="prompt_tokens must be a whole number, 1 or more"):
        audit.run(tmp_path, tokens)
    assert not any(tmp_path.iterdir())
