"""One card for every resource that a model takes: computation, memory, energy, money, communication.

What can be measured is, the rest is computed from the configuration, and each number says which.
"""

from zsaa.card.build import card
from zsaa.card.prices import PRICES, Prices
from zsaa.card.show import Card

__all__ = ["PRICES", "Card", "Prices", "card"]
