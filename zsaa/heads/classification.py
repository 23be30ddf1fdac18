"""Classifiers: which row of each text the head reads, and so where a text ends."""

from __future__ import annotations

import torch
from torch import Tensor

from zsaa.call import Call
from zsaa.families import Part


def reads(owner: Part) -> str | None:
    """How the head of `owner` reads the decoder: "row" for a classifier of transformers, which reads one row of each
    sample (see `read_rows`); "own" for a subclass with a forward of its own, which may read others; else None."""
    if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(owner).__mro__):
        return None
    return "row" if type(owner).forward.__module__.startswith("transformers.") else "own"


def read_rows(how: str, call: Call) -> Tensor | None:
    """The mask bool [batch, tokens] (None: all) of a classifier's texts, each of which ends in the row that its head
    reads: what follows cannot influence that row, and is not to be kept in its place.

    The head's rule is transformers': the last token that is not config.pad_token_id, or the first token if there is
    none; the last column where no pad token is set, or embeddings are given. ValueError if that row is padding by the
    mask, and, for a head with a forward of its own (how: "own"), if it is not the last real token.
    """
    (batch, width), ids, mask, pad = call.shape, call.ids, call.real, call.decoder.config.pad_token_id
    if ids is None or pad is None:
        if mask is None:
            return None
        read = torch.full((batch,), width - 1, device=mask.device)
    else:
        columns = torch.arange(width, device=ids.device)
        read = ((ids != pad) * columns).argmax(dim=1)
    columns = torch.arange(width, device=read.device)
    real = torch.ones(batch, width, dtype=torch.bool, device=read.device) if mask is None else mask
    after = real & (columns > read[:, None])
    padded = ~real.gather(1, read[:, None])[:, 0]
    wrong, longer = torch.stack([padded, after.any(dim=1)]).tolist()
    if any(wrong):
        sample = wrong.index(True)
        rule = (
            "the last row, as it is given inputs_embeds"
            if ids is None
            else f"the last token that is not {pad}, the pad"
        )
        rule = "the last row, as the model has no pad_token_id" if ids is not None and pad is None else rule
        raise ValueError(
            f"the classifier's head reads column {int(read[sample])} of sample {sample} ({rule}), which is padding by "
            "its attention_mask. Pad on the left, pad with the model's pad_token_id, or set alpha to 1 for this call."
        )
    if not any(longer):
        return mask
    if how == "own":
        sample = longer.index(True)
        raise ValueError(
            f"sample {sample} ends in tokens equal to the pad token ({pad}) that its attention_mask calls real. A head "
            "with a forward of its own may read the last of them or the last before them, and only one is sure to be "
            "kept. Mask them, set another pad_token_id, or set alpha to 1 for this call."
        )
    return real & ~after
