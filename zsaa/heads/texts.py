"""Parts of a prompt told by their text: which of its tokens are the document, which are the question.

    model.generate(**prompt, document=document, question=question, tokenizer=tokenizer, alpha=0.3)

The prompt may be made in any way, by a chat template for one: its tokens are decoded, and the text is looked for in
what they say.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsaa.call import MASKS
from zsaa.guards import check_mask
from zsaa.rule import ASKERS

DOCUMENT = "document"


def masks_of(ids: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """The masks of a prompt by name, see `zsaa.enable`: taken out of the `options` of a `generate`, which leaves it
    those that are its own, or made of the texts there. ids: the prompt's, [batch, tokens].

    question, exempt: a mask, or a text or one for each sample, whose tokens are meant. document: texts alone; all
    tokens but theirs are exempt. Without it what follows a question's text within ASKERS tokens, such as a chat's
    closing marks, is. Where a text occurs more than once, its last place counts. TypeError or ValueError for what is
    neither, or not in the prompt.
    """
    given = {name: options.pop(name) for name in (*MASKS, DOCUMENT) if options.get(name) is not None}
    masks: dict[str, Tensor] = {}
    tokenizer, told = options.get("tokenizer"), []
    for name, value in given.items():
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
            masks[name] = _marked(name, texts, ids, tokenizer)
            told.append(name)
        elif name == DOCUMENT:
            raise TypeError(
                f"document must be a text of the prompt, or a list of one for each sample, got a "
                f"{type(value).__name__}. For a mask of its tokens give exempt=~mask: all others stay."
            )
        else:
            masks[name] = check_mask(name, value)
    outside = None
    if DOCUMENT in masks:
        outside = ~masks.pop(DOCUMENT)
    elif "question" in told:
        outside = _behind(masks["question"])
    if outside is not None:
        real = options.get("attention_mask")
        outside = outside if real is None else outside & (real != 0).to(outside.device)
        masks["exempt"] = outside | masks["exempt"] if "exempt" in masks else outside
    return masks


def _behind(question: Tensor) -> Tensor:
    """The columns after the question's in each sample, where they are no more than ASKERS."""
    places = torch.arange(question.shape[1], device=question.device)
    last = (question * places).amax(dim=1, keepdim=True)
    return (places > last) & (question.shape[1] - 1 - last <= ASKERS)


def _marked(name: str, texts: Sequence[str], ids: Any, tokenizer: Any) -> Tensor:
    """Bool [batch, tokens]: the tokens of each sample's text, those of the only one in every sample."""
    if tokenizer is None:
        raise ValueError(
            f"{name}={texts[0]!r:.60} is a text, which is found by the prompt's tokenizer: give tokenizer=, too, or a "
            "bool mask [batch, tokens]."
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(f"{name}={texts[0]!r:.60} is a text, and this call gives no input_ids: give a bool mask.")
    if len(texts) not in (1, len(ids)):
        raise ValueError(
            f"{name} has {len(texts)} texts, and the prompt {len(ids)} samples: give one for each, or one for all."
        )
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for sample, row in enumerate(ids.tolist()):
        text = texts[sample % len(texts)]
        place = find(tokenizer, row, text)
        if place is None:
            raise ValueError(
                f"{name}={text!r:.60} is not in sample {sample} of the prompt, as its tokens read: give it word for "
                "word as it stands there (a truncated prompt may have lost it), or a bool mask [batch, tokens]."
            )
        mask[sample, place.start : place.stop] = True
    return mask


def find(tokenizer: Any, ids: Sequence[int], text: str) -> range | None:
    """The fewest tokens of `ids` that hold the last place of `text`; None if there is none. Space around it, and how
    accents are composed, do not matter."""
    wanted = unicodedata.normalize("NFC", text).strip()

    def holds(start: int, stop: int) -> bool:
        said = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return wanted in unicodedata.normalize("NFC", said)

    end = len(ids)
    if not wanted or not holds(0, end):
        return None
    # What holds it still does with more tokens, so both ends are found by bisection.
    start = bisect_left(range(end), True, key=lambda at: not holds(at, end)) - 1
    return range(start, bisect_left(range(end + 1), True, lo=start, key=lambda stop: holds(start, stop)))
