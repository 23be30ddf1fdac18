"""python -m ablation.show      draws figures/ablation_*.png from results/ablation (part of make figures)"""

from ablation.show import draw_committed
from zsaa.kit.store import RESULTS

for drawn in draw_committed(RESULTS.parent / "figures"):
    print(drawn)
