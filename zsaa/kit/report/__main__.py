"""python -m zsaa.kit.report      docs/report.html and docs/report.md from the committed results (make report)"""

from zsaa.kit.report import committed
from zsaa.kit.report.view import ROOT

for written in committed(ROOT / "docs"):
    print(written)
