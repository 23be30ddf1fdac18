"""All figures of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

from zsaa.card.show import Card
from zsaa.kit import points
from zsaa.kit.figures.accuracy import accuracy_figures
from zsaa.kit.figures.audit import audit_exponents_figure, audit_reach_figure, audit_reductions_figure
from zsaa.kit.figures.choice import choice_figure
from zsaa.kit.figures.depth import depth_figure, exits_figure
from zsaa.kit.figures.figure2 import figure_2
from zsaa.kit.figures.headline import headline_figure
from zsaa.kit.figures.memory import footprint_figure, memory_figure
from zsaa.kit.figures.perplexity import perplexity_figures
from zsaa.kit.figures.preservation import preservation_figure
from zsaa.kit.figures.rush import measured_rush_figure
from zsaa.kit.figures.speed import attention_figure, prefill_figures, speed_figure, training_figure
from zsaa.kit.figures.style import save_figure
from zsaa.kit.store import all_results, load_results, unpack

SPEED = ("cpu/prefill-smollm2-135m(-batch)?", "h200/prefill-(small|llama3-8b)")  # by today's code
RUSH = "serving/serve-cpu.json"  # the measured rush that README shows


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw every figure of results/points.csv into `folder` (the repository's figures/), and those of what is no number
    of its own: which tokens were kept, and the audit. Returns the PNGs."""
    names = []
    for name, figure in _figures(points.read()):  # one after the other: matplotlib keeps what is open in memory
        save_figure(figure, Path(folder) / name)
        names.append(name)
    return [Path(folder) / f"{name}.png" for name in names]


def _figures(all_points):
    """(name, figure) of each."""

    def of(file: str):
        return all_points[all_points["file"].str.fullmatch(file)]

    yield "headline", headline_figure(all_points)
    for name, figure in accuracy_figures(all_points).items():
        yield f"accuracy_{name}", figure
    yield "figure2", figure_2(all_points)
    timed = of(f"speed/({'|'.join(SPEED)})\\.json")
    yield "speed", speed_figure(timed[~timed["model"].str.startswith("gpt2")])  # the page's tables show it
    for name, figure in prefill_figures(of(r"speed/h100/prefill-.*\.json")).items():
        yield f"h100_prefill_{name}", figure
    yield "h100_attention", attention_figure(of(r"speed/h100/attention\.json"))
    yield "h100_memory", memory_figure(of(r"speed/h100/memory-.*\.json"))
    yield "h100_training", training_figure(of(r"speed/h100/train\.json"))
    for name, figure in perplexity_figures(all_points).items():
        yield f"perplexity_{name}", figure
    yield "mmlu", choice_figure(of(r"choices/mmlu-.*\.json"))
    yield "choice", choice_figure(of(r"choices/choice-.*\.json"))
    yield "footprint", footprint_figure(of(r"speed/footprint(-eager)?\.json"))
    for result in load_results(kind="preservation"):
        for row, suffix in zip(result["rows"], ("", "_words")):
            kept, tokens = unpack(row)
            yield f"preservation{suffix}", preservation_figure(kept, tokens)
    for file, result in all_results():
        if result["kind"] == "card":
            about = {**result, "model": result["model"]["name"]}
            yield Path(file).stem.replace("-", "_"), Card(result["rows"], about).figure()
    for result in load_results(kind="depth"):
        yield "depth", depth_figure(result)
    shown = re.compile(r"depth/films/test/exits(-first-seconds520)?\.json")
    exits = [result for path, result in all_results() if shown.fullmatch(path)]
    if exits:
        yield "depth_dial", exits_figure(exits)
    for path, result in all_results():
        if path == RUSH:
            yield "rush", measured_rush_figure(result)
    for audit in load_results(kind="audit"):
        yield "audit_table3", audit_reductions_figure(audit)
        yield "audit_exponents", audit_exponents_figure(audit)
        yield "audit_reach", audit_reach_figure(audit)
