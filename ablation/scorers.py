"""Learned scores: what each looks at, what it costs, and what it is taught.

Two teachers. The gradient of a step's alpha = 1 pass says how much of the loss each token's state carries (`Probe`).
The labels say what each token, or phrase, tells by itself: it votes for a class, and all votes together must be right
(`Evidence`). `make` builds the scorer of a row, `price` counts its multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.forward import between, take
from ablation.variants import Variant, named
from ablation.words import Weights, fit
from zsaa.cost import attention_widths

PROBES = ("gradient", "wide", "salience", "phrases", "wide-phrases")  # a gradient teaches them
GRADIENTS = (*PROBES, "votes", "told", "both")  # a gradient teaches them, at least above
AHEAD = (*PROBES, "votes", "told", "words")  # they know what goes on before a layer's attention
KINDS = ("", *GRADIENTS, "words", "evidence", "notes")

WIDTH = 64  # of a head's hidden layer
REACH = 5  # tokens in a phrase
NOTE = 128  # of a note


def make(
    kind: str, config, variant: Variant, classes: int, samples: Sequence[Sequence[int]] = (), labels: Sequence[int] = ()
) -> Probe | Evidence | Words | None:
    """The untrained scorer of a kind, for the layers that drop under `variant`. samples, labels: for "words", which is
    fitted to them at once."""
    if variant.ahead and kind not in AHEAD:
        raise ValueError(f"probe {kind!r} looks at a layer's attention: what goes on is not known ahead of it.")
    layers = dropping(config, variant)
    if kind in PROBES:
        phrases, wide = kind.endswith("phrases"), kind in ("wide", "salience", "wide-phrases")
        words = config.vocab_size if phrases or kind == "salience" else 0
        return Probe(config.hidden_size, layers, words, wide, phrases)
    if kind == "words":
        return Words(fit([torch.tensor(s) for s in samples], labels, config.vocab_size))
    if kind == "both":
        return Both(config, layers, classes)
    if kind in ("votes", "told"):
        return Votes(config, layers, classes, told=kind == "told")
    if kind in ("evidence", "notes"):
        noted = variant.dropped == "noted"
        return Evidence(config, layers, classes, noted=noted, deciding=kind == "evidence")
    return None


def price(kind: str, config, variant: Variant, classes: int) -> tuple[int, int]:
    """Multiply-accumulates per row that enters a layer which drops some: of the first of these layers, and of those
    above. Notes count as if every row were read."""
    size, q_dim = config.hidden_size, attention_widths(config)[0]
    phrase = WIDTH * size + REACH * WIDTH * WIDTH
    one_by_one = WIDTH * (size + q_dim + classes)
    noted = NOTE * (2 * size + q_dim) if variant.dropped == "noted" else 0
    return {
        "gradient": (size, size),
        "wide": (WIDTH * (size + 1), WIDTH * (size + 1)),
        "salience": (WIDTH * (size + 1), WIDTH * (size + 1)),
        "phrases": (phrase + WIDTH, size),
        "wide-phrases": (phrase + WIDTH, WIDTH * (size + 1)),
        "evidence": (one_by_one + noted, one_by_one + noted),
        "notes": (noted, noted),
        "both": (one_by_one, size),
        "votes": (phrase + WIDTH * classes, size),
        "told": (phrase + WIDTH * (classes + size), size),
    }.get(kind, (0, 0))


def dropping(config, variant: Variant) -> list[int]:
    """The layers that drop something at some alpha."""
    found, layers = set(), config.num_hidden_layers
    for alpha in (0.999, *(0.99 - 0.01 * step for step in range(50))):
        plan = [512, *variant.counts(512, alpha, layers)]
        found |= {n for n in range(layers) if plan[n + 1] < plan[n]}
    return list(range(max(found) + 1)) if named(variant.schedule)[0] == "deep" else sorted(found)


class Phrase(nn.Module):
    """States [batch, rows, size] of whole texts to [batch, rows, out] numbers, each of a token and the REACH - 1 before
    it: a causal convolution. `features` [batch, rows, WIDTH] is what the last call saw, zero for padding."""

    def __init__(self, size: int, out: int):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(size), nn.Linear(size, WIDTH)
        self.mix, self.out = nn.Conv1d(WIDTH, WIDTH, REACH), nn.Linear(WIDTH, out)
        nn.init.zeros_(self.out.weight)
        self.features: Tensor | None = None

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        x = F.dropout(self.down(self.norm(hidden.float())), 0.1, self.training) * real[..., None]
        self.features = F.gelu(self.mix(F.pad(x.transpose(1, 2), (REACH - 1, 0))).transpose(1, 2)) * real[..., None]
        return self.out(self.features)


class Probe(nn.Module):
    """A linear score of the states that enter each dropping layer, trained beside the model by gradients. wide: the
    heads have a hidden layer; words: that many tokens have a score of their own, too, wherever they stand; phrases:
    the first head scores phrases, and tokens have their own score in its layer alone."""

    def __init__(self, size: int, layers: Sequence[int], words: int = 0, wide: bool = False, phrases: bool = False):
        super().__init__()
        self.heads = nn.ModuleDict({str(n): nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 1)) for n in layers})
        self.table = nn.Embedding(words, 1) if words else None
        self.everywhere = not phrases  # does the table score in all layers?
        if words:
            nn.init.zeros_(self.table.weight)
        if wide:
            for head in self.heads.values():
                head[1] = nn.Sequential(nn.Linear(size, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        if phrases:
            self.heads[str(layers[0])] = Phrase(size, 1)

    def groups(self) -> list[dict]:
        return [{"params": self.parameters(), "lr": 1e-3}]

    @property
    def by_gradient(self) -> Probe:
        """The part that a gradient teaches."""
        return self

    def forward(self, layer: int, hidden: Tensor, output: Tensor | None, tokens: Tensor | None, real: Tensor = None):
        head = self.heads[str(layer)]
        phrase = isinstance(head, Phrase)
        score = (head(hidden, real) if phrase else head(hidden.float())).squeeze(-1)
        tabled = self.table is not None and (phrase or self.everywhere)
        return score + self.table(tokens).squeeze(-1) if tabled else score

    def loss(
        self,
        entered: dict[int, Tensor],
        ids: Tensor,
        trail: Sequence[Tensor],
        rivals: bool = False,
        lengths: bool = False,
    ) -> Tensor:
        """Cross-entropy to each token's share of |state x gradient|; call after a backward pass. ids [batch, width];
        trail: per layer the positions that enter it [batch, rows], -1 for padding; rivals: of tokens that may be
        dropped, so not of the last; lengths: share of |state| x |gradient|, whatever the angle between them, which a
        norm makes nearly a right one."""
        total = ids.new_zeros((), dtype=torch.float32)
        for name in self.heads:
            state, at = entered[int(name)], trail[int(name)]
            tokens, real = ids.gather(1, at.clamp(min=0)), at >= 0
            real = real & (at < at.amax(1, keepdim=True).clamp(min=1)) if rivals else real
            given, pull = state.detach().float(), state.grad.float()
            share = given.norm(dim=-1) * pull.norm(dim=-1) if lengths else (given * pull).sum(-1).abs()
            share = share * real
            share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
            logits = self(int(name), state.detach(), None, tokens, real).float()
            logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)  # not -inf: there may be none
            total = total - (share * logits.log_softmax(1).masked_fill(~real, 0)).sum(1).mean()
        return total


class Words(nn.Module):
    """Scores of a bag of words: how much each token of the vocabulary tells by itself."""

    by_gradient = None

    def __init__(self, weights: Weights):
        super().__init__()
        self.register_buffer("salience", weights.salience())

    def groups(self) -> list[dict]:
        return []

    def forward(self, layer: int, hidden: Tensor, output: Tensor, tokens: Tensor, *_) -> Tensor:
        return self.salience[tokens]


class Evidence(nn.Module):
    """How much each token tells about the label by itself: in every dropping layer a small head gives each row a vote
    for each class, and the votes, summed over the rows alone, must predict the label. A row's score is how far its
    votes are apart. The head sees what the row carries on, the state that enters the layer and what its attention read,
    and not the rows beside it. A table adds what the token tells wherever it stands.

    noted: a second head writes a note of each row, from what the first one sees; if the row is dropped, the note is
    added, through a matrix that starts at zero, to the state of the next kept one. deciding: do the votes decide?"""

    PRICE = 0.1  # of a vote

    def __init__(self, config, layers: Sequence[int], classes: int, noted: bool = False, deciding: bool = True):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, classes)
        nn.init.zeros_(self.table.weight)
        self.heads = nn.ModuleDict({str(layer): self._head(config, classes, noted) for layer in layers})
        self.deciding = deciding
        self.notes: dict[int, Tensor] = {}  # the last pass' notes, zero for padding
        self.together: dict[int, Tensor] = {}  # the last pass' votes of each layer, summed: class logits by themselves
        self.spread: dict[int, Tensor] = {}  # and how far they are apart on average

    @staticmethod
    def _head(config, classes: int, noted: bool) -> nn.Module:
        hidden, (q_dim, _) = config.hidden_size, attention_widths(config)
        head = nn.ModuleDict({
            "norms": nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(q_dim)]),
            "features": nn.Linear(hidden + q_dim, WIDTH),
            "votes": nn.Linear(WIDTH, classes),
        })  # fmt: skip
        nn.init.zeros_(head["votes"].weight)
        if noted:
            head["note"] = nn.Linear(hidden + q_dim, NOTE)
            head["read"] = nn.Linear(NOTE, hidden, bias=False)
            nn.init.zeros_(head["read"].weight)
        return head

    @property
    def by_gradient(self) -> Probe | None:
        above = self._modules.get("above")
        return above if above is not None and len(above.heads) else None

    def groups(self) -> list[dict]:
        into_states = [p for name, p in self.heads.named_parameters() if ".note." in name or ".read." in name]
        heads = [p for name, p in self.heads.named_parameters() if ".note." not in name and ".read." not in name]
        return [
            {"params": heads, "lr": 1e-3},
            {"params": into_states, "lr": 1e-4},  # faster, and they drown the states
            {"params": self.table.parameters(), "lr": 3e-3, "weight_decay": 0.0},
        ]

    def loss(self, wanted: Tensor) -> Tensor:
        """Of the last pass: cross-entropy of the votes alone, and a price on votes, so that tokens that tell nothing
        have none."""
        losses = [F.cross_entropy(self.together[n], wanted) + self.PRICE * self.spread[n] for n in self.together]
        return sum(losses) / len(losses)

    def watches(self, layer: int) -> bool:
        """Is it to see the layer's rows even if all of them go on?"""
        return self.deciding and str(layer) in self.heads

    def read(self, layer: int, kept: Tensor, wanted: Tensor) -> Tensor:
        """What is added to the states of the kept rows [batch, kept], of which `wanted` [batch] are real."""
        return self.heads[str(layer)]["read"](between(self.notes[layer], kept))

    def forward(self, layer: int, hidden: Tensor, output: Tensor, tokens: Tensor, real: Tensor) -> Tensor | None:
        head = self.heads[str(layer)]
        seen = torch.cat([norm(x.float()) for norm, x in zip(head["norms"], (hidden, output))], -1)
        if "note" in head:
            self.notes[layer] = F.gelu(head["note"](seen)) * real[..., None]
        if not self.deciding:
            return None
        features = F.dropout(F.gelu(head["features"](seen)), 0.1, self.training)
        return self.apart(layer, head["votes"](features), tokens, real)

    def apart(self, layer: int, votes: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """The scores, of the heads' votes; together with the table's they are noted down for the loss."""
        votes = (votes + self.table(tokens)) * real[..., None]
        self.together[layer] = 2 * votes.sum(1) / real.sum(1, keepdim=True).sqrt()
        apart = votes.amax(-1) - votes.amin(-1)
        self.spread[layer] = apart.sum() / real.sum()
        return apart


class Both(Evidence):
    """Evidence in the first layer, a gradient's score above."""

    def __init__(self, config, layers: Sequence[int], classes: int):
        super().__init__(config, layers[:1], classes)
        self.above = Probe(config.hidden_size, layers[1:])

    def groups(self) -> list[dict]:
        return [*super().groups(), *self.above.groups()]

    def forward(self, layer: int, hidden: Tensor, *seen) -> Tensor:
        return super().forward(layer, hidden, *seen) if self.watches(layer) else self.above(layer, hidden, *seen)


class Votes(Both):
    """As `Both`, but phrases vote, by the states that enter the first layer alone: what goes on is known before its
    attention. told: what the head saw of a phrase is added to the kept state, and the mean of all phrases to the last
    one's, through matrices that start at zero."""

    def __init__(self, config, layers: Sequence[int], classes: int, told: bool = False):
        super().__init__(config, layers, classes)
        self.lengths: Tensor | None = None  # real rows of the last pass
        head = self.heads[str(layers[0])]
        if told:
            head["read"] = nn.ModuleList(nn.Linear(WIDTH, config.hidden_size, bias=False) for _ in range(2))
            for part in head["read"]:
                nn.init.zeros_(part.weight)

    @staticmethod
    def _head(config, classes: int, noted: bool) -> nn.Module:
        return nn.ModuleDict({"phrase": Phrase(config.hidden_size, classes)})

    def forward(self, layer: int, hidden: Tensor, output: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        if not self.watches(layer):
            return self.above(layer, hidden, output, tokens, real)
        self.lengths = real.sum(1)
        return self.apart(layer, self.heads[str(layer)]["phrase"](hidden, real), tokens, real)

    def read(self, layer: int, kept: Tensor, wanted: Tensor) -> Tensor:
        if not self.watches(layer):
            return kept.new_zeros(())
        head, rows = self.heads[str(layer)], torch.arange(kept.shape[1], device=kept.device)
        seen = head["phrase"].features
        mean = seen.sum(1, keepdim=True) / self.lengths[:, None, None]
        own, all_of_them = (matrix(x) for matrix, x in zip(head["read"], (take(seen, kept), mean)))
        return own + all_of_them * (rows == wanted[:, None] - 1)[..., None]
