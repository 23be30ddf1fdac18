"""A task where the deciding words may stand anywhere: one marked sentence among unmarked ones that contradict it.

Every passage is made of real one-sentence reviews (Rotten Tomatoes). One of them, at a random place, is marked as the
verdict, and its sentiment is the label; the others are drawn in equal numbers from both sentiments. Whoever reads only
one end of the passage must fail as often as the verdict stands elsewhere.
"""

from __future__ import annotations

import random

MARK = "Verdict: "


def passages(texts: list[str], labels: list[int], sentences: int, seed: int) -> tuple[list[str], list[int], list[int]]:
    """One passage per text: (passages, labels, place of the verdict in each, 0 to sentences - 1). Fillers come from the
    same texts, so give train and test apart."""
    if sentences % 2 == 0 or sentences < 3:
        raise ValueError(f"sentences is {sentences}; it must be odd and at least 3, so that the fillers balance.")
    order = random.Random(f"depth {seed}")
    by_label = {label: [i for i, other in enumerate(labels) if other == label] for label in (0, 1)}
    made, places = [], []
    for index, text in enumerate(texts):
        half = (sentences - 1) // 2
        fillers = [i for label in (0, 1) for i in order.sample(by_label[label], half + 1) if i != index]
        kept = [i for i in fillers if labels[i] == 0][:half] + [i for i in fillers if labels[i] == 1][:half]
        order.shuffle(kept)
        place = order.randrange(sentences)
        lines = [texts[i].strip() for i in kept]
        lines.insert(place, MARK + text.strip())
        made.append("\n".join(lines))
        places.append(place)
    return made, list(labels), places
