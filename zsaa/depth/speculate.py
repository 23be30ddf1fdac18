"""Greedy text sooner: something cheap drafts tokens, and the model checks them all in one pass.

    text, passes = continued(Reader(model, room=256), prompt, 64, Exit(Reader(drafter, room=256), ahead=4))

Drafts come from a model of few layers (`Exit`; zsaa/depth/draft.py teaches a model's own first ones) or are what stood
behind the same words before (`Before`, known as prompt lookup). Wherever they come from, the text is the model's greedy
one, up to ties that fall within rounding: a pass over several tokens adds in another order than one over one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from zsaa.families import find_decoder
from zsaa.fast import graphs


class Rewritten(Cache):
    """Keys and values of at most `room` tokens, written at `places` (int64 [tokens]), wherever the last ones ended: a
    text that was drafted in vain is written over, and nothing is cropped or moved."""

    places: Tensor

    def __init__(self, layers: int, room: int):
        super().__init__(layers=[StaticLayer(max_cache_len=room) for _ in range(layers)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        layer.keys.index_copy_(2, self.places, key_states)
        layer.values.index_copy_(2, self.places, value_states)
        return layer.keys, layer.values


class Reader:
    """A stock causal language model that reads one text, from any place of it on.

    room: tokens that the text may have; words: int64 [words], the tokens that it may say (all, for None); recorded: are
    passes replayed as CUDA graphs? NotImplementedError for layers that look at a window alone, and for a head that is
    more than a matrix.
    """

    def __init__(self, model: nn.Module, room: int, words: Tensor | None = None, recorded: bool = False):
        self.decoder, _ = find_decoder(model)
        config, last = self.decoder.config, model.get_output_embeddings()
        if type(last) is not nn.Linear or last.bias is not None:
            raise NotImplementedError(
                f"the head of this {type(model).__name__} is a {type(last).__module__}.{type(last).__name__}, and only "
                "a plain matrix is read here. Merge adapters first (merge_and_unload), or use transformers' generate."
            )
        head = last.weight.detach()
        kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) or "full_attention"]
        if {*kinds} != {"full_attention"}:
            raise NotImplementedError(
                f"layers of this {type(model).__name__} look at a window of tokens, and only such can be read here "
                "that look at all before them. Use transformers' own generate (assistant_model)."
            )
        self.words, self.head = words, head if words is None else head[words]
        self.cache = Rewritten(config.num_hidden_layers, room)
        self.rows = torch.arange(room, device=head.device)
        self.at = torch.zeros((), dtype=torch.long, device=head.device)
        self.recorded, self.recordings, self.pool = recorded, {}, []

    def __call__(self, ids: Tensor, at: int, last: bool = False) -> Tensor:
        """The likeliest token behind each of `ids` (int64 [tokens]), which are the text from place `at` on; whatever
        stood there or further on is forgotten. last: behind the last of them alone, [1]."""
        if at + len(ids) > len(self.rows):
            raise ValueError(f"tokens {at} to {at + len(ids)} of a text do not fit a room of {len(self.rows)}.")
        self.at.fill_(at)
        if last or not self.recorded:
            return self._read(ids, last)
        if len(ids) not in self.recordings:
            given = ids.clone()
            self._read(given)  # what is compiled or allocated at the first use is so before recording
            graph = graphs.CudaGraph(ids.device, self.pool)
            (_, (said,)), _ = graph.record(lambda: (None, [self._read(given)]))
            self.recordings[len(ids)] = graph, given, said
        graph, given, said = self.recordings[len(ids)]
        given.copy_(ids)
        graph.replay()
        return said.clone()

    def _read(self, ids: Tensor, last: bool = False) -> Tensor:
        places = self.rows[: len(ids)] + self.at
        self.cache.places = places
        seen = (self.rows <= places[:, None])[None, None]
        states = self.decoder(
            input_ids=ids[None], position_ids=places[None], attention_mask=seen, past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[0, -1 if last else 0 :]  # fmt: skip
        likely = F.linear(states, self.head).argmax(-1)
        return likely if self.words is None else self.words[likely]


class Exit:
    """Drafts of `ahead` tokens by a Reader of few layers; with `most`, of two more behind a draft that was right, up to
    so many, and of one less, down to one, behind another."""

    def __init__(self, reader: Reader, ahead: int, most: int | None = None):
        self.reader, self.first, self.most = reader, ahead, most

    def begin(self, prompt: Tensor) -> None:
        self.ahead, self.stood = self.first, None
        self.reader(prompt, 0, last=True)

    def __call__(self, text: list[int]) -> Tensor:
        if self.most and self.stood is not None:
            right = len(text) - self.stood == self.ahead + 1
            self.ahead = min(self.ahead + 2, self.most) if right else max(self.ahead - 1, 1)
        self.stood = len(text)
        # The last token but one comes again: all drafts may have been right, and of these it read all but the last.
        at = len(text) - 2
        drafted = [self.reader(torch.tensor(text[at:], device=self.reader.rows.device), at)[-1:]]
        for more in range(1, self.ahead):
            drafted.append(self.reader(drafted[-1], at + 1 + more))
        return torch.cat(drafted)


class Before:
    """Drafts of `ahead` tokens: what stood behind the last tokens, three of them or else fewer, where they stood last.
    None, if the last token is new."""

    def __init__(self, ahead: int, longest: int = 3):
        self.ahead, self.longest = ahead, longest

    def begin(self, prompt: Tensor) -> None:
        """There is nothing to prepare."""

    def __call__(self, text: list[int]) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at : at + size] == text[-size:]:
                    found = text[at + size : at + size + self.ahead]
                    return found + [0] * (self.ahead - len(found))  # of one length, which one recording serves
        return []


@torch.inference_mode()
def continued(model: Reader, prompt: Tensor, new: int, draft: Exit | Before | None = None) -> tuple[list[int], int]:
    """The `new` tokens that greedy decoding adds to `prompt` (int64 [tokens]), whatever `draft` says; and how many
    passes of the model it took."""
    text, passes, device = prompt.tolist(), 1, prompt.device
    end = len(text) + new
    text.append(int(model(prompt, 0, last=True)))
    if draft is not None:
        draft.begin(prompt)
    while len(text) < end:
        drafted = torch.as_tensor(draft(text) if draft else [], dtype=torch.long, device=device)
        said = model(torch.cat([torch.tensor(text[-1:], device=device), drafted]), len(text) - 1)
        told = torch.cat([said, drafted]).tolist()  # the one time that the host waits
        said, drafted = told[: len(said)], told[len(said) :]
        right = next((n for n, (ours, theirs) in enumerate(zip(said, drafted)) if ours != theirs), len(drafted))
        text += said[: right + 1]
        passes += 1
    return text[len(prompt) : end], passes
