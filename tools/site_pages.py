"""Make the documentation site, build/site, from the repository: python tools/site_pages.py [--outputs FOLDER]

Pages keep their places (README.md, docs/, results/README.md), so that their links stay as they are; what they link to
besides comes along as it is. A notebook is a page with its outputs, as a run left it (outputs/ci, outputs/smoke, or the
folder that is named); one that was not run there is shown without outputs, and says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build/pages", ROOT / "build/site"
SOURCE = "https://github.com/zsaa-kit/zsaa/blob/main"  # for what is no page and no file: folders
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FETCHED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=.?https?:[^>]*>|<link\b(?=[^>]*stylesheet)[^>]*https?:[^>]*>")
BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*colab-badge\.svg\)\]\(([^)]*)\)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, help="the output folder of a run; default: outputs/ci, outputs/smoke")
    arguments = parser.parse_args()
    if missing := [name for name in ("material", "nbconvert") if not find_spec(name)]:
        lacking = ", ".join(missing)
        print(f"make site needs the extra docs ({lacking} missing): pip install 'zsaa[docs]'", file=sys.stderr)
        return 1
    runs = [arguments.outputs] if arguments.outputs else [ROOT / "outputs/ci", ROOT / "outputs/smoke"]
    shutil.rmtree(PAGES, ignore_errors=True)
    notebooks = [notebook_page(path, runs) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")]
    for path in [*pages, *sorted((ROOT / "docs").rglob("*.md"))]:
        place = path.relative_to(ROOT)
        put(PAGES / place, carried(path.read_text(encoding="utf-8"), place.parent))
    for name in ("docs/slider.html", "tools/site.css"):
        bring(ROOT / name)
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = "".join(f"\n      - {place}" for place in notebooks)
    made = ROOT / "build/mkdocs.yml"
    put(made, re.sub(r" NOTEBOOKS\b.*", lambda _: listed, settings).replace(": build/", ": "))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "-f", made]
    code = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode
    return code or report(fetched(SITE))


def fetched(site: Path) -> list[str]:
    """What pages of `site` would fetch from elsewhere when they are viewed; the slider's page holds all it needs."""
    pages = [(page, page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))]
    return [f"{page.relative_to(site)}: {tag[:120]}" for page, text in pages for tag in FETCHED.findall(text)]


def report(found: list[str]) -> int:
    if found:
        print("the site would fetch this when it is viewed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    print(f"{SITE / 'index.html'}: {len(list(SITE.rglob('*.html')))} pages")
    return 0


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def bring(path: Path) -> None:
    """A file of the repository, at the same place of the site."""
    target = PAGES / path.relative_to(ROOT)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def carried(text: str, folder: Path) -> str:
    """The page's text; files that it links to are brought along, and links to folders lead to the repository.
    `folder`: the page's own, from the root. What leads nowhere stays, for mkdocs to complain of."""

    def one(match: re.Match) -> str:
        link = match[1]
        path, _, anchor = unquote(link).partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return link
        target = (ROOT / folder / path).resolve()
        if not target.is_relative_to(ROOT):
            return link
        if target.is_dir():
            return f"{SOURCE}/{target.relative_to(ROOT).as_posix()}"
        if target.suffix == ".ipynb":
            return path.removesuffix(".ipynb") + ".md" + (f"#{anchor}" if anchor else "")
        if target.is_file() and target.suffix != ".md":
            bring(target)
        return link

    return LINK.sub(one, text)


def notebook_page(path: Path, runs: list[Path]) -> str:
    """Writes the page of a notebook, with its outputs where a run has them; returns its place in the site."""
    import nbformat
    from nbconvert import MarkdownExporter

    executed = next((run / "executed" / path.name for run in runs if (run / "executed" / path.name).is_file()), None)
    notebook = nbformat.read(executed or path, 4)
    for cell in notebook.cells:  # progress bars and warnings are for those who wait, not for those who read
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    folder = PAGES / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():  # pictures: output_7_0.png
        (folder / f"{path.stem}_{name}").write_bytes(data)
        text = text.replace(f"({name})", f"({path.stem}_{name})")
    text = BADGE.sub(r"[Open in Colab](\1)", text).replace(f"{ROOT}/", "../")  # not where it was made
    if executed is None:
        text = text.replace("\n", "\n\n*Not run for this site: its cells are shown without outputs.*\n", 1)
    put(folder / f"{path.stem}.md", carried(text, Path("notebooks")))
    return f"notebooks/{path.stem}.md"


if __name__ == "__main__":
    sys.exit(main())
