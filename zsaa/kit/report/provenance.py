"""Where each result file came from: device, time, energy, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise

from zsaa.kit.labels import threads
from zsaa.kit.store import QUESTIONS


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def joules_text(*joules: float | None) -> str:
    """Energy, for people: "not measured", or kJ of the GPU and the CPU."""
    known = [f"{value / 1000:.1f} kJ {device}" for value, device in zip(joules, ("GPU", "CPU")) if value is not None]
    return " + ".join(known) or "not measured"


def flat(found: Sequence[tuple[str, dict]]) -> list[dict]:
    """What `load_results` gives: the results of the folder itself and of its QUESTIONS."""
    return [result for name, result in found if name.rpartition("/")[0] in ("", *QUESTIONS)]


def _data(task: dict | str | None) -> str:
    if not isinstance(task, dict):
        return "-"
    taught = task.get("training_substitute")
    return task.get("source", "-") + (f"; to train on, a substitute: {taught}" if taught else "")


def provenance_of(origin: str, name: str, result: dict) -> dict:
    p = result["provenance"]
    hardware, versions = p.get("hardware", {}), p.get("versions", {})
    device = str(hardware.get("device", "-"))
    if device == "cpu":
        device = f"{hardware.get('cpu', 'CPU')}, {threads(hardware.get('threads', hardware.get('cores')))}"
    samples = [f"{p[f'{part}_samples']:,} {part}" for part in ("train", "eval") if p.get(f"{part}_samples")]
    return {
        "origin": origin,
        "file": name.removesuffix(".json"),
        "kind": result.get("kind", "-"),
        "model": result.get("model", {}).get("name", "-") if isinstance(result.get("model"), dict) else "-",
        "data": _data(result.get("task")),
        "device": device,
        "samples": ", ".join(samples) or "-",
        "seed": p.get("seed", "-"),
        "seconds": p.get("seconds"),
        "ended": datetime.fromisoformat(p["date"]).timestamp() if p.get("date") else 0.0,
        "time": seconds_text(p.get("seconds")),
        "joules": (p.get("gpu_joules"), p.get("cpu_joules")),
        "energy": joules_text(p.get("gpu_joules"), p.get("cpu_joules")),
        "versions": ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "python") if versions.get(k)),
        "commit": (p.get("commit") or "unknown")[:10] + (" with local changes" if p.get("dirty") else ""),
        "date": str(p.get("date", "-"))[:10],
        "command": result.get("command") or p.get("command") or "",
    }


def hardware_of(rows: Sequence[dict]) -> list[dict]:
    """Per kind of device: how many result files, how long, how much energy. Runs that shared a device each read its
    whole meter, so what overlaps in time counts once."""
    found = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        joules = [once(mine, lambda row, i=i: row["joules"][i]) for i in (0, 1)]
        known = sum(any(value is not None for value in row["joules"]) for row in mine)
        energy = joules_text(*joules) + (f" (in {known} of {len(mine)} files)" if 0 < known < len(mine) else "")
        seconds = once(mine, lambda row: row["seconds"])
        found.append({"device": device, "files": len(mine), "time": seconds_text(seconds), "energy": energy})
    return found


def once(rows: Sequence[dict], amount: Callable[[dict], float | None]) -> float | None:
    """What was spent in all, of amounts that each run spent evenly up to its "ended" (seconds), where of runs at the
    same time the one that spent most counts. Runs that say no length count in full. None: no amount is known."""
    known = [(row, value) for row in rows if (value := amount(row)) is not None]
    if not known:
        return None
    spans = [
        (row["ended"] - row["seconds"], row["ended"], value / row["seconds"]) for row, value in known if row["seconds"]
    ]
    ends = sorted({end for start, stop, _ in spans for end in (start, stop)})
    total = sum(value for row, value in known if not row["seconds"])
    for start, stop in pairwise(ends):
        rates = [rate for first, last, rate in spans if first <= start and stop <= last]
        total += (stop - start) * max(rates, default=0.0)
    return total
