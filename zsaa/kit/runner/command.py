"""The command line of the runner."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from .console import clock, say
from .done import estimate, find_done, fingerprint
from .environment import cores
from .errors import EXIT_CODES, FOLDER, OK, SETUP, USAGE, FolderError, Interrupted, UsageError
from .folder import output_folder, own_folder
from .plan import Job, load_profiles, plan, shard
from .run import Run, lacks, look_for_needs, say_missing

ROOT = Path(__file__).resolve().parents[3]


def say_profiles(root: Path) -> None:
    """What --list shows."""
    for profile, entry in load_profiles(root).items():
        needs = f" (needs {', '.join(entry['needs'])})" if entry.get("needs") else ""
        say(f"{profile}: {entry.get('about', '')}{needs}")
        for name, settings in entry["notebooks"].items():
            minutes = settings.get("minutes")
            say(f"    {name}" + (f"  (about {minutes:g} min)" if minutes else ""))


def say_plan(
    root: Path, profile: str, out: Path, jobs: list[Job], selected: list[str], force: bool, at_once: int
) -> None:
    """What --dry-run shows: each notebook, its parameters, whether it is done, the time that is left and in all."""
    say(f"profile {profile}, output folder {out}")
    chosen = [job for job in jobs if job.name in selected]
    try:
        missing, _ = look_for_needs(chosen)
        say_missing(chosen, missing)
    except ModuleNotFoundError:
        missing = {}
        say("  what the notebooks need is not looked for before the set-up (make setup)")
    left, whole, unknown = 0.0, 0.0, 0
    for job in jobs:
        key = fingerprint(root, job)
        record, why = find_done(out, job, key)
        seconds, source = estimate(out, job, key)
        together = 1 if job.alone else at_once
        if job.name not in selected:
            state = "not selected"
        elif record and not force:
            state, seconds = f"done {record['started']}, in {clock(record['seconds'])}", record["seconds"]
        elif lacks(job, missing):
            state = f"not run, for want of {' and '.join(need for need in job.needs if need in missing)}"
        else:
            left, unknown = left + (seconds or 0.0) / together, unknown + (seconds is None)
            state = f"to do ({why or 'forced'}), about {clock(seconds)} ({source})"
        whole += (seconds or 0.0) / together
        say(f"\n{job.name}: {state}")
        for name, value in job.parameters.items():
            say(f"    {name} = {value!r}")
    say(f"\nleft: about {clock(left)}" + (f", and {unknown} without an estimate" if unknown else ""))
    beside = f", {at_once} notebooks at a time" if at_once > 1 else ""
    say(f"the whole profile: about {clock(whole)}{beside}, set-up not included")


def _part(text: str) -> tuple[int, int]:
    """(k, n) of "k/n", for argparse."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not k/n with 1 <= k <= n, such as 2/3")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 0 on, such as 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Runs the notebooks of a profile and writes tables, figures and an index page. "
        "Notebooks that are done and unchanged are not run again.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--profile", default="smoke", help="which profile of notebooks/profiles.yaml to run (default: smoke)")
    add("--only", metavar="NAME[,NAME]", help="run only these notebooks of the profile")
    add("--shard", metavar="K/N", type=_part, help="run only the k-th of n disjoint parts, as on one of n machines")
    add("--seeds", metavar="0,1,2", type=_seeds, help="give these seeds to every notebook that takes several")
    add("--jobs", metavar="N", type=_count, help="run N notebooks at once, but those whose times are shown alone "
        "(default: what profiles.yaml says, and no more than there are cores)")  # fmt: skip
    add("--output-dir", metavar="DIR", help="write here instead of outputs/<profile>: a new or empty folder, or one of "
        "an earlier run")  # fmt: skip
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run stopped (as is done anyway)")
    again.add_argument("--force", action="store_true", help="run again what is done already")
    add("--keep-going", action="store_true", help="after a failure go on with the next notebook")
    add("--list", action="store_true", help="list profiles and notebooks, and stop")
    add("--dry-run", action="store_true", help="show what would run, with parameters and times, and stop")
    add("--report", action="store_true", help="run nothing: write the report of what the output folder holds")
    add("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)  # another tree to run; for the tests
    return parser.parse_args(arguments)


def follow(options: argparse.Namespace) -> int:
    """Does what the options say, and returns the exit code; what stops it is raised."""
    root = options.root.resolve()
    if options.list:
        say_profiles(root)
        return OK
    out = output_folder(root, options.output_dir, options.profile)
    jobs = plan(root, options.profile, out, options.seeds)
    names = [job.name for job in jobs]
    selected = options.only.split(",") if options.only is not None else names
    for name in selected:
        if name not in names:
            raise UsageError(f"unknown notebook {name!r}; profile {options.profile!r} has: {', '.join(names)}")
    if options.shard:
        selected = shard([job for job in jobs if job.name in selected], *options.shard)
    if options.report:
        selected = []
    at_once = options.jobs or min(load_profiles(root)[options.profile].get("jobs", 1), cores())
    if options.dry_run:
        say_plan(root, options.profile, out, jobs, selected, options.force, at_once)
        return OK
    for package in ("papermill", "zsaa"):  # asked for here, so that a missing one is a set-up failure
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
    with own_folder(out, selected if options.shard or options.report else None) as locks:
        part = f", shard {options.shard[0]} of {options.shard[1]}" if options.shard else ""
        say(f"profile {options.profile}{part}: {len(selected)} notebook(s), output folder {out}")
        return Run(root, out, jobs, selected, options.force, options.keep_going, locks, at_once).go()


def catch_signals() -> dict[int, Callable | int | None]:
    """Turns the first signal that would end the run into Interrupted, the second one into the end; returns the handlers
    before. A signal that the caller ignores stays ignored: SIGHUP under nohup, SIGINT in a script's background job."""
    interrupted = False

    def on_signal(signum, frame):
        nonlocal interrupted
        if interrupted:  # the second one: the user will not wait
            os._exit(128 + signum)
        interrupted = True
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():
        return {}
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {s: signal.signal(s, on_signal) for s in signals if signal.getsignal(s) is not signal.SIG_IGN}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (see EXIT_CODES)."""
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):  # a heading's alpha is no reason to fail in an ASCII terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    old: dict[int, Callable | int | None] = {}
    try:
        old = catch_signals()
        return follow(options)
    except (UsageError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FOLDER
    except ModuleNotFoundError as error:
        print(f"error: {error}. Run the set-up: make setup", file=sys.stderr)
        return SETUP
    except Interrupted as error:
        print("interrupted before anything ran", file=sys.stderr)
        return 128 + error.signum
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
