"""Every variant of the method that the ablation compares, in one plain forward pass.

The package itself carries only what paid off, with kernels, caches and graphs; this pass is for comparing: any score,
any schedule, any fate of the dropped tokens, batches of unequal lengths, gradients, on a CPU or a GPU. With the paper's
settings it equals the package (tests/test_ablation.py). Models without sliding windows and softcapping only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa.attention import rotate
from zsaa.cost import attention_widths, layer_weights
from zsaa.families import find_decoder

DROPPED = ("gone", "merged", "weighted", "keys", "noted")
SCHEDULES = ("geometric", "rising", "easing", "front", "late", "early", "once", "twice", "deep", "linear", "zipf")


@dataclass(frozen=True)
class Variant:
    """What is chosen, when, and what becomes of the rest.

    score: a name of SCORES. sinks: first tokens that are always kept. recent: share of the kept places that goes to the
    latest tokens, whatever their score.
    schedule: how the total number of drops is spread over the layers (see `counts`): "geometric" (Eq. 2), "front" (as
        if a quarter of the layers' drops were behind layer 1, the rest as in Eq. 2), "rising" (layer l keeps alpha^w
        of what enters it, w growing as exp(l / L): lower layers drop less, upper ones more; "rising:2" as
        exp(2 l / L)), "easing" (as exp(4 l / (L d)), d = -L log(alpha), the drops of all layers together: the slope
        eases off as the dial turns; "easing:2" half as steep), "late" (the first third of the layers spared), "early"
        (all drops in the first third), "once" (all behind layer 1), "once:10" (all behind layer 10), "deep" (once, with
        the token-layers of Eq. 2 at this alpha: the more there are, the deeper; "deep:0.9" deeper still), "twice"
        (behind layers 1 and 4), "linear" (equal numbers of tokens per layer), "zipf" (behind layer l as many as
        1 / (1 + k l) of all, with alpha of them behind layer 1: many go at once, few stay for long; "zipf:0.5" to this
        power), or one weight per layer.
    smooth: scores are averaged over so many neighbouring tokens, so that phrases stay together.
    reference: None counts by each sample's own length (Eq. 2); a number counts as if shorter samples had so many
        tokens, so that they keep all for longer, as they do when inputs are truncated.
    dropped: "gone" (the paper), "merged" (into the next kept token: its mean, by the tokens it stands for), "weighted"
        (merged by score), "keys" (kept as keys and values, of the state in which it was dropped, for all layers
        above) or "noted" (a learned note of what it said is added to the next kept token: needs a scorer with notes).
    ahead: the score looks at the states that enter a layer, not at its attention: what goes on is known beforehand, and
        only that asks queries.
    scorer_macs: what a learned score costs per row that enters a layer that drops some: (the first of these layers,
        those above).
    """

    score: str = "column_sum"
    schedule: str | tuple[float, ...] = "geometric"
    dropped: str = "gone"
    sinks: int = 0
    recent: float = 0.0
    smooth: int = 1
    reference: int | None = None
    tau: int = 5
    ahead: bool = False
    scorer_macs: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if not isinstance(self.schedule, str):  # a configuration's list
            object.__setattr__(self, "schedule", tuple(self.schedule))


# ---------------------------------------------------------------------------------------------------- schedules


def weights(schedule: str | Sequence[float], layers: int) -> list[float]:
    """How strongly each layer drops: it keeps alpha^w of what enters; the weights sum to the number of layers, so that
    the top layer is left with the same share under every schedule."""
    third = layers // 3
    if not isinstance(schedule, str):
        given = [float(w) for w in schedule]
        if len(given) != layers or min(given) < 0 or sum(given) == 0:
            raise ValueError(f"a schedule needs {layers} weights >= 0, one per layer, not all 0; got {schedule}.")
    elif schedule == "geometric":
        given = [1.0] * layers
    elif schedule.partition(":")[0] == "rising":
        slope = float(schedule.partition(":")[2] or 1)
        given = [math.exp(slope * layer / layers) for layer in range(layers)]
    elif schedule == "front":
        given = [max(1.0, layers / 4)] + [1.0] * (layers - 1)
    elif schedule == "late":
        given = [0.0] * third + [1.0] * (layers - third)
    elif schedule == "early":
        given = [1.0] * third + [0.0] * (layers - third)
    elif schedule.partition(":")[0] == "once":
        at = int(schedule.partition(":")[2] or 1)
        given = [float(layer == at) for layer in range(1, layers + 1)]
    elif schedule == "twice":
        given = [1.0 if layer in (0, min(3, layers - 1)) else 0.0 for layer in range(layers)]
    else:
        raise ValueError(f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}, or one weight per layer.")
    return [w * layers / sum(given) for w in given]


@lru_cache
def _shares(alpha: float, schedule: str | tuple[float, ...], layers: int) -> list[float]:
    """What each layer keeps of what enters. Training asks for many lengths at one alpha."""
    if str(schedule).partition(":")[0] == "easing":
        slope = float(schedule.partition(":")[2] or 4) / max(1.0, -layers * math.log(alpha))
        schedule = f"rising:{slope}"
    return [alpha**w for w in weights(schedule, layers)]


def counts(n: int, alpha: float, layers: int, variant: Variant) -> list[int]:
    """N_1 .. N_L for n tokens: N_l = max(floor(alpha^w_l N_(l-1)), tau); "linear" drops the same number each layer."""
    if variant.reference is not None and n < variant.reference:
        allowed = counts(variant.reference, alpha, layers, variant)
        return [min(n, most) for most in allowed]
    found, floor = [], min(n, variant.tau)
    kind, _, share = str(variant.schedule).partition(":")
    if kind == "deep":
        token_layers = sum(counts(n, alpha, layers, replace(variant, schedule="geometric", reference=None)))
        whole = max(0, math.floor(float(share or 0.6) * token_layers / n + 1e-9) - 1)  # layers that drop nothing
        kept = min(n, max(floor, (token_layers - whole * n) // (layers - whole)))
        return [n] * whole + [kept] * (layers - whole)
    if kind == "zipf":
        power = float(share or 1)
        pace = alpha ** (-1 / power) - 1
        shares = ((1 + pace * layer) ** -power for layer in range(1, layers + 1))
        return [min(n, max(math.floor(share * n + 1e-6), floor)) for share in shares]
    if variant.schedule == "linear":
        top = max(math.floor(alpha**layers * n + 1e-6), floor)
        return [round(n - (n - top) * (layer + 1) / layers) for layer in range(layers)]
    for share in _shares(alpha, variant.schedule, layers):
        n = min(n, max(math.floor(share * n + 1e-6), floor))
        found.append(n)
    return found


def macs(config, n: int, alpha: float, variant: Variant) -> int:
    """Multiply-accumulates of a prefill of n tokens, in zsaa.cost's convention; kept keys count with the projections to
    keys and values, and in the attention of those that go on."""
    entering_weights, kept_weights = layer_weights(config)
    (q_dim, kv_dim), size = attention_widths(config), config.hidden_size  # a config is slow to read
    total, alive, scoring = 0, n, variant.scorer_macs[0]
    for kept in counts(n, alpha, config.num_hidden_layers, variant):
        banked = n - alive if variant.dropped == "keys" else 0
        asking = kept if variant.ahead else alive
        total += alive * entering_weights - (alive - asking) * q_dim * size + kept * kept_weights
        total += 2 * asking * (alive + banked) * q_dim + banked * 2 * kv_dim * size
        if kept < alive:
            total, scoring = total + alive * scoring, variant.scorer_macs[1]
        alive = kept
    return total


def total_macs(config, counted: Counter, alpha: float, variant: Variant) -> int:
    """The sum of `macs` over lengths, each as often as `counted` says; at once, where the schedule is shares of what
    enters: training asks for it dozens of times a step."""
    kind = str(variant.schedule).partition(":")[0]
    if kind in ("deep", "zipf", "linear") or variant.reference is not None or variant.dropped == "keys":
        return sum(times * macs(config, n, alpha, variant) for n, times in counted.items())
    entering_weights, kept_weights = layer_weights(config)
    (q_dim, _), size = attention_widths(config), config.hidden_size
    alive, times = (np.array(list(x), dtype=np.int64) for x in (counted.keys(), counted.values()))
    floor, total, scored = np.minimum(alive, variant.tau), 0, np.zeros_like(alive, dtype=bool)
    for share in _shares(alpha, variant.schedule, config.num_hidden_layers):
        kept = np.minimum(alive, np.maximum(np.floor(share * alive + 1e-6).astype(np.int64), floor))
        asking = kept if variant.ahead else alive
        total = total + alive * entering_weights - (alive - asking) * q_dim * size + kept * kept_weights
        total = total + 2 * asking * alive * q_dim
        drops = kept < alive
        total = total + np.where(drops, alive * np.where(scored, variant.scorer_macs[1], variant.scorer_macs[0]), 0)
        scored, alive = scored | drops, kept
    return int((total * times).sum())


def alpha_for(config, lengths: Sequence[int], mac_reduction: float, variant: Variant) -> float:
    """The largest alpha that divides the MACs of samples of these lengths by `mac_reduction`, to 1e-4."""
    if mac_reduction <= 1:
        return 1.0
    counted = Counter(lengths)

    def total(alpha: float) -> int:
        return total_macs(config, counted, alpha, variant)

    whole, low, high = total(1.0), 1e-4, 1.0
    if whole / total(low) < mac_reduction:
        raise ValueError(f"{variant} cannot reach {mac_reduction}x on these samples.")
    while high - low > 1e-4:
        middle = (low + high) / 2
        reached = whole / total(middle) >= mac_reduction
        low, high = (middle, high) if reached else (low, middle)
    return low


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
) -> tuple[Tensor, list[Tensor]]:
    """The decoder's last hidden states of the rows that reach the top, and which those are.

    ids int64 [batch, width], padded on the right; lengths: real tokens of each sample, `tail` included: the last `tail`
    tokens of each sample neither vote nor are dropped, as if they were decoded behind the pruned prompt.
    scorer: a module in place of the variant's score: (layer, hidden states that enter it [batch, rows, size], output of
        its attention before the projection [batch, rows, q_dim], token ids [batch, rows], real rows, bool [batch,
        rows]) -> scores [batch, rows], or None: the variant's score decides. It may have a method watches(layer): is it
        called where nothing is dropped? For dropped="noted" it has read(layer, kept rows [batch, kept], how many of
        them are real [batch]) -> what is added to their states, of its last call.
    entered: is filled with the hidden states that enter each layer.

    Returns hidden [batch, rows, size] after the final norm (real rows first, the sample's last token the last of them)
    and per layer the original positions that it passed on, int64 [batch, rows], -1 for padding.
    """
    decoder, family = find_decoder(decoder)
    config, device = decoder.config, ids.device
    layers = getattr(decoder, family.layers)
    if config.model_type.startswith("gemma") or getattr(config, "sliding_window", None):
        raise ValueError(f"no ablation for {config.model_type}: sliding windows and softcapping are not done here.")
    # All shapes are known beforehand: one copy to the device, and no layer waits for it.
    plans = [[n, *(kept + tail for kept in counts(n - tail, alpha, len(layers), variant))] for n in lengths]
    stages = torch.tensor(plans, device=device)
    positions = torch.arange(ids.shape[1], device=device).expand(len(ids), -1)
    tables = None
    if config.model_type != "gpt2":
        every = torch.arange(ids.shape[1], device=device)[None]
        tables = [
            F.embedding(every, table[0]) for table in decoder.rotary_emb(decoder.get_input_embeddings().weight, every)
        ]
    hidden = decoder.get_input_embeddings()(ids)
    if config.model_type == "gpt2":
        hidden = decoder.drop(hidden + decoder.wpe(positions))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    stand_for = torch.ones(ids.shape, dtype=wide, device=device)  # how many tokens a merged row stands for
    bank: tuple[Tensor, Tensor, Tensor] | None = None  # hidden, positions, real of kept keys
    trail = []
    scorer_watches = getattr(scorer, "watches", lambda layer: False)
    for number, layer in enumerate(layers):
        attention = getattr(layer, family.attention)
        if entered is not None:
            entered[number] = hidden
        rows, sizes = hidden.shape[1], stages[:, number]
        real = torch.arange(rows, device=device) < sizes[:, None]
        norm = getattr(layer, family.attention_norm)
        q, k, v = family.qkv(attention, _normed(norm, hidden))
        at = positions
        drops = any(plan[number + 1] < plan[number] for plan in plans)
        gone = variant.dropped in ("gone", "noted") or (bank is None and variant.dropped == "keys")
        visible = None
        if drops or not gone:
            visible = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None] & real[:, None, None]
        if bank is not None:
            _, bank_k, bank_v = family.qkv(attention, _normed(norm, bank[0]))
            k, v, at = torch.cat((k, bank_k), 2), torch.cat((v, bank_v), 2), torch.cat((at, bank[1]), 1)
            seen = (bank[1][:, None, None] <= positions[:, None, :, None]) & bank[2][:, None, None]
            visible = torch.cat((visible.expand(len(ids), -1, -1, -1), seen), 3)
        if config.model_type != "gpt2":
            cos, sin = (F.embedding(at, table[0].to(q.dtype)) for table in tables)
            if bank is None:
                q, k = rotate(q, k, cos, sin)
            else:
                k, _ = rotate(k, k, cos, sin)
                q, _ = rotate(q, q, cos[:, :rows], sin[:, :rows])
        dropout = family.dropout(attention) if decoder.training else 0.0
        shared = {"scale": attention.scaling, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
        if gone:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, **shared)
        else:  # a padding row sees the first key, or its NaN would reach the gradients
            mask = torch.zeros(visible.shape, dtype=q.dtype, device=device).masked_fill(~visible, float("-inf"))
            mask[..., 0] = torch.where(visible.any(-1), mask[..., 0], 0)
            if bank is None:  # a row that stands for several tokens is attended to as often
                mask = mask + stand_for.log()[:, None, None].to(q.dtype)
            output = F.scaled_dot_product_attention(q, k, v, mask, **shared)
        output = output.transpose(1, 2).flatten(2)

        if scorer is not None and (drops or scorer_watches(number)):  # it may be in training
            learned = scorer(number, hidden, output, ids.gather(1, positions), real)
        if drops:
            wanted, width = stages[:, number + 1], max(plan[number + 1] for plan in plans)
            with torch.no_grad():
                if scorer is not None and learned is not None:
                    scores = learned.detach().to(wide)
                else:
                    voters = torch.arange(rows, device=device) < (sizes - tail)[:, None]
                    view = View(q, k, v, hidden, positions, real, voters, visible, attention.scaling, number)
                    scores = SCORES[variant.score](view).to(wide)
                kept = _select(scores, sizes, wanted, width, variant, tail)
            inside = torch.arange(kept.shape[1], device=device) < wanted[:, None]
            if variant.dropped in ("merged", "weighted"):
                share = stand_for if variant.dropped == "merged" else stand_for * scores.clamp(min=1e-6)
                (hidden, output), stand_for = _merge((hidden, output), share * real, stand_for * real, kept, inside)
            else:
                if variant.dropped == "keys":
                    stays = real.new_zeros(len(ids), rows + 1).scatter(1, torch.where(inside, kept, rows), True)
                    lost = ~stays[:, :rows] & real
                    width = max(1, int(lost.sum(1).max()))
                    out = lost.float().topk(width, 1, sorted=True).indices.sort(1).values
                    new = take(hidden, out), positions.gather(1, out), lost.gather(1, out)
                    bank = new if bank is None else tuple(torch.cat(pair, 1) for pair in zip(bank, new))
                hidden, output = take(hidden, kept), take(output, kept)
                if variant.dropped == "noted":
                    hidden = hidden + scorer.read(number, kept, wanted).to(hidden.dtype)
            positions = positions.gather(1, kept)
        rows = hidden.shape[1]
        trail.append(positions.masked_fill(torch.arange(rows, device=device) >= stages[:, number + 1, None], -1))
        hidden = hidden + family.output(attention, output)
        hidden = hidden + getattr(layer, family.mlp)(_normed(getattr(layer, family.mlp_norm), hidden))
    final = decoder.ln_f if config.model_type == "gpt2" else decoder.norm
    return _normed(final, hidden), trail


def _normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """norm(hidden); on a GPU transformers' RMSNorm in one kernel, not six: they are half of a small model's time."""
    if hidden.is_cuda and hasattr(norm, "variance_epsilon"):
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
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
