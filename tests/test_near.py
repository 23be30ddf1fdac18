"""Near prompts: what an embedding overlooks, and the label that has to be asked for."""

import numpy as np
import pytest

from zsaa.reuse.near import Near, same_facts

VECTORS = {
    "Did Anna call Ben?": (1.0, 0.0),
    "Did Ben call Anna?": (0.999, 0.045),
    "did Anna call Ben": (0.99, 0.141),
    "Who won in 1931?": (0.0, 1.0),
}


def embed(texts):
    found = np.array([VECTORS[text] for text in texts], dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("Did Anna call Ben?", "Did Ben call Anna?", False),
        ("Is the ferry late?", "Is the ferry not late?", False),
        ("He does n't know.", "He doesn't know.", True),
        ("Who won in 1931?", "Who won in 1932?", False),
        ("How many of the two crates?", "How many of the three crates?", False),
        ("Who opened it?", "When was it opened?", False),
        ("The captain saw Mara.", "Mara was seen.", False),
        ("In short, the boat of Jonas sank.", "To be brief, the ship of Jonas sank", True),
    ],
)
def test_the_facts_of_a_text_are_told_from_those_of_its_neighbour(one, other, same):
    assert same_facts(one, other) == same_facts(other, one) == same


def test_a_near_prompt_is_a_hit_only_if_its_facts_agree():
    near = Near(embed, threshold=0.95, unsafe=True)
    assert near.get("Did Anna call Ben?") is None
    near.put("Did Anna call Ben?", "yes")
    near.put("Who won in 1931?", "nobody")
    hit = near.get("did Anna call Ben")
    assert (hit.answer, hit.matched) == ("yes", "Did Anna call Ben?") and 0.98 < hit.similarity < 1
    assert near.get("Did Ben call Anna?") is None
    assert near.counts == {"misses": 2, "hits": 1, "refuted": 1}
    careless = Near(embed, threshold=0.95, verify=None, unsafe=True)
    careless.put("Did Anna call Ben?", "yes")
    assert careless.get("Did Ben call Anna?").answer == "yes"  # what the label warns of
    assert careless.get("Who won in 1931?") is None


def test_unsafe_has_to_be_said():
    with pytest.raises(ValueError, match="Say unsafe=True"):
        Near(embed)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 2"):
        Near(embed, threshold=2, unsafe=True)
