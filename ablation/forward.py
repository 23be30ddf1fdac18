"""Every variant of the method that the ablation compares, in one plain forward pass.

The package itself carries only what paid off, with kernels, caches and graphs; this pass is for comparing: any score,
any schedule, any fate of the dropped tokens, batches of unequal lengths, gradients, on a CPU or a GPU. With the paper's
settings it equals the package (tests/test_ablation.py). Models without softcapping only, and texts within their sliding
window.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.variants import Variant
from zsaa.attention import rotate
from zsaa.families import find_decoder

# ------------------------------------------------------------------------------------------------------- scores


@dataclass
class View:
    """What a score may look at, of the rows that enter a layer: q, k, v [batch, heads, rows, dim] (k and v also of kept
    keys, behind the rows), hidden [batch, rows, size], positions, real and voters [batch, rows], visible [batch, 1,
    rows, keys]."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    positions: Tensor
    real: Tensor
    voters: Tensor  # bool [batch, rows]: who votes
    visible: Tensor
    scale: float
    layer: int

    def soft_score(self, q: Tensor, visible: Tensor) -> Tensor:
        """softmax(QK^T) of some queries [batch, heads, queries, rows], in float32 at least; the columns of kept keys
        are left out."""
        groups = q.shape[1] // self.k.shape[1]
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, self.k))
        p = torch.matmul(q.unflatten(1, (-1, groups)), k.transpose(2, 3)[:, :, None]) * self.scale
        p = p.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1)
        return p.nan_to_num(0.0)[..., : self.q.shape[2]].flatten(1, 2)

    def votes(self, by_value: bool = False) -> Tensor:
        """Attention that each row receives from all voters; by_value: times the length of its values."""
        rows = self.q.shape[2]
        block = max(16, (1 << 26) // (self.q.shape[0] * self.q.shape[1] * self.k.shape[2]))
        total = 0
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            p = self.soft_score(self.q[:, :, part], self.visible[:, :, part])
            p = (p * self.voters[:, None, part, None]).sum(2)
            total = total + (p * self.value_norms() if by_value else p).sum(1)
        return total

    def latest(self, count: int) -> Tensor:
        """Attention that each row receives from the last `count` voters."""
        last = self.voters.cumsum(1).amax(1, keepdim=True) - torch.arange(count, 0, -1, device=self.q.device)
        index = last.clamp(min=0)  # voters are the first rows
        q = self.q.gather(2, index[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        visible = self.visible.gather(2, index[:, None, :, None].expand(-1, 1, -1, self.visible.shape[3]))
        return (self.soft_score(q, visible) * (last >= 0)[:, None, :, None]).sum((1, 2))

    def value_norms(self) -> Tensor:
        norms = self.v[:, :, : self.q.shape[2]].norm(dim=-1)
        return norms.repeat_interleave(self.q.shape[1] // norms.shape[1], dim=1)

    def audience(self) -> Tensor:
        """How many voters can see each row."""
        voters = self.voters.sum(1, keepdim=True)
        return (voters - torch.arange(self.q.shape[2], device=self.q.device)).clamp(min=1)


def _random(view: View) -> Tensor:
    mixed = (view.positions * 2654435761 + 40503 * (view.layer + 1) + view.real.sum(1, keepdim=True) * 97) % 2**31
    for _ in range(3):
        mixed = (mixed ^ (mixed >> 13)) * 1274126177 % 2**31
    return mixed.float()


def _even(view: View) -> Tensor:
    """Evenly spaced: the more often an index can be halved, the later it is dropped (van der Corput's sequence)."""
    index, value, share = torch.arange(view.q.shape[2], device=view.q.device), 0.0, 0.5
    for _ in range(16):
        value, share, index = value + share * (index % 2), share / 2, index // 2
    return -value.expand(view.q.shape[0], -1)


SCORES = {
    "column_sum": lambda view: view.votes(),
    "column_mean": lambda view: view.votes() / view.audience(),
    "value_sum": lambda view: view.votes(by_value=True),
    "value_mean": lambda view: view.votes(by_value=True) / view.audience(),
    "last_query": lambda view: view.latest(1),
    "last_8": lambda view: view.latest(8),
    "last_32": lambda view: view.latest(32),
    "norm": lambda view: view.hidden.float().norm(dim=-1),
    # controls: they do not look at the text
    "recent": lambda view: view.positions.float(),
    "first": lambda view: -view.positions.float(),
    "even": _even,
    "random": _random,
}


# ------------------------------------------------------------------------------------------------ the forward pass


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x [batch, n, ...] at rows [batch, k]."""
    flat = rows + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, rows.shape)


def forward(
    decoder: nn.Module,
    ids: Tensor,
    lengths: Sequence[int],
    alpha: float,
    variant: Variant,
    tail: int = 0,
    scorer: nn.Module | None = None,
    entered: dict[int, Tensor] | None = None,
    depth: int | None = None,
    skipped: Collection[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """The decoder's last hidden states of the rows that reach the top, and which those are.

    ids int64 [batch, width], padded on the right; lengths: real tokens of each sample, `tail` included: the last `tail`
    tokens of each sample neither vote nor are dropped, as if they were decoded behind the pruned prompt.
    scorer: a module in place of the variant's score: (layer, hidden states that enter it [batch, rows, size], output of
        its attention before the projection [batch, rows, q_dim], token ids [batch, rows], real rows, bool [batch,
        rows]) -> scores [batch, rows], or None: the variant's score decides. It may have a method watches(layer): is it
        called where nothing is dropped? For dropped="noted" it has read(layer, kept rows [batch, kept], how many of
        them are real [batch]) -> what is added to their states, of its last call.
    entered: is filled with the hidden states that enter each layer. depth: the first so many layers run, None: all.
    skipped: layers that are left out, in training; these may drop nothing.

    Returns hidden [batch, rows, size] after the final norm (real rows first, the sample's last token the last of them)
    and per layer the original positions that it passed on, int64 [batch, rows], -1 for padding.
    """
    step = _Pass(decoder, ids, lengths, alpha, variant, tail, scorer)
    for number in range(depth or len(step.layers)):
        if entered is not None:
            entered[number] = step.hidden
        if number in skipped:
            step.trail.append(step.trail[-1])
        else:
            step.layer(number)
    final = step.decoder.ln_f if step.gpt2 else step.decoder.norm
    return _normed(final, step.hidden), step.trail


class _Pass:
    """One pass: hidden [batch, rows, size], and at which positions its rows stand, of those that are still there.

    stand_for: how many tokens a merged row stands for. beside: hidden, positions and real of dropped rows that stay as
    keys. visible: bool [batch, 1, rows, keys] of the layer that is at work, or None: all that is causal.
    """

    def __init__(self, decoder, ids, lengths, alpha, variant, tail, scorer):
        self.decoder, self.family = find_decoder(decoder)
        self.ids, self.variant, self.tail, self.scorer = ids, variant, tail, scorer
        self.layers = getattr(self.decoder, self.family.layers)
        config, device = self.decoder.config, ids.device
        window = getattr(config, "sliding_window", None) or ids.shape[1]
        if self.family.softcap or ids.shape[1] > window:
            raise ValueError(
                f"no ablation for {config.model_type} and texts of {ids.shape[1]} tokens: softcapping is not done "
                f"here, nor sliding windows; cut the texts to {window} tokens."
            )
        self.gpt2 = config.model_type == "gpt2"
        # All shapes are known beforehand: one copy to the device, and no layer waits for it.
        counted = ((n, variant.counts(n - tail, alpha, len(self.layers))) for n in lengths)
        self.counts = [[n, *(kept + tail for kept in found)] for n, found in counted]
        self.stages = torch.tensor(self.counts, device=device)
        self.positions = torch.arange(ids.shape[1], device=device).expand(len(ids), -1)
        embed = self.decoder.get_input_embeddings()
        self.hidden = embed(ids)
        if self.gpt2:
            self.hidden = self.decoder.drop(self.hidden + self.decoder.wpe(self.positions))
        else:
            self.tables = self._rotations(embed.weight, ids.shape[1])
        self.wide = torch.promote_types(self.hidden.dtype, torch.float32)
        self.stand_for = torch.ones(ids.shape, dtype=self.wide, device=device)
        self.beside: tuple[Tensor, ...] | None = None
        self.trail: list[Tensor] = []

    def _rotations(self, like: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the cosines and sines of `width` positions; Gemma 3 has two kinds of layers."""
        every, kinds = torch.arange(width, device=like.device)[None], getattr(self.decoder.config, "layer_types", None)
        if not self.decoder.config.model_type.startswith("gemma3"):
            return [tuple(table[0] for table in self.decoder.rotary_emb(like, every))] * len(self.layers)
        found = {kind: self.decoder.rotary_emb(like, every, kind) for kind in set(kinds)}
        return [tuple(table[0] for table in found[kind]) for kind in kinds]

    def layer(self, number: int) -> None:
        """Let the rows through one layer, which may drop some."""
        layer, family = self.layers[number], self.family
        attention, sizes, rows = getattr(layer, family.attention), self.stages[:, number], self.hidden.shape[1]
        real = torch.arange(rows, device=self.ids.device) < sizes[:, None]
        drops = any(counted[number + 1] < counted[number] for counted in self.counts)
        q, k, v, visible, output = self._attention(number, real, drops)
        learned = None
        watched = getattr(self.scorer, "watches", lambda layer: False)
        if self.scorer is not None and (drops or watched(number)):  # it may be in training
            learned = self.scorer(number, self.hidden, output, self.ids.gather(1, self.positions), real)
        if drops:
            wanted, width = self.stages[:, number + 1], max(counted[number + 1] for counted in self.counts)
            with torch.no_grad():
                if learned is not None:
                    scores = learned.detach().to(self.wide)
                else:
                    voters = torch.arange(rows, device=self.ids.device) < (sizes - self.tail)[:, None]
                    seen = self.hidden, self.positions, real, voters, visible
                    view = View(q, k, v, *seen, attention.scaling, number)
                    scores = SCORES[self.variant.score](view).to(self.wide)
                kept = _select(scores, sizes, wanted, width, self.variant, self.tail)
            output = self._drop(number, output, scores, kept, wanted, real)
        padding = torch.arange(self.hidden.shape[1], device=self.ids.device) >= self.stages[:, number + 1, None]
        self.trail.append(self.positions.masked_fill(padding, -1))
        self.hidden = self.hidden + self._after(layer, family.after_attention_norm, family.output(attention, output))
        normed = _normed(getattr(layer, family.mlp_norm), self.hidden)
        self.hidden = self.hidden + self._after(layer, family.after_mlp_norm, getattr(layer, family.mlp)(normed))

    @staticmethod
    def _after(layer: nn.Module, norm: str | None, x: Tensor) -> Tensor:
        return x if norm is None else _normed(getattr(layer, norm), x)

    def _attention(self, number: int, real: Tensor, drops: bool) -> tuple:
        """q, k, v of the rows (k and v also of dropped ones beside them), who sees whom, and the heads' output."""
        rows, device, variant, beside = self.hidden.shape[1], self.ids.device, self.variant, self.beside
        attention, norm = (getattr(self.layers[number], n) for n in (self.family.attention, self.family.attention_norm))
        q, k, v = self.family.qkv(attention, _normed(norm, self.hidden))
        at, visible = self.positions, None
        plain = variant.dropped in ("gone", "noted") or (beside is None and variant.dropped == "keys")
        if drops or not plain:
            visible = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None] & real[:, None, None]
        if beside is not None:
            _, more_k, more_v = self.family.qkv(attention, _normed(norm, beside[0]))
            k, v, at = torch.cat((k, more_k), 2), torch.cat((v, more_v), 2), torch.cat((at, beside[1]), 1)
            seen = (beside[1][:, None, None] <= self.positions[:, None, :, None]) & beside[2][:, None, None]
            visible = torch.cat((visible.expand(len(self.ids), -1, -1, -1), seen), 3)
        if not self.gpt2:
            cos, sin = (F.embedding(at, table.to(q.dtype)) for table in self.tables[number])
            if beside is None:
                q, k = rotate(q, k, cos, sin)
            else:
                k, _ = rotate(k, k, cos, sin)
                q, _ = rotate(q, q, cos[:, :rows], sin[:, :rows])
        dropout = self.family.dropout(attention) if self.decoder.training else 0.0
        shared = {"scale": attention.scaling, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
        if plain:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, **shared)
        else:  # a padding row sees the first key, or its NaN would reach the gradients
            mask = torch.zeros(visible.shape, dtype=q.dtype, device=device).masked_fill(~visible, float("-inf"))
            mask[..., 0] = torch.where(visible.any(-1), mask[..., 0], 0)
            if beside is None:  # a row that stands for several tokens is attended to as often
                mask = mask + self.stand_for.log()[:, None, None].to(q.dtype)
            output = F.scaled_dot_product_attention(q, k, v, mask, **shared)
        return q, k, v, visible, output.transpose(1, 2).flatten(2)

    def _drop(self, number: int, output: Tensor, scores: Tensor, kept: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        """Go on with the rows `kept`, and with what the others leave; returns the heads' output for them."""
        dropped, device = self.variant.dropped, self.ids.device
        inside = torch.arange(kept.shape[1], device=device) < wanted[:, None]
        if dropped in ("merged", "weighted"):
            share = self.stand_for if dropped == "merged" else self.stand_for * scores.clamp(min=1e-6)
            states, self.stand_for = _merge((self.hidden, output), share * real, self.stand_for * real, kept, inside)
            self.hidden, output = states
        else:
            if dropped == "keys":
                self._put_beside(kept, inside, real)
            self.hidden, output = take(self.hidden, kept), take(output, kept)
            if dropped == "noted":
                self.hidden = self.hidden + self.scorer.read(number, kept, wanted).to(self.hidden.dtype)
        self.positions = self.positions.gather(1, kept)
        return output

    def _put_beside(self, kept: Tensor, inside: Tensor, real: Tensor) -> None:
        rows = real.shape[1]
        stays = real.new_zeros(len(real), rows + 1).scatter(1, torch.where(inside, kept, rows), True)
        lost = ~stays[:, :rows] & real
        width = max(1, int(lost.sum(1).max()))
        out = lost.float().topk(width, 1, sorted=True).indices.sort(1).values
        new = take(self.hidden, out), self.positions.gather(1, out), lost.gather(1, out)
        self.beside = new if self.beside is None else tuple(torch.cat(pair, 1) for pair in zip(self.beside, new))


def _normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """norm(hidden); on a GPU transformers' RMSNorm in one kernel, not six: they are half of a small model's time."""
    if hidden.is_cuda and hasattr(norm, "variance_epsilon"):
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    if hidden.is_cuda and type(norm).__name__ == "Gemma3RMSNorm":
        return F.rms_norm(hidden, norm.weight.shape, 1 + norm.weight, norm.eps)
    return norm(hidden)


def _select(scores: Tensor, sizes: Tensor, wanted: Tensor, width: int, variant: Variant, tail: int) -> Tensor:
    """Rows to keep, ascending, [batch, width], width = max(wanted); ties go to the earlier row. Rows beyond a sample's
    own count point at its last row."""
    if variant.smooth > 1:
        real = torch.arange(scores.shape[1], device=scores.device) < sizes[:, None]
        whole = F.avg_pool1d(scores * real, variant.smooth, 1, variant.smooth // 2)[:, : scores.shape[1]]
        scores = whole / F.avg_pool1d(real.to(scores.dtype), variant.smooth, 1, variant.smooth // 2).clamp(min=1e-9)
    rows = torch.arange(scores.shape[1], device=scores.device)
    last = sizes[:, None] - 1 - tail  # the prompt's last token carries the prediction
    recent = ((wanted - tail) * variant.recent).long()[:, None]
    protected = (rows >= last - recent) | (rows < variant.sinks)
    # The prediction and the tail come first, then what is protected, then the score.
    scores = scores.masked_fill(protected, torch.finfo(scores.dtype).max).masked_fill(rows >= last, float("inf"))
    scores = scores.masked_fill(rows >= sizes[:, None], float("-inf"))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    best = best.masked_fill(torch.arange(width, device=scores.device) >= wanted[:, None], scores.shape[1])
    return best.sort(1).values.minimum(sizes[:, None] - 1)


def between(notes: Tensor, kept: Tensor) -> Tensor:
    """Per kept row the notes [batch, rows, size] of the dropped rows between the kept one before and itself: their sum
    over the root of their number, [batch, kept, size]."""
    until = take(notes.cumsum(1), kept)
    before = F.pad(until, (0, 0, 1, 0))[:, :-1]
    count = kept - F.pad(kept, (1, 0), value=-1)[:, :-1] - 1
    return (until - before - take(notes, kept)) / count.clamp(min=1).sqrt()[..., None]


def _merge(states: Sequence[Tensor], share: Tensor, stand_for: Tensor, kept: Tensor, inside: Tensor):
    """Each row joins the next kept one. states [batch, rows, size] become means by `share` [batch, rows] over each
    kept row's group; stand_for [batch, rows] is summed over it."""
    batch, rows = share.shape
    width = kept.shape[1]
    marks = share.new_zeros(batch, rows + 1)
    marks.scatter_add_(1, torch.where(inside, kept + 1, rows), inside.to(share.dtype))
    group = marks[:, :rows].cumsum(1).long().clamp(max=width - 1)  # kept rows before this one
    flat = (group + torch.arange(batch, device=share.device)[:, None] * width).flatten()

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(batch * width, *x.shape[2:]).index_add(0, flat, x.flatten(0, 1)).unflatten(0, (batch, width))

    whole = total(share).clamp(min=1e-12)
    merged = [total(x * share[..., None].to(x.dtype)) / whole[..., None].to(x.dtype) for x in states]
    return merged, total(stand_for).clamp(min=1)
