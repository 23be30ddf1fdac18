"""The paper's claims against its own numbers and against the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsaa.kit import paper, printed
from zsaa.kit.audit import measured_reach, reach
from zsaa.kit.equal import ahead, at_equal_macs, control_rows, said
from zsaa.kit.held import Held, find, row_at, span
from zsaa.kit.labels import label, training
from zsaa.kit.store import rows_of
from zsaa.kit.store import with_interval as _said
from zsaa.kit.tables.table3 import CHANCE

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


def _apart(a: dict, b: dict) -> int:
    """1 if a's interval lies above b's, -1 if below, 0 if they overlap."""
    return (a["ci95"][0] > b["ci95"][1]) - (a["ci95"][1] < b["ci95"][0])


def _by_share(shares: Sequence[float]) -> str:
    """The verdict on a speed-up by the clock, from the shares of what the MACs promise."""
    return "borne out" if min(shares) > 0.8 else "partly" if max(shares) > 0.8 else "not borne out"


# What the results say: the dial on substitutes. Each function gives evidence and verdict; no evidence: not tested.


def _stable(held: Held) -> tuple[str, str]:
    ours = [row_at(held.sampled, "alpha", t) for t in (1, 11)]
    if not all(ours):
        return "", ""
    lost = ours[0]["accuracy"] - ours[1]["accuracy"]
    theirs = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[11]["IMDB"]
    evidence = (
        f"IMDB accuracy from 1x to 11x: the paper loses {theirs:.1f} points; {held.sampled['model']['name']} on "
        f"held-out reviews goes from {_said(ours[0])} to {_said(ours[1])} and loses {lost:.1f}"
    )
    verdict = "borne out" if lost <= theirs else "not borne out"
    another = [row_at(find(held.of("curve"), "imdb", method="zsaa+"), "alpha", t) for t in (1, 11)]
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
                f"{model}'s shape, batch {batch} of {lengths} tokens, {device}: {span(clock)}"
                + (f" ({span(plain)} without CUDA graphs)" if plain != clock else "")
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
    rows = [row_at(result, "alpha", target) for result in (held.sampled, held.usual)]
    if not all(rows):
        return "", ""
    evidence, borne_out = compare(*rows)
    return evidence, "borne out" if borne_out else "not borne out"


def _can_be_eliminated(held: Held) -> tuple[str, str]:
    leads = {t: lead for t in paper.TABLE_1 if t > 1 and (lead := _over_last(row_at(held.sampled, "alpha", t), held))}
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
        pairs = {t: [row_at(result, control, t) for control in ("alpha", "random")] for t in targets}
        if leads := {t: ahead(*pair) for t, pair in pairs.items() if all(pair)}:
            sure.extend((low > 0) - (high < 0) for _, (low, high) in leads.values())
            parts.append(f"{name}: " + ", ".join(f"{said(lead)} at {target}x" for target, lead in leads.items()))

    for result in held.curves:
        if result["recipe"].get("score", "column_sum") == "column_sum" and result["recipe"]["method"] != "zsaa+":
            name = f"{label(result)}, n {result['rows'][0]['n']}"
            compare(name, result, [t for t in paper.TABLE_1 if t > 1])
    choices = [r for r in held.of("choice") if row_at(r, "random", 1.5)]
    # What is not told from chance with all tokens cannot tell which of them matter.
    for result in [r for r in choices if (whole := row_at(r, "alpha", 1)) and whole["ci95"][0] > CHANCE]:
        trained = training(result, "questions").replace(";", ",")
        compare(
            f"{result['model']['name']}, {trained}, {result['task']['name']}, {result['task']['form']}", result, [1.5]
        )
    if not parts:
        return "", ""
    verdict = "borne out" if min(sure) > 0 else "partly" if max(sure) > 0 else "not borne out"
    return "points ahead of as many tokens kept by lot: " + "; ".join(parts), verdict


def _with_lora(held: Held) -> tuple[str, str]:
    lora = find(held.curves, "imdb", method="alpha-sampled", tuning="lora")
    pair = [row_at(r, "alpha", 11) for r in (lora, held.usual)]
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
    evidence = f"by Eq. 2 with tau = {paper.TAU} and GPT-2's layers, the largest printed speed-ups need " + ", ".join(
        f"{n} tokens an input ({', '.join(c for c in paper.TABLE_1_COLUMNS if needed[c] == n)})"
        for n in sorted({needed[c] for c in paper.TABLE_1_COLUMNS})
    ) + "; measured: " + "; ".join(
        f"{row['data']}, {row['tokens, mean']} tokens on average, {row['within reach']} within reach, "
        f"{row['printed']} printed for {row['column']}" for row in rows
    )  # fmt: skip
    return evidence, "borne out" if all(row["enough"] for row in rows) else "partly"


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
    ("an average latency reduction of approximately 9× across GLUE tasks", "section 4.4", printed.nine_times),
    (
        "the reduction in Multiply-Accumulate Operations (MACs) achieved by the proposed approach",
        "Table 3",
        printed.macs_of_table_3,
    ),
    (
        "the GPU memory footprint reduction (excluding constant self-model memory)",
        "Table 3",
        printed.footprint_of_table_3,
    ),
    (
        "reduces Multiply-Accumulate Operations (MACs) during inference while maintaining high accuracy",
        "section 4.4",
        printed.high_accuracy,
    ),
    ("the input sentence context is well preserved", "section 4.4", printed.context_is_preserved),
    (
        "enhanced effectiveness on datasets with longer sequence lengths",
        "section 4.4, on Figure 2 (C)",
        printed.longer_is_better,
    ),
    (
        "exposed to dynamic preservation rates ranging from 2% to 100% token preservation per layer",
        "section 3.4",
        printed.range_of_alpha,
    ),
    ("GPT-2 (137M parameters)", "Tables 1 and 2", printed.which_gpt2),
)


def claims(results: Sequence[dict]) -> list[Claim]:
    """The paper's claims against its own numbers and against these results (see `load_results`)."""
    held, found = Held(results), []
    for quote, where, evidence_on in CLAIMS:
        evidence, verdict = evidence_on(held)
        found.append(Claim(quote, where, evidence, verdict if evidence else "not tested"))
    return found
