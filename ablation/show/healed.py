"""Language models with fewer layers, healed; with exits; drafting with these: as Markdown.

python -m ablation.show.healed      prints the tables, as docs/findings/depth.md has them
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from zsaa.evaluation.language import unpack
from zsaa.kit.store import RESULTS

FOLDER = RESULTS / "depth"
TASKS = {"sciq": "SciQ", "piqa": "PIQA", "arc_easy": "ARC-Easy"}
NAMES = {"untuned": "as left", "text": "healed by text", "distilled": "by text and the whole model"}


def rows(pattern: str, folder: Path = FOLDER) -> list[dict]:
    """The rows of all result files of this name, in the order of their names."""
    return [row for path in sorted(folder.glob(pattern)) for row in json.loads(path.read_text("utf-8"))["rows"]]


def recovered(found: list[dict], removed: int, how: str) -> tuple[float, tuple[float, float]]:
    """Percent of the nats that removing so many layers costs which healing gives back, against the untuned whole model;
    and its 95% interval, by resampling windows."""
    at = {(row["removed"], row["healed"]): np.array(unpack(row["nll"])) for row in found}
    whole, left, healed = at[0, "untuned"], at[removed, "untuned"], at[removed, how]
    draw = np.random.RandomState(0)
    shares = []
    for _ in range(2000):
        pick = draw.randint(0, len(whole), len(whole))
        shares.append(100 * (left - healed)[pick].sum() / (left - whole)[pick].sum())
    low, high = np.percentile(shares, (2.5, 97.5))
    return 100 * (left - healed).sum() / (left - whole).sum(), (low, high)


def healed_table(folder: Path = FOLDER):
    """A line per block and way: perplexity, over the whole model's, what is recovered, and multiple choices. Rows that
    the end of a lease left without a step of training are none."""
    import pandas as pd

    found, lines = [row for row in rows("heal-*.json", folder) if row["log"] is None or row["log"]["steps"]], []
    unique = {(row["removed"], row["healed"]): row for row in found}
    for (removed, how), row in sorted(unique.items(), key=lambda item: (item[0][0], list(NAMES).index(item[0][1]))):
        back = ""
        if removed and how != "untuned":
            share, (low, high) = recovered(found, removed, how)
            back = f"{share:.0f} [{low:.0f}, {high:.0f}]"
        low, high = row["ratio_ci95"]
        lines.append({
            "layers removed": removed or "none", "": NAMES[how] if removed or how == "untuned" else "adapted, too",
            "perplexity": f"{row['perplexity']:.1f}", "over the whole": f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            "recovered, % of nats": back,
            **{name: f"{row['choices'][task]['accuracy']:.1f}" for task, name in TASKS.items() if row["choices"]},
        })  # fmt: skip
    return pd.DataFrame(lines)


def exits_table(folder: Path = FOLDER):
    """A line per depth: perplexity and agreement with all layers, before and after it was taught."""
    import pandas as pd

    found = rows("exits-*.json", folder)
    depths = sorted({row["depth"] for row in found}, reverse=True)
    lines = []
    for depth in depths:
        before, after = (
            next((r for r in found if r["depth"] == depth and r["trained"] is on), None) for on in (False, True)
        )
        lines.append({
            "layers": depth, "perplexity, untaught": _number(before["perplexity"]),
            **({"taught": _number(after["perplexity"]),
                "says what all layers say, %": f"{after['agreement']:.1f}",
                "untaught, %": f"{before['agreement']:.1f}"} if after else {}),
        })  # fmt: skip
    return pd.DataFrame(lines)


def drafts_table(folder: Path = FOLDER):
    """A line per machine and depth that drafts: tokens a second, over plain decoding, and the same text how often. How
    far ahead is chosen by the first half of the prompts, and the other half says what it gives."""
    import pandas as pd

    lines = []
    for path in sorted(folder.glob("draft-*.json")):
        result = json.loads(path.read_text("utf-8"))
        kind = "taught" if result["model"]["taught"] else "untaught"
        machine = result["provenance"]["hardware"].get("gpu") or f"CPU, {result['threads']} threads"
        for alpha in dict.fromkeys(row["alpha"] for row in result["rows"]):
            plain, *ways = (row for row in result["rows"] if row["alpha"] == alpha)
            half = plain["n"] // 2
            for depth in dict.fromkeys(way["depth"] for way in ways):
                mine = [way for way in ways if way["depth"] == depth]
                best = max(mine, key=lambda way: np.median(way["speedups"][:half]))
                middle, low, high = np.percentile(best["speedups"][half:], (50, 25, 75))
                lines.append({
                    "on": machine, "alpha": alpha, "drafted by": f"the first {depth} layers, {kind}",
                    "ahead": best["ahead"], "tokens/s, greedy": f"{plain['tokens_per_second']:.1f}",
                    "over greedy": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                    "whole passes a token": f"{best['passes_per_token']:.2f}",
                    "same text": f"{sum(way['same_text'] for way in mine)} of {sum(way['n'] for way in mine)}",
                })  # fmt: skip
    return pd.DataFrame(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if math.isfinite(value) else "-"


def main() -> int:
    for table in (healed_table, exits_table, drafts_table):
        print(table().to_markdown(index=False, disable_numparse=True), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
