"""`--bare`: the same paths by uvicorn in one process, where there is no Ray."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny
import torch

pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'zsaa[serve]'")
pytest.importorskip("prometheus_client", reason="the server needs prometheus-client: pip install 'zsaa[serve]'")

import zsaa
from zsaa import finetune
from zsaa.serve.engine import Classifier
from zsaa.serve.load import free_port

TEXT = " ".join(f"w{3 + (7 * i) % 94}" for i in range(30))
WITHOUT_RAY = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('zsaa.serve', run_name='__main__')"


@pytest.fixture(scope="module")
def mood(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mood"
    finetune.save(
        zsaa.enable(tiny.make("llama", "sequence-classification", dtype=torch.float32)), tiny.tokenizer(), folder
    )
    return folder


@pytest.fixture(scope="module")
def address(mood):
    port = free_port()
    options = ["--bare", "--model", "none", "--classifier", str(mood), "--port", str(port)]
    options += ["--floor", "0.7", "--reference", "64", "--calibrate-s", "0", "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-c", WITHOUT_RAY, *options], stderr=subprocess.PIPE, text=True)
    found = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr.read()
            try:
                urllib.request.urlopen(f"{found}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait(60)


def asked(address, body):
    request = urllib.request.Request(f"{address}/classify", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers, json.load(response)


@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_one_process_without_ray_answers_as_the_model_does(address, mood, alpha):
    engine = Classifier(*finetune.load(mood, kind="sequence-classification"))
    headers, content = asked(address, {"input": TEXT, "alpha": alpha})
    (row,) = content["data"]
    assert headers["x-zsaa-alpha"] == f"{alpha:g}" == f"{row['zsaa']['alpha']:g}"
    assert list(row["logits"].values()) == pytest.approx(engine.run([engine.encode(TEXT)], [alpha])[0], abs=1e-4)


def test_one_process_tells_of_itself(address):
    asked(address, {"input": TEXT})
    with urllib.request.urlopen(f"{address}/live", timeout=60) as response:
        (replica,) = json.load(response)["replicas"].values()
    assert replica["mood"]["answered"] >= 1 and replica["mood"]["waiting"] == replica["mood"]["running"] == 0
    with urllib.request.urlopen(f"{address}/", timeout=60) as response:
        assert "<html" in response.read().decode().lower()


WRONG = {
    "--floor 2": "--floor must be in (0, 1], got 2.0",
    "--p95-ms -1": "--p95-ms must be in (0, inf), got -1.0",
    "--threads 0": "--threads must be a whole number, 1 or more, or None (the cores, shared), got 0",
    "--port 99999": "--port must be a whole number from 0 to 65535, got 99999",
    "--batch 0": "--batch must be a whole number, 1 or more, got 0",
    "--replicas 3 --max-replicas 2": "--max-replicas must be a whole number, 3 or more",
    "--curve nowhere.json": "there is no accuracy curve nowhere.json",
    "--model none --classifier none": "neither a model nor a classifier",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_no_server_can_keep_to_is_said_before_a_model_is_loaded(given, monkeypatch, capsys):
    from zsaa.serve import __main__ as command

    monkeypatch.setattr(sys, "argv", ["zsaa.serve", "--bare", *given.split()])
    monkeypatch.setattr(command, "bare", lambda _: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and WRONG[given] in capsys.readouterr().err


def test_a_package_that_the_server_lacks_is_named(monkeypatch):
    from zsaa.serve import __main__ as command

    monkeypatch.setattr(sys, "argv", ["zsaa.serve", "--bare"])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"the server needs uvicorn, which is not installed.*zsaa\[serve\]"):
        command.main()


def test_a_model_that_is_not_there_ends_it_in_a_line(monkeypatch, tmp_path):
    from zsaa.serve import __main__ as command

    monkeypatch.setattr(sys, "argv", ["zsaa.serve", "--bare", "--model", "none", "--classifier", str(tmp_path / "no")])
    with pytest.raises(SystemExit, match=f"^zsaa.serve: there is no folder {tmp_path / 'no'}: "):
        command.main()
