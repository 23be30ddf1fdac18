"""The kit's place in the house: what imports it, what counts as code that changes numbers, and names that moved."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from zsaa.kit import architectures, store
from zsaa.measure import once


@pytest.mark.full
def test_training_and_evaluation_import_nothing_that_reports():
    """Of the kit they use what needs no other package: how a file is written, and what time and energy were spent."""
    code = (
        "import sys, zsaa.finetune, zsaa.evaluation.accuracy;"
        "print(*(m for m in sys.modules if m.startswith('zsaa.kit')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {"zsaa.kit", "zsaa.kit.energy", "zsaa.kit.files"}


def test_all_code_that_can_change_a_number_is_in_the_cache_key():
    found = once._sources()
    assert {"evaluation/accuracy.py", "slider/engine.py", "kernels/attention.py", "kit/audit.py"} <= {*found}
    assert {"studies/accuracy.py", "studies/training.py", "bench/prefill.py", "evaluation/language.py"} <= {*found}
    assert not [
        name for name in found if name.startswith(("kit/tables", "kit/figures", "kit/report", "kit/paper", "kit/equal"))
    ]
    assert all(path.is_file() for path in found.values())


def test_commands_that_result_files_name_are_still_there():
    written = [result.get("command") or "" for result in store.load_results()]
    commands = {text.split()[2] for text in written if text.startswith("python -m")}
    assert {"zsaa.audit", "zsaa.architectures"} <= commands
    assert all(find_spec(module) for module in commands)


def test_a_command_writes_no_committed_file_unless_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    architectures.main([])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")] == [
        "outputs/audit/architectures.json"
    ]


@pytest.mark.full
@pytest.mark.parametrize("module", ["zsaa.audit", "zsaa.architectures"])
def test_an_old_name_runs_what_moved(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"zsaa.kit.{module[5:]}" in done.stdout, done.stderr
