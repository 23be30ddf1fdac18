"""The report as pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsaa.kit.files import write_text
from zsaa.kit.report import view as views


def render(template: str, view: dict) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        autoescape=template.endswith(".html"), keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["slug"] = lambda verdict: verdict.replace(" ", "-")
    environment.filters["line"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.get_template(template).render(view)


def index(output_dir: str | Path, statuses: Sequence[dict] = ()) -> Path:
    """Write output_dir/index.html and index.md: what this run measured, with the committed results beside it; returns
    the page's path.

    statuses: one dict per notebook, from the runner: name, status, and optionally message, seconds, gpu_joules,
    cpu_joules, and the paths of the executed notebook and the log relative to output_dir.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    view = views.gather(views.Sources({"this run": output_dir, "committed": views.ROOT}, output_dir), statuses)
    write_text(output_dir / "index.html", render("report.html", view))
    write_text(output_dir / "index.md", render("report.md", view))
    return output_dir / "index.html"


def committed(folder: str | Path) -> list[Path]:
    """Write report.html and report.md of the committed results into `folder` (the repository's docs/); returns both."""
    folder = Path(folder)
    view = views.gather(views.Sources({"committed": views.ROOT}, folder))
    for name in ("report.html", "report.md"):
        write_text(folder / name, render(name, view))
    return [folder / "report.html", folder / "report.md"]
