"""What other work on the machine costs: steps of SmolLM2-135M on the CPU, idle and beside busy processes, in turn.

    python tools/busy.py --output results/speed/cpu/busy.json

Three settings of PyTorch's threads are compared: the library's own, one thread, and the kit's, which run_all.sh gives
its kernels (zsaa.kit.runner.environment). "cost" is the loaded time over the idle time. The measure for it is the row
"share": a process on each core that waits for nobody, whose cost is what the load takes of the cores. A setting is
good if its cost is no higher. All runs take turns, so a change of the machine hits all of them alike; what else ran is
told by --note and the load averages.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = ("train", "prefill", "decode")
SPIN = "n = 6_000_000\nwhile n: n -= 1"


def settings() -> dict[str, dict[str, str]]:
    from zsaa.kit.runner.environment import threads

    return {"library": {}, "one thread": {"OMP_NUM_THREADS": "1"}, "kit": threads()}


def work() -> None:
    """A process that does the step that each line of its input names, and answers with its seconds."""
    import torch

    from zsaa.models import load_model

    torch.manual_seed(0)
    model, _ = load_model("smollm2-135m")
    tokens = torch.randint(0, 1000, (2, 96))
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)

    def train():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def prefill():
        model(input_ids=tokens)

    def decode():
        model.generate(tokens[:1, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False)

    steps = {"train": train, "prefill": prefill, "decode": decode}
    for step in steps.values():  # warm-up
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - started, flush=True)


def share() -> float:
    """Seconds of one process a core, each with work of its own."""
    started = time.perf_counter()
    for process in [subprocess.Popen([sys.executable, "-I", "-S", "-c", SPIN]) for _ in os.sched_getaffinity(0)]:
        process.wait()
    return time.perf_counter() - started


def start(variables: dict[str, str]) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, __file__, "--work"], env={**os.environ, **variables}, **pipes)
    if process.stdout.readline().strip() != "ready":
        raise SystemExit("a worker did not start; its own message is above")
    return process


def ask(process: subprocess.Popen, step: str) -> float:
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(load: int, rounds: int) -> list[dict]:
    """One row per setting and step; `load`: how many busy processes."""
    chosen = settings()
    workers = {name: start(variables) for name, variables in chosen.items()}
    busy = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(load)]
    seconds: dict[tuple[str, str], dict[bool, list[float]]] = {}
    try:
        for _ in range(rounds):
            for loaded in (False, True):
                for process in busy:
                    process.send_signal(signal.SIGCONT if loaded else signal.SIGSTOP)
                time.sleep(0.2)
                taken = {("share", "share"): share()}
                taken |= {(name, step): ask(worker, step) for step in STEPS for name, worker in workers.items()}
                for key, value in taken.items():
                    seconds.setdefault(key, {False: [], True: []})[loaded].append(value)
    finally:
        for process in [*busy, *workers.values()]:
            process.kill()
            process.wait()
    return [_row(name, step, chosen.get(name), times) for (name, step), times in seconds.items()]


def _row(name: str, step: str, variables: dict | None, times: dict[bool, list[float]]) -> dict:
    idle, loaded = (statistics.median(times[key]) for key in (False, True))
    facts = {"setting": name, "variables": variables, "step": step, "cost": round(loaded / idle, 2)}
    for label, values in (("idle", times[False]), ("loaded", times[True])):
        facts[f"{label}_s"] = round(statistics.median(values), 3)
        facts[f"{label}_range_s"] = [round(min(values), 3), round(max(values), 3)]
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, default=4, help="busy processes (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each step is done, idle and loaded")
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into the result")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench/busy.json"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work()
        return 0
    from zsaa.kit.energy import energy
    from zsaa.measure import provenance, write_json

    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))]:
        del os.environ[name]
    before = os.getloadavg()
    with energy() as spent:
        rows = measure(chosen.load, chosen.rounds)
    command = f"python tools/busy.py --load {chosen.load} --rounds {chosen.rounds} --note {shlex.quote(chosen.note)}"
    others = {"note": chosen.note, "load_average_before": before, "load_average_after": os.getloadavg()}
    facts = provenance(seed=0, repeats=chosen.rounds, **spent)
    result = {"kind": "busy", "command": command, "load": chosen.load, "others": others, "provenance": facts}
    print(write_json(chosen.output, {**result, "rows": rows}))
    for row in rows:
        print("{setting:10} {step:8} idle {idle_s:6.2f} s, loaded {loaded_s:6.2f} s, cost {cost:5.2f}".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
