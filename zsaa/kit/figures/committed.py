"""All figures of the committed results."""

from __future__ import annotations

from pathlib import Path

from zsaa.kit.figures.accuracy import accuracy_figures
from zsaa.kit.figures.audit import audit_exponents_figure, audit_reach_figure, audit_reductions_figure
from zsaa.kit.figures.choice import choice_figure
from zsaa.kit.figures.figure2 import figure_2
from zsaa.kit.figures.memory import footprint_figure, memory_and_training_figure
from zsaa.kit.figures.perplexity import longest, perplexity_figure
from zsaa.kit.figures.preservation import preservation_figure
from zsaa.kit.figures.speed import attention_figure, prefill_figure, speed_figure
from zsaa.kit.figures.style import save_figure
from zsaa.kit.store import RESULTS, load_results, unpack


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw every figure that the committed results hold into `folder` (the repository's figures/); returns the PNGs."""
    curves, times = load_results(RESULTS, kind="curve"), load_results(RESULTS, kind="latency")
    figures = {}
    figures |= {f"accuracy_{name}": figure for name, figure in accuracy_figures(curves).items()}
    captions = {}
    if lengths := load_results(RESULTS, kind="lengths"):
        figures["figure2"], captions["figure2"] = figure_2(curves, lengths)
    if times:
        figures["speed"] = speed_figure(times, "Forward pass, SmolLM2-135M: measured speed-up")
    for name, draw in (("prefill", prefill_figure), ("attention", attention_figure)):
        if benchmarks := load_results(RESULTS / "h100", kind=f"bench-{name}"):
            figures[f"h100_{name}"] = draw(benchmarks)
    memory, training = (load_results(RESULTS / "h100", kind=f"bench-{name}") for name in ("memory", "train"))
    if memory and training:
        figures["h100_memory_training"] = memory_and_training_figure(memory, training)
    for result in load_results(RESULTS, kind="preservation"):
        for row, suffix in zip(result["rows"], ("", "_words")):
            kept, tokens = unpack(row)
            figures[f"preservation{suffix}"] = preservation_figure(kept, tokens, columns=1 if suffix else 2)
    if perplexities := load_results(RESULTS, kind="perplexity"):
        figures["perplexity"] = perplexity_figure(longest(perplexities))
    choices = load_results(RESULTS, kind="choice")
    for name, substitute in (("mmlu", False), ("choice", True)):
        if drawn := [r for r in choices if r["task"]["substitute"] == substitute]:
            figures[name] = choice_figure(drawn)
    if drawn := footprint_figure(load_results(RESULTS, kind="footprint")):
        figures["footprint"], captions["footprint"] = drawn
    for audit in load_results(RESULTS, kind="audit"):
        figures["audit_table3"] = audit_reductions_figure(audit)
        figures["audit_exponents"] = audit_exponents_figure(audit)
        figures["audit_reach"] = audit_reach_figure(audit)
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name, captions.get(name))
    return [Path(folder) / f"{name}.png" for name in figures]
