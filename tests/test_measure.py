"""Result files that are computed once, and the energy of a block, with made-up counters."""

import json
import sys
import types

import pytest

from zsaa import measure


def test_a_result_is_computed_once_per_settings_code_and_device(tmp_path, monkeypatch):
    path, calls = tmp_path / "results" / "a.json", []

    def compute():
        calls.append(1)
        return {"name": "a", "kind": "test", "rows": [{"n": len(calls), 3: (1, 2)}]}

    def get(**settings):
        return measure.cached(path, settings, compute)["rows"][0]

    assert get(seed=0, sizes=(1, 2)) == {"n": 1, "3": [1, 2]}  # as it is read back
    assert get(seed=0, sizes=[1, 2]) == {"n": 1, "3": [1, 2]}
    assert get(seed=1)["n"] == 2
    path.write_text(path.read_text()[:-20])  # cut off
    assert get(seed=1)["n"] == 3
    path.write_text("[]")
    assert get(seed=1)["n"] == 4
    monkeypatch.setattr(measure, "code_hash", lambda: "other code")
    assert get(seed=1)["n"] == 5
    monkeypatch.setattr(measure, "hardware", lambda *_: {"device": "another"})
    assert get(seed=1)["n"] == 6
    monkeypatch.setenv("ZSAA_NOT_BEFORE", str(path.stat().st_mtime + 1))
    assert get(seed=1)["n"] == 7
    monkeypatch.setenv("ZSAA_NOT_BEFORE", "0")
    assert get(seed=1)["n"] == 7
    stored = json.loads(path.read_text())
    assert stored["unit"]["settings"] == {"seed": 1} and stored["unit"]["device"] == "another"
    assert stored["provenance"]["seconds"] >= 0 and stored["provenance"]["versions"]["torch"]
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_computation_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    measure.cached(path, {"seed": 0}, lambda: {"rows": [], "provenance": {"seconds": 7.0, "seed": 0}})
    assert json.loads(path.read_text())["provenance"]["seconds"] == 7.0  # the caller's own count of its seconds
    before = path.read_text()
    with pytest.raises(ZeroDivisionError):
        measure.cached(path, {"seed": 1}, lambda: {"rows": [1 / 0]})
    with pytest.raises(ValueError, match="JSON"):
        measure.cached(path, {"seed": 1}, lambda: {"rows": [float("nan")]})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".a[1].json.999999").write_text("half")
    (tmp_path / ".b.json.999999").write_text("another file's")
    measure.write_json(tmp_path / "a[1].json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.json.999999", "a[1].json"]


def fake_nvml(counters, supported=True):
    """pynvml for devices with the given energy readings in millijoules, one list each, read one after the other."""

    class NVMLError(Exception):
        pass

    def reading(handle):
        if not supported:
            raise NVMLError("not supported")
        return counters[handle].pop(0)

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(counters),
        nvmlDeviceGetHandleByIndex=lambda i: list(counters)[i],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid.decode(),
        nvmlDeviceGetTotalEnergyConsumption=reading,
    )


@pytest.mark.parametrize(
    ("visible", "joules"), [(None, 3.5), ("0", 1.5), ("GPU-b", 2.0), ("1,0", 3.5), ("", None), ("GPU-c", None)]
)
def test_joules_of_the_gpus_that_the_process_may_use(monkeypatch, visible, joules):
    counters = {"GPU-a": [10_000, 11_500], "GPU-b": [500, 2_500]}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(counters))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if visible == "GPU-c":
        monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetHandleByUUID", lambda uuid: 1 / 0)
    with measure.energy() as spent:
        assert spent == {}
    assert spent["gpu_joules"] == joules
    assert spent["seconds"] >= 0


def test_a_gpu_without_the_counter_and_no_gpu_at_all(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (fake_nvml({"GPU-a": [1, 2]}, supported=False), None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with measure.energy() as spent:
            pass
        assert spent["gpu_joules"] is None


def test_joules_of_the_processor_packages(tmp_path, monkeypatch):
    """Two packages, one of whose counters starts again at zero; parts of a package and the whole board do not count."""
    monkeypatch.setattr(measure, "RAPL", tmp_path)

    def counter(name, domain, value):
        (tmp_path / domain).mkdir(exist_ok=True)
        for file, text in (("name", name), ("energy_uj", value), ("max_energy_range_uj", 9_999_999)):
            (tmp_path / domain / file).write_text(f"{text}\n")

    def counters(first, second):
        counter("package-0", "intel-rapl:0", first)
        counter("package-1", "intel-rapl:1", second)
        counter("core", "intel-rapl:0:0", first)
        counter("psys", "intel-rapl:2", first)

    counters(1_000_000, 9_000_000)
    with measure.energy() as spent:
        counters(3_000_000, 500_000)
    assert spent["cpu_joules"] == 3.5
    (tmp_path / "intel-rapl:1/energy_uj").write_text("unreadable")
    with measure.energy() as spent:
        pass
    assert spent["cpu_joules"] is None


def test_energy_is_known_even_if_the_block_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(KeyError), measure.energy() as spent:
        raise KeyError
    assert spent["seconds"] >= 0
