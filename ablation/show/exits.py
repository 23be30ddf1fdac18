"""One model, any depth, on the test part of imdb_films: beside models of so many layers, and beside fewer tokens.

python -m ablation.show.exits      prints the tables, as docs/findings/depth.md has them

What a method does at a budget (a confidence, a split between both dials) is chosen on the validation part, among the
settings that save as many MACs; the test part says what that choice is worth. Intervals as in ablation.show.films.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ablation import films
from zsaa.kit.equal import right
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import mean_difference

FOLDER, EARLIER = RESULTS / "depth" / "films", RESULTS / "ablation" / "imdb_films"
EXITS = ("exits", "exits-seed1", "exits-seed2")
BUDGETS = (2, 3, 5, 7)
SHOWN = (30, 27, 24, 22, 20, 18, 15, 10, 6, 3)  # layers
TAUGHT = {15: "layers-15-taught", 10: "layers-10-taught", 6: "layers-6-taught", 3: "layers-3-taught"}
KEYS = ("control", "layers", "sure", "tokens", "target")  # what tells a setting from another of the same result


@lru_cache
def rows(name: str, part: str, folder: Path = FOLDER) -> tuple[dict, ...]:
    """The rows of a result of this folder, or of an earlier row, of the part "validation" or "test"; none, if it was
    not run."""
    for place in (folder, EARLIER):
        path = place / (f"{name}.json" if part == "validation" else f"test/{name}.json")
        if path.is_file():
            return tuple(json.loads(path.read_text(encoding="utf-8"))["rows"])
    return ()


def there(names: Sequence[str], folder: Path = FOLDER) -> list[str]:
    """Those of the results that were read on the test part."""
    return [name for name in names if rows(name, "test", folder)]


def at_depth(name: str, layers: int, part: str = "test", folder: Path = FOLDER) -> dict:
    """The row of a result's first so many layers, whole texts."""
    return next(r for r in rows(name, part, folder) if r["control"] == "layers" and r["layers"] == layers)


def chosen(name: str, controls: Sequence[str], budget: float, folder: Path = FOLDER) -> dict | None:
    """The test row of the setting that is most accurate on validation among those of these controls that save as many
    MACs there; of equals the one that saves most. None if none does."""
    found = [r for r in rows(name, "validation", folder) if r["control"] in controls]
    found = [r for r in found if r["mac_reduction"] >= 0.999 * budget]
    if not found:
        return None
    best = max(found, key=lambda r: (r["accuracy"], r["mac_reduction"]))
    same = [r for r in rows(name, "test", folder) if all(r.get(k) == best.get(k) for k in KEYS)]
    return same[0] if same else None


def difference(ours: Sequence[dict], theirs: Sequence[dict]) -> tuple[float, tuple[float, float]]:
    """Points by which the mean of rows is ahead of that of others on the same reviews, and its 95% interval."""
    return mean_difference([right(r) for r in ours], [right(r) for r in theirs], clusters=films.runs("test"))


def said(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    mean, (low, high) = difference(ours, theirs)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def mean(found: Sequence[dict]) -> str:
    return f"{np.mean([100 * right(r).mean() for r in found]):.1f}"


def depths_table(folder: Path = FOLDER):
    """A line per depth: one model, in the mean of its seeds, what it loses of its whole, and models of their own."""
    import pandas as pd

    names, lines = there(EXITS, folder), []
    for layers in SHOWN:
        own = [at_depth(name, layers, folder=folder) for name in names]
        whole = [at_depth(name, 30, folder=folder) for name in names]
        alone = there([TAUGHT[layers] + seed for seed in ("", "-seed1", "-seed2")], folder) if layers in TAUGHT else []
        others = [rows(name, "test", folder)[0] for name in alone]
        lines.append({
            "layers": layers, "MACs": f"{30 / layers:.2f}x", f"one model (trainings: {len(names)})": mean(own),
            "ahead of all its layers": said(own, whole) if layers < 30 else "",
            "a model of its own, distilled": mean(others) if others else "",
            "one model is ahead by": said(own, others) if others else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def ways(folder: Path = FOLDER) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """name -> (results, one per seed; controls among which validation chooses)."""
    joint = sorted(
        path.stem
        for path in (folder / "test").glob("*exits-both*.json")
        if (folder / path.name).is_file()
    )  # fmt: skip
    full, adapters = ([n for n in joint if n.startswith("lora") is on] for on in (False, True))
    found = {
        "fewer layers, one model": (there(EXITS, folder), ("layers",)),
        "fewer layers, by confidence, one model": (there(EXITS, folder), ("confidence",)),
        "fewer tokens (seed 0 of the dial)": (there(["lora-crops-epochs3"], folder), ("alpha",)),
    }
    for names, kind in ((full, "in full"), (adapters, "by adapters")):
        if names:
            found |= {
                f"both, {kind}: tokens alone": (names, ("alpha",)),
                f"both, {kind}: a split": (names, ("both", "alpha", "layers")),
                f"both, {kind}: by confidence": (names, ("both-confidence", "confidence")),
            }
    return found


def cells(names: Sequence[str], controls: Sequence[str], budget: float, folder: Path = FOLDER) -> list[dict]:
    found = [chosen(name, controls, budget, folder) for name in names]
    return [row for row in found if row is not None]


def budgets_table(folder: Path = FOLDER):
    """A line per way: its test accuracy at each budget, by settings that validation chose; the MACs that it saved."""
    import pandas as pd

    lines = []
    for name, (names, controls) in ways(folder).items():
        line = {"accuracy": f"{name}" + (f" ({len(names)} seeds)" if len(names) > 1 else "")}
        for budget in BUDGETS:
            found = cells(names, controls, budget, folder)
            saved = np.mean([r["mac_reduction"] for r in found]) if found else 0
            line[f"{budget}x"] = f"{mean(found)} at {saved:.1f}x" if found else ""
        lines.append(line)
    alone = {"accuracy": "models of so many layers, distilled (3 seeds)"}
    for budget in BUDGETS:
        model = TAUGHT.get(30 // budget, "none")
        at = [rows(model + seed, "test", folder) for seed in ("", "-seed1", "-seed2")]
        alone[f"{budget}x"] = f"{mean([found[0] for found in at])} at {budget:.1f}x" if all(at) else ""
    return pd.DataFrame([*lines, alone])


def single(budget: float, folder: Path = FOLDER) -> tuple[str, list[dict]]:
    """The better of the ways that turn one dial, by validation: its name and its test rows."""
    best, found = None, []
    for name, (names, controls) in ways(folder).items():
        if name.startswith("both"):
            continue
        at = [max((r["accuracy"] for r in rows(n, "validation", folder) if r["control"] in controls
                   and r["mac_reduction"] >= 0.999 * budget), default=0.0) for n in names]  # fmt: skip
        if at and (best is None or np.mean(at) > best[0]):
            best, found = (np.mean(at), name), cells(names, controls, budget, folder)
    return (best[1] if best else ""), found


def joint_table(folder: Path = FOLDER):
    """A line per way to turn both dials: how far it is ahead of the better single one at each budget."""
    import pandas as pd

    lines = []
    for name, (names, controls) in ways(folder).items():
        if not name.startswith("both") or "tokens alone" in name:
            continue
        line = {"ahead of the better single dial": name}
        for budget in BUDGETS:
            rival, theirs = single(budget, folder)
            ours = cells(names, controls, budget, folder)
            line[f"{budget}x"] = f"{said(ours, theirs)} ({rival.split(',')[0]})" if ours and theirs else ""
        lines.append(line)
    return pd.DataFrame(lines)


def main() -> int:
    for table in (depths_table, budgets_table, joint_table):
        print(table().to_markdown(index=False, disable_numparse=True), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
