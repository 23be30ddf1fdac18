#!/usr/bin/env python3
"""Run transformers' own model tests without the dial and with it: python tools/transformers_suite.py [MODE ...]

The tests come from the source archive of the installed transformers version, which pip fetches; how they are applied,
and what the modes are, is told in tools/transformers_suite_cases.py. Without arguments all modes run (2 minutes each
on an idle core). Counts and differences from "stock" go to results/transformers/VERSION.json, and the table of all such
files to docs/transformers_suite.md. Exit code 1: the dial changed a result for a reason that REASONS does not declare.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

import transformers

from zsaa.measure import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "transformers"
PAGE = ROOT / "docs" / "transformers_suite.md"
MODES = {
    "stock": "transformers alone",
    "dial": "every model is built with `zsaa.enable(model, alpha=1)`",
    "traced": "the same, with every prefill sent through the pruning code, which keeps all tokens",
    "pruned": "every model is built with `zsaa.enable(model, alpha=0.6, tau=2)`",
}
# Differences that are meant, by mode: a pattern in the failure's message, and why. At alpha = 1 there are none.
REFUSALS = {
    "output_attentions=True is not available": "refused by design: pruned layers have no full attention matrix",
    "needs non-reentrant gradient checkpointing": "refused by design: a replay must see the stored choice of tokens",
}
OVERFIT = "to decrease by at least|to generate the training sequence"
REASONS = {
    "stock": {},
    "dial": {},
    "traced": REFUSALS,
    "pruned": {
        **REFUSALS,
        OVERFIT: "pruned training falls short of the test's bar (90% off the loss in 300 steps, text by heart)",
    },
}


def fetch(folder: Path) -> Path:
    """The unpacked source archive of the installed transformers, and beside it what only its tests import."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    release = f"transformers=={transformers.__version__}"
    source = ["--no-binary", "transformers", "--no-deps", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([*pip, "download", *source, release], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), "parameterized"], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("transformers-*") if path.is_dir())


def outcomes(report: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """By family and test: passed, skipped or failed (with any of its subtests), and the first message."""
    rank = {"passed": 1, "skipped": 0, "failed": 2}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for case in ET.parse(report).iter("testcase"):
        name = case.get("classname").rsplit(".Test_", 1)[-1], case.get("name")
        problems = [child for child in case if child.tag in ("failure", "error")]
        state = "failed" if problems else "skipped" if case.find("skipped") is not None else "passed"
        message = problems[0].get("message", "").splitlines()[0] if problems else ""
        found[name] = max(found.get(name, (state, message)), (state, message), key=lambda f: rank[f[0]])
    return found


def run(mode: str, source: Path, jobs: int) -> dict:
    """Outcomes of one mode; `models` counts the models that got the dial."""
    report, counter = source.parent / f"{mode}.xml", source.parent / f"{mode}.count"
    paths = [str(ROOT), str(source), str(source.parent / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {"ZSAA_SUITE": mode, "ZSAA_SUITE_COUNT": str(counter), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    options = ["-q", "-W", "ignore", "--tb=no", "-r", "N", "-p", "no:cacheprovider", "-c", os.devnull, "-n", str(jobs)]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={source}", f"--junitxml={report}"]
    started = time.perf_counter()
    with (source.parent / f"{mode}.log").open("w") as log:
        cases = str(ROOT / "tools" / "transformers_suite_cases.py")
        done = subprocess.run([*command, cases], env={**os.environ, **environment}, cwd=source, stdout=log, stderr=log)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{Path(log.name).read_text()[-3000:]}")
    models = len(counter.read_text()) if counter.exists() else 0
    if (models > 0) != (mode != "stock"):
        raise SystemExit(f"{models} models got the dial in mode {mode}: the suite does not test what it says.")
    return {"outcomes": outcomes(report), "seconds": round(time.perf_counter() - started), "models": models}


def compare(stock: dict, found: dict) -> list[dict]:
    """Tests whose outcome is not that of stock, with the message of the first failure."""
    if stock.keys() != found.keys():
        raise SystemExit(f"not the same tests ran as in stock: {sorted(stock.keys() ^ found.keys())[:5]}, ...")
    changed = [(*name, state, message) for name, (state, message) in found.items() if stock[name][0] != state]
    return [dict(zip(("family", "test", "state", "message"), values)) for values in changed]


def reason(mode: str, difference: dict) -> str | None:
    """Why a test has another outcome than in stock; None if REASONS does not tell."""
    failed = difference["state"] == "failed"
    found = (why for pattern, why in REASONS[mode].items() if re.search(pattern, difference["message"]))
    return next(found, None) if failed else None


def page(results: list[dict]) -> str:
    """docs/transformers_suite.md from the result files."""
    parts = [
        "# transformers' own tests, with the dial on",
        "",
        "Written by `python tools/transformers_suite.py` from results/transformers/; do not edit.",
        "",
        "The source archive of transformers on PyPI carries the tests that every model must pass "
        "(`ModelTesterMixin`, `TrainingTesterMixin`), but not the small models that they are applied to, nor the "
        "generation tests (`GenerationTesterMixin`) and the export tests. So the small models are ours, the tests "
        "theirs. Generation is tested by our own tests instead (tests/test_transformers.py). Nothing here needs a "
        "model hub. Skipped are, with or without the dial, tests that need a GPU or a library that is not installed, "
        "slow ones, and those for other kinds of models. Behind each test, the number of families that it concerns.",
        "",
        *[f"- **{mode}**: {what}." for mode, what in MODES.items()],
    ]
    for result in results:
        facts, modes = result["provenance"], result["modes"]
        parts += ["", f"## transformers {facts['versions']['transformers']}", ""]
        parts += [
            f"torch {facts['versions']['torch']}, Python {facts['versions']['python']}, zsaa commit "
            f"`{facts['commit'][:7]}`, {facts['date'][:10]}. Each cell: passed / failed / skipped.",
            "",
            "| family | " + " | ".join(modes) + " |",
            "|---|" + "---|" * len(modes),
        ]
        for family in [*modes["stock"]["counts"], "all"]:
            cells = [
                [sum(c[state] for f, c in modes[mode]["counts"].items() if family in (f, "all"))
                 for state in ("passed", "failed", "skipped")]
                for mode in modes
            ]  # fmt: skip
            parts.append(f"| {family} | " + " | ".join(" / ".join(map(str, cell)) for cell in cells) + " |")
        models = ", ".join(f"{modes[mode]['models']:,} in {mode}" for mode in modes if mode != "stock")
        parts += ["", f"Models that were built with the dial on: {models}.", ""]
        for mode in modes:
            groups = defaultdict(Counter)
            for difference in modes[mode]["differences"]:
                groups[reason(mode, difference) or f"NOT EXPLAINED: {difference['message']}"][difference["test"]] += 1
            if mode != "stock":
                parts += [f"Outcomes in **{mode}** that differ from stock's:{'' if groups else ' none.'}"]
            for why, tests in groups.items():
                names = ", ".join(f"`{test}` ({times})" for test, times in sorted(tests.items()))
                parts += [f"- {why}: {names}"]
            parts += [""] if mode != "stock" else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def measure(modes: list[str], jobs: int) -> dict:
    """The result file: counts of each mode by family, and each test's outcome where it is not that of stock."""
    command = " ".join(["python tools/transformers_suite.py", *sys.argv[1:]])
    result = {"kind": "transformers-suite", "provenance": provenance(command=command), "modes": {}}
    stock: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        source = fetch(Path(folder))
        for mode in modes:
            found = run(mode, source, jobs)
            outcomes = found.pop("outcomes")
            stock = stock or outcomes  # the first mode
            counts = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
            for (family, _), (state, _) in outcomes.items():
                counts[family][state] += 1
            result["modes"][mode] = {"counts": counts, **found, "differences": compare(stock, outcomes)}
            print(f"{mode}: {dict(sum(map(Counter, counts.values()), Counter()))}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}; stock always runs")
    parser.add_argument("--jobs", type=int, default=1, help="test processes (default 1)")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    if unknown := set(arguments.modes) - set(MODES):
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    if not arguments.page_only:
        wanted = {"stock", *(arguments.modes or MODES)}
        result = measure([mode for mode in MODES if mode in wanted], arguments.jobs)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{transformers.__version__}.json").write_text(json.dumps(result, indent=1) + "\n")
    newest_first = {"key": lambda path: [int(part) for part in path.stem.split(".")], "reverse": True}
    files = sorted(RESULTS.glob("*.json"), **newest_first)
    results = [json.loads(path.read_text()) for path in files]
    PAGE.write_text(page(results))
    open_ones = 0
    for result in results:
        for mode, found in result["modes"].items():
            for difference in found["differences"]:
                if reason(mode, difference) is None:
                    open_ones += 1
                    print("not explained: {family} {test} is {state} {message}".format(**difference), file=sys.stderr)
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
