"""Language models with fewer layers, healed; with exits; drafting with these: as Markdown.

python -m ablation.show.healed      prints the tables, as docs/findings/depth.md has them
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from zsaa.depth.published import TABLE_1, TABLE_2
from zsaa.depth.study import CONTINUATION
from zsaa.evaluation.language import unpack
from zsaa.kit.store import RESULTS

FOLDER = RESULTS / "depth"
TASKS = {"sciq": "SciQ", "piqa": "PIQA", "arc_easy": "ARC-Easy"}
SCORES = ("exact", "f1", "rouge_l")
NAMES = {"untuned": "as left", "text": "healed by text", "distilled": "by text and the whole model",
         "sequence": "by text that a model wrote"}  # fmt: skip


def rows(pattern: str, folder: Path = FOLDER) -> list[dict]:
    """The rows of all result files of this name, in the order of their names, each with its file's seed."""
    results = (json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(pattern)))
    return [
        {**row, "seed": result.get("provenance", {}).get("seed", 0)} for result in results for row in result["rows"]
    ]


def cells(pattern: str, folder: Path) -> dict[tuple[int, str], list[dict]]:
    """Rows by (layers removed, way of healing), one for each seed; what was not trained, once. Rows that the end of a
    lease left without a step of training are none."""
    found: dict[tuple[int, str], dict] = {}
    for row in rows(pattern, folder):
        if row["log"] is None or row["log"]["steps"]:
            seed = 0 if row["log"] is None else row["seed"]
            found.setdefault((row["removed"], row["healed"]), {}).setdefault(seed, row)
    order = sorted(found, key=lambda cell: (cell[0], list(NAMES).index(cell[1])))
    return {cell: [*found[cell].values()] for cell in order}


def nats(found: list[dict]) -> np.ndarray:
    """Of each window, in the mean over seeds."""
    return np.mean([unpack(row["nll"]) for row in found], 0)


def resampled(share, count: int, draws: int = 2000) -> tuple[float, float]:
    """The 95% interval of share(windows) over resamples of `count` of them."""
    draw = np.random.RandomState(0)
    low, high = np.percentile([share(draw.randint(0, count, count)) for _ in range(draws)], (2.5, 97.5))
    return float(low), float(high)


def recovered(found: dict[tuple[int, str], list[dict]], removed: int, how: str) -> tuple[float, tuple[float, float]]:
    """Percent of the nats that removing so many layers costs which healing gives back, against the untuned whole model;
    and its 95% interval, by resampling windows."""
    whole, left, healed = (nats(found[at]) for at in ((0, "untuned"), (removed, "untuned"), (removed, how)))

    def share(pick) -> float:
        return float(100 * (left - healed)[pick].sum() / (left - whole)[pick].sum())

    return share(slice(None)), resampled(share, len(whole))


def over_whole(found: dict[tuple[int, str], list[dict]], cell: tuple[int, str], unit: str = "") -> str:
    """Perplexity over the untuned whole model's, and its interval: the file's for one seed, else by windows."""
    first, *more = found[cell]
    middle, (low, high) = first["ratio"], first["ratio_ci95"]
    if more:
        apart = (nats(found[cell]) - nats(found[0, "untuned"])) / CONTINUATION
        middle = float(np.exp(apart.mean()))
        low, high = resampled(lambda pick: float(np.exp(apart[pick].mean())), len(apart))
    return f"{middle:.2f}{unit} [{low:.2f}, {high:.2f}]"


def said(found: dict[tuple[int, str], list[dict]], cell: tuple[int, str]) -> dict[str, str]:
    """What both tables say of a cell."""
    back = ""
    if cell[0] and cell[1] != "untuned":
        share, (low, high) = recovered(found, *cell)
        back = f"{share:.0f} [{low:.0f}, {high:.0f}]"
    perplexity = math.exp(np.mean([math.log(row["perplexity"]) for row in found[cell]]))
    choices = {name: [row["choices"][task]["accuracy"] for row in found[cell]] for task, name in TASKS.items()
               if found[cell][0]["choices"]}  # fmt: skip
    return {"": NAMES[cell[1]] if cell[0] or cell[1] == "untuned" else "adapted, too",
            "perplexity": f"{perplexity:.1f}", "back": back,
            **{name: f"{np.mean(values):.1f}" for name, values in choices.items()}}  # fmt: skip


def healed_table(folder: Path = FOLDER):
    """A line per block and way: perplexity, over the whole model's, what is recovered, and multiple choices."""
    import pandas as pd

    found, lines = cells("heal-[ab]-*.json", folder), []
    for cell in found:
        facts = said(found, cell)
        lines.append({
            "layers removed": cell[0] or "none", "": facts[""], "perplexity": facts["perplexity"],
            "over the whole": over_whole(found, cell), "recovered, % of nats": facts["back"],
            **{name: facts[name] for name in TASKS.values() if name in facts},
        })  # fmt: skip
    return pd.DataFrame(lines)


def exam_table(folder: Path = FOLDER):
    """A line per share of layers and way of healing, in the shape of the optimization paper's Tables 1 and 2: half of
    the text that heals is like the questions. Means over seeds, where there are some."""
    import pandas as pd

    found, lines = cells("heal-exam-*.json", folder), []
    for cell, mine in found.items():
        facts = said(found, cell)
        asked = {
            f"{name}: EM / F1 / ROUGE-L": " / ".join(
                f"{np.mean([row['answers'][task][key] for row in mine]):.1f}" for key in SCORES
            )
            for task, name in (("coqa", "CoQA"), ("squad", "SQuAD"))
        }
        lines.append({
            "layers removed": f"{cell[0]} ({round(100 * cell[0] / 30)}%)" if cell[0] else "none", "": facts[""],
            "seeds": len(mine) if mine[0]["log"] else "",
            "perplexity": f"{facts['perplexity']}, {over_whole(found, cell, 'x')}",
            "recovered, % of nats": facts["back"], **asked, **{name: facts[name] for name in TASKS.values()},
        })  # fmt: skip
    return pd.DataFrame(lines)


def answers_back(removed: int, how: str, folder: Path = FOLDER) -> tuple[float, float, tuple[float, float]]:
    """(F1 points that removing so many layers costs, the percent of them that healing gives back, its 95% interval), of
    all questions about passages together, by resampling questions."""
    at = {
        cell: np.mean([np.concatenate([row["answers"][t]["f1s"] for t in ("coqa", "squad")]) for row in mine], 0)
        for cell, mine in cells("heal-exam-*.json", folder).items()
    }
    whole, left, healed = at[0, "untuned"], at[removed, "untuned"], at[removed, how]
    draw, shares = np.random.RandomState(0), []
    for _ in range(2000):
        pick = draw.randint(0, len(whole), len(whole))
        shares.append(100 * (healed - left)[pick].sum() / (whole - left)[pick].sum())
    cost, back = 100 * (whole - left).mean(), 100 * (healed - left).sum() / (whole - left).sum()
    return cost, back, tuple(np.percentile(shares, (2.5, 97.5)))


def beside_table(folder: Path = FOLDER):
    """A line per share of layers and way: the optimization paper's 1B model (its Tables 1 and 2) and ours, each over
    its own whole model, undistilled. Ours: exact match on CoQA, the mean of the multiple choices, and an answer's time
    in the combined table, in bfloat16 on a GPU."""
    import pandas as pd

    found, clock = cells("heal-exam-*.json", folder), {}
    for row in rows("combined-smollm2-135m.json", folder):
        if row["storage"] == "bfloat16":
            clock[30 - row["layers"]] = row["times"]["all tokens, answer"]["latency_ms"]

    def ours(cell: tuple[int, str]) -> tuple[float, float]:
        exact = np.mean([row["answers"]["coqa"]["exact"] for row in found[cell]])
        return exact, np.mean([row["choices"][task]["accuracy"] for row in found[cell] for task in TASKS])

    lines = []
    for share, removed, how in ((20, 6, "untuned"), (20, 6, "distilled"), (40, 12, "untuned"), (40, 12, "distilled")):
        if (removed, how) not in found:
            continue
        name = "1B" if how == "untuned" else "1B+KD"
        theirs, whole = TABLE_1[name, share, "Dynamic"], TABLE_1["1B", 0, "Dynamic"]
        said, whole_said = TABLE_2[name, share], TABLE_2["1B", 0]
        mine, whole_mine = ours((removed, how)), ours((0, "untuned"))
        lines.append({
            "layers fewer": f"{share}%", "": NAMES[how],
            "perplexity: theirs": f"{theirs[0] / whole[0]:.2f}x", "ours": over_whole(found, (removed, how), "x"),
            "exact match: theirs": f"{said[1]} of {whole_said[1]}", "ours ": f"{mine[0]:.1f} of {whole_mine[0]:.1f}",
            "accuracy: theirs": f"{said[2]} of {whole_said[2]}", "ours  ": f"{mine[1]:.1f} of {whole_mine[1]:.1f}",
            "latency: theirs": f"{theirs[2] / whole[2]:.2f}", "ours   ": f"{clock[removed] / clock[0]:.2f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


PRUNING = ("all layers", "2x by tokens", "6 layers fewer", "12 layers fewer")


def combined_table(folder: Path = FOLDER):
    """A line per machine and precision, in the shape of the optimization paper's Table 3: what is stored, and
    milliseconds of the prefills and of an answer, by what is pruned; on random weights of the shape."""
    import pandas as pd

    found: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("combined-*.json")):
        result = json.loads(path.read_text("utf-8"))
        for row in (row for row in result["rows"] if "times" in row):
            line = found.setdefault((where(result), row["storage"]), {"MB": f"{row['bytes'] / 1e6:.0f}"})
            for name in dict.fromkeys(key.split(",")[0] for key in row["times"]):
                clock = [row["times"].get(f"{name}, {what}", {}).get("latency_ms") for what in ("prefill", "answer")]
                pruning = row["pruning"] if name == "all tokens" else name
                line[pruning] = " / ".join("-" if ms is None else f"{ms:.1f}" for ms in clock)
    lines = [
        {"on": machine, "weights": storage, "MB": line["MB"], **{name: line.get(name, "") for name in PRUNING}}
        for (machine, storage), line in sorted(found.items(), key=lambda item: item[0][0] != "NVIDIA H200")
    ]
    return pd.DataFrame(lines)


def scores_table(folder: Path = FOLDER):
    """A line per precision: perplexity over the whole model's in float32, by what is pruned, with intervals."""
    import pandas as pd

    lines: dict[str, dict] = {}
    for row in rows("combined-*.json", folder):
        cells = {row["pruning"]: row, **row.get("by_tokens", {})} if "ratio" in row else {}
        for name, scores in cells.items():
            low, high = scores["ratio_ci95"]
            line = lines.setdefault(row["storage"], {"weights": row["storage"], **dict.fromkeys(PRUNING, "")})
            line[name] = f"{scores['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    return pd.DataFrame([*lines.values()])


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


def where(result: dict) -> str:
    """The machine of a result: its GPU, or how many threads of a CPU."""
    device = result["provenance"]["hardware"]["device"]
    return device if device != "cpu" else f"CPU, {result['threads']} threads"


WAYS = {
    "generate": "transformers, nothing drafted", "lookup": "transformers, what stood before",
    "assisted": "transformers, first layers", "plain": "nothing drafted", "before": "what stood before",
    "exit": "first layers", "paced": "first layers, as far as right",
}  # fmt: skip


def drafts_table(folder: Path = FOLDER):
    """A line per machine and way to decode, each the best of its kind on other prompts: tokens a second, over stock
    `generate`, over as much code without drafts, and the same text how often."""
    import pandas as pd

    lines = []
    for path in sorted(folder.glob("draft-*.json")):
        result = json.loads(path.read_text("utf-8"))
        ways = {row["way"]: row for row in result["rows"]}
        for name, row in ways.items():
            recorded, kind = name.startswith("recorded "), name.removeprefix("recorded ")
            plain = "generate" if kind in ("generate", "lookup", "assisted") else "recorded " * recorded + "plain"
            apart = np.array(row["speedups"]) / np.array(ways[plain]["speedups"])
            lines.append({
                "on": where(result), "drafted by": WAYS[kind] + ", recorded" * recorded, "layers": row["depth"] or "",
                "ahead": row["ahead"] or "", "tokens/s": f"{row['tokens_per_second']:.1f}",
                "over stock": _quartiles(row["speedups"]),
                "over nothing drafted": _quartiles(apart) if name != plain else "",
                "whole passes a token": f"{row['passes_per_token']:.2f}",
                "same text": f"{row['same_text']} of {row['n']}",
            })  # fmt: skip
    return pd.DataFrame(lines)


def _quartiles(values) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def drafters_table(folder: Path = FOLDER):
    """A line per depth that was taught to draft: what of the whole model's greedy text it foretells, before and
    after."""
    import pandas as pd

    lines = []
    for path in sorted(folder.glob("drafters-*.json")):
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            lines.append({
                "layers": row["depth"], "rank": row["rank"], "steps": row["log"]["steps"],
                "foretells, %": f"{row['foretold']:.1f}", "untaught": f"{row['foretold_untaught']:.1f}",
            })  # fmt: skip
    return pd.DataFrame(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if math.isfinite(value) else "-"


def main() -> int:
    for table in (
        healed_table,
        exam_table,
        beside_table,
        combined_table,
        scores_table,
        exits_table,
        drafters_table,
        drafts_table,
    ):
        print(table().to_markdown(index=False, disable_numparse=True), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
