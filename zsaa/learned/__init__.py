"""Scores that were taught: children of the decoder that say, in place of attention, which tokens go on."""

from typing import Any

from zsaa.learned import asked, salience
from zsaa.learned.salience import Learned
from zsaa.rule import ASKED, LEARNED


def scorer_for(decoder: Any, score: str) -> Learned | None:
    """What is to score on `decoder`: its own scorer, or the one that was saved with it; None for a score that was not
    taught. ValueError if there is none."""
    needed = {LEARNED: salience.needed, ASKED: asked.needed}.get(score)
    return None if needed is None else needed(decoder)
