"""A learned score that is asked: which chunks of a prompt does its question ask for?

Every token of the head (the question and what was said before it) looks for its best match in every chunk: as a word
(the same word in its plain form, weighted by how rare it is) and in a learned space (a few narrow heads over a short
convolution of the token states). What all of them found, weighted by how much each token asks, is read over
neighbouring chunks. A score depends on its own sample alone: padding is masked everywhere.

It sees what enters the first layer, so that tokens can leave before it (schedule "entry"). How it is taught: the study
ablation/answers. Like the other learned score, zsaa/learned/salience.py, it is a child of the decoder, computes in
float32, and is saved in a file of its own. Not in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from zsaa.families import Part, find_decoder
from zsaa.learned.salience import Affine, Learned
from zsaa.rule import ASKERS, SINKS

FILE = "asked.safetensors"
CHILD = "asked"  # its name in the decoder
FAR = -1e4
PIECE, RAREST = 32, 5.0  # tokens in which a word is counted once; what the rarest word counts
QUESTION = 3  # of the parts that ask: 1 older turns, 2 the last turn, 3 the question; 0 does not ask


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

    @property
    def features(self) -> int:
        """What is read of each chunk."""
        return 6 + (2 * self.heads + 8 + 2 if self.width else 0)

    def macs(self, body: int, head: int) -> int:
        """Multiply-accumulates for one prompt, comparisons of words left out (they multiply nothing)."""
        chunks = -(-body // self.chunk)
        total = chunks * (self.features * 32 * 3 + 32 * 32 * 3 + 32) + 2 * head * chunks
        if self.width:
            w = self.width
            token = self.states * w + self.blocks * (self.reach * w + 4 * w**2) + w**2
            total += (body + head) * token + body * w * 8 + head * (w + 1) * (self.heads + 2)
            total += head * body * w + head * chunks * (self.heads + 2)
        return total


class Block(nn.Module):
    """What neighbours say, then a small MLP."""

    def __init__(self, width: int, reach: int):
        super().__init__()
        self.near = nn.Conv1d(width, width, reach, padding=reach // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = Affine(width, 2 * width), Affine(2 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        near = self.near((x * real[..., None]).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(near))))


class Scorer(Learned):
    """A learned score, asked by the question: 32 tokens together, by the words that they share with it and by sense."""

    child, file = CHILD, FILE
    canon: Tensor
    idf: Tensor

    def __init__(self, shape: Shape, canon: Tensor, idf: Tensor):
        """canon: plain form of each token id; idf: of each plain form."""
        super().__init__()
        self.shape = shape
        self.register_buffer("canon", canon)
        self.register_buffer("idf", idf)
        w, h = shape.width, shape.heads
        if w:
            self.enter = nn.Sequential(nn.LayerNorm(shape.states), Affine(shape.states, w))
            self.part = nn.Embedding(4, w)  # body, older turns, the last turn, the question
            self.blocks = nn.ModuleList(Block(w, shape.reach) for _ in range(shape.blocks))
            self.leave = nn.Sequential(nn.LayerNorm(w), nn.Dropout(shape.dropout))
            self.query, self.key = Affine(w, w), Affine(w, w)
            self.weight = Affine(w + 1, h + 2)
            self.own = Affine(w, 8)
        self.read = nn.Sequential(
            nn.Conv1d(shape.features, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(32, 1, 1),
        )
        last: Any = self.read[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.words = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(
        self, body: Tensor | None, body_ids: Tensor, n_body: Tensor, head: Tensor | None, head_ids: Tensor, part: Tensor
    ) -> Tensor:
        """Scores [batch, chunks], higher is better; a chunk without a token gets FAR. body, head: states [batch,
        tokens, width of the model]; part: of each head token, 0 for padding."""
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
        norm, dropout = self.leave
        # Who chooses needs no gradient, and chooses in training what is chosen afterwards.
        return dropout(norm(x)) if torch.is_grad_enabled() else norm(x)

    def macs(self, body: int, head: int) -> int:
        return self.shape.macs(body, head)

    def facts(self) -> dict[str, str]:
        return {"shape": json.dumps(asdict(self.shape))}

    def state_to_save(self) -> dict[str, Tensor]:
        return {**self.state_dict(), "canon": self.canon.int()}

    @torch.no_grad()
    def rank(self, states: Tensor, ids: Tensor, part: Tensor, real: Tensor, asks: int) -> Tensor:
        """Scores [batch, width], float32, of the tokens of a prompt: chunk by chunk, the best first, each from its
        beginning.

        states [batch, width, width of the model], ids [batch, width], as the decoder gets them; part: which ask; real:
        bool, which are tokens; asks: the most that ask in a sample. Chunks are cut from all tokens but the question's,
        whose scores mean nothing.
        """
        body, askers = real & (part != QUESTION), real & (part > 0)
        place, who = ((~some).int().argsort(dim=1, stable=True) for some in (body, askers))
        who = who[:, :asks]

        def at(index: Tensor) -> tuple[Tensor, Tensor]:
            return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1])).float(), ids.gather(1, index)

        (b, b_ids), (h, h_ids) = at(place), at(who)
        with torch.autocast(states.device.type, enabled=False):
            scores = self(b, b_ids, body.sum(1), h, h_ids, part.gather(1, who) * askers.gather(1, who))
        order = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        index, size = torch.arange(ids.shape[1], device=ids.device), self.shape.chunk
        key = order[:, index // size] * size + index % size
        return torch.zeros_like(key, dtype=torch.float32).scatter(1, place, -key.float())


def by_words(model: nn.Module, tokenizer: Any, texts: Iterable[str] = (), chunk: int = 32) -> Scorer:
    """A scorer for `model` that nothing was taught: chunks of `chunk` tokens by the words that they share with the
    question. `zsaa.salience.attach(model, ...)` puts it on, for every language model that the dial knows.

    texts: documents of the kind that will be asked about: a word counts the more, the fewer of their pieces of 32
    tokens it is in. Without any the tokenizer's order tells, which lists common pieces first.
    """
    canon, idf = words_of(find_decoder(model)[0].config.vocab_size, tokenizer, texts)
    return Scorer(Shape(find_decoder(model)[0].config.hidden_size, 0, chunk=chunk), canon, idf).requires_grad_(False)


def words_of(vocabulary: int, tokenizer: Any, texts: Iterable[str] = ()) -> tuple[Tensor, Tensor]:
    """For a `Scorer`: the plain form of each token id, int64, and how rare each plain form is, float32 from 0 to
    RAREST; each [vocabulary, or the tokenizer's if that is larger]."""
    size = max(vocabulary, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    first: dict[str, int] = {}
    plain = [first.setdefault((piece or f"<{i}>").lstrip("Ġ▁").lower(), i) for i, piece in enumerate(pieces)]
    canon = torch.tensor([*plain, *range(len(plain), size)])
    seen, held = 0, torch.zeros(size)
    for text in texts:
        ids = canon[torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)]
        for piece in ids.split(PIECE):
            held[piece.unique()] += 1
            seen += 1
    if seen:
        idf = torch.log((seen + 1) / (held + 0.5))
    else:  # ids of one byte, then merges by how often they are wanted: a frequency by Zipf's law
        idf = RAREST * torch.log((torch.arange(size) + 1) / 256) / torch.log(torch.tensor(max(size, 257) / 256))
    return canon, idf.clamp(0, RAREST)


def read(config, folder: str | Path) -> Scorer:
    """The scorer in `folder`, for a decoder with this `config`. ValueError for the file of another model, or of
    something else."""
    path = Path(folder) / FILE
    try:
        with safe_open(path, "pt") as file:
            facts, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = Shape(**json.loads(facts["shape"]))
        if shape.states != config.hidden_size or len(weights["canon"]) < config.vocab_size:
            raise ValueError(f"it is for states {shape.states} wide and {len(weights['canon'])} token ids")
        scorer = Scorer(shape, weights["canon"].long(), weights["idf"].float())
        scorer.load_state_dict({**weights, "canon": scorer.canon})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path} is not a scorer for this {config.model_type} ({config.hidden_size} wide, {config.vocab_size} "
            f"token ids): {said}"
        ) from error
    return scorer.requires_grad_(False)


def needed(decoder: Part) -> Scorer:
    """The scorer on `decoder`, else the one that was saved with it; ValueError if there is none."""
    scorer, folder = getattr(decoder, CHILD, None), Path(getattr(decoder.config, "_name_or_path", "") or ".")
    if scorer is None and not (folder.parts and (folder / FILE).is_file()):
        raise ValueError(
            'score="asked" is learned, and this model has none: load a model or adapter that was saved with one by '
            f"finetune.load (a plain save_pretrained leaves out {FILE}; finetune.save does not), or put one on it that "
            "goes by words alone: zsaa.salience.attach(model, zsaa.asked.by_words(model, tokenizer))."
        )
    return read(decoder.config, folder) if scorer is None else scorer


def check_question(
    question: Tensor | None, exempt: Tensor | None, mask: Tensor | None, ids: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """Who asks, by score "asked": the part of each column, int64 [batch, tokens] (0: does not ask); the columns that
    are never dropped, those of the question and the first tokens beside `exempt`; and the most that ask in a sample.

    question: as the call gave it; None: the last tokens ask. mask: bool [batch, tokens], which are real, or None.
    ValueError for a sample in which no real token is the question's, and for other parts than 0 to 3."""
    if ids is None:
        raise ValueError(
            'score="asked" compares words, and this call gives inputs_embeds: give input_ids, use another score, or '
            "set alpha to 1 for this call."
        )
    real = torch.ones(shape, dtype=torch.bool, device=ids.device) if mask is None else mask
    place = real.long().cumsum(dim=1)
    if question is None:
        part = QUESTION * (real & (place[:, -1:] - place < ASKERS)).long()
    else:
        part = (QUESTION * question if question.dtype == torch.bool else question.long()) * real
    known = ((part >= 0) & (part <= QUESTION)).all(dim=1)
    wrong = ~(known & (part == QUESTION).any(dim=1))
    asks, wrong = torch.stack([(part > 0).sum(dim=1), wrong.long()]).tolist()
    if any(wrong):
        raise ValueError(
            f"question names no real token of sample {wrong.index(1)}, or parts that there are not: it must be True "
            "(or 3) where a token is the question's; 2 and 1 tell the turn before it and older ones, 0 the rest."
        )
    stays = (part == QUESTION) | (real & (place <= SINKS))
    return part, stays if exempt is None else stays | exempt, max(asks)
