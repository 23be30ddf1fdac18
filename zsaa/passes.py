"""What travels down the decoder in one forward pass: a Prefill that prunes, or a Decode that continues a pruned cache.

The dial's hook makes one such object per pass and hands it to the layers; nothing else knows which tokens are alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.attention import rotate, visible
from zsaa.fast import dispatch
from zsaa.fast import rows as fast
from zsaa.fast.rows import Left
from zsaa.rule import Rule
from zsaa.score import FUNCTIONS, select

if TYPE_CHECKING:
    from zsaa.dials.trace import Trace


@dataclass(frozen=True)
class Request:
    """All that the shapes of a pruned pass depend on: the lengths and the dial's settings, none of the data.

    lengths: real tokens of each sample; width: columns of the input; alphas: one per sample. exempt: tokens of each
    sample that are never dropped, the last included; empty where the call names none. asks: the most tokens of a sample
    that ask, by score "asked". stop: the pass ends behind so many of the num_layers; None: it goes through all.
    """

    lengths: tuple[int, ...]
    width: int
    alphas: tuple[float, ...]
    rule: Rule
    num_layers: int
    carry: bool  # do dropped tokens leave with the state that they had?
    device: torch.device
    exempt: tuple[int, ...] = ()
    asks: int = 0
    stop: int | None = None

    @property
    def depth(self) -> int:
        """How many layers the pass goes through."""
        return self.num_layers if self.stop is None else self.stop

    @property
    def padded(self) -> bool:
        """Are some columns of the input no tokens?"""
        return min(self.lengths) < self.width


class Plan:
    """The shapes of a pass, and the tensors that follow from them. Stage l is what enters layer l.

    counts: per layer and sample, N_l. widths: rows per stage, the most of any sample. sizes: int64 [stages, batch],
    real rows; lengths: of the input. real: per stage bool [batch, rows], or None where no row is padding. drops: does a
    layer drop any? early: do any leave before the first? compact: are the rows of stage 0 a selection of the input's?
    """

    def __init__(self, request: Request):
        lengths, device = request.lengths, request.device
        given = zip(lengths, request.alphas, request.exempt or repeat(0))
        counts = (request.rule.stages(n, alpha, request.num_layers, exempt) for n, alpha, exempt in given)
        stages = [list(stage) for stage in zip(*counts)][: request.depth + 1]
        self.counts = stages[1:]
        self.early = stages[0] != list(lengths)
        self.compact = request.padded or self.early
        self.lengths = torch.tensor(lengths, device=device)
        self.widths = [max(stage) for stage in stages]
        self.drops = [before != after for before, after in zip(stages, self.counts)]
        self.sizes = torch.tensor(stages, device=device)
        self.samples = torch.arange(len(lengths), device=device)[:, None]
        self.index = torch.arange(request.width, device=device)
        ragged = [min(stage) < max(stage) for stage in stages]
        self.real = [
            self.index[:width] < size[:, None] if padded else None
            for width, size, padded in zip(self.widths, self.sizes, ragged)
        ]


INPUT = -1  # in place of a stage: the columns of the input, before any token was dropped


@dataclass
class Given:
    """What a prefill reads of its call beside the decoder's own arguments, each [batch, width] or None.

    real: bool, the columns that are no padding; None: all. exempt: bool, those that are never dropped. part, ids:
    int64, for score "asked": the part by which each column asks, and the token ids.
    """

    real: Tensor | None = None
    exempt: Tensor | None = None
    part: Tensor | None = None
    ids: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


class Prefill:
    """One pruned pass over whole inputs: which rows are alive, layer after layer.

    Inputs are compacted before the first layer (real tokens first), so padding costs nothing and decides nothing. The
    choice of each layer is stored, so that a replay under gradient checkpointing repeats it instead of re-deciding.

    rows: per stage int64 [batch, rows], the input rows that are alive, in order. scorer: the learned score; None where
    another decides. partial: is what enters each layer asked for, too, and so the output to be completed? trace: gets
    what was kept, once the pass is through.

    Not a dataclass: FSDP looks into those for tensors to cast, and hands each layer a copy.
    """

    stock = False

    def __init__(
        self, request: Request, plan: Plan, given: Given, scorer: Any = None, partial=False, trace: Trace | None = None
    ):
        self.request, self.plan, self.given, self.scorer = request, plan, given, scorer
        self.partial, self.trace = partial, trace
        self.scores: Tensor | None = None  # of the input's columns, where they are given once
        self.rows: list[Tensor] = []
        self.choice: dict[int, tuple[Tensor, Tensor | None] | None] = {}
        self.left = Left(request.width)
        self.input: Tensor  # the input's real columns [batch, rows], in order
        self.turned: tuple = ((None,), [])  # rows and rotary tables, and what these hold at them

    @property
    def real(self) -> list[Tensor | None]:
        return self.plan.real

    @property
    def depth(self) -> int:
        return self.request.depth

    def to(self, device: Any, **_) -> Prefill:
        """For whoever spreads a model over devices, as accelerate does, and moves what a layer is given."""
        return self if self.plan.sizes.device == device else fast.moved(self, device)

    def columns(self, stage: int) -> Tensor:
        """Where the rows [batch, rows] stand in the input; -1 for padding."""
        rows, real = self.rows[stage], self.real[stage]
        return rows if real is None else rows.masked_fill(~real, -1)

    def positions(self, stage: int) -> Tensor:
        """Original positions [batch, rows], counted from each sample's first real token; -1 for padding."""
        columns = self.columns(stage)
        return (columns - self.input[:, :1]).clamp(min=-1) if self.request.padded else columns

    def begin(self, hidden: Tensor) -> Tensor:
        """Stage 0 of hidden states [batch, width, hidden_size]."""
        if not self.rows:
            part, ids, real = self.given.part, self.given.ids, self.given.real
            self.input = self.plan.index.expand(hidden.shape[0], -1)
            if real is not None:
                self.input = (~real).int().argsort(dim=1, stable=True)[:, : max(self.request.lengths)]
            if part is not None and ids is not None and (self.plan.early or any(self.plan.drops)):
                real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
                self.scores = self.scorer.rank(hidden, ids, part, real, self.request.asks)
            self.rows.append(self._early(hidden) if self.plan.early else self.input)
        if self.plan.early and self.request.carry:
            self.left.stages.setdefault(INPUT, hidden)
        if self.plan.compact:
            return self.take(hidden, self.rows[0])
        return hidden if hidden.stride(-1) == 1 else hidden.contiguous()  # inputs_embeds may lie in any way

    @torch.no_grad()
    def _early(self, hidden: Tensor) -> Tensor:
        """The rows of the input that enter the first layer at all, chosen by its states."""
        lengths, padding = self.plan.lengths, min(self.request.lengths) < self.input.shape[1]
        if self.scores is not None:
            scores = self.scores.gather(1, self.input)
        elif self.scorer is not None:
            scores = self.scorer(0, self.take(hidden, self.input) if self.request.padded else hidden)
        else:
            scores = hidden.new_zeros(self.input.shape)
        scores = self._ranked(scores, lengths, self.input)
        ragged = padding or self.real[0] is not None
        kept, _ = select(scores, lengths, self.plan.sizes[0], self.plan.widths[0], ragged)
        return self.input.gather(1, kept)

    def _ranked(self, scores: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Scores of rows, of which each sample has so many: made of the sums of attention or, if learned, as they are;
        and the highest for what is exempt."""
        score, exempt = FUNCTIONS.get(self.request.rule.score), self.given.exempt
        scores = scores if score is None else score(scores, lengths)
        return scores if exempt is None else scores.masked_fill(exempt.gather(1, rows), float("inf"))

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [batch, n, size] at rows [batch, k]. One flat index_select: far faster than gather."""
        return x.flatten(0, 1).index_select(0, self._flat(rows, x.shape[1])).unflatten(0, rows.shape)

    def _flat(self, rows: Tensor, width: int) -> Tensor:
        """Where rows [batch, k] stand if the samples' `width` rows follow each other."""
        return rows[0] if rows.shape[0] == 1 else (rows + self.plan.samples * width).flatten()

    def embeddings(self, layer: int, table: Tensor) -> Tensor:
        """Rows of a position-embedding table [1 or batch, width, dim] for what enters `layer`."""
        if layer == 0 and not self.plan.compact:
            return table
        if table.shape[0] == 1:
            return F.embedding(self.rows[layer], table[0])
        return self.take(table, self.rows[layer])

    def rotate(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], padded: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of what enters `layer`, with their rotary position embedding; with `padded` rows if that is free."""
        kernels = dispatch.row_kernels(q)
        if kernels is not None:
            return kernels.rotate(q, k, v, *tables, self.rows[layer], padded)
        given = self.rows[layer], *tables
        if not all(
            a is b for a, b in zip(given, self.turned[0])
        ):  # else the layer before, of the same tables, kept all
            self.turned = given, [self.embeddings(layer, table) for table in tables]
        return *rotate(q, k, *self.turned[1]), v

    @torch.no_grad()
    def learned(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The learned score of the rows that enter `layer`, float32 [batch, rows], of their states, or as it was given
        to the input; None where all go on. No gradient passes: the choice has none (Eq. 3), and the score has a loss of
        its own."""
        if not self.plan.drops[layer]:
            return None
        return self.scorer(layer, hidden) if self.scores is None else self.scores.gather(1, self.rows[layer])

    def choose(self, layer: int, scores: Tensor | None, like: Tensor) -> None:
        """Choose by the sums of attention [batch, rows], or learned scores, what `layer` passes on, if that is not done
        yet: indices into the rows that entered it, and the place of each row among them where a kernel chose; None
        where all go on. like: a tensor of the states' kind."""
        if layer in self.choice:
            return
        before, after = self.plan.sizes[layer], self.plan.sizes[layer + 1]
        rows, width = self.rows[layer], self.plan.widths[layer + 1]
        self.choice[layer] = None
        if self.plan.drops[layer] and scores is not None:
            scores, places = self._ranked(scores, before, rows), None
            if chosen := fast.choose(scores, before, after, width, rows, like):
                kept, places, rows = chosen
            else:
                ragged = self.real[layer] is not None or self.real[layer + 1] is not None
                kept, _ = select(scores, before, after, width, ragged)
                places = None if ragged else fast.places(kept, rows.shape[1], like)
                rows = rows.gather(1, kept)
            self.choice[layer] = kept, places
        self.rows.append(rows)

    def move(self, layer: int, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer` passes on of its hidden states and its attention's output [batch, rows, size]."""
        choice = self.choice[layer]
        if choice is None:
            return hidden, output
        kept, places = choice
        kernels = None if places is None else dispatch.row_kernels(hidden)
        at_once = kernels is not None and self.request.carry and not self.partial and self.left.at_once(layer, hidden)
        if self.request.carry and not at_once:
            self.left.stages.setdefault(layer, hidden)
        if kernels is None:
            return self.take(hidden, kept), self.take(output, kept)
        sizes, rows = self.plan.sizes[layer], self.rows[layer]
        hidden, output, final = kernels.move(
            hidden, output, kept, places, sizes, rows, self.left.final if at_once else None
        )
        self.left.final = final if at_once else self.left.final
        return hidden, output

    def end(self, hidden: Tensor) -> Tensor:
        """What the last layer passes on [batch, rows, hidden_size] as the decoder's output, see `scatter`."""
        if self.trace is not None:
            self.trace.record(self)
        return self.scatter(hidden, self.depth)

    def complete(self, output):
        """The decoder's output, with states [batch, width, hidden_size] of all tokens in place of those that are left:
        the first and the last entry of hidden_states hold all anyway. Entries that were not asked for are None."""
        states = list(output.get("hidden_states") or ())
        for stage in range(1, min(len(states) - 1, len(self.rows))):
            states[stage] = None if states[stage] is None else self.scatter(states[stage], stage)
        if states:
            output.hidden_states = tuple(states)
        return output

    def scatter(self, hidden: Tensor, stage: int) -> Tensor:
        """Rows of a stage back to [batch, width, hidden_size]: a token that was dropped before has the state in which
        it entered its last layer, or, if it entered none, its embedding, so every real position has one; padding, and
        without `carry` dropped tokens, are zero."""
        batch, width = hidden.shape[0], self.request.width
        inputs = (self.plan.index, self.given.real)
        parts = [*((layer, states) for layer, states in self.left.stages.items() if layer < stage), (stage, hidden)]
        placed = [(*(inputs if at == INPUT else (self.rows[at], self.real[at])), states) for at, states in parts]
        written = self.left.final
        if written is not None and written.dtype == hidden.dtype and all(real is None for _, real, _ in placed):
            final = written.flatten(0, 1)
        else:
            final = hidden.new_zeros(batch * width + 1, hidden.shape[2])  # the extra row takes the padding
            if written is not None:
                final[:-1] = written.flatten(0, 1)
        for rows, real, states in placed:
            flat = self._flat(rows, width)
            flat = flat if real is None else flat.masked_fill(~real.flatten(), batch * width)
            final.index_copy_(0, flat, states.flatten(0, 1).to(final.dtype))
        return final[: batch * width].unflatten(0, (batch, width))


class Decode:
    """One pass that continues a pruned cache: the new tokens go through all layers (Eq. 2 keeps a lone token).

    mask: bool [batch, seen + new] or None, which of all tokens, those of earlier calls included, are real now.
    columns: int64 [batch, new], where the new tokens stand among all. before: what the decoder gave for the prompt, if
    this very call began with one, and the output is so to be completed; keep: is the cache to be handed out, then?
    """

    stock = False

    def __init__(
        self, cache, shape: tuple[int, int], mask: Tensor | None, device: torch.device, before=None, keep: bool = True
    ):
        (batch, self.width), first, self.depth = shape, cache.layers[0], len(cache.layers)
        self.before, self.keep, self.partial = before, keep, before is not None
        self.slots: Any = None  # fast.slots.Slots: where the new row goes, if not to the end of a longer cache
        self.columns = torch.arange(first.seen, first.seen + self.width, device=device).expand(batch, -1)
        self.hidden: Tensor | None = None  # bool [batch, seen + new]: tokens that are not real, where that matters
        if mask is not None and not (first.all_real and bool(mask.all())):
            columns = torch.cat([first.columns, self.columns], dim=1)
            held = mask.new_zeros(mask.shape[0], mask.shape[1] + 1).scatter_(1, columns % (mask.shape[1] + 1), True)
            held = held[:, :-1]  # the last column takes the rows without a token
            if first.given is not None:
                held[:, : first.given.shape[1]] |= first.given
            between = mask[:, :-1] & ~mask[:, 1:]  # padding in front shifts all tokens alike
            gone, some = torch.stack([(mask & ~held).any(), (held & ~mask).any() | between.any()]).tolist()
            if gone:
                raise ValueError(
                    "attention_mask has a 1 where it had a 0 when the prompt was given: padding that was left out of a "
                    "pruned cache cannot become real. Pass the mask of the prompt, extended by the new tokens."
                )
            if some:
                self.hidden, self._hidden_before = ~mask, (~mask).cumsum(dim=1)
        self.positions = self._positions(self.columns)

    def to(self, device: Any, **_) -> Decode:
        """As that of a Prefill."""
        return self if self.columns.device == device else fast.moved(self, device)

    def complete(self, output):
        """The decoder's output, behind what it gave for the prompt."""
        before = self.before
        if before is None:
            return output
        output.last_hidden_state = torch.cat([before.last_hidden_state, output.last_hidden_state], dim=1)
        if output.get("hidden_states") is not None:
            pairs = zip(before.hidden_states, output.hidden_states, strict=True)
            output.hidden_states = tuple(None if a is None else torch.cat([a, b], dim=1) for a, b in pairs)
        if not self.keep:
            output.past_key_values = None
        return output

    def _positions(self, columns: Tensor) -> Tensor:
        """Positions of rows as they count for the order of tokens and for sliding windows: hidden ones do not; -1 for
        those, and for rows without a token."""
        if self.hidden is None:
            return columns
        at = columns.clamp(min=0)
        return (columns - self._hidden_before.gather(1, at)).masked_fill((columns < 0) | self.hidden.gather(1, at), -1)

    def mask(self, layer_cache, window: int | None) -> Tensor | None:
        """Bool [batch, 1, new rows, cached rows], or None where every cached row is visible."""
        if self.width == 1 and layer_cache.all_real and window is None and self.hidden is None:
            return None
        mask = visible(self.positions, self._positions(layer_cache.columns), window)
        if self.hidden is not None:  # a padding row sees everything rather than nothing: NaN would spread
            mask = mask | (self.positions < 0)[:, None, :, None]
        return mask
