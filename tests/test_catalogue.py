"""results/README.md is in step and leaves no file out, its three lines draw, and every file keeps to schema.yaml."""

import json
import re
import shlex
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import folds, run
from zsaa.kit import catalogue, store

SCHEMA = jsonschema.Draft202012Validator(yaml.safe_load((store.RESULTS / "schema.yaml").read_text()))


def test_the_committed_page_is_what_the_notes_and_the_files_say():
    """If this fails: make figures."""
    assert catalogue.catalogue() == (store.RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_command_that_a_row_s_fields_tell_makes_that_file_with_those_settings(monkeypatch):
    """All but readings, of which a file's name is all that they are told."""
    config, asked = run.load_config(), []

    def cached(path, unit, compute):
        asked.append((path, unit))
        return {"rows": [], "log": {"steps": 0, "seconds": 0}}

    for module in (run, folds):
        monkeypatch.setattr(module, "cached", cached)
    monkeypatch.setattr(run, "load_config", lambda: config)
    monkeypatch.setattr(run, "_code", lambda *modules: "")
    seen = 0
    for name, result in store.all_results(store.RESULTS):
        command = catalogue.command_of(name, result)
        if result["kind"] != "ablation" or "unit" not in result or "--rows" not in (command or ""):
            continue
        _, _, program, *options = shlex.split(command)
        {"ablation.run": run, "ablation.folds": folds}[program].main(options)
        (path, unit), seen = asked.pop(), seen + 1
        assert path.name == name.rsplit("/", 1)[-1] and unit["model"] == result["model"]["name"]
        asks = json.loads(json.dumps(unit["training"]))
        told = {key: value for key, value in result["training"].items() if key in asks}
        assert {key: asks[key] for key in told} == told, name
    assert seen > 200


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed/a.json").write_text(
        json.dumps({"kind": "x", "provenance": {"eval_samples": 1200, "date": "2000-01-02T"}})
    )
    (tmp_path / "notes.yaml").write_text('- question: Why?\n  notes: [{files: ["speed/a*.json"], what: "one | two"}]\n')
    return tmp_path


def test_a_file_without_a_note_and_a_note_without_a_file_are_named(folder):
    assert "| `speed/a*.json` | one \\| two | 1 | 1,200 | - | 2000-01-02 |" in catalogue.catalogue(folder)
    (folder / "speed/b.json").write_text((folder / "speed/a.json").read_text())
    with pytest.raises(ValueError, match=r"says nothing of speed/b\.json: add a note"):
        catalogue.catalogue(folder)
    for name in ("speed/a.json", "speed/b.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"notes of files that are not there: \[\['speed/a\*\.json'\]\]"):
        catalogue.catalogue(folder)


def test_a_file_that_lies_loose_is_refused(folder):
    (folder / "speed/a.json").rename(folder / "a.json")
    with pytest.raises(ValueError, match=r"lie loose in results/: \['a\.json'\]. Move them"):
        catalogue.catalogue(folder)


def test_any_figure_in_three_lines(monkeypatch):
    """The page's own example."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(store.RESULTS.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (store.RESULTS / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    (line,) = matplotlib.pyplot.gcf().axes[0].lines
    rows = store.rows_of(next(r for r in store.load_results() if r.get("name") == "imdb-alpha-sampled"), "alpha")
    assert list(line.get_ydata()) == [row["accuracy"] for row in rows]
    matplotlib.pyplot.close("all")


def test_every_result_file_keeps_to_the_schema():
    for name, result in store.all_results():
        assert not [f"{name}: {'/'.join(map(str, e.path))}: {e.message}" for e in SCHEMA.iter_errors(result)][:3]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"kind": None}, "kind"), ({"rows": [{"accuracy": 101.0}]}, "rows/0/accuracy"),
        ({"rows": [{"right": "yes"}]}, "rows/0/right"),
        ({"provenance": {"commit": "c0ffee"}}, "provenance/commit"),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_wrong(change, where):
    result = {**next(r for r in store.load_results() if r["kind"] == "curve"), **change}
    assert where in {"/".join(map(str, error.path)) for error in SCHEMA.iter_errors(result)}
