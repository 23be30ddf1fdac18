"""The report: the paper's tables and figures, what was run here, on what, with which verdict, and what was not.

    python -m zsaa.kit.report      docs/report.html and docs/report.md from the committed results (make report)

One page, self-contained; a Markdown summary beside it. `index` writes the same page for a run's output folder, with
the state of its notebooks. Everything comes from result files, the figures drawn from them, zsaa.kit.tables and
zsaa.kit.verdicts; nothing here computes a result, and the same files give the same page.
"""

from zsaa.kit.report.write import committed, index

__all__ = ["committed", "index"]
