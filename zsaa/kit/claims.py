"""The paper's claims against its own numbers and against the results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsaa.budget import alpha_for
from zsaa.kit import paper
from zsaa.kit.architectures import config
from zsaa.kit.audit import TABLE_3, floored, measured_reach, reach, table_3
from zsaa.kit.equal import ahead, at_equal_macs, control_rows, said
from zsaa.kit.labels import by_eq_2, label, training
from zsaa.kit.store import rows_of
from zsaa.kit.store import with_interval as _said
from zsaa.kit.tables.table3 import CHANCE
from zsaa.rule import TAU

VERDICTS = ("borne out", "partly", "not borne out", "against its own numbers", "not tested")


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, where it stands, what there is on it, and what that makes of it (one of VERDICTS).
    "against its own numbers": what the paper prints elsewhere, or Eq. 2, says otherwise. The other verdicts rest on our
    results, which are substitutes: they judge the claim for what was measured here, not the paper's own runs."""

    quote: str
    where: str
    evidence: str
    verdict: str


@dataclass(frozen=True)
class Held:
    """The results that the claims are judged by. sampled, usual: IMDB after alpha-sampled and after conventional
    fine-tuning, under the paper's schedule."""

    results: Sequence[dict]

    def of(self, kind: str) -> list[dict]:
        return [result for result in self.results if result["kind"] == kind]

    @property
    def curves(self) -> list[dict]:
        return [result for result in self.of("curve") if by_eq_2(result)]

    @property
    def sampled(self) -> dict | None:
        return _find(self.curves, "imdb", method="alpha-sampled", tuning="full")

    @property
    def usual(self) -> dict | None:
        return _find(self.curves, "imdb", method="conventional", tuning="full")


def _find(curves: Sequence[dict], task: str, **recipe) -> dict | None:
    """The curve of that task and recipe that has the most samples; of several the first."""
    found = [r for r in curves if r["task"]["name"] == task]
    found = [r for r in found if all(r["recipe"].get(k) == v for k, v in recipe.items())]
    return max(found, key=lambda r: r["provenance"]["eval_samples"], default=None)


def _row(result: dict | None, control: str, target: float) -> dict | None:
    return next((r for r in rows_of(result, control) if r["target"] == target), None) if result else None


def _apart(a: dict, b: dict) -> int:
    """1 if a's interval lies above b's, -1 if below, 0 if they overlap."""
    return (a["ci95"][0] > b["ci95"][1]) - (a["ci95"][1] < b["ci95"][0])


def _span(values: Sequence[float]) -> str:
    """The range of these, once where both ends look alike."""
    return " to ".join(dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values))))


def _by_share(shares: Sequence[float]) -> str:
    """The verdict on a speed-up by the clock, from the shares of what the MACs promise."""
    return "borne out" if min(shares) > 0.8 else "partly" if max(shares) > 0.8 else "not borne out"


# What the results say: the dial on substitutes. Each function gives evidence and verdict; no evidence: not tested.


def _stable(held: Held) -> tuple[str, str]:
    ours = [_row(held.sampled, "alpha", t) for t in (1, 11)]
    if not all(ours):
        return "", ""
    lost = ours[0]["accuracy"] - ours[1]["accuracy"]
    theirs = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[11]["IMDB"]
    evidence = (
        f"IMDB accuracy from 1x to 11x: the paper loses {theirs:.1f} points; {held.sampled['model']['name']} on "
        f"held-out reviews goes from {_said(ours[0])} to {_said(ours[1])} and loses {lost:.1f}"
    )
    verdict = "borne out" if lost <= theirs else "not borne out"
    another = [_row(_find(held.of("curve"), "imdb", method="zsaa+"), "alpha", t) for t in (1, 11)]
    if verdict == "not borne out" and all(another):
        # Neither the paper's score nor its training, nor, where the result says so, its schedule.
        less = another[0]["accuracy"] - another[1]["accuracy"]
        evidence += f"; by the recipe zsaa+ (LoRA) from {_said(another[0])} to {_said(another[1])}: {less:.1f}"
        verdict = "partly" if less <= theirs else verdict
    return evidence, verdict


def _by_the_clock(held: Held) -> tuple[str, str]:
    times = [found for result in held.of("latency") for found in _best_batch(result)]
    if not times:
        return "", ""
    evidence = "; ".join(
        f"{where}, batch {r['latency_batch']} of {r['latency_tokens']} tokens: {r['speedup']:.1f}x by the clock "
        f"at {r['latency_mac_reduction']:.1f}x fewer MACs" for where, r in times
    )  # fmt: skip
    return evidence, _by_share([r["speedup"] / r["latency_mac_reduction"] for _, r in times])


def _best_batch(result: dict) -> list[tuple[str, dict]]:
    """(model and device, row) of a latency result at its largest target and batch."""
    rows = [r for r in rows_of(result, "alpha") if r.get("speedup")]
    where = f"{result['model']['name']}'s shape, {result['provenance']['hardware']['device']}"
    return [(where, max(rows, key=lambda r: (r["latency_batch"], r["target"])))] if rows else []


def _first_token(held: Held) -> tuple[str, str]:
    parts, shares = [], []
    for result in held.of("ttft"):
        device, timed = result["provenance"]["hardware"]["device"], {}
        for row in (row for row in result["rows"] if row["target"] == 3):
            timed.setdefault((row["model"], row["batch"]), []).append(row)
        for (model, batch), rows in timed.items():
            clock, plain = (sorted(row[key] for row in rows) for key in ("speedup", "by_kernel_speedup"))
            lengths = " to ".join(str(n) for n in dict.fromkeys((rows[0]["tokens"], rows[-1]["tokens"])))
            parts.append(
                f"{model}'s shape, batch {batch} of {lengths} tokens, {device}: {_span(clock)}"
                + (f" ({_span(plain)} without CUDA graphs)" if plain != clock else "")
            )
            shares += [times / 3 for times in plain]
    if not parts:
        return "", ""
    evidence = "random weights, 3x fewer MACs by Eq. 2, first token by the clock: " + "; ".join(parts)
    return evidence, _by_share(shares)


def _prepares(held: Held) -> tuple[str, str]:
    return _of_both(held, 11, lambda sampled, usual: (
        f"at 11x under the same dial: alpha-sampled {_said(sampled)}, conventional fine-tuning {_said(usual)}",
        _apart(sampled, usual) > 0,
    ))  # fmt: skip


def _replaces(held: Held) -> tuple[str, str]:
    return _of_both(held, 1, lambda sampled, usual: (
        f"same data, steps and epochs; at 1x alpha-sampled {_said(sampled)}, conventional {_said(usual)}: "
        f"{usual['accuracy'] - sampled['accuracy']:+.1f} points for the conventional one",
        _apart(sampled, usual) >= 0,
    ))  # fmt: skip


def _of_both(held: Held, target: float, compare: Callable[[dict, dict], tuple[str, bool]]) -> tuple[str, str]:
    """What the dial's rows at `target` say, after alpha-sampled and after conventional fine-tuning, if there are both:
    evidence, and whether it bears the claim out."""
    rows = [_row(result, "alpha", target) for result in (held.sampled, held.usual)]
    if not all(rows):
        return "", ""
    evidence, borne_out = compare(*rows)
    return evidence, "borne out" if borne_out else "not borne out"


def _can_be_eliminated(held: Held) -> tuple[str, str]:
    leads = {t: lead for t in paper.TABLE_1 if t > 1 and (lead := _over_last(_row(held.sampled, "alpha", t), held))}
    if not leads:
        return "", ""
    better = [f"{t}x" for t, (_, (low, _)) in leads.items() if low > 0]
    worse = [f"{t}x" for t, (_, (_, high)) in leads.items() if high < 0]
    last = max(leads)
    evidence = (
        f"against reading only the last tokens at equal MACs (IMDB, the same reviews): the dial is ahead at "
        f"{', '.join(better) or 'no setting'}, behind at {', '.join(worse) or 'none'}; at {last}x {said(leads[last])}"
    )
    return evidence, "borne out" if len(better) > len(worse) else "not borne out"


def _over_last(dial: dict | None, held: Held) -> tuple[float, tuple[float, float]] | None:
    """How far a row of the dial's is ahead of conventional fine-tuning on the last tokens that equal MACs leave."""
    if dial is None or held.usual is None:
        return None
    cut = at_equal_macs(control_rows(held.usual, "last"), dial["mac_reduction"])
    return ahead(dial, cut) if cut else None


def _soft_score(held: Held) -> tuple[str, str]:
    """Against tokens kept by lot: after fine-tuning by the paper's score, and in choices without."""
    parts, sure = [], []

    def compare(name: str, result: dict, targets: Sequence[float]) -> None:
        pairs = {t: [_row(result, control, t) for control in ("alpha", "random")] for t in targets}
        if leads := {t: ahead(*pair) for t, pair in pairs.items() if all(pair)}:
            sure.extend((low > 0) - (high < 0) for _, (low, high) in leads.values())
            parts.append(f"{name}: " + ", ".join(f"{said(lead)} at {target}x" for target, lead in leads.items()))

    for result in held.curves:
        if result["recipe"].get("score", "column_sum") == "column_sum" and result["recipe"]["method"] != "zsaa+":
            name = f"{label(result)}, n {result['rows'][0]['n']}"
            compare(name, result, [t for t in paper.TABLE_1 if t > 1])
    choices = [r for r in held.of("choice") if _row(r, "random", 1.5)]
    # What is not told from chance with all tokens cannot tell which of them matter.
    for result in [r for r in choices if (whole := _row(r, "alpha", 1)) and whole["ci95"][0] > CHANCE]:
        trained = training(result, "questions").replace(";", ",")
        compare(
            f"{result['model']['name']}, {trained}, {result['task']['name']}, {result['task']['form']}", result, [1.5]
        )
    if not parts:
        return "", ""
    verdict = "borne out" if min(sure) > 0 else "partly" if max(sure) > 0 else "not borne out"
    return "points ahead of as many tokens kept by lot: " + "; ".join(parts), verdict


def _with_lora(held: Held) -> tuple[str, str]:
    lora = _find(held.curves, "imdb", method="alpha-sampled", tuning="lora")
    pair = [_row(r, "alpha", 11) for r in (lora, held.usual)]
    if not all(pair):
        return "", ""
    lead = _over_last(pair[0], held)
    evidence = (
        f"with LoRA, IMDB at 11x: {_said(pair[0])}; conventional fine-tuning under the dial: {_said(pair[1])}"
        + (f"; reading only the last tokens at equal MACs, the dial is ahead of it by {said(lead)}" if lead else "")
    )
    strong = _apart(*pair) > 0, lead is None or lead[1][1] >= 0
    return evidence, "borne out" if all(strong) else "partly" if strong[0] else "not borne out"


def _adjusted_individually(held: Held) -> tuple[str, str]:
    needed = {row["column"]: row["tokens"] for row in reach()}
    rows = [row for row in measured_reach(held.results) if row["column"]]
    if not rows:
        return "", ""
    evidence = f"by Eq. 2 with tau = {TAU} and GPT-2's layers, the largest printed speed-ups need " + ", ".join(
        f"{n} tokens an input ({', '.join(c for c in paper.TABLE_1_COLUMNS if needed[c] == n)})"
        for n in sorted({needed[c] for c in paper.TABLE_1_COLUMNS})
    ) + "; measured: " + "; ".join(
        f"{row['data']}, {row['tokens, mean']} tokens on average, {row['within reach']} within reach, "
        f"{row['printed']} printed for {row['column']}" for row in rows
    )  # fmt: skip
    return evidence, "borne out" if all(row["enough"] for row in rows) else "partly"


# What the paper's own numbers say.


def _nine_times(held: Held) -> tuple[str, str]:
    best = [max(t for t, row in paper.TABLE_1.items() if row[c] is not None) for c in paper.TABLE_1_COLUMNS[1:]]
    evidence = (
        f"the largest speed-ups that Table 1 prints for GLUE are {', '.join(f'{t}x' for t in best)}: "
        f"{statistics.mean(best):.1f}x on average"
    )
    return evidence, "against its own numbers"


def _macs_of_table_3(held: Held) -> tuple[str, str]:
    rows = table_3()
    evidence = "Eq. 2 gives " + "; ".join(
        f"{name} " + ", ".join(f"{r['eq2']:.2f}x at {r['alpha']}" for r in rows if r["model"] == name)
        for name in TABLE_3
    ) + ". Inferred: alpha^3 per layer gives " + "; ".join(
        ", ".join(f"{r['cubed']:.2f}x" for r in rows if r["model"] == name) for name in TABLE_3
    )  # fmt: skip
    return evidence, "against its own numbers"


def _footprint_of_table_3(held: Held) -> tuple[str, str]:
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
                    _span([r["footprint_reduction"] for r in mine if (r["control"], r["target"]) == (control, target)])
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


def _high_accuracy(held: Held) -> tuple[str, str]:
    kept = []
    for name in TABLE_3:
        scores = [paper.TABLE_3[name][t]["MMLU"] for t in (1, 3.5)]
        above = (scores[1] - CHANCE) / (scores[0] - CHANCE)
        kept.append(f"{name} {scores[0]} to {scores[1]}, or {above:.0%} of what is above chance")
    return f"Table 3, 1x to 3.5x: {'; '.join(kept)}", "partly"


def _context_is_preserved(held: Held) -> tuple[str, str]:
    rise = [f"{c} {paper.TABLE_2[3][c] / paper.TABLE_2[1][c] - 1:+.0%}" for c in paper.TABLE_2_COLUMNS]
    return f"perplexity from 1x to 3x in Table 2: {', '.join(rise)}", "partly"


def _longer_is_better(held: Held) -> tuple[str, str]:
    alphas = [f"{alpha_for(config('gpt2-124m'), n, 5):.2f} at {n} tokens" for n in (32, 64, 128, 512)]
    return f"by Eq. 2 with tau = {TAU}, GPT-2 needs for 5x fewer MACs alpha = {', '.join(alphas)}", "borne out"


def _range_of_alpha(held: Held) -> tuple[str, str]:
    evidence = (
        f"{floored():.0%} of the draws leave only tau = {TAU} of 300 tokens in GPT-2's last layer: most steps "
        "train for the floor, not for the range"
    )
    return evidence, "partly"


def _which_gpt2(held: Held) -> tuple[str, str]:
    evidence = (
        "Table 4 lists GPT-2 as 355M, 24 layers, 16 heads, 1024 wide, which is gpt2-medium. The small one has "
        "124,439,808 weights, and 137,022,720 numbers with the 12 causal masks of 1024 x 1024 in its checkpoint"
    )
    return evidence, "against its own numbers"


# The sentence, where it stands, and what there is on it.
CLAIMS: tuple[tuple[str, str, Callable[[Held], tuple[str, str]]], ...] = (
    ("stably accelerates inference by up to 11×", "section 1", _stable),
    ("achieves up to 11× speedup compared to the baseline", "abstract", _by_the_clock),
    ("up to a 3× improvement in Time-to-First-Token (TTFT)", "section 4.4", _first_token),
    ("A fine-tuning policy that prepares the model for zero-shot adjustable acceleration", "section 1", _prepares),
    (
        "fully replaces conventional fine-tuning without incurring additional training cost",
        "section 3.4",
        _replaces,
    ),
    (
        "hidden activations with lower contributions can be eliminated in subsequent layers",
        "section 3.3",
        _can_be_eliminated,
    ),
    (
        "the soft-score determines the contribution of each hidden activation to the layer output",
        "section 3.3",
        _soft_score,
    ),
    ("strong performance when combined with the LoRA-based acceleration method", "section 4.4", _with_lora),
    ("the preservation rate is adjusted individually for each dataset", "section 4.4", _adjusted_individually),
    ("an average latency reduction of approximately 9× across GLUE tasks", "section 4.4", _nine_times),
    (
        "the reduction in Multiply-Accumulate Operations (MACs) achieved by the proposed approach",
        "Table 3",
        _macs_of_table_3,
    ),
    ("the GPU memory footprint reduction (excluding constant self-model memory)", "Table 3", _footprint_of_table_3),
    (
        "reduces Multiply-Accumulate Operations (MACs) during inference while maintaining high accuracy",
        "section 4.4",
        _high_accuracy,
    ),
    ("the input sentence context is well preserved", "section 4.4", _context_is_preserved),
    (
        "enhanced effectiveness on datasets with longer sequence lengths",
        "section 4.4, on Figure 2 (C)",
        _longer_is_better,
    ),
    (
        "exposed to dynamic preservation rates ranging from 2% to 100% token preservation per layer",
        "section 3.4",
        _range_of_alpha,
    ),
    ("GPT-2 (137M parameters)", "Tables 1 and 2", _which_gpt2),
)


def claims(results: Sequence[dict]) -> list[Claim]:
    """The paper's claims against its own numbers and against these results (see `load_results`)."""
    held, found = Held(results), []
    for quote, where, evidence_on in CLAIMS:
        evidence, verdict = evidence_on(held)
        found.append(Claim(quote, where, evidence, verdict if evidence else "not tested"))
    return found
