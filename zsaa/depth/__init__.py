"""Fewer layers: which block of layers changes least what passes through it, and a model without it.

The rival next door of fewer tokens. By angular distance as in Gromov et al. (arXiv 2403.17887), which the paper on
optimization strategies beside this one follows (its section 3.1 and Figure 5), and by ShortGPT's block influence
(arXiv 2403.03853).
"""

from zsaa.depth.remove import origin_of, remove_layers
from zsaa.depth.similarity import Similarity, similarity

__all__ = ["Similarity", "origin_of", "remove_layers", "similarity"]
