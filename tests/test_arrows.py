"""Who may import whom. The method knows nothing of the kit; arrows point one way; there are no cycles.

A room may import what stands in its line, and itself. Imports inside functions count, but for those that LATE names.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
METHOD = [
    *("attention", "cache", "call", "compat", "cost", "dial", "families", "guards", "hook", "layer", "passes"),
    *("rule", "scope", "score", "subclass"),
]
ROOMS = {  # room -> its modules, without "zsaa."
    "method": METHOD,
    "learned": ["learned"],  # scores that were taught
    "dials": ["dials"],  # what a dial is set to, and what it shows
    "heads": ["heads"],  # what a model with a head knows of a call
    "fast": ["fast"],
    "kernels": ["kernels"],
    "files": ["kit.files", "kit.energy", "measure.checks"],  # used by everybody, know nobody
    "measure": ["measure"],
    "budget": ["budget"],
    "card": ["card"],
    "depth": ["depth"],
    "models": ["models"],
    "data": ["data"],
    "training": ["finetune"],
    "evaluation": ["evaluation"],
    "studies": [
        "bench",
        "card.__main__",
        "depth.__main__",
        "depth.combined",
        "depth.draft",
        "depth.speculate",
        "depth.exam",
        "depth.heal",
        "depth.told",
        "depth.study",
        "experiment",
        "glue",
        "mmlu",
        "perplexity",
        "run",
        "studies",
    ],
    "kit": ["kit", "architectures", "audit", "runner"],
    "reuse": ["reuse"],  # prompts that come again
    "serve": ["serve"],
    "slider": ["slider"],
}
MAY = {
    "method": "fast learned heads dials depth",
    "learned": "method",
    "dials": "method",
    "heads": "method",
    "fast": "method depth kernels",  # asks the method for its plain references, and records its passes
    "kernels": "fast",
    "files": "",
    "measure": "files",
    "budget": "method dials depth fast measure",
    "card": "method measure files kit",
    "depth": "method measure",
    "models": "method files",
    "data": "models files",
    "training": "method dials learned heads budget measure models data files package",
    "evaluation": "method dials learned heads budget measure models data training files package",
    "studies": "method dials depth card learned fast kernels budget measure models data evaluation training files kit "
    "package",
    "kit": "method budget card measure models data evaluation training files studies package",
    "reuse": "method fast",
    "serve": "method budget measure models data training files kit package",
    "slider": "method dials learned fast budget measure models data evaluation training files kit package",
}
LATE = {  # types; names of a checkout
    ("hook", "dials.trace"),
    ("passes", "dials.trace"),
    ("budget.saved", "models"),
    ("budget.saved", "zsaa"),
}


def room_of(module: str) -> str:
    if module == "zsaa":
        return "package"  # what it exports: the method, budgets and the slider
    name = module.removeprefix("zsaa.")
    found = [
        (len(m), room) for room, modules in ROOMS.items() for m in modules if name == m or name.startswith(m + ".")
    ]
    return max(found)[1]


def modules() -> dict[str, Path]:
    files = {
        f"zsaa.{'.'.join(p.relative_to(ROOT / 'zsaa').with_suffix('').parts)}": p for p in ROOT.glob("zsaa/**/*.py")
    }
    files |= {f"zsaa.kernels.{p.stem}": p for p in ROOT.glob("kernels/*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


MODULES = modules()


def imports(path: Path, top_only: bool = False) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if top_only and getattr(node, "col_offset", 0):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zsaa":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "zsaa"}
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"zsaa"}))
def test_arrows_point_one_way(module):
    room = room_of(module)
    short = module.removeprefix("zsaa.")
    wrong = [
        other
        for other in imports(MODULES[module])
        if room_of(other) != room
        and room_of(other) not in MAY[room].split()
        and (short, other.removeprefix("zsaa.")) not in LATE
    ]
    assert not wrong, f"{module} (room {room}) imports {wrong}; it may import {MAY[room] or 'nothing'} of zsaa"


def test_no_cycles():
    """Of modules, by what they import when they are imported."""
    graph = {name: imports(path, top_only=True) - {name} for name, path in MODULES.items() if name != "zsaa"}
    packages = {name for name in MODULES if any(other.startswith(name + ".") for other in MODULES)}
    TopologicalSorter({name: others - packages for name, others in graph.items()}).prepare()


def test_the_method_is_small():
    """At most 15 files and 2,500 lines, no function over 60 (its docstring aside)."""
    top = [MODULES[f"zsaa.{name}"] for name in METHOD]
    assert len(top) <= 15
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in top) <= 2500
    for path in top:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                assert node.end_lineno - node.lineno + 1 - said <= 60, f"{path.name}: {node.name} is long"


def test_the_type_checker_looks_at_the_method():
    beside = {"zsaa/heads", "zsaa/learned", "zsaa/dials", "zsaa/depth/stop.py"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["files"]
    assert {f"zsaa/{name}.py" for name in METHOD} | beside <= {*listed}


def test_eq_2_stands_alone():
    """Plain arithmetic: it imports nothing of the package, nor torch."""
    tree = ast.parse(MODULES["zsaa.rule"].read_text(encoding="utf-8"))
    plain = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
    names = plain | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "collections.abc", "functools", "math", "dataclasses", "numbers", "typing"}
