"""python -m zsaa.kit.figures      draws figures/ from the committed results (make figures)"""

from zsaa.kit.figures import draw_committed
from zsaa.kit.store import RESULTS

for drawn in draw_committed(RESULTS.parent / "figures"):
    print(drawn)
