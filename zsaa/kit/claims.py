"""The paper's claims against its own numbers and against the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from zsaa.kit import paper
from zsaa.kit.architectures import config
from zsaa.kit.audit import TABLE_3, floored, measured_reach, reach, table_3
from zsaa.kit.labels import by_eq_2, training
from zsaa.kit.store import rows_of
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


def _find(results: Sequence[dict], kind: str, task: str, **recipe) -> dict | None:
    """The result of that kind, task and recipe that has the most samples; of several the first."""
    found = [r for r in results if r["kind"] == kind and r["task"]["name"] == task]
    found = [r for r in found if all(r["recipe"].get(k) == v for k, v in recipe.items())]
    return max(found, key=lambda r: r["provenance"]["eval_samples"], default=None)


def _row(result: dict | None, control: str, target: float) -> dict | None:
    return next((r for r in rows_of(result, control) if r["target"] == target), None) if result else None


def _said(row: dict) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(row["accuracy"], *row["ci95"])


def _apart(a: dict, b: dict) -> int:
    """1 if a's interval lies above b's, -1 if below, 0 if they overlap."""
    return (a["ci95"][0] > b["ci95"][1]) - (a["ci95"][1] < b["ci95"][0])


def claims(results: Sequence[dict]) -> list[Claim]:
    """The paper's claims against its own numbers and against these results (see `load_results`)."""
    curves = [r for r in results if r["kind"] == "curve" and by_eq_2(r)]
    sampled = _find(curves, "curve", "imdb", method="alpha-sampled", tuning="full")
    usual = _find(curves, "curve", "imdb", method="conventional", tuning="full")
    found: list[Claim] = []

    def say(quote, where, evidence, verdict):
        found.append(Claim(quote, where, evidence, verdict if evidence else "not tested"))

    # What the results say: the dial on substitutes.
    evidence, verdict = "", ""
    ours = [_row(sampled, "alpha", t) for t in (1, 11)]
    if all(ours):
        lost = ours[0]["accuracy"] - ours[1]["accuracy"]
        theirs = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[11]["IMDB"]
        evidence = (
            f"IMDB accuracy from 1x to 11x: the paper loses {theirs:.1f} points; {sampled['model']['name']} on "
            f"held-out reviews goes from {_said(ours[0])} to {_said(ours[1])} and loses {lost:.1f}"
        )
        verdict = "borne out" if lost <= theirs else "not borne out"
        another = [_row(_find(results, "curve", "imdb", method="zsaa+"), "alpha", t) for t in (1, 11)]
        if verdict == "not borne out" and all(another):
            # Neither the paper's score nor its training, nor, where the result says so, its schedule.
            less = another[0]["accuracy"] - another[1]["accuracy"]
            evidence += f"; by the recipe zsaa+ (LoRA) from {_said(another[0])} to {_said(another[1])}: {less:.1f}"
            verdict = "partly" if less <= theirs else verdict
    say("stably accelerates inference by up to 11×", "section 1", evidence, verdict)

    evidence, verdict = "", ""
    times = [r for result in results if result["kind"] == "latency" for r in _best_batch(result)]
    if times:
        evidence = "; ".join(
            f"{where}, batch {r['latency_batch']} of {r['latency_tokens']} tokens: {r['speedup']:.1f}x by the clock "
            f"at {r['latency_mac_reduction']:.1f}x fewer MACs" for where, r in times
        )  # fmt: skip
        share = [r["speedup"] / r["latency_mac_reduction"] for _, r in times]
        verdict = "borne out" if min(share) > 0.8 else "partly" if max(share) > 0.8 else "not borne out"
    say("achieves up to 11× speedup compared to the baseline", "abstract", evidence, verdict)

    evidence, verdict, parts, share = "", "", [], []
    for result in (r for r in results if r["kind"] == "ttft"):
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
            share += [times / 3 for times in plain]
    if parts:
        evidence = "random weights, 3x fewer MACs by Eq. 2, first token by the clock: " + "; ".join(parts)
        verdict = "borne out" if min(share) > 0.8 else "partly" if max(share) > 0.8 else "not borne out"
    say("up to a 3× improvement in Time-to-First-Token (TTFT)", "section 4.4", evidence, verdict)

    evidence, verdict = "", ""
    pair = [_row(r, "alpha", 11) for r in (sampled, usual)]
    if all(pair):
        evidence = (
            f"at 11x under the same dial: alpha-sampled {_said(pair[0])}, conventional fine-tuning {_said(pair[1])}"
        )
        verdict = "borne out" if _apart(*pair) > 0 else "not borne out"
    say(
        "A fine-tuning policy that prepares the model for zero-shot adjustable acceleration", "section 1",
        evidence, verdict,
    )  # fmt: skip

    evidence, verdict = "", ""
    pair = [_row(r, "alpha", 1) for r in (sampled, usual)]
    if all(pair):
        evidence = (
            f"same data, steps and epochs; at 1x alpha-sampled {_said(pair[0])}, conventional {_said(pair[1])}: "
            f"{pair[1]['accuracy'] - pair[0]['accuracy']:+.1f} points for the conventional one"
        )
        verdict = "not borne out" if _apart(*pair) < 0 else "borne out"
    say(
        "fully replaces conventional fine-tuning without incurring additional training cost", "section 3.4",
        evidence, verdict,
    )  # fmt: skip

    evidence, verdict = "", ""
    pairs = [
        (t, _row(sampled, "alpha", t), cut)
        for t in paper.TABLE_1
        if t > 1 and (cut := _row(usual, "last", t)) is not None
    ]
    if pairs:
        better = [t for t, dial, cut in pairs if _apart(dial, cut) > 0]
        worse = [t for t, dial, cut in pairs if _apart(dial, cut) < 0]
        last = pairs[-1]
        evidence = (
            f"against reading only the last tokens at equal MACs (IMDB): the dial is ahead at "
            f"{', '.join(f'{t}x' for t in better) or 'no setting'}, behind at "
            f"{', '.join(f'{t}x' for t in worse) or 'none'}; at {last[0]}x {_said(last[1])} against {_said(last[2])}"
        )
        verdict = "borne out" if len(better) > len(worse) else "not borne out"
    say(
        "hidden activations with lower contributions can be eliminated in subsequent layers", "section 3.3",
        evidence, verdict,
    )  # fmt: skip

    evidence, verdict = "", ""
    choice = [r for r in results if r["kind"] == "choice" and _row(r, "random", 1.5)]
    # What is not told from chance with all tokens cannot tell which of them matter.
    choice = [r for r in choice if (whole := _row(r, "alpha", 1)) and whole["ci95"][0] > CHANCE]
    if choice:
        parts, ahead = [], []
        for result in choice:
            dial, lot, cut = (_row(result, control, 1.5) for control in ("alpha", "random", "last"))
            trained = training(result, "questions").replace(";", ",")
            parts.append(
                f"{result['model']['name']}, {trained}, {result['task']['name']}, {result['task']['form']}: "
                f"dial {_said(dial)}, tokens by lot {_said(lot)}" + (f", last tokens only {_said(cut)}" if cut else "")
            )
            ahead.append(_apart(dial, lot))
        evidence = "four-way choices at 1.5x fewer MACs: " + "; ".join(parts)
        verdict = "borne out" if min(ahead) > 0 else "partly" if max(ahead) > 0 else "not borne out"
    say(
        "the soft-score determines the contribution of each hidden activation to the layer output",
        "section 3.3",
        evidence,
        verdict,
    )

    lora = _find(curves, "curve", "imdb", method="alpha-sampled", tuning="lora")
    evidence, verdict = "", ""
    pair, cut = [_row(r, "alpha", 11) for r in (lora, usual)], _row(usual, "last", 11)
    if all(pair):
        evidence = (
            f"with LoRA, IMDB at 11x: {_said(pair[0])}; conventional fine-tuning under the dial: {_said(pair[1])}"
            + (f", and reading only the last tokens: {_said(cut)}" if cut else "")
        )
        strong = _apart(*pair) > 0, cut is None or _apart(pair[0], cut) >= 0
        verdict = "borne out" if all(strong) else "partly" if strong[0] else "not borne out"
    say("strong performance when combined with the LoRA-based acceleration method", "section 4.4", evidence, verdict)

    evidence, verdict, needed = "", "", {row["column"]: row["tokens"] for row in reach()}
    if rows := [row for row in measured_reach(results) if row["column"]]:
        evidence = "by Eq. 2 with tau = 5 and GPT-2's layers, the largest printed speed-ups need " + ", ".join(
            f"{n} tokens an input ({', '.join(c for c in paper.TABLE_1_COLUMNS if needed[c] == n)})"
            for n in sorted({needed[c] for c in paper.TABLE_1_COLUMNS})
        ) + "; measured: " + "; ".join(
            f"{row['data']}, {row['tokens, mean']} tokens on average, {row['within reach']} within reach, "
            f"{row['printed']} printed for {row['column']}" for row in rows
        )  # fmt: skip
        verdict = "borne out" if all(row["enough"] for row in rows) else "partly"
    say("the preservation rate is adjusted individually for each dataset", "section 4.4", evidence, verdict)

    # What the paper's own numbers say.
    best = [max(t for t, row in paper.TABLE_1.items() if row[c] is not None) for c in paper.TABLE_1_COLUMNS[1:]]
    say(
        "an average latency reduction of approximately 9× across GLUE tasks", "section 4.4",
        f"the largest speed-ups that Table 1 prints for GLUE are {', '.join(f'{t}x' for t in best)}: "
        f"{statistics.mean(best):.1f}x on average",
        "against its own numbers",
    )  # fmt: skip

    rows = table_3()
    say(
        "the reduction in Multiply-Accumulate Operations (MACs) achieved by the proposed approach", "Table 3",
        "Eq. 2 gives " + "; ".join(
            f"{name} " + ", ".join(f"{r['eq2']:.2f}x at {r['alpha']}" for r in rows if r["model"] == name)
            for name in TABLE_3
        ) + ". Inferred: alpha^3 per layer gives " + "; ".join(
            ", ".join(f"{r['cubed']:.2f}x" for r in rows if r["model"] == name) for name in TABLE_3),
        "against its own numbers",
    )  # fmt: skip
    shrinks = {
        name: ", ".join(
            f"{r['footprint']:.2f}x ({r['kv']:.2f}x, {r['last_layer']:.2f}x)" for r in rows if r["model"] == name
        )
        for name in TABLE_3
    }
    say(
        "the GPU memory footprint reduction (excluding constant self-model memory)", "Table 3",
        "printed (by Eq. 2 the key/value cache, and the last layer's rows, more than which nothing linear in tokens "
        "shrinks): "
        + "; ".join(f"{name} {what}" for name, what in shrinks.items())
        + "".join(f". Measured{what}" for what in _measured_footprints(results)),
        "against its own numbers" if any(r["footprint"] > r["last_layer_rounded"] for r in rows) else "partly",
    )  # fmt: skip

    kept = []
    for name in TABLE_3:
        scores = [paper.TABLE_3[name][t]["MMLU"] for t in (1, 3.5)]
        kept.append(
            f"{name} {scores[0]} to {scores[1]}, or {(scores[1] - 25) / (scores[0] - 25):.0%} of what is above chance"
        )
    say(
        "reduces Multiply-Accumulate Operations (MACs) during inference while maintaining high accuracy", "section 4.4",
        f"Table 3, 1x to 3.5x: {'; '.join(kept)}", "partly",
    )  # fmt: skip
    rise = [f"{c} {paper.TABLE_2[3][c] / paper.TABLE_2[1][c] - 1:+.0%}" for c in paper.TABLE_2_COLUMNS]
    say(
        "the input sentence context is well preserved", "section 4.4",
        f"perplexity from 1x to 3x in Table 2: {', '.join(rise)}", "partly",
    )  # fmt: skip

    gpt2, alphas = config("gpt2-124m"), []
    from zsaa.budget import alpha_for

    for n in (32, 64, 128, 512):
        alphas.append(f"{alpha_for(gpt2, n, 5):.2f} at {n} tokens")
    say(
        "enhanced effectiveness on datasets with longer sequence lengths", "section 4.4, on Figure 2 (C)",
        f"by Eq. 2 with tau = 5, GPT-2 needs for 5x fewer MACs alpha = {', '.join(alphas)}", "borne out",
    )  # fmt: skip
    say(
        "exposed to dynamic preservation rates ranging from 2% to 100% token preservation per layer", "section 3.4",
        f"{floored():.0%} of the draws leave only tau = 5 of 300 tokens in GPT-2's last layer: most steps "
        "train for the floor, not for the range", "partly",
    )  # fmt: skip
    say(
        "GPT-2 (137M parameters)", "Tables 1 and 2",
        "Table 4 lists GPT-2 as 355M, 24 layers, 16 heads, 1024 wide, which is gpt2-medium. The small one has "
        "124,439,808 weights, and 137,022,720 numbers with the 12 causal masks of 1024 x 1024 in its checkpoint",
        "against its own numbers",
    )  # fmt: skip
    return found


def _span(values: Sequence[float]) -> str:
    """The range of these, once where both ends look alike."""
    return " to ".join(dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values))))


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


def _best_batch(result: dict) -> list[tuple[str, dict]]:
    """(model and device, row) of a latency result at its largest target and batch."""
    rows = [r for r in rows_of(result, "alpha") if r.get("speedup")]
    where = f"{result['model']['name']}'s shape, {result['provenance']['hardware']['device']}"
    return [(where, max(rows, key=lambda r: (r["latency_batch"], r["target"])))] if rows else []
