"""What the paper's own numbers, and Eq. 2, say of its claims (zsaa/kit/claims.py lists these). Each function gives
evidence and verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from zsaa.budget import alpha_for
from zsaa.kit import paper
from zsaa.kit.architectures import config
from zsaa.kit.audit import TABLE_3, floored, table_3
from zsaa.kit.held import Held, span
from zsaa.kit.tables.table3 import CHANCE


def nine_times(held: Held) -> tuple[str, str]:
    best = [max(t for t, row in paper.TABLE_1.items() if row[c] is not None) for c in paper.TABLE_1_COLUMNS[1:]]
    evidence = (
        f"the largest speed-ups that Table 1 prints for GLUE are {', '.join(f'{t}x' for t in best)}: "
        f"{statistics.mean(best):.1f}x on average"
    )
    return evidence, "against its own numbers"


def macs_of_table_3(held: Held) -> tuple[str, str]:
    rows = table_3()
    evidence = "Eq. 2 gives " + "; ".join(
        f"{name} " + ", ".join(f"{r['eq2']:.2f}x at {r['alpha']}" for r in rows if r["model"] == name)
        for name in TABLE_3
    ) + ". Inferred: alpha^3 per layer gives " + "; ".join(
        ", ".join(f"{r['cubed']:.2f}x" for r in rows if r["model"] == name) for name in TABLE_3
    )  # fmt: skip
    return evidence, "against its own numbers"


def footprint_of_table_3(held: Held) -> tuple[str, str]:
    rows = table_3()
    shrinks = {
        name: ", ".join(
            f"{r['footprint']:.2f}x ({r['kv']:.2f}x, {r['last_layer']:.2f}x)" for r in rows if r["model"] == name
        )
        for name in TABLE_3
    }
    evidence = (
        "printed (by Eq. 2 the key/value cache, and the last layer's rows, more than which nothing linear in tokens "
        "shrinks): "
        + "; ".join(f"{name} {what}" for name, what in shrinks.items())
        + "".join(f". Measured{what}" for what in _measured_footprints(held.results))
    )
    beyond = any(r["footprint"] > r["last_layer_rounded"] for r in rows)
    return evidence, "against its own numbers" if beyond else "partly"


def _measured_footprints(results: Sequence[dict]) -> list[str]:
    """What 4-bit results of the kind "footprint" say: over stock, at the printed alphas and at those of Eq. 2."""
    found = []
    for result in (r for r in results if r["kind"] == "footprint"):
        rows = [row for row in result["rows"] if row["storage"] == "nf4" and row["peak_bytes"] and row["target"] != 1]
        parts = []
        for name, shape in TABLE_3.items():
            mine = [row for row in rows if row["model"] == shape]
            for control, how in (("printed", "as printed"), ("alpha", "of Eq. 2")):
                spans = [
                    span([r["footprint_reduction"] for r in mine if (r["control"], r["target"]) == (control, target)])
                    for target in dict.fromkeys(row["target"] for row in mine)
                ]
                parts += [f"{name}, alphas {how}, {', '.join(spans)}"] if spans else []
        if parts:
            lengths = sorted({row["tokens"] for row in rows})
            device = result["provenance"]["hardware"]["device"]
            found.append(
                f" (nf4, random weights, prompts of {lengths[0]} to {lengths[-1]} tokens, {device}): {'; '.join(parts)}"
            )
    return found


def high_accuracy(held: Held) -> tuple[str, str]:
    kept = []
    for name in TABLE_3:
        scores = [paper.TABLE_3[name][t]["MMLU"] for t in (1, 3.5)]
        above = (scores[1] - CHANCE) / (scores[0] - CHANCE)
        kept.append(f"{name} {scores[0]} to {scores[1]}, or {above:.0%} of what is above chance")
    return f"Table 3, 1x to 3.5x: {'; '.join(kept)}", "partly"


def context_is_preserved(held: Held) -> tuple[str, str]:
    rise = [f"{c} {paper.TABLE_2[3][c] / paper.TABLE_2[1][c] - 1:+.0%}" for c in paper.TABLE_2_COLUMNS]
    return f"perplexity from 1x to 3x in Table 2: {', '.join(rise)}", "partly"


def longer_is_better(held: Held) -> tuple[str, str]:
    alphas = [f"{alpha_for(config('gpt2-124m'), n, 5):.2f} at {n} tokens" for n in (32, 64, 128, 512)]
    return f"by Eq. 2 with tau = {paper.TAU}, GPT-2 needs for 5x fewer MACs alpha = {', '.join(alphas)}", "borne out"


def range_of_alpha(held: Held) -> tuple[str, str]:
    evidence = (
        f"{floored():.0%} of the draws leave only tau = {paper.TAU} of 300 tokens in GPT-2's last layer: most steps "
        "train for the floor, not for the range"
    )
    return evidence, "partly"


def which_gpt2(held: Held) -> tuple[str, str]:
    evidence = (
        "Table 4 lists GPT-2 as 355M, 24 layers, 16 heads, 1024 wide, which is gpt2-medium. The small one has "
        "124,439,808 weights, and 137,022,720 numbers with the 12 causal masks of 1024 x 1024 in its checkpoint"
    )
    return evidence, "against its own numbers"
