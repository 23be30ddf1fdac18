"""Files that are written in one piece: by one, by many at once, on a full disk, under any umask."""

import os
import stat
import subprocess
import sys
import threading
import zipfile

import pytest

from zsaa.kit import files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        path = files.write_text(tmp_path / "new folder" / "a.json", "{}")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_many_writers_of_one_file_do_not_meet(tmp_path):
    """Threads and processes: each text arrives whole, and no writer takes another's draft for left behind."""
    path, texts = tmp_path / "index.html", [f"{n}" * 50_000 for n in range(8)]
    errors = []

    def write(text):
        try:
            for _ in range(20):
                files.write_text(path, text)
                assert path.read_text() in texts
        except BaseException as error:
            errors.append(error)

    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(files.__file__)!r})\n"  # without zsaa, which imports torch
        "from files import write_text\n"
        "for _ in range(20): write_text(sys.argv[1], sys.argv[2] * 50_000)"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in (6, 7)]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts[:6]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    assert not errors
    assert os.listdir(tmp_path) == ["index.html"]


def test_a_full_disk_keeps_the_old_text_and_leaves_no_draft(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "file.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write_text(path, "new")
    with pytest.raises(OSError, match="No space"), files.draft(path) as own:
        own.write_text("half")
        full()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_readers_do_not_see_a_draft(tmp_path):
    with files.draft(tmp_path / "a.zip") as own:
        assert own.parent == tmp_path and not list(tmp_path.glob("*.zip"))
        with zipfile.ZipFile(own, "w") as archive:
            archive.writestr("a", "b")
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == ["a"]


def test_what_a_killed_process_left_is_cleared_away_and_nothing_else(tmp_path):
    """Names with [ ] in them; the draft of a living process and of another machine; another file's."""
    child = subprocess.Popen(["true"])
    child.wait()
    host, dead = files._host(), child.pid
    kept = [
        tmp_path / f".a[1].json.{host}-{os.getppid()}-00",
        tmp_path / f".a[1].json.ffffffff-{dead}-00",
        tmp_path / f".b.json.{host}-{dead}-00",
        tmp_path / ".a[1].json.my-own-notes",
    ]
    gone = [tmp_path / f".a[1].json.{host}-{dead}-00", tmp_path / ".a[1].json.fffffffe-1-00"]
    for path in kept + gone:
        path.write_text("half")
    os.utime(gone[1], (0, 0))
    files.write_text(tmp_path / "a[1].json", "")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "a[1].json"])


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        *((name, False) for name in ("a.py", "sub/a.json", "a.tmp/a.json", "README.md")),
        *((name, True) for name in (".DS_Store", "sub/.DS_Store", ".a.py.swp", "a.py~", "#a.py#", ".#a.py", "._a.py")),
        *((name, True) for name in (".ipynb_checkpoints/a-checkpoint.py", "__pycache__/a.py", "a.json.bak", "a.orig")),
        *((name, True) for name in ("Thumbs.db", "desktop.ini", "~$a.json", ".~lock.a.csv#", ".nfs0001", "a.rej")),
    ],
)
def test_what_editors_and_systems_leave_is_stray(tmp_path, name, stray):
    assert files.is_stray(tmp_path / ".hidden" / name, tmp_path / ".hidden") == stray
