"""A repository in a temporary folder, with notebooks so small that the runner's tests can run them."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat

from zsaa.kit.runner import command

RUNNER = Path(command.__file__).parents[2] / "runner.py"
PARAMETERS = "n = 1\nrate = 0.5\nnames = ['a']\nflag = False\nfree = None\noutput_dir = '.'"
WRITE = """
import json, pathlib
out = pathlib.Path(output_dir, "results")
out.mkdir(parents=True, exist_ok=True)
count = out / f"{NAME}.json"
runs = json.loads(count.read_text())["runs"] + 1 if count.exists() else 1
count.write_text(json.dumps({"runs": runs, "n": n, "rate": rate, "names": names, "flag": flag}))
"""


def make_notebook(path, *cells, parameters=PARAMETERS):
    """Writes a notebook whose cells follow a parameters cell; a cell that starts with # is markdown."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    new = [(nbformat.v4.new_markdown_cell if c.startswith("#") else nbformat.v4.new_code_cell)(c) for c in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {path.stem}"), first, *new])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


class Tree:
    """A repository in a temporary folder with the notebooks first and second, each counting its runs."""

    def __init__(self, root):
        self.root, self.out = root, root / "outputs" / "smoke"
        self.notebook("first")
        self.notebook("second")
        write(root / "zsaa" / "code.py", "x = 1\n")
        write(root / "requirements.lock", "torch==1\n")
        write(root / "results" / "old.json", "{}\n")
        self.profiles("{n: 3, rate: 2.0e-5, names: [b, c], flag: true}")

    def notebook(self, name, *cells):
        make_notebook(self.root / "notebooks" / f"{name}.ipynb", f"NAME = {name!r}", *(cells or [WRITE]))

    def profiles(self, first="{}"):
        write(
            self.root / "notebooks" / "profiles.yaml",
            f"""
            smoke:
              about: two notebooks
              notebooks:
                first:
                  minutes: 2
                  parameters: {first}
                second:
            other:
              notebooks: {{second: }}
            """,
        )

    def run(self, *arguments):
        return command.main(["--root", str(self.root), *arguments])

    def runs(self, name):
        return json.loads((self.out / "results" / f"{name}.json").read_text())["runs"]

    def done(self, name):
        assert (self.out / "done" / f"{name}.json").exists() == (self.out / f"executed/{name}.ipynb").exists()
        return (self.out / "done" / f"{name}.json").exists()

    def log(self, name):
        return (self.out / "logs" / f"{name}.log").read_text()


# A stand-in for the process that writes the index page; it keeps what zsaa.kit.report.index would get in index.json.
PAGE = """
import os, sys
path = os.path.join(sys.argv[1], "index.json")
with open(path, "w") as file:
    file.write(sys.stdin.read())
print(path)
"""


def page_command(text):
    return [sys.executable, "-I", "-S", "-c", text]


def index(tree):
    return {status["name"]: status for status in json.loads((tree.out / "index.json").read_text())}


# ./run_all.sh as a process: the runner by its path, with the stand-in for the index page. torch is not to be imported
# there: a run that is stopped while it imports would import the broken rest again.
DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("runner", {path!r})
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
command = runner.load_kit()
sys.modules["zsaa_kit.runner.page"].COMMAND = {page!r}
code = command.main(["--root", {root!r}, *{arguments!r}])
assert not {{"torch", "zsaa"}} & set(sys.modules)
sys.exit(code)
"""


def driver(tree, *arguments):
    code = DRIVER.format(path=str(RUNNER), page=page_command(PAGE), root=str(tree.root), arguments=arguments)
    return [sys.executable, "-I", "-c", code]


def wait(done, seconds):
    """Until done() is true, and no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def is_running(pid):
    """True unless the process is gone or a zombie that nobody has waited for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
