"""What travels down the decoder in one forward pass: a Prefill that prunes, or a Decode that continues a pruned cache.

The dial's hook makes one such object per pass and hands it to the layers; nothing else knows which tokens are alive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.attention import visible
from zsaa.keep import kept_counts
from zsaa.score import SCORES, select


class Prefill:
    """One pruned pass over whole inputs: which rows are alive, layer after layer.

    Inputs are compacted before the first layer (real tokens first), so padding costs nothing and decides nothing. The
    choice of each layer is stored, so that a replay under gradient checkpointing repeats it instead of re-deciding.

    Stage l is what enters layer l (stage 0: the input). Per stage: `rows` int64 [batch, n], the input rows that are
    alive, in order, and `real` bool [batch, n], or None where no row is padding.
    """

    def __init__(self, dial, shape: tuple[int, int], mask: Tensor | None, device: torch.device):
        self.batch, self.width = shape
        self.score, self.carry = SCORES[dial.score], dial.carry
        self.lengths = [self.width] * self.batch if mask is None else mask.sum(dim=1).tolist()
        if min(self.lengths) == 0:
            empty = self.lengths.index(0)
            raise ValueError(f"sample {empty} of the batch has no real token: its attention_mask is all 0.")
        alphas = dial.alphas(self.batch)
        counts = (kept_counts(n, a, dial.num_layers, dial.tau) for n, a in zip(self.lengths, alphas))
        self.counts = [list(layer) for layer in zip(*counts)]
        self.sizes = torch.tensor([self.lengths, *self.counts], device=device)  # [stages, batch]
        self.samples = torch.arange(self.batch, device=device)[:, None]
        longest = max(self.lengths)
        self.compact = min(self.lengths) < self.width  # are the rows of stage 0 a selection of the input's?
        if self.compact:
            rows = (~mask).int().argsort(dim=1, stable=True)[:, :longest]
        else:
            rows = torch.arange(self.width, device=device).expand(self.batch, -1)
        ragged = min(self.lengths) < longest
        self.rows = [rows]
        self.real = [torch.arange(longest, device=device) < self.sizes[0, :, None] if ragged else None]
        # One causal mask for all layers, unless it would be large: then attention builds it block by block.
        short = longest <= 4096
        self.future = torch.ones(longest, longest, dtype=torch.bool, device=device).triu_(1) if short else None
        self.choice: dict[int, Tensor | None] = {}
        self.entered: dict[int, Tensor] = {}

    def positions(self, stage: int) -> Tensor:
        """Original positions [batch, n], counted from each sample's first real token; -1 for padding."""
        positions = self.rows[stage] - self.rows[0][:, :1]
        real = self.real[stage]
        return positions if real is None else positions.masked_fill(~real, -1)

    def enter(self, hidden: Tensor) -> Tensor:
        """Stage 0 of hidden states [batch, width, hidden_size]."""
        return self.take(hidden, self.rows[0]) if self.compact else hidden

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [batch, n, size] at rows [batch, k]. One flat index_select: far faster than gather."""
        flat = (rows + self.samples * x.shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, flat).unflatten(0, rows.shape)

    def embeddings(self, layer: int, table: Tensor) -> Tensor:
        """Rows of a position-embedding table [1 or batch, width, dim] for what enters `layer`."""
        if layer == 0 and not self.compact:
            return table
        if table.shape[0] == 1:
            return F.embedding(self.rows[layer], table[0])
        return self.take(table, self.rows[layer])

    def keep(self, layer: int, sums: Tensor) -> Tensor | None:
        """Choose what `layer` passes on: indices [batch, k] into the rows that entered it, or None for all of them."""
        if layer in self.choice:
            return self.choice[layer]
        counts, before = self.counts[layer], self.counts[layer - 1] if layer else self.lengths
        rows, real, kept = self.rows[layer], self.real[layer], None
        if counts != before:
            ragged = min(counts) != max(counts) or real is not None
            scores = self.score(sums, self.sizes[layer])
            kept, real = select(scores, self.sizes[layer], self.sizes[layer + 1], max(counts), ragged)
            rows = rows.gather(1, kept)
            real = real if min(counts) != max(counts) else None
        self.choice[layer] = kept
        self.rows.append(rows)
        self.real.append(real)
        return kept

    def scatter(self, hidden: Tensor) -> Tensor:
        """Back to [batch, width, hidden_size] after the last layer: a dropped token leaves with the state in which it
        entered its last layer, so every real position has one; padding, and without `carry` dropped tokens, are zero.
        """
        stages = [*self.entered.items(), (len(self.rows) - 1, hidden)] if self.carry else [(-1, hidden)]
        size = self.batch * self.width
        final = hidden.new_zeros(size + 1, hidden.shape[2])  # the extra row takes the padding
        for stage, states in stages:
            flat, real = self.rows[stage] + self.samples * self.width, self.real[stage]
            flat = flat if real is None else flat.masked_fill(~real, size)
            final = final.index_copy(0, flat.flatten(), states.flatten(0, 1))
        final = final[:size]
        return final.unflatten(0, (self.batch, self.width))


class Decode:
    """One pass that continues a pruned cache: the new tokens go through all layers (Eq. 2 keeps a lone token)."""

    def __init__(self, cache, shape: tuple[int, int], mask: Tensor | None, device: torch.device):
        width = shape[1]
        first = cache.layers[0].positions.max(dim=1, keepdim=True).values + 1
        self.positions = first + torch.arange(width, device=device)
        self.all_real, self.width = True, width
        if mask is not None and not bool(mask[:, -width:].all()):
            new = mask[:, -width:]
            self.positions = (first + new.cumsum(dim=1) - 1).masked_fill(~new, -1)
            self.all_real = False

    def mask(self, layer_cache, window: int | None) -> Tensor | None:
        """Bool [batch, 1, new rows, cached rows], or None where every cached row is visible."""
        if self.width == 1 and layer_cache.all_real and window is None:
            return None
        mask = visible(self.positions, layer_cache.positions, window)
        if not self.all_real:  # a padding row sees everything rather than nothing: NaN would spread
            mask = mask | (self.positions < 0)[:, None, :, None]
        return mask
