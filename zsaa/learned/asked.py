"""A learned score that is asked: which chunks of a prompt does its question ask for?

Every token of the head (the question and what was said before it) looks for its best match in every chunk: as a word
(the same word in its plain form, weighted by how rare it is; and by BM25, which asks how rare it is in this prompt) and
in a learned space (a few narrow heads over a short convolution of the token states). What all of them found, weighted
by how much each token asks, is read over neighbouring chunks. Chunks are so many tokens, or sentences. A score depends
on its own sample alone: padding is masked everywhere.

It sees what enters the first layer, so that tokens can leave before it (schedule "entry"). How it is taught: the study
ablation/answers. Like the other learned score, zsaa/learned/salience.py, it is a child of the decoder, computes in
float32, and is saved in a file of its own. Not in the paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
END, LINE, BEGINS, CLOSES = 1, 2, 4, 8  # a token ends a sentence or a line, begins a word, is a closing quote
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
    sentences: bool = False  # chunks are sentences, longer ones in equal pieces of at most `chunk` tokens
    bm25: bool = False  # words count by BM25 too

    @property
    def features(self) -> int:
        """What is read of each chunk."""
        return 6 + 7 * self.bm25 + (2 * self.heads + 8 + 2 if self.width else 0)

    def macs(self, body: int, head: int) -> int:
        """Multiply-accumulates for one prompt, comparisons of words left out (they multiply nothing)."""
        chunks = -(-body // self.chunk) * (1 + self.sentences)  # sentences: about as many, for most are shorter
        total = chunks * (self.features * 32 * 3 + 32 * 32 * 3 + 32) + 2 * head * chunks
        if self.width:
            w = self.width
            token = self.states * w + self.blocks * (self.reach * w + 4 * w**2) + w**2
            total += (body + head) * token + body * w * 8 + head * (w + 1) * (self.heads + 2)
            total += head * body * w + head * chunks * (self.heads + 2)
        return total


def marks(pieces: Sequence[str]) -> Tensor:
    """What of END, LINE, BEGINS and CLOSES holds of each token id's text, as tokenizers write it."""
    found = torch.zeros(len(pieces), dtype=torch.uint8)
    for i, piece in enumerate(pieces):
        bare = piece.rstrip("\"')")
        line = "Ċ" in piece or "\n" in piece
        found[i] = (
            END * bare.endswith((".", "!", "?"))
            + LINE * line
            + BEGINS * (line or piece.startswith(("Ġ", "▁")))
            + CLOSES * (not bare and bool(piece))
        )
    return found


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
    """A learned score, asked by the question: tokens together, by the words that they share with it and by sense."""

    child, file = CHILD, FILE
    canon: Tensor
    idf: Tensor
    marks: Tensor

    def __init__(self, shape: Shape, canon: Tensor, idf: Tensor, marks: Tensor | None = None):
        """canon: plain form of each token id; idf: of each plain form; marks: `marks` of each token id's text, where
        chunks are sentences."""
        super().__init__()
        self.shape = shape
        self.register_buffer("canon", canon)
        self.register_buffer("idf", idf)
        if shape.sentences:
            if marks is None:
                raise ValueError("chunks are sentences (Shape.sentences): give the marks of each token id.")
            self.register_buffer("marks", marks)
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
        self.words = nn.Parameter(torch.tensor([1.0, 0.5, *([1.0, 0.5] if shape.bm25 else [])]))

    def forward(
        self, body: Tensor | None, body_ids: Tensor, n_body: Tensor, head: Tensor | None, head_ids: Tensor, part: Tensor
    ) -> Tensor:
        """Scores [batch, chunks], higher is better; a chunk without a token gets FAR. body, head: states [batch,
        tokens, width of the model]; part: of each head token, 0 for padding."""
        batch, n = body_ids.shape
        real = torch.arange(n, device=body_ids.device) < n_body[:, None]
        unit = self.units(body_ids, real)
        chunks = int(unit.max()) + 1 if self.shape.sentences else -(-n // self.shape.chunk)
        size = unit.new_zeros(batch, chunks).scatter_add(1, unit, real.long())
        some = size > 0
        times, rare = self._same_words(body_ids, real, head_ids, part, unit, chunks)
        found = (times > 0).float()
        asks = [(part == p).float() for p in (3, 2, 1)]
        lexical = torch.stack([(found * (rare * a)[..., None]).sum(1) for a in asks[:2]], 1)  # [batch, 2, chunks]
        most = lexical.amax(-1, keepdim=True).clamp(min=1.0)
        place = torch.arange(chunks, device=body_ids.device) / some.sum(1, keepdim=True).clamp(min=1)
        features = [lexical / 10, lexical / most, (place[:, None] * some[:, None]), some[:, None].float()]
        weighed = lexical / most * 4
        if self.shape.bm25:
            by_bm25 = self._bm25(times, rare > 0, asks, size)
            top = by_bm25.amax(-1, keepdim=True).clamp(min=1.0)
            features += [by_bm25 / 10, by_bm25 / top, (size[:, None] / self.shape.chunk)]
            weighed = torch.cat([weighed, by_bm25[:, :2] / top[:, :2] * 4], 1)
        if self.shape.width:
            features += self._learned(body, real, head, part, found, rare, unit, size)
        x = torch.cat(features, 1) * some[:, None]
        for layer in self.read:
            x = layer(x)
            x = x * some[:, None]  # what is not there says nothing to its neighbours
        score = (self.words[:, None] * weighed).sum(1) + x[:, 0]
        return score.masked_fill(~some, FAR)

    @property
    def recordable(self) -> bool:
        """May a CUDA graph hold it? Sentences are counted on the way, and so of no fixed shape."""
        return not self.shape.sentences

    def units(self, ids: Tensor, real: Tensor) -> Tensor:
        """Which chunk each token is of [batch, tokens], from 0; 0 for padding, which stands at the end."""
        index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if not self.shape.sentences:
            return (index // self.shape.chunk).masked_fill(~real, 0)
        marks = self.marks[ids].masked_fill(~real, 0)
        before = F.pad(marks, (1, 0))[:, :-1]
        ends = ((marks & END) > 0) | (((marks & CLOSES) > 0) & ((before & END) > 0))
        ends = (ends & (F.pad(marks, (0, 1))[:, 1:] & BEGINS > 0)) | ((marks & LINE) > 0)
        sentence = F.pad(ends, (1, 0))[:, :-1].cumsum(1)
        long = torch.zeros_like(sentence).scatter_add(1, sentence, real.long())
        place = index - (long.cumsum(1) - long).gather(1, sentence)
        long = long.gather(1, sentence).clamp(min=1)
        piece = place * -(-long // self.shape.chunk) // long
        new = (sentence.diff(dim=1) != 0) | (piece.diff(dim=1) != 0)
        return F.pad(new, (1, 0)).cumsum(1).masked_fill(~real, 0)

    def _same_words(self, body_ids, real, head_ids, part, unit, chunks):
        """[batch, head tokens, chunks]: how often the token's word is in the chunk; and how rare it is, once per
        word."""
        ours, theirs = self.canon[head_ids], self.canon[body_ids].masked_fill(~real, -1)
        same = (ours[..., None] == theirs[:, None]).float()
        times = same.new_zeros(*ours.shape, chunks).scatter_add(2, unit[:, None].expand(same.shape), same)
        alike = (ours[:, :, None] == ours[:, None]) & (part[:, :, None] == part[:, None])
        again = (alike & torch.ones_like(alike).tril(-1)).any(-1)
        return times, self.idf[ours] * ~again * (part > 0)

    def _bm25(self, times, once, asks, size):
        """[batch, parts, chunks]: BM25 (k = 1.5, b = 0.75) of the words that each part asks for; words of the prompt's
        own form, which weigh nothing, are left out."""
        chunks = (size > 0).sum(1, keepdim=True)
        seen = (times > 0).sum(2)
        weight = torch.log(1 + (chunks - seen + 0.5) / (seen + 0.5)) * once
        norm = 1.5 * (0.25 + 0.75 * size / (size.sum(1, keepdim=True) / chunks.clamp(min=1)).clamp(min=1))
        worth = times * 2.5 / (times + norm[:, None])
        return torch.stack([(worth * (weight * a)[..., None]).sum(1) for a in asks], 1)

    def _learned(self, body, real, head, part, found, rare, unit, size):
        b = self._encode(body, real, real.long() * 0)
        h = self._encode(head, part > 0, part)
        split = (self.shape.heads, self.shape.width // self.shape.heads)
        k = self.key(b).unflatten(2, split).transpose(1, 2)
        q = self.query(h).unflatten(2, split).transpose(1, 2)
        match = (q @ k.transpose(2, 3)) / split[1] ** 0.5  # [batch, heads, head tokens, body tokens]
        match = match.masked_fill(~real[:, None, None], FAR)
        best = match.new_full((*match.shape[:3], size.shape[1]), FAR)
        match = best.scatter_reduce(3, unit[:, None, None].expand(match.shape), match, "amax").clamp(min=-20)
        weight = self.weight(torch.cat([h, rare[..., None] / 5], -1)).masked_fill((part == 0)[..., None], FAR)
        weight = weight.softmax(1).transpose(1, 2)
        heads = (weight[:, :-2, :, None] * match).sum(2)
        best = heads.amax(-1, keepdim=True)
        words = weight[:, -2:] @ found
        own = self.own(b) * real[..., None]
        own = own.new_zeros(len(own), size.shape[1], 8).scatter_add(1, unit[..., None].expand(own.shape), own)
        own = own / size.clamp(min=1)[..., None]
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
    def ordered(self, scores: Tensor, unit: Tensor) -> Tensor:
        """How many of the body's tokens stay longer than each [batch, tokens]: the best chunk first, each from its
        beginning."""
        order = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return order.gather(1, unit).argsort(dim=1, stable=True).argsort(dim=1)

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
        index = torch.arange(ids.shape[1], device=ids.device)
        key = self.ordered(scores, self.units(b_ids, index < body.sum(1)[:, None]))
        return torch.zeros_like(key, dtype=torch.float32).scatter(1, place, -key.float())


def by_words(model: nn.Module, tokenizer: Any, texts: Iterable[str] = (), chunk: int = 32) -> Scorer:
    """A scorer for `model` that nothing was taught: sentences, by BM25 of the question's words; those longer than
    `chunk` tokens in equal pieces. `zsaa.salience.attach(model, ...)` puts it on, for every language model that the
    dial knows.

    texts: documents of the kind that will be asked about: words that are in all pieces of these count nothing. Without
    any the tokenizer's order tells, which lists common pieces first.
    """
    scorer = fresh(model, tokenizer, texts, chunk, width=0)
    scorer.words.data.copy_(torch.tensor([0.0, 0.0, 1.0, 0.5]))  # BM25 alone
    return scorer.requires_grad_(False)


def fresh(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], chunk: int, width: int, sentences: bool = True
) -> Scorer:
    """An untrained scorer: of sentences, in pieces of at most `chunk` tokens, with BM25 among its features; or of
    chunks of so many tokens. See `by_words`."""
    config = find_decoder(model)[0].config
    canon, idf = words_of(config.vocab_size, tokenizer, texts)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # A line may end within a sentence, as texts are wrapped; a blank line does not.
    wrapped = ["Ġ" if piece in ("Ċ", "\n") else piece or "" for piece in pieces]
    kinds = marks(wrapped + [""] * (len(canon) - len(pieces)))
    shape = Shape(config.hidden_size, width, chunk=chunk, sentences=sentences, bm25=sentences)
    return Scorer(shape, canon, idf, kinds)


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
        scorer = Scorer(shape, weights["canon"].long(), weights["idf"].float(), weights.get("marks"))
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
