"""What is to be run: profiles.yaml and the notebooks' parameter cells."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

from .errors import UsageError


@dataclasses.dataclass(frozen=True)
class Job:
    """One notebook of a profile, checked: the file exists and takes all of `parameters`."""

    name: str
    path: Path
    parameters: dict
    minutes: float | None  # estimate from profiles.yaml
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    alone: bool = False  # shows times, which other work would change


def load_profiles(root: Path) -> dict:
    """Returns profiles.yaml as {profile: {"about", "needs", "jobs", "notebooks": {name: {"minutes", "parameters",
    "needs", "wants", "alone"}}}}; all but "notebooks" may be missing."""
    path = root / "notebooks" / "profiles.yaml"
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("PyYAML is missing; run ./run_all.sh, which installs it") from None
    try:
        profiles = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; the runner needs a clone, not a wheel") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(profiles, dict) or not profiles:
        raise UsageError(f"{path} must map profile names to their notebooks")
    for profile, entry in profiles.items():
        known = isinstance(entry, dict) and not set(entry) - {"about", "needs", "jobs", "notebooks"}
        if not known or not isinstance(entry.get("notebooks"), dict) or not entry["notebooks"]:
            keys = "'about', 'needs', 'jobs' and 'notebooks'"
            raise UsageError(f"{path}: profile {profile!r} takes {keys}, nothing else")
        at_once = entry.get("jobs", 1)
        if type(at_once) is not int or at_once < 1:
            raise UsageError(f"{path}: {profile}: jobs must be a whole number from 1 on, got {at_once!r}")
        for name, settings in entry["notebooks"].items():
            entry["notebooks"][name] = {} if settings is None else settings
            _check_settings(f"{path}: {profile}/{name}", entry["notebooks"][name], entry.get("needs"))
    return profiles


def _check_settings(where: str, settings: dict, needs: list | None) -> None:
    """Raises UsageError unless one notebook's entry holds what it may; `needs`: those of its whole profile."""
    if not isinstance(settings, dict) or set(settings) - {"minutes", "parameters", "needs", "wants", "alone"}:
        raise UsageError(f"{where} takes 'minutes', 'parameters', 'needs', 'wants' and 'alone', nothing else")
    minutes, parameters = settings.get("minutes"), settings.get("parameters")
    if minutes is not None and not isinstance(minutes, (int, float)):
        raise UsageError(f"{where}: minutes must be a number, got {minutes!r}")
    if parameters is not None and not isinstance(parameters, dict):
        raise UsageError(f"{where}: parameters must map names to values")
    if not isinstance(settings.get("alone", False), bool):
        raise UsageError(f"{where}: alone must be true or false, got {settings['alone']!r}")
    for key, value in (("needs", needs), *settings.items()):
        if key in ("needs", "wants") and not _are_needs(value):
            raise UsageError(f"{where}: {key} must list {NEEDS}, got {value!r}")


NEEDS = "gpu, gpu:GIB, package:NAME, model:ID or dataset:ID"


def _are_needs(value: object) -> bool:
    pattern = re.compile(r"gpu(:\d+)?|(package|model|dataset):[\w./-]+")
    return value is None or (
        isinstance(value, list) and all(isinstance(item, str) and pattern.fullmatch(item) for item in value)
    )


def read_cells(path: Path) -> list[dict]:
    """Returns the cells of a notebook as {"type", "tags", "source"}: all that decides what it computes."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            {
                "type": cell["cell_type"],
                "tags": cell.get("metadata", {}).get("tags", []),
                "source": "".join(cell["source"]),
            }
            for cell in cells
        ]
    except FileNotFoundError:
        raise UsageError(f"notebook {path} is missing, but profiles.yaml names it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a notebook (nbformat 4): {error!r}") from None


UNKNOWN_DEFAULT = object()


def declared_parameters(path: Path) -> dict:
    """Returns {name: default} of the cell tagged "parameters"; UNKNOWN_DEFAULT where it is not a literal.

    Finds the same names as papermill's inspect_notebook (a test compares them), but needs nothing installed.
    """
    tagged = [cell for cell in read_cells(path) if "parameters" in cell["tags"]]
    if len(tagged) != 1:
        raise UsageError(f"{path.name} must have exactly one cell tagged 'parameters', found {len(tagged)}")
    found = {}
    for node in ast.parse(tagged[0]["source"]).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
                try:
                    found[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    found[target.id] = UNKNOWN_DEFAULT
    return found


def check_parameters(name: str, given: dict, declared: dict) -> None:
    """Raises UsageError unless every given parameter is declared and fits the type of its default."""
    known = ", ".join(sorted(declared)) or "none"
    for key, value in given.items():
        if key not in declared:
            raise UsageError(f"{name}: unknown parameter {key!r}; the notebook's parameters are: {known}")
        default = declared[key]
        if default is None or default is UNKNOWN_DEFAULT or value is None:
            continue
        wanted = {float: (int, float), tuple: (list, tuple)}.get(type(default), type(default))
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            hint = "; YAML reads 2e-5 as text, write 2.0e-5" if isinstance(value, str) else ""
            raise UsageError(
                f"{name}: parameter {key} = {value!r} is of type {type(value).__name__}, "
                f"but its default {default!r} is of type {type(default).__name__}{hint}"
            )


def plan(root: Path, profile: str, output_dir: Path, seeds: list[int] | None = None) -> list[Job]:
    """Returns the checked jobs of `profile` in the order of profiles.yaml.

    seeds: given to every notebook that declares a parameter of that name; an error if none does.
    """
    profiles = load_profiles(root)
    if profile not in profiles:
        raise UsageError(f"unknown profile {profile!r}; the profiles are: {', '.join(profiles)}")
    jobs = []
    for name, settings in profiles[profile]["notebooks"].items():
        path = root / "notebooks" / f"{name}.ipynb"
        declared = declared_parameters(path)
        given = {**(settings.get("parameters") or {}), "output_dir": str(output_dir)}
        if seeds is not None and "seeds" in declared:
            given["seeds"] = seeds
        check_parameters(name, given, declared)
        needs = tuple(dict.fromkeys([*(profiles[profile].get("needs") or ()), *(settings.get("needs") or ())]))
        wants, alone = tuple(settings.get("wants") or ()), settings.get("alone", False)
        jobs.append(Job(name, path, given, settings.get("minutes"), needs, wants, alone))
    if seeds is not None and not any("seeds" in job.parameters for job in jobs):
        raise UsageError(f"--seeds: no notebook of profile {profile!r} has a parameter 'seeds'; leave the option out")
    return jobs


def shard(jobs: list[Job], part: int, parts: int) -> list[str]:
    """Returns the names of part `part` (from 1) of `parts`: disjoint, together all, the same on every machine.

    The longest notebooks are dealt out first, each to the part with the least to do; times are those of
    profiles.yaml, as a machine's own would give every machine another split.
    """
    loads, of = [0.0] * parts, {}
    for job in sorted(jobs, key=lambda job: -(job.minutes or 1.0)):
        of[job.name] = least = loads.index(min(loads))
        loads[least] += job.minutes or 1.0
    return [job.name for job in jobs if of[job.name] == part - 1]
