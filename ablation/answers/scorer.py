"""Which chunks of a prompt does its question ask for? A small score of chunks, asked by the question.

Every token of the head (the question and what was said before it) looks for its best match in every chunk: as a word
(the same word in its plain form, weighted by how rare it is) and in a learned space (a few narrow heads over a short
convolution of the token states). What all of them found, weighted by how much each token asks, is read over
neighbouring chunks. A score depends on its own sample alone: padding is masked everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAR = -1e4


@dataclass(frozen=True)
class Shape:
    """Sizes of a scorer. width 0: words alone, with nothing learned but how to read them."""

    states: int  # width of the token states it sees
    width: int = 128
    blocks: int = 2
    heads: int = 4
    reach: int = 7  # tokens of a convolution
    chunk: int = 32  # tokens
    dropout: float = 0.1


class Block(nn.Module):
    """What neighbours say, then a small MLP."""

    def __init__(self, width: int, reach: int):
        super().__init__()
        self.near = nn.Conv1d(width, width, reach, padding=reach // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        near = self.near((x * real[..., None]).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(near))))


class Scorer(nn.Module):
    """forward -> [batch, chunks], higher is better; a chunk without a token gets FAR."""

    def __init__(self, shape: Shape, canon: Tensor, idf: Tensor):
        """canon: plain form of each token id; idf: of each plain form."""
        super().__init__()
        self.shape = shape
        self.register_buffer("canon", canon)
        self.register_buffer("idf", idf)
        w, h = shape.width, shape.heads
        features = 6
        if w:
            self.enter = nn.Sequential(nn.LayerNorm(shape.states), nn.Linear(shape.states, w))
            self.part = nn.Embedding(4, w)  # body, older turns, the last turn, the question
            self.blocks = nn.ModuleList(Block(w, shape.reach) for _ in range(shape.blocks))
            self.leave = nn.Sequential(nn.LayerNorm(w), nn.Dropout(shape.dropout))
            self.query, self.key = nn.Linear(w, w), nn.Linear(w, w)
            self.weight = nn.Linear(w + 1, h + 2)
            self.own = nn.Linear(w, 8)
            features += 2 * h + 8 + 2
        self.read = nn.Sequential(
            nn.Conv1d(features, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(32, 1, 1),
        )
        nn.init.zeros_(self.read[-1].weight)
        nn.init.zeros_(self.read[-1].bias)
        self.words = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(
        self, body: Tensor | None, body_ids: Tensor, n_body: Tensor, head: Tensor | None, head_ids: Tensor, part: Tensor
    ) -> Tensor:
        """body, head: states [batch, tokens, width of the model]; part: of each head token, 0 for padding, 1 older,
        2 the last turn, 3 the question."""
        batch, n = body_ids.shape
        chunks = -(-n // self.shape.chunk)
        pad = chunks * self.shape.chunk - n
        real = torch.arange(n, device=body_ids.device) < n_body[:, None]
        there = F.pad(real, (0, pad)).unflatten(1, (chunks, self.shape.chunk))
        some = there.any(-1)
        found, rare = self._same_words(body_ids, real, head_ids, part, pad)
        asked, last = rare * (part == 3), rare * (part == 2)
        lexical = torch.stack([(found * a[..., None]).sum(1) for a in (asked, last)], 1)  # [batch, 2, chunks]
        most = lexical.amax(-1, keepdim=True).clamp(min=1.0)
        place = torch.arange(chunks, device=body_ids.device) / some.sum(1, keepdim=True).clamp(min=1)
        features = [lexical / 10, lexical / most, (place[:, None] * some[:, None]), some[:, None].float()]
        if self.shape.width:
            features += self._learned(body, real, head, part, found, rare, pad, there)
        x = torch.cat(features, 1) * some[:, None]
        for layer in self.read:
            x = layer(x)
            x = x * some[:, None]  # what is not there says nothing to its neighbours
        score = (self.words[:, None] * lexical / most * 4).sum(1) + x[:, 0]
        return score.masked_fill(~some, FAR)

    def _same_words(self, body_ids, real, head_ids, part, pad):
        """[batch, head tokens, chunks]: is the token's word in the chunk? and how rare it is, once per word."""
        ours, theirs = self.canon[head_ids], self.canon[body_ids].masked_fill(~real, -1)
        same = F.pad(ours[..., None] == theirs[:, None], (0, pad)).unflatten(2, (-1, self.shape.chunk)).any(-1)
        alike = (ours[:, :, None] == ours[:, None]) & (part[:, :, None] == part[:, None])
        again = (alike & torch.ones_like(alike).tril(-1)).any(-1)
        return same.float(), self.idf[ours] * ~again * (part > 0)

    def _learned(self, body, real, head, part, found, rare, pad, there):
        batch, n = real.shape
        b = self._encode(body, real, real.long() * 0)
        h = self._encode(head, part > 0, part)
        split = (self.shape.heads, self.shape.width // self.shape.heads)
        k = self.key(b).unflatten(2, split).transpose(1, 2)
        q = self.query(h).unflatten(2, split).transpose(1, 2)
        match = (q @ k.transpose(2, 3)) / split[1] ** 0.5  # [batch, heads, head tokens, body tokens]
        match = F.pad(match.masked_fill(~real[:, None, None], FAR), (0, pad), value=FAR)
        match = match.unflatten(3, (-1, self.shape.chunk)).amax(-1).clamp(min=-20)
        weight = self.weight(torch.cat([h, rare[..., None] / 5], -1)).masked_fill((part == 0)[..., None], FAR)
        weight = weight.softmax(1).transpose(1, 2)
        heads = (weight[:, :-2, :, None] * match).sum(2)
        best = heads.amax(-1, keepdim=True)
        words = weight[:, -2:] @ found
        own = F.pad(self.own(b) * real[..., None], (0, 0, 0, pad)).unflatten(1, (-1, self.shape.chunk)).sum(2)
        own = own / there.sum(-1).clamp(min=1)[..., None]
        return [heads, heads - best, own.transpose(1, 2), words]

    def _encode(self, states, real, part):
        x = self.enter(states.float()) + self.part(part)
        for block in self.blocks:
            x = block(x, real)
        return self.leave(x)

    def macs(self, body: int, head: int) -> int:
        """Multiply-accumulates for one prompt, comparisons of words left out (they multiply nothing)."""
        s, chunks = self.shape, -(-body // self.shape.chunk)
        total = chunks * (self.read[0].in_channels * 32 * 3 + 32 * 32 * 3 + 32) + 2 * head * chunks
        if s.width:
            token = s.states * s.width + s.blocks * (s.reach * s.width + 4 * s.width**2) + s.width**2
            total += (body + head) * token + body * s.width * 8 + head * (s.width + 1) * (s.heads + 2)
            total += head * body * s.width + head * chunks * (s.heads + 2)
        return total
