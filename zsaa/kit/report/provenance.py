"""Where each result file came from: device, time, energy, commit."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.labels import threads


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
    """What `load_results` gives: the results of the folder itself."""
    return [result for name, result in found if "/" not in name]


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
        "time": seconds_text(p.get("seconds")),
        "joules": (p.get("gpu_joules"), p.get("cpu_joules")),
        "energy": joules_text(p.get("gpu_joules"), p.get("cpu_joules")),
        "versions": ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "python") if versions.get(k)),
        "commit": (p.get("commit") or "unknown")[:10] + (" with local changes" if p.get("dirty") else ""),
        "date": str(p.get("date", "-"))[:10],
        "command": result.get("command") or p.get("command") or "",
    }


def hardware_of(rows: Sequence[dict]) -> list[dict]:
    """Per device: how many result files, how long, how much energy."""
    found = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        joules = [
            sum(values) if (values := [row["joules"][i] for row in mine if row["joules"][i] is not None]) else None
            for i in (0, 1)
        ]
        known = sum(any(value is not None for value in row["joules"]) for row in mine)
        energy = joules_text(*joules) + (f" (in {known} of {len(mine)} files)" if 0 < known < len(mine) else "")
        seconds = sum(row["seconds"] or 0 for row in mine)
        found.append({"device": device, "files": len(mine), "time": seconds_text(seconds), "energy": energy})
    return found
