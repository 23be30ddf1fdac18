"""How kernels share the processor with other programs, and the benchmark of it (tools/busy.py)."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zsaa.kit.runner import environment

BUSY = Path(__file__).resolve().parents[1] / "tools" / "busy.py"
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


@pytest.fixture
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(environment, "cpu_quota", lambda: math.inf)
    return monkeypatch


def test_threads_wait_without_spinning_and_what_the_user_chose_stays(bare):
    assert environment.threads() == environment.WAITING
    assert environment.variables("folder", {})["OMP_WAIT_POLICY"] == "PASSIVE"
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        with bare.context() as patch:
            patch.setenv(name, "7")
            assert environment.threads() == {}
            assert "GOMP_SPINCOUNT" not in environment.variables("folder", {})


@pytest.mark.parametrize(("quota", "threads"), [(math.inf, None), (8, None), (2.0, "2"), (3.7, "3"), (0.5, "1")])
def test_no_more_threads_than_the_control_group_grants(bare, quota, threads):
    bare.setattr(environment, "cpu_quota", lambda: quota)
    assert environment.threads().get("OMP_NUM_THREADS") == threads
    bare.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in environment.threads()


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/job/step", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000"}, 2.0),
        ("0::/job/step", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "50000 100000"}, 0.5),
        ("0::/../elsewhere", {"cpu.max": "300000 100000"}, 3.0),
        ("3:pids:/a\n2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5),
        ("2:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
        ("2:cpu:/of/the/host", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0),
        ("no control groups", {}, math.inf),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups_of_both_versions(tmp_path, own, files, quota):
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text + "\n")
    assert environment.cpu_quota(tmp_path / "own", tmp_path / "tree") == quota
    assert environment.cpu_quota(tmp_path / "not there") == math.inf


def test_the_benchmark_compares_idle_and_loaded_steps_in_turn(monkeypatch):
    """With workers that need a second, and three under load."""
    spec = importlib.util.spec_from_file_location("busy", BUSY)
    busy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(busy)
    state = {"loaded": False}

    class Load(subprocess.Popen):
        def send_signal(self, signum):
            if signum in (busy.signal.SIGCONT, busy.signal.SIGSTOP):
                state["loaded"] = signum == busy.signal.SIGCONT
            super().send_signal(signum)

    def ask(worker, step):
        return 3.0 if state["loaded"] and step == "train" else 1.0

    monkeypatch.setattr(busy.subprocess, "Popen", Load)
    monkeypatch.setattr(busy, "start", lambda variables: Load([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
    monkeypatch.setattr(busy, "ask", ask)
    monkeypatch.setattr(busy, "share", lambda: 4.0 if state["loaded"] else 2.0)
    rows = busy.measure(load=2, rounds=2)
    steps = {(name, step) for name in busy.settings() for step in busy.STEPS}
    assert {(r["setting"], r["step"]) for r in rows} == {("share", "share")} | steps
    assert {r["cost"] for r in rows if r["step"] == "train"} == {3.0}
    assert {r["cost"] for r in rows if r["step"] == "prefill"} == {1.0}
    assert rows[0]["cost"] == 2.0 and rows[0]["loaded_range_s"] == [4.0, 4.0]


def test_committed_a_load_costs_no_more_than_its_share_of_the_cores():
    """With the very variables that kernels get."""
    result = json.loads((BUSY.parents[1] / "results/speed/cpu/busy.json").read_text())
    facts = result["provenance"]
    assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"]) and not facts["dirty"] and result["others"]["note"]
    cost = {(row["setting"], row["step"]): row["cost"] for row in result["rows"]}
    steps = {step for setting, step in cost if setting == "kit"}
    assert steps == {"train", "prefill", "decode"}
    for step in steps:
        assert cost["kit", step] <= cost["share", "share"] < cost["library", step]
    (variables,) = {json.dumps(row["variables"]) for row in result["rows"] if row["setting"] == "kit"}
    assert json.loads(variables) == environment.WAITING
