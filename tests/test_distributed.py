"""Several processes, started as a user would: tests/distributed_worker.py on two CPU processes, once for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from zsaa import finetune
from zsaa.measure import distributed

pytestmark = pytest.mark.full
WORKER = Path(__file__).parent / "distributed_worker.py"
CASES = [
    "ddp, accumulated",
    "ddp, interrupted",
    "ddp, LoRA",
    "fsdp2, accumulated",
    "fsdp2, interrupted",
    "fsdp2, FSDP recomputing",
    "fsdp2, language model",
]
LIMIT = 300  # seconds; it takes about 45 of CPU time


def launch(folder: Path) -> None:
    """Run the worker; leave what it wrote, its exit code and its output in folder/done.json. The launcher chooses a
    free port."""
    out = folder / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER),
               "--out", str(out), "--runs", str(folder / "runs"), "--experiment", "--die",
               "--cases", *CASES]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf")}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except BaseException as error:  # an interrupt by the user, too
        process.terminate()  # not kill: asked to end, the launcher ends its processes first
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        pytest.fail(f"not done after {LIMIT} s:\n{process.communicate()[0][-4000:]}")
    assert out.exists(), output[-4000:]
    done = json.loads(out.read_text()) | {"exit": process.returncode, "output": output}
    (folder / "done.json").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the worker wrote, its exit code, output and folder. The processes of pytest-xdist share one launch."""
    pytest.importorskip("transformers", minversion="5.18", reason="older Trainers cannot resume on several CPUs")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done.json").exists():
            launch(folder)
        return json.loads((folder / "done.json").read_text()) | {"folder": folder}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one_with_twice_the_batch(run, name):
    case = run["cases"][name]
    assert case["processes"] == 2
    assert case["samples_equal"], "the same samples and alpha in each step as in a single process"
    assert case["alphas_equal"], "all processes, and all passes of a step, at one alpha"
    assert len(set(case["alphas"])) == len(case["alphas"]) == 6
    assert case["moved"] > 1e-3
    assert case["max_difference"] < 1e-7  # float64, but for LLaMA's norms, which round to float32 within
    assert case["files"] == ["model"], "the first process saved, once, and cleared the checkpoints away"
    assert case.get("evaluation_equal", True)


def test_evaluation_is_shared_to_the_bit(run):
    (equal,) = run["evaluation"].values()
    assert len(equal) == 10 and all(equal.values()), equal
    assert run["failed"] == [] and run["not_run"] == []


def test_sharded_layers_get_the_dials_object_untouched(run):
    said = run["mixed_precision"]
    assert said["bits_equal"] and said["kept_equal"] and said["fewest_kept"] < 5
    disabled, enabled = said["refusals"]
    assert "wrapped or sharded (FSDPLlamaDecoderLayer). zsaa.set_alpha(model, 1.0)" in disabled
    assert "wrapped or sharded (FSDPLlamaDecoderLayer). Call zsaa.enable before" in enabled


def test_processes_that_are_asked_differently_are_told(run):
    first, second = run["refusals"]["asked differently"]
    assert "process 1 was not given the same samples" in first and "process 0 was not" in second


def test_what_stops_the_first_process_stops_all(run):
    first, second = run["refusals"]["could not save"]
    assert first == "OSError: [Errno 28] No space left on device"
    assert second.startswith("RuntimeError: process 0 of 2 failed") and "No space left" in second


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_experiment_writes_one_file_with_the_bits_of_one_process(run, strategy):
    said = run["experiment"][strategy]
    assert said["exit"] == 0 and said["files"] == ["run.json"] and said["processes"] == 2
    assert said["sharded"] == (strategy == "fsdp2")
    assert said["command"].startswith("torchrun --nproc-per-node 2 -m zsaa.experiment --task imdb")
    assert said["right"] == said["right_alone"] and len(said["right"]) == 21
    assert not said["timed"]


def test_a_process_that_fails_ends_the_others_and_leaves_no_model(run):
    assert run["exit"] != 0
    assert "process 1 fails on purpose" in run["output"]
    assert [p.name for p in (run["folder"] / "runs/died").iterdir()] == ["checkpoints"]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"4 processes .* has 2 GPU\(s\).*--nproc-per-node 2"):
        distributed.start()


def test_alone_nothing_is_started_and_all_works():
    distributed.start()
    assert distributed.place() == (0, 1) and distributed.gather("x") == ["x"]
    done = []
    distributed.on_first(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        distributed.on_first(lambda: 1 / 0)


def test_checkpoints_that_are_incomplete_or_of_other_processes(tmp_path):
    def checkpoint(step, *files):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()

    assert finetune.last_checkpoint(tmp_path / "none") is None
    checkpoint(9, "trainer_state.json", "rng_state.pth")
    checkpoint(10, "trainer_state.json", "rng_state.pth")
    checkpoint(11, "model.safetensors", "rng_state.pth")  # killed while saving
    assert finetune.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    checkpoint(12, "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
    with pytest.raises(ValueError, match=r"checkpoint-12 holds the state of 2 process\(es\), but 1 resume it"):
        finetune.last_checkpoint(tmp_path)
