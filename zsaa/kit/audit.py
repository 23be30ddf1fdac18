"""What the paper's own numbers say about each other: Eq. 2 against its tables.

    python -m zsaa.kit.audit        writes outputs/audit/audit.json, and prints the claims

Nothing here needs a model's weights or a GPU: everything follows from the printed numbers (`paper`), the published
configurations (`architectures`), Eq. 2 (`zsaa.rule`) and result files. What is *inferred* from them, a rule that would
explain printed numbers, is called an inference: only the authors can say what they ran. `claims` sets the paper's
sentences beside it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from zsaa.cost import attention_widths, histogram, layer_weights, mac_reduction, total_macs
from zsaa.kit import paper
from zsaa.kit.architectures import config
from zsaa.kit.labels import by_eq_2
from zsaa.kit.store import load_results
from zsaa.measure import provenance, write_json
from zsaa.measure.checks import check_whole
from zsaa.rule import Rule, kept_counts

TABLE_3 = {"LLaMA-3-8B-4bit": "llama3-8b", "Gemma-2-2B-4bit": "gemma2-2b"}  # the paper's name -> the published config
LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of a prompt; the paper gives none for Table 3
HALF_DIGIT = 0.005  # alpha is printed to two digits: the true one lies this far away at most
HALF_STEP = 0.05  # and reductions to one


# Table 3: which rule gives the printed reductions?

# What each layer keeps of the tokens that enter it, as shares of their number, for `layers` layers.
SCHEDULES = {
    **{f"alpha^{k:g} in every layer": lambda a, layers, k=k: [a**k] * layers for k in (1, 1.5, 2, 2.5, 3, 3.5, 4, 6)},
    **{
        f"{k} x (1 - alpha) of the prompt dropped by every layer": lambda a, layers, k=k: [
            max(1 - k * (1 - a) * (i + 1), 0) / max(1 - k * (1 - a) * i, 1e-9) for i in range(layers)
        ]
        for k in (1, 2, 3)
    },
    "alpha^l in layer l": lambda a, layers: [a ** (i + 1) for i in range(layers)],
    "alpha once, in the first layer": lambda a, layers: [a] + [1.0] * (layers - 1),
}
ATTENTION = {"full square": 2.0, "causal half": 1.0, "left out": 0.0}  # n^2 x width, times this
PLACES = ("after attention", "before attention")  # where a layer prunes: Q, K, V see what entered, or what is kept
HEADS = ("one position", "every position")  # logits of the last token only (left out), or of all that are left


def cost(
    config: Any, n: int, shares: Sequence[float], attention="full square", place=PLACES[0], head=HEADS[0]
) -> float:
    """Multiply-accumulates of a prefill of `n` tokens whose layers keep `shares` of what enters them: `zsaa.cost.macs`
    without rounding and tau, under any of the conventions above."""
    (entering, kept), (q_dim, _) = layer_weights(config), attention_widths(config)
    total, rows = 0.0, float(n)
    for share in shares:
        after = share * rows
        seen = rows if place == "after attention" else after
        total += seen * entering + ATTENTION[attention] * seen * seen * q_dim + after * kept
        rows = after
    return total + (rows * config.vocab_size * config.hidden_size if head == "every position" else 0.0)


def reduction(config: Any, n: int, shares: Sequence[float], **convention) -> float:
    """`cost` of the stock model over `cost` at these shares."""
    return cost(config, n, [1.0] * len(shares), **convention) / cost(config, n, shares, **convention)


def _printed() -> Iterable[tuple[str, Any, float, dict]]:
    """(the paper's name, config, printed reduction, printed cells) of each row of Table 3 at alpha < 1."""
    for name, shape in TABLE_3.items():
        for times, cells in paper.TABLE_3[name].items():
            if times != 1:
                yield name, config(shape), times, cells


def hypotheses(lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """Every schedule under every convention: {"schedule", "attention", "place", "head", "tokens", "rows": how many of
    Table 3's six printed reductions it gives, within the rounding of alpha and of the reduction, "off": the largest
    factor between a printed reduction and the one at the alpha as printed}. Best first."""
    printed, found = list(_printed()), []
    for (schedule, shares), attention, place, head, n in itertools.product(
        SCHEDULES.items(), ATTENTION, PLACES, HEADS, lengths
    ):
        convention = {"attention": attention, "place": place, "head": head}
        rows, off = 0, 1.0
        for _, c, times, cells in printed:
            low, at, high = (
                reduction(c, n, shares(cells["alpha"] + step, c.num_hidden_layers), **convention)
                for step in (HALF_DIGIT, 0, -HALF_DIGIT)
            )
            rows += low <= times + HALF_STEP and high >= times - HALF_STEP
            off = max(off, at / times, times / at)
        found.append({"schedule": schedule, **convention, "tokens": n, "rows": rows, "off": round(off, 3)})
    return sorted(found, key=lambda row: (-row["rows"], row["off"]))


def by_schedule(found: Sequence[dict]) -> list[dict]:
    """`hypotheses` summed up, a row per schedule: its best and worst number of explained rows over all conventions and
    lengths, and the convention at its best."""
    rows = []
    for schedule in SCHEDULES:
        mine = [row for row in found if row["schedule"] == schedule]
        best = min(mine, key=lambda row: (-row["rows"], row["off"]))
        all_six = sum(row["rows"] == 6 for row in mine)
        worst = min(row["rows"] for row in mine)
        rows.append({**best, "worst": worst, "conventions": len(mine), "all six under": all_six})
    return sorted(rows, key=lambda row: (-row["rows"], row["off"]))


def exponents(n: int = 512) -> list[dict]:
    """For each row of Table 3 the k with which keeping alpha^k per layer gives the printed reduction: at the alpha as
    printed, and at both ends of what rounds to it (and of what rounds to the reduction). Eq. 2 says k = 1."""
    rows = []
    for name, c, times, cells in _printed():

        def solve(target, alpha, c=c):
            low, high = 0.0, 60.0
            while high - low > 1e-6:
                k = (low + high) / 2
                low, high = (low, k) if reduction(c, n, [alpha**k] * c.num_hidden_layers) >= target else (k, high)
            return low

        a = cells["alpha"]
        ends = (solve(times - HALF_STEP, a - HALF_DIGIT), solve(times + HALF_STEP, a + HALF_DIGIT))
        rows.append(
            {"model": name, "reduction": times, "alpha": a, "k": solve(times, a), "low": ends[0], "high": ends[1]}
        )
    return rows


def table_3(n: int = 512, tau: int = paper.TAU) -> list[dict]:
    """Each row of Table 3 beside what Eq. 2 and the inferred alpha^3 make of it, for prompts of `n` tokens.

    "reduction": printed; "eq2", "cubed": of the printed alpha; "needed": the alpha that gives it by Eq. 2.
    "footprint": printed; "kv", "kv_cubed": by how much the key/value cache shrinks at the printed alpha. "last_layer":
    by how much the last layer's rows do: no part of a footprint that is linear in tokens shrinks more (and what is not,
    attention matrices, peaks in the first layer, which sees them all). "last_layer_rounded": the same at the smallest
    alpha that rounds to the printed one.
    """
    from zsaa.budget import alpha_for

    rows = []
    for name, c, times, cells in _printed():
        layers, a = c.num_hidden_layers, cells["alpha"]
        needed = alpha_for(c, n, times, tau)
        rows.append(
            {
                "model": name,
                "reduction": times,
                "alpha": a,
                "eq2": mac_reduction(c, n, a, tau),
                "cubed": mac_reduction(c, n, a**3, tau),
                "needed": needed,
                "footprint": cells["GPU footprint"],
                "kv": n * layers / sum([n, *kept_counts(n, a, layers, tau)[:-1]]),
                "kv_cubed": n * layers / sum([n, *kept_counts(n, a**3, layers, tau)[:-1]]),
                "last_layer": a**-layers,
                "last_layer_rounded": (a - HALF_DIGIT) ** -layers,
            }
        )
    return rows


def curves(n: int = 512) -> list[dict]:
    """MAC reductions along alpha for Table 3's models, to draw: {"model", "alpha", "eq2", "cubed"}."""
    rows = []
    for name, shape in TABLE_3.items():
        c = config(shape)
        for alpha in [round(0.95 + 0.002 * i, 3) for i in range(26)]:
            eq2, cubed = (reduction(c, n, [alpha**k] * c.num_hidden_layers) for k in (1, 3))
            rows.append({"model": name, "alpha": alpha, "eq2": eq2, "cubed": cubed})
    return rows


# Tables 1 and 2: what is within reach of Eq. 2 with the paper's tau?


def most(config: Any, lengths: int | Iterable[int], tau: int = paper.TAU) -> float:
    """The largest MAC reduction of Eq. 2 on inputs of these lengths: every layer but the first sees tau tokens."""
    counted = histogram(lengths)
    return total_macs(config, counted, 1.0) / total_macs(config, counted, 1e-9, Rule(tau))


def tokens_needed(config: Any, target: float, tau: int = paper.TAU) -> int:
    """The shortest input (all of one length) for which a MAC reduction of `target` is within reach."""
    low, high = tau, tau
    while most(config, high, tau) < target:
        low, high = high, 2 * high
        if high > 1 << 20:
            raise ValueError(
                f"a MAC reduction of {target} is out of reach at any length: this model has too few layers."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if most(config, middle, tau) >= target else (middle, high)
    return high


def reach(tau: int = paper.TAU) -> list[dict]:
    """Per column of Tables 1 and 2: the largest printed speed-up, and the tokens per input that Eq. 2 needs for it on
    GPT-2 (124M; the paper counts its buffers in, and says 137M)."""
    gpt2, rows = config("gpt2-124m"), []
    for table, columns, cells in (
        ("Table 1", paper.TABLE_1_COLUMNS, paper.TABLE_1),
        ("Table 2", paper.TABLE_2_COLUMNS, paper.TABLE_2),
    ):
        for column in columns:
            times = max(t for t, row in cells.items() if row[column] is not None)
            rows.append(
                {"table": table, "column": column, "speed-up": times, "tokens": tokens_needed(gpt2, times, tau)}
            )
    return rows


def measured_reach(results: Iterable[dict]) -> list[dict]:
    """What results of kind "lengths" (zsaa.experiment) with GPT-2's layers and Eq. 2 say: the largest MAC reduction
    asked for that the lengths of a data set's held-out inputs allow, beside the paper's largest speed-up there."""
    rows = []
    for result in results:
        if result["kind"] != "lengths" or result["recipe"]["shape"] != "gpt2" or not by_eq_2(result):
            continue
        task = result["task"]
        column = task["paper_column"]
        reached = max(row["target"] for row in result["rows"])
        printed = max((t for t, row in paper.TABLE_1.items() if column and row[column] is not None), default=None)
        rows.append(
            {
                "data": task["name"],
                "tokenizer": result["model"]["name"],
                "tokens, mean": result["tokens_mean"],
                "within reach": f"{reached}x",
                "column": column,
                "printed": f"{printed}x" if printed else "-",
                "enough": printed is None or reached >= printed,
            }
        )
    return rows


def floored(n: int = 300, tau: int = paper.TAU, low: float = 0.02, high: float = 1.0, steps: int = 2000) -> float:
    """The share of Eq. 3's draws of alpha that leave only tau of `n` tokens in GPT-2's last layer."""
    layers = config("gpt2-124m").num_hidden_layers
    draws = (low + (high - low) * (i + 0.5) / steps for i in range(steps))
    return sum(kept_counts(n, alpha, layers, tau)[-1] == min(tau, n) for alpha in draws) / steps


# One result file


def run(output_dir: str | Path, n: int = 512) -> dict:
    """Write output_dir/audit.json: all of the above but the claims, which change with the results; returns its content.
    n: tokens of a prompt, for what is not searched over LENGTHS."""
    n = check_whole("prompt_tokens", n)
    started = time.perf_counter()
    found = hypotheses()
    result = {
        "name": "audit",
        "kind": "audit",
        "command": "python -m zsaa.kit.audit",
        "model": {"name": "none"},
        "tokens": n,
        "rows": table_3(n),
        "exponents": exponents(n),
        "schedules": by_schedule(found),
        "hypotheses": len(found),
        "curves": curves(n),
        "reach": reach(),
        "most": [{"tokens": n, "reduction": most(config("gpt2-124m"), n)} for n in (5, *range(8, 129, 4))],
        "floored": floored(),
        "provenance": provenance(torch.device("cpu"), seed=0, seconds=round(time.perf_counter() - started, 1)),
    }
    write_json(Path(output_dir) / "audit.json", result)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.kit.audit", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", default="outputs/audit", help="results/audit: anew what is committed")
    run(parser.parse_args(arguments).output_dir)
    from zsaa.kit.claims import claims  # which builds on this module

    for claim in claims(load_results()):
        print(f"{claim.verdict:>24}  {claim.quote}: {claim.evidence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
