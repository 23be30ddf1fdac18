"""The command line of the studies, made from the signatures of `Job` and of its objective's settings.

    python -m zsaa.run --objective accuracy --data imdb --recipe paper --changes.epochs 1.5 --seeds [0,1,2]
    python -m zsaa.run --objective perplexity --model gpt2 --data wikitext-103 --source hub --settings.stride 32
    python -m zsaa.run --objective choice --data reviews --recipe paper --changes.tuning lora --train 4000
    python -m zsaa.run --objective answers --data mine.jsonl --recipe zsaa+ --changes.tuning lora
    python -m zsaa.run --objective accuracy --recipe paper --print_config > job.yaml
    python -m zsaa.run --config job.yaml --test 300

What is not given has the defaults that --print_config shows. --recipe names a recipe or its file, and --changes.FIELD
changes one of its fields. Lists are written [1,2,3], nothing as null.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import yaml

from zsaa.families import UnsupportedModelError
from zsaa.finetune import RECIPES, Recipe
from zsaa.kit.store import measured
from zsaa.measure.distributed import place, start
from zsaa.studies.job import SETTINGS, Job

UNTRAINED = "none"
NO_OPTIONS = ("recipe", "settings", "command")  # the first two have options of their own


def measure(job: Job) -> list[dict]:
    """Do a job: the results, one for each seed."""
    study = importlib.import_module(f"zsaa.studies.{job.objective}")  # multiple choice needs lm-eval, others do not
    return [study.measure(one) for one in job.each()]


def run(job_in: Callable[[list[str]], Job], arguments: list[str] | None = None) -> int:
    """As a program: do the job that its arguments ask for, by default the command line's, and print its rows."""
    start()  # first: the command of a result says how many processes there were
    for result in measure(job_in(list(sys.argv[1:] if arguments is None else arguments))):
        if place()[0] == 0:
            print(result["name"])
            for row in result["rows"]:
                print(" ", line(row))
    return 0


def line(row: dict) -> str:
    """A row of a result, as a program shows it."""
    parts = [f"{row['control']:>7} {row.get('score') or '':>11} {row['mac_reduction']:6.2f}x"]
    if "perplexity" in row:
        parts.append(f"perplexity {row['perplexity']:.2f} [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]")
        parts.append(f"x{row['ratio']:.3f} of stock  agreement {row['agreement']:.1f}%")
        parts.append(f"TTFT {row.get('speedup', 'not run')}")
    elif "exact_match" in row:
        parts.append(f"F1 {row['f1']:.2f}  exact match {row['exact_match']:.2f}  {row['tokens']:.0f} tokens")
    elif "accuracy" in row:
        parts.append(f"{'F1' if 'f1' in row else 'accuracy'} {measured(row):.2f} [{row['ci95'][0]}, {row['ci95'][1]}]")
    if "preserved" in row:
        parts.append(f"alpha {row['alpha']:.4f}  preserved {row['preserved']:.3f}")
    if "latency_mac_reduction" in row:
        parts.append(f"speed-up {row['speedup']} on batch {row['latency_batch']} x {row['latency_tokens']}")
    return "  ".join(parts)


def exit_code(program: Callable[[], int], module: str) -> int:
    """Of `program`; 1, and the error in a line, where the user can mend it: that needs no traceback. 130 where it was
    interrupted."""
    from zsaa.models import AssetError

    try:
        return program()
    except (AssetError, UnsupportedModelError, ValueError, OSError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{module}: interrupted; files that were complete are kept, and none is cut off.", file=sys.stderr)
        return 130


def parser_for(objective: str):
    """The command line of one objective, whose settings have their defaults."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults, and a description as it stands."""

    parser = ArgumentParser(prog="python -m zsaa.run", description=__doc__, formatter_class=Help)
    parser.add_argument("--config", action="config", help="a job as YAML, as --print_config writes it")
    parser.add_class_arguments(Job, skip=set(NO_OPTIONS))
    parser.set_defaults(objective=objective)
    parser.add_argument("--recipe", default=UNTRAINED, help=f"{UNTRAINED}, {', '.join(RECIPES)}, or a YAML file")
    parser.add_argument("--changes", type=dict[str, Any], default={}, help="fields of the recipe, and their values")
    parser.add_class_arguments(SETTINGS[objective], "settings")
    return parser


def objective_in(arguments: list[str]) -> str:
    """The objective that a command line or its config file asks for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective")
    first.add_argument("--config")
    asked, _ = first.parse_known_args(arguments)
    objective = asked.objective
    if objective is None and asked.config:
        try:
            with open(asked.config, encoding="utf-8") as file:
                objective = (yaml.safe_load(file) or {}).get("objective")
        except (OSError, yaml.YAMLError, AttributeError):
            pass  # the parser proper says what is wrong with it
    return objective if objective in SETTINGS else "accuracy"


def job_of(arguments: list[str]) -> Job:
    """The job that a command line asks for; what there cannot be ends the program, and says why."""
    parser = parser_for(objective_in(arguments))
    asked = parser.parse_args(arguments)
    try:
        if asked.recipe == UNTRAINED and asked.changes:
            raise ValueError(f"changes are {asked.changes} of no recipe: add --recipe paper, or another one.")
        kind = "causal-lm" if asked.objective == "answers" else None
        recipe = None if asked.recipe == UNTRAINED else Recipe.named(asked.recipe, kind, **asked.changes)
        own = {field.name: getattr(asked, field.name) for field in fields(Job) if field.name not in NO_OPTIONS}
        return Job(**own, recipe=recipe, settings=parser.instantiate(asked).settings, command=_written(parser, asked))
    except (TypeError, ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def _written(parser, asked) -> str:
    """The command line that asks for the same, wherever options stood; an output folder is no part of how."""
    changed = yaml.safe_load(parser.dump(asked, skip_default=True)) or {}
    changed = {"objective": asked.objective, **{k: v for k, v in changed.items() if k not in ("config", "output")}}
    options = []
    for name, value in changed.items():
        inside = value if isinstance(value, dict) else {"": value}
        for key, single in inside.items():
            text = single if isinstance(single, str) else json.dumps(single)
            options += [f"--{name}.{key}".rstrip("."), text]
    launcher = "python" if place()[1] == 1 else f"torchrun --nproc-per-node {place()[1]}"
    return shlex.join([*launcher.split(), "-m", "zsaa.run", *options])


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: run(job_of, arguments), "zsaa.run")
