"""`python -m zsaa.serve --model smollm2-135m` serves it on http://127.0.0.1:8000, on this machine or a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from zsaa.measure.checks import check_number, check_whole
from zsaa.serve.controller import POLICIES

LOOPBACK = ("127.0.0.1", "localhost")
KEY = "ZSAA_API_KEY"
KEEPS_S = 75  # a connection without a request: longer than clients do, or one may send as the server closes it
# Of Ray, where nothing else is said. It tells nobody outside that it runs; its workers are as nice as any program (by
# itself 15, behind all others); and it collects no numbers of its own, nor a history of its tasks, which nobody reads
# here: all of its processes grew by them, idle, by 20 MiB an hour and more (docs/findings/serving.md).
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m zsaa.serve", description=__doc__)
    add = made.add_argument
    add("--model", default="smollm2-135m", help="for completions: a packaged name, hub id or folder; 'none' for none")
    add("--classifier", default=None, help="adapter or model folder for /classify; default: the shipped one; or 'none'")
    add("--p95-ms", type=float, default=2000.0, help="the promise: 95%% of the answers take no longer")
    add("--floor", type=float, default=None, help="least alpha of all; default: what --loss allows by --curve")
    add("--loss", type=float, default=1.0, help="points of accuracy that the classifier may lose in a rush")
    add(
        "--curve",
        default=None,
        help="a result file: the classifier's accuracy by alpha; default: the shipped one's",
    )
    add("--policy", choices=POLICIES, default="controller", help="what to compare with")
    add("--reference", type=int, default=256, help="tokens of a usual request, which is what costs are timed for")
    add("--batch", type=int, default=8, help="requests in a batch at most")
    add("--max-tokens", type=int, default=1024, help="of a prompt and its completion")
    add("--max-jobs", type=int, default=256, help="requests in the house at most, of each replica and model")
    add("--max-body", type=int, default=1 << 20, help="bytes")
    add("--timeout-s", type=float, default=60.0, help="for one request")
    add("--calibrate-s", type=float, default=10.0, help="seconds to time each model; 0: by multiply-accumulates")
    add("--threads", type=int, default=None, help="of torch in each replica; default: the cores, shared")
    add("--device", default="cpu")
    add(
        "--apart",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="models in a process of their own, each replica's; default: on a GPU with --bare",
    )
    add("--replicas", type=int, default=1)
    add("--max-replicas", type=int, default=None, help="let Ray Serve start up to so many as the load asks for them")
    add("--cpus", type=float, default=1.0, help="that each replica reserves in Ray")
    add("--gpus", type=float, default=0.0)
    add("--host", default="127.0.0.1", help=f"address to listen on; set {KEY} before you open it to others")
    add("--port", type=int, default=8000)
    add("--address", default=None, help="a Ray cluster to run on ('auto': the one of this machine); default: a new one")
    add("--bare", action="store_true", help="one replica in this process by uvicorn, without Ray: to measure it alone")
    return made


def check(chosen: argparse.Namespace) -> None:
    """ValueError or OSError for options that no server can keep to, before a model is loaded and timed."""
    for name in ("reference", "batch", "max_tokens", "max_jobs", "max_body", "replicas"):
        check_whole(_option(name), getattr(chosen, name))
    check_whole("--threads", chosen.threads, also={None: "the cores, shared"})
    check_whole("--max-replicas", chosen.max_replicas, chosen.replicas, also={None: "as many as --replicas"})
    check_whole("--port", chosen.port, 0, 65535)
    for name, interval in (("p95_ms", "(0, inf)"), ("timeout_s", "(0, inf)"), ("calibrate_s", "[0, inf)"),
                           ("loss", "[0, inf)"), ("cpus", "[0, inf)"), ("gpus", "[0, inf)")):  # fmt: skip
        check_number(_option(name), getattr(chosen, name), interval)
    if chosen.floor is not None:
        check_number("--floor", chosen.floor, "(0, 1]")
    if chosen.model == chosen.classifier == "none":
        raise ValueError("there is neither a model nor a classifier: name one of them with --model or --classifier.")
    if chosen.curve is not None and not Path(chosen.curve).is_file():
        raise FileNotFoundError(f"there is no accuracy curve {chosen.curve}. Give a result file, or --floor.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings(chosen: argparse.Namespace):
    """The replica's settings from the command line and the environment."""
    from zsaa.serve.furnish import Settings

    given = {f.name: getattr(chosen, f.name) for f in fields(Settings) if hasattr(chosen, f.name)}
    for name in ("classifier", "curve"):
        if given[name] is None:
            del given[name]
    if given["apart"] is None:
        given["apart"] = chosen.bare and chosen.device != "cpu"
    for name in ("model", "classifier"):
        if given.get(name) == "none":
            given[name] = None
    hosts = LOOPBACK if chosen.host in LOOPBACK else ()
    return Settings(**given, key=os.environ.get(KEY) or None, hosts=hosts)


def bare(chosen: argparse.Namespace) -> None:
    """The same application without Ray: no router, no proxy, no second process."""
    with needed():
        import uvicorn

        from zsaa.serve import app as http
        from zsaa.serve.furnish import furnish
        from zsaa.serve.lane import settle
    from zsaa.models import AssetError

    plan = settings(chosen)
    try:
        house = furnish(plan)
    except (AssetError, ValueError, OSError) as error:  # a model that is not there, most likely
        sys.exit(f"zsaa.serve: {error}")
    app = http.build(house, plan.key, plan.hosts, plan.max_body)
    settle()
    quiet = {"log_level": "warning", "access_log": False}
    uvicorn.run(app, host=chosen.host, port=chosen.port, timeout_keep_alive=KEEPS_S, **quiet)


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Imports of packages that only the server needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"the server needs {error.name}, which is not installed: pip install 'zsaa[serve]'")


def main() -> None:
    made = parser()
    chosen = made.parse_args()
    try:
        check(chosen)
    except (ValueError, OSError) as error:
        made.error(str(error))
    if chosen.bare:
        return bare(chosen)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with needed():
        import ray
        from ray import serve
    from zsaa.serve.cluster import NAME, application

    plan = settings(chosen)
    if chosen.host not in LOOPBACK and plan.key is None:
        print(f"warning: {chosen.host} can be reached by others, and no key is asked for. Set {KEY}.", file=sys.stderr)
    local = {} if chosen.address else {"include_dashboard": False}
    if not chosen.address:
        local["num_cpus"] = max(os.cpu_count() or 1, (chosen.max_replicas or chosen.replicas) * chosen.cpus)
    ray.init(address=chosen.address, log_to_driver=True, **local)
    serve.start(http_options={"host": chosen.host, "port": chosen.port})
    app = application(plan, chosen.replicas, chosen.max_replicas, chosen.cpus, chosen.gpus)
    serve.run(app, name=NAME, route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"serving on http://{chosen.host}:{chosen.port}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        if not chosen.address:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
