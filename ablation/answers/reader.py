"""A LLaMA-like model's pass over prompts whose least asked-for tokens leave, in real rows: prefill, and greedy answers.

Rows are gathered, so the pass gets shorter where tokens leave. What stays keeps its order and its positions, padding
stands at the end, and so attention is plain causal attention throughout. Answer tokens never leave and never choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.answers.data import Sample

SINKS = 4  # first tokens, which never leave


@dataclass
class Batch:
    """Prompts, right-padded. A prompt is its region, from which tokens may leave, and the rest of it, which stays."""

    ids: Tensor  # [batch, tokens]
    region: Tensor  # [batch], its tokens
    prompt: Tensor  # [batch]
    total: Tensor  # [batch], with the answer
    head: Tensor  # [batch, askers], places of the tokens that ask
    part: Tensor  # [batch, askers]: 1 older turns, 2 the last turn, 3 the question, 0 padding

    @property
    def exempt(self) -> Tensor:
        return self.prompt - self.region + self.region.clamp(max=SINKS)


def batch(samples: Sequence[Sample], device, answers: bool = True, history: bool = False) -> Batch:
    """history: the turns before the question stay whole too; otherwise they are part of the region."""
    rows = [s.body + s.older + s.last + s.line + (s.answer if answers else ()) for s in samples]
    heads = [len(s.older) + len(s.last) + len(s.line) for s in samples]
    width, widest = max(map(len, rows)), max(heads)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    part = torch.zeros(len(rows), widest, dtype=torch.long)
    for i, (s, row, head) in enumerate(zip(samples, rows, heads)):
        ids[i, : len(row)] = torch.tensor(row)
        part[i, :head] = torch.tensor([1] * len(s.older) + [2] * len(s.last) + [3] * len(s.line))
    prompt = torch.tensor([len(s.body) for s in samples]) + torch.tensor(heads)
    region = torch.tensor([len(s.body) + (0 if history else len(s.older) + len(s.last)) for s in samples])
    total = torch.tensor([len(row) for row in rows])
    first = torch.tensor([len(s.body) for s in samples])
    head = (first[:, None] + torch.arange(widest)).clamp(max=width - 1)
    return Batch(*(t.to(device) for t in (ids, region, prompt, total, head, part)))


def chunks_of(b: Batch, size: int) -> Tensor:
    """Which chunk of `size` tokens each token of the region is of [batch, widest region]."""
    return (torch.arange(int(b.region.max()), device=b.ids.device) // size).expand(len(b.ids), -1)


def ranks(scores: Tensor, b: Batch, unit: Tensor) -> Tensor:
    """[batch, tokens]: how many prompt tokens stay longer than this one. scores: of the region's chunks; unit: which
    chunk each of its tokens is of.

    Exempt tokens come first, then chunk by chunk, each from its beginning; answers are below zero, padding is last.
    """
    n, width = len(b.ids), b.ids.shape[1]
    i = torch.arange(width, device=b.ids.device).expand(n, width)
    order = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    key = order.gather(1, F.pad(unit, (0, width - unit.shape[1]))) * width + i
    key = key.masked_fill((i < SINKS) | (i >= b.region[:, None]), -1)
    key = key.masked_fill(i >= b.prompt[:, None], -2).masked_fill(i >= b.total[:, None], 2 * width**2)
    return key.argsort(dim=1, stable=True).argsort(1) - (b.total - b.prompt)[:, None]


def rope(place: Tensor, config, dtype) -> tuple[Tensor, Tensor]:
    d = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    f = theta ** (-torch.arange(0, d, 2, device=place.device).float() / d)
    angle = (place[..., None].float() * f).repeat(1, 1, 2)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * by[0] + torch.cat([-b, a], -1) * by[1]


def projections(attention, config, y: Tensor, by) -> tuple[Tensor, Tensor, Tensor]:
    n, m, d = y.shape[0], y.shape[1], config.hidden_size // config.num_attention_heads
    q = attention.q_proj(y).view(n, m, -1, d).transpose(1, 2)
    k = attention.k_proj(y).view(n, m, -1, d).transpose(1, 2)
    return turn(q, by), turn(k, by), attention.v_proj(y).view(n, m, -1, d).transpose(1, 2)


def norm(module, x: Tensor) -> Tensor:
    """The module's RMS norm in one launch, which also keeps less for the backward pass."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def through(layer, x: Tensor, o: Tensor) -> Tensor:
    x = x + layer.self_attn.o_proj(o.transpose(1, 2).reshape(*x.shape[:2], -1))
    return x + layer.mlp(norm(layer.post_attention_layernorm, x))


@dataclass
class Rows:
    """What is still on its way: states, their places in the prompt, and which rows are no padding."""

    x: Tensor
    place: Tensor
    real: Tensor

    def keep(self, rank: Tensor, tokens: Tensor) -> Rows:
        """The rows whose rank is below the number of tokens; in order, shortened to the longest sample."""
        return self.only(self.real & (rank.gather(1, self.place) < tokens[:, None]))

    def parted(self, b: Batch) -> tuple[Rows, Rows]:
        """(the region's rows, padding in the others' places; those that stand behind it)"""
        asks = self.real & (self.place >= b.region[:, None])
        return Rows(self.x, self.place, self.real & ~asks), self.only(asks)

    def only(self, stays: Tensor) -> Rows:
        width = max(1, int(stays.sum(1).max()))
        index = (~stays).long().argsort(dim=1, stable=True)[:, :width]
        x = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[-1]))
        return Rows(x, self.place.gather(1, index), stays.gather(1, index))


def behind(layer, config, stood: Rows, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(keys, values, which are no padding, what each row looks at) of rows that go on behind those that stand still;
    by self_attn.guess, where it is there (ablation/answers/guess.py), in place of the layer's own projections."""
    by, y = rope(stood.place, config, k.dtype), norm(layer.input_layernorm, stood.x)
    if hasattr(layer.self_attn, "guess"):
        size = config.hidden_size // config.num_attention_heads
        first, values = (
            part.unflatten(-1, (-1, size)).transpose(1, 2) for part in layer.self_attn.guess(y).chunk(2, -1)
        )
        first = turn(first, by)
    else:
        _, first, values = projections(layer.self_attn, config, y, by)
    rows = real.shape[1]
    before = torch.ones(rows, rows, dtype=torch.bool, device=real.device).tril().expand(len(real), 1, -1, -1)
    mask = torch.cat([stood.real[:, None, None].expand(-1, 1, rows, -1), before], -1)
    return torch.cat([first, k], 2), torch.cat([values, v], 2), torch.cat([stood.real, real], 1), mask


def read(
    lm,
    b: Batch,
    steps: Sequence[int] = (),
    keep: Tensor | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
    unit: Tensor | None = None,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
    store: list | None = None,
    layers: int | None = None,
    close: bool = False,
    passed: list[Rows] | None = None,
    still: int | None = None,
) -> Rows:
    """The pass over the first `layers` layers (all of them, and the last norm).

    steps: before which layers tokens leave; keep [batch, steps]: prompt tokens that go on. choose(states): scores of
    the region's chunks, asked once, before the first step; unit: as in `ranks`. watch(layer, queries, keys) sees each
    layer's attention; store collects each layer's keys, values and real rows; passed, what
    enters each layer, and what the last one leaves. close: what is left is numbered anew, as
    if nothing had stood between; otherwise it keeps its places. still: from which layer on the region stands still: its
    keys and values come of the states that enter that layer (SwiftKV, arXiv 2410.03960), and only what asks goes on.
    """
    config = lm.config
    rows = Rows(lm.model.embed_tokens(b.ids), *_places(b))
    rank, by, stood = None, None, None
    for number, layer in enumerate(lm.model.layers[:layers]):
        for s in (s for s, at in enumerate(steps) if at == number):
            if rank is None:
                rank = ranks(choose(rows.x), b, unit)
            rows, by = rows.keep(rank, keep[:, s]), None
        if number == still:
            stood, rows, by = *rows.parted(b), None
        if by is None:
            dtype = torch.bfloat16 if torch.is_autocast_enabled(rows.x.device.type) else rows.x.dtype
            by = rope(rows.real.cumsum(1) - 1 if close else rows.place, config, dtype)
        if passed is not None:
            passed.append(rows)
        q, k, v = projections(layer.self_attn, config, norm(layer.input_layernorm, rows.x), by)
        real, mask = rows.real, None
        if stood is not None:
            k, v, real, mask = behind(layer, config, stood, k, v, real)
        if watch is not None:
            watch(number, q, k)
        if store is not None:
            store.append((k, v, real))
        rows = Rows(through(layer, rows.x, attend(q, k, v, mask)), rows.place, rows.real)
    if passed is not None:
        passed.append(rows)
    return rows if layers is not None else Rows(norm(lm.model.norm, rows.x), rows.place, rows.real)


def _places(b: Batch) -> tuple[Tensor, Tensor]:
    place = torch.arange(b.ids.shape[1], device=b.ids.device).expand(b.ids.shape)
    return place, place < b.total[:, None]


def at_answers(lm, rows: Rows, b: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities where answer tokens are foretold, the tokens, and whose they are."""
    where = rows.real & (rows.place >= b.prompt[:, None] - 1) & (rows.place < b.total[:, None] - 1)
    owner, row = where.nonzero(as_tuple=True)
    gold = b.ids[owner, rows.place[owner, row] + 1]
    return lm.lm_head(rows.x[owner, row]).float().log_softmax(-1), gold, owner


@torch.no_grad()
def answer(lm, b: Batch, end: int, limit: int = 24, temperature: float = 0.0, likely: list[float] | None = None,
           **how) -> list[list[int]]:  # fmt: skip
    """Greedy answers up to the token `end`, on the keys and values that a prefill left; with a temperature they are
    drawn. b: without answers. likely: gets the probability of each answer, its end among it."""
    logs, done = torch.zeros(len(b.ids), device=b.ids.device), torch.zeros_like(b.prompt, dtype=torch.bool)

    def chosen(logits: Tensor) -> Tensor:
        if likely is not None:
            logs.add_(logits[:, 0].float().log_softmax(-1).amax(-1).masked_fill(done, 0))
        if not temperature:
            return logits.argmax(-1)
        return torch.multinomial((logits[:, 0].float() / temperature).softmax(-1), 1)

    kept: list = []
    rows = read(lm, b, store=kept, **how)
    last = (rows.real.sum(1) - 1)[:, None, None].expand(-1, 1, rows.x.shape[-1])
    token = chosen(lm.lm_head(rows.x.gather(1, last)))
    first = rows.real.sum(1) if how.get("close") else b.prompt
    kept = [(F.pad(k, (0, 0, 0, limit)), F.pad(v, (0, 0, 0, limit)), F.pad(r, (0, limit))) for k, v, r in kept]
    said = [token[:, 0]]
    done |= token[:, 0] == end
    for t in range(limit - 1):
        if bool(done.all()):
            break
        x = lm.model.embed_tokens(token)
        by = rope((first + t)[:, None], lm.config, kept[0][0].dtype)
        for layer, (keys, values, real) in zip(lm.model.layers, kept):
            q, k, v = projections(layer.self_attn, lm.config, norm(layer.input_layernorm, x), by)
            at = keys.shape[2] - limit + t
            keys[:, :, at], values[:, :, at], real[:, at] = k[:, :, 0], v[:, :, 0], True
            x = through(layer, x, attend(q, keys, values, real[:, None, None]))
        token = chosen(lm.lm_head(norm(lm.model.norm, x)))
        said.append(token[:, 0])
        done |= token[:, 0] == end
    if likely is not None:
        likely += logs.exp().tolist()
    return torch.stack(said, 1).tolist()
