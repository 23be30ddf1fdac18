"""Eq. 2, the schedule beside it, and their costs: properties, the paper's own numbers, and a FLOP counter's opinion."""

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import zsaa
from ablation import variants as bench
from zsaa import attention
from zsaa.kit import paper
from zsaa.rule import SCHEDULES, SPREAD, TAU, Rule, check_alpha, check_tau, powers
from zsaa.score import FUNCTIONS, select

ROOT = Path(__file__).parent.parent
alphas = st.floats(min_value=0.01, max_value=1.0)


@given(n=st.integers(1, 4096), alpha=alphas, layers=st.integers(1, 40), tau=st.integers(1, 64))
def test_kept_counts_follow_eq_2(n, alpha, layers, tau):
    counts = zsaa.kept_counts(n, alpha, layers, tau)
    assert len(counts) == layers
    before = n
    for count in counts:
        assert min(before, tau) <= count <= before, "never fewer than tau, never more than before"
        assert count <= max(alpha * before + 1e-6, tau), "never more than Eq. 2 allows"
        if count > tau:
            assert count > alpha * before - 1, "floor loses less than one token"
        before = count


@pytest.mark.parametrize("schedule", SPREAD)
@given(n=st.integers(1, 4096), alpha=alphas, layers=st.integers(1, 40), tau=st.integers(1, 64))
def test_kept_counts_are_the_bench_s(schedule, n, alpha, layers, tau):
    found = zsaa.kept_counts(n, alpha, layers, tau, schedule)
    assert found == bench.Variant(schedule=schedule, tau=tau).counts(n, alpha, layers)


@given(layers=st.integers(1, 40), alpha=alphas)
def test_lower_layers_drop_less_by_the_rising_schedule(layers, alpha):
    rising = powers(layers, "rising")
    assert list(rising) == sorted(rising) and rising[0] <= 1 <= rising[-1] < math.e
    assert sum(rising) == pytest.approx(layers), "the top is left with the same share"
    assert powers(layers, "geometric") == (1.0,) * layers
    eq_2, found = (zsaa.kept_counts(10**9, alpha, layers, 1, schedule) for schedule in SPREAD)
    assert all(a >= b - layers for a, b in zip(found, eq_2)), "and no layer with less"


def test_the_rising_schedule_in_numbers():
    assert zsaa.kept_counts(1000, 0.5, 4, schedule="rising") == [632, 350, 164, 62]
    assert zsaa.kept_counts(1000, 0.5, 4) == [500, 250, 125, 62]


def test_unknown_schedules():
    for name in ("luck", "once", ["rising"]):
        with pytest.raises(
            ValueError, match=r"schedule .*(luck|once|rising).*Available: geometric, rising, entry\. Leave"
        ):
            zsaa.kept_counts(9, 0.5, 3, schedule=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(n=st.integers(1, 2048), low=alphas, high=alphas, tau=st.integers(1, 16))
def test_kept_counts_grow_with_alpha(schedule, n, low, high, tau):
    low, high = sorted((low, high))
    fewer, more = (zsaa.kept_counts(n, a, 12, tau, schedule) for a in (low, high))
    assert all(a <= b for a, b in zip(fewer, more))


@given(n=st.integers(1, 4096), numerator=st.integers(1, 100))
def test_percentages_are_exact(n, numerator):
    """alpha = k/100 keeps floor(k n / 100) in exact arithmetic, whatever floats make of the product."""
    assert zsaa.kept_counts(n, numerator / 100, 1, 1) == [max(1, math.floor(Fraction(numerator * n, 100)))]


def test_alpha_one_keeps_everything():
    assert zsaa.kept_counts(100, 1.0, 3) == [100, 100, 100]
    assert zsaa.kept_counts(3, 0.1, 4, tau=5) == [3, 3, 3, 3], "inputs shorter than tau are never emptied"
    assert zsaa.kept_counts(100, 0.3, 4, tau=5) == [30, 9, 5, 5]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(n=st.integers(1, 2048), layers=st.integers(1, 40))
def test_any_text_is_kept_whole_at_alpha_one(schedule, n, layers):
    assert zsaa.kept_counts(n, 1.0, layers, schedule=schedule) == [n] * layers


@settings(deadline=None)
@given(data=st.data(), batch=st.integers(1, 4), rows=st.integers(1, 40), ties=st.booleans())
def test_selection(data, batch, rows, ties):
    lengths = data.draw(st.lists(st.integers(1, rows), min_size=batch, max_size=batch))
    lengths[0] = rows
    counts = [data.draw(st.integers(1, n)) for n in lengths]
    seed = data.draw(st.integers(0, 2**31))
    scores = torch.rand(batch, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 3).floor()
    ragged = len(set(counts)) > 1 or len(set(lengths)) > 1
    kept, real = select(scores.clone(), torch.tensor(lengths), torch.tensor(counts), max(counts), ragged)
    for b in range(batch):
        chosen = kept[b][real[b]].tolist() if real is not None else kept[b].tolist()
        want = sorted(range(lengths[b]), key=lambda j: (j != lengths[b] - 1, -scores[b, j].item(), j))[: counts[b]]
        assert chosen == sorted(want), "best first, the last row always, ties to the earlier, in order"
    assert int(kept.max()) < rows and int(kept.min()) >= 0, "padding points at rows that exist"


def test_column_mean_divides_by_the_queries_that_see_a_token():
    sums, lengths = torch.ones(2, 4), torch.tensor([4, 3])
    want = torch.tensor([[1 / 4, 1 / 3, 1 / 2, 1], [1 / 3, 1 / 2, 1, 1]])
    torch.testing.assert_close(FUNCTIONS["column_mean"](sums, lengths), want)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("alpha", "schedule"), [(1.0, "geometric"), (0.6, "geometric"), (0.6, "rising")])
def test_macs_agree_with_a_flop_counter(family, alpha, schedule, monkeypatch):
    """On a path made of plain products, and one block, so that nothing is skipped: exactly."""
    monkeypatch.setitem(attention.BLOCK_ELEMENTS, "cpu", 1 << 40)
    monkeypatch.delitem(attention.BLOCK_ROWS, "cpu")
    model = zsaa.enable(tiny.make(family, "base"), alpha=alpha, tau=3, schedule=schedule)
    n = 40
    with torch.no_grad(), zsaa.trace(model), FlopCounterMode(display=False) as counter:
        model(tiny.tokens([n])[0], use_cache=False)
    # Some transformers versions make the rotary angles by a matrix product; they are no part of the decoder's cost.
    by_module = {name.rsplit(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops = counter.get_total_flops() - by_module.get("rotary_emb", 0)
    assert flops == 2 * zsaa.macs(model.config, n, alpha, tau=3, schedule=schedule)


def test_macs_of_known_shapes():
    import transformers as tf

    gpt2 = tf.GPT2Config()  # 12 layers of 12 x 768^2 weights
    assert zsaa.macs(gpt2, 100) == 12 * (100 * 12 * 768**2 + 2 * 100 * 100 * 768)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("score", ["column_sum", "salience"])
def test_macs_layer_by_layer(family, score):
    """The head of a learned score is paid for every row that enters a layer which drops some."""
    config, n, alpha, tau = tiny.CONFIGS[family](), 700, 0.4, 120
    counts = zsaa.kept_counts(n, alpha, 4, tau)
    assert counts == [280, 120, 120, 120], "two layers drop"
    entering, size = [n, *counts[:-1]], config.hidden_size
    pairs = 2 * size  # of queries and keys, attention and values
    per_entering_row, per_kept_row = zsaa.cost.layer_weights(config)
    want = sum(entering) * per_entering_row + sum(k * k for k in entering) * pairs + sum(counts) * per_kept_row
    want += (n + counts[0]) * (size * 64 + 64) if score == "salience" else 0
    assert zsaa.macs(config, n, alpha, tau, score) == want
    assert zsaa.macs(config, n, 1.0, tau, score) == zsaa.macs(config, n), "who drops nothing asks no head"


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(lengths=st.lists(st.integers(30, 900), min_size=1, max_size=5), target=st.floats(1.0, 6.0))
def test_alpha_for_reaches_the_target_by_a_learned_score(schedule, lengths, target):
    config, rule = tiny.CONFIGS["llama"](), {"score": "salience", "schedule": schedule}
    most = zsaa.mac_reduction(config, lengths, 1e-5, **rule)
    if target > most:
        with pytest.raises(ValueError, match=f"from 1 to {most:.2f}"):
            zsaa.alpha_for(config, lengths, target, **rule)
    else:
        alpha = zsaa.alpha_for(config, lengths, target, **rule)
        assert zsaa.mac_reduction(config, lengths, alpha, **rule) >= target


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(30, 500), min_size=1, max_size=5), target=st.floats(1.0, 3.0))
def test_alpha_for_inverts_mac_reduction(family, lengths, target):
    config = tiny.CONFIGS[family]()
    alpha = zsaa.alpha_for(config, lengths, target)
    assert zsaa.mac_reduction(config, lengths, alpha) >= target or alpha == 1.0
    if alpha < 1:
        assert zsaa.mac_reduction(config, lengths, min(1.0, alpha + 2e-5)) < target, "and no larger alpha would do"


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=5), target=st.floats(1.0, 20.0))
def test_truncation_for_spends_no_more_than_the_dial_may(lengths, target):
    config = tiny.CONFIGS["llama"]()
    k = zsaa.truncation_for(config, lengths, target)
    whole = sum(zsaa.macs(config, n) for n in lengths)

    def cost(k):
        return sum(zsaa.macs(config, min(n, k)) for n in lengths)

    assert k == 1 or whole / cost(k) >= target
    assert k == max(lengths) or whole / cost(k + 1) < target


def test_unreachable_targets_name_the_range():
    config = tiny.CONFIGS["gpt2"]()
    with pytest.raises(ValueError, match=r"50 is out of reach.*ranges from 1 to \d"):
        zsaa.alpha_for(config, 20, 50)
    with pytest.raises(ValueError, match="out of reach"):
        zsaa.alpha_for(config, 200, 0.5)
    with pytest.raises(ValueError, match="empty"):
        zsaa.alpha_for(config, [], 2)


def test_what_is_no_length_or_number_of_layers_is_named():
    config = tiny.CONFIGS["llama"]()
    for layers in (0, -2, 2.5, "4", True):
        with pytest.raises(ValueError, match=f"num_layers must be a whole number >= 1, got {layers!r}"):
            zsaa.kept_counts(10, 0.5, layers)
    with pytest.raises(ValueError, match="n must be .* got '32'"):
        zsaa.alpha_for(config, "32", 2)
    assert zsaa.alpha_for(config, torch.tensor(64), 2) == zsaa.alpha_for(config, torch.tensor([64]), 2)
    with pytest.raises(ValueError, match="mac_reduction must be > 0, got nan"):
        zsaa.truncation_for(config, 64, math.nan)
    with pytest.raises(ValueError, match="Of a model, give its configuration: model.config"):
        zsaa.macs(tiny.make("llama"), 64)


@pytest.mark.parametrize("alpha", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got " + str(alpha).replace("+", r"\+")):
        check_alpha(alpha)


@pytest.mark.parametrize("alpha", ["0.5", None, True, [0.5], 0.5j])
def test_alpha_of_the_wrong_type(alpha):
    with pytest.raises(TypeError, match="alpha must be a number"):
        check_alpha(alpha)


@pytest.mark.parametrize(("tau", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError),
                                            ("5", TypeError), (math.nan, TypeError), (None, TypeError)])  # fmt: skip
def test_tau_out_of_range_or_of_the_wrong_type(tau, error):
    with pytest.raises(error, match=r"tau must be .*>= 1"):
        check_tau(tau)


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_token_counts_are_checked(n):
    with pytest.raises(ValueError, match="n must be a whole number"):
        zsaa.kept_counts(n, 0.5, 3)


def literal_taus(source: str) -> list[int]:
    """Lines of Python source on which the paper's tau is written as a number: any default or field, the 5 that is given
    or compared, and text that says so ("tau = 5"; docstrings are prose). Another number that is given is a choice."""
    found, tree = [], ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}

    def number(node, any_other):
        if isinstance(node, ast.Call):  # traitlets.Int(5)
            return any(number(argument, any_other) for argument in node.args)
        return isinstance(node, ast.Constant) and type(node.value) is int and (any_other or node.value == TAU)

    for node in ast.walk(tree):
        pairs, any_other = [], isinstance(node, (ast.arguments, ast.AnnAssign))
        if isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args]
            pairs = [
                *zip(named[len(named) - len(node.defaults) :], node.defaults),
                *zip(node.kwonlyargs, node.kw_defaults),
            ]
            pairs = [(argument.arg, default) for argument, default in pairs]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.Assign):
            pairs = [(ast.unparse(target), node.value) for target in node.targets]
        elif isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", ""), value) for key, value in zip(node.keys, node.values)]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            pairs = [(ast.unparse(node.left).strip("]'\"").rpartition("'")[2], node.comparators[0])]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [node.lineno] * bool(re.search(rf"\btau(?: ?= ?| ){TAU}\b", node.value))
        found += [
            value.lineno for name, value in pairs if value and str(name).lower() == "tau" and number(value, any_other)
        ]
    return found


def test_the_paper_s_tau_is_written_once():
    """In zsaa/rule.py, and among the paper's own numbers; whatever else counts by it names it."""
    for source in (
        "def f(n, tau: int = 5): ...",
        "tau: int = 3",
        "f(tau=5)",
        "{'tau': 5}",
        "x['tau'] != 5",
        "x = 'tau = 5'",
    ):
        assert literal_taus(source), source
    assert not literal_taus("def f(tau: int = TAU, k=5):\n    'with tau = 5'\n    return g(tau=tau), g(tau=1)")
    assert paper.TABLE_1_RECIPE["tau"] == TAU == Rule().tau
    written = {"zsaa/rule.py", "zsaa/kit/paper.py"}
    for path in (
        path for folder in ("zsaa", "kernels", "ablation", "tools") for path in ROOT.glob(f"{folder}/**/*.py")
    ):
        source = path.read_text(encoding="utf-8")
        lines = literal_taus(source) if re.search("tau", source, re.IGNORECASE) else []
        name = path.relative_to(ROOT).as_posix()
        assert len(lines) == (name in written), f"{name}, lines {lines}: name zsaa.rule.TAU, or leave tau out"


def test_another_default_leaves_the_audit_of_the_paper_alone():
    """What the kit says of the paper is by the paper's tau, whatever the dial's default is."""
    for name in ("audit", "claims", "printed", "figures/audit", "tables/table3"):
        source = (ROOT / f"zsaa/kit/{name}.py").read_text(encoding="utf-8")
        assert "paper.TAU" in source and "import TAU" not in source
