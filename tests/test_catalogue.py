"""results/README.md is in step and leaves no file out, its three lines draw, and every file keeps to schema.yaml."""

import json
import re

import jsonschema
import pytest
import yaml

from zsaa.kit import catalogue, store

SCHEMA = jsonschema.Draft202012Validator(yaml.safe_load((store.RESULTS / "schema.yaml").read_text()))


def test_the_committed_page_is_what_the_notes_and_the_files_say():
    """If this fails: make figures."""
    assert catalogue.catalogue() == (store.RESULTS / "README.md").read_text(encoding="utf-8")


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
