"""The hook on an enabled decoder: each forward pass gets a Prefill or a Decode of its own, and the alpha that it has.

Which alpha a call has: the one that it is given (`model(..., alpha=0.9)`, `model.generate(..., alpha=0.9)`), else that
of the `at` block which it runs in, else the model's own, set by `enable` and `set_alpha`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zsaa.cache import is_empty, is_pruned, pruned_cache
from zsaa.families import Family
from zsaa.fast.graphs import Graphs
from zsaa.generation import MASKS, Prompt, given
from zsaa.guards import (
    check_call,
    check_continued,
    check_exempt,
    check_last,
    check_layers,
    check_lengths,
    check_mask,
    check_question,
    read_rows,
)
from zsaa.passes import Decode, Prefill, Request, plan
from zsaa.rule import ASKED, LEARNED, Rule, check_alphas
from zsaa.scope import innermost, opened, opened_anywhere

if TYPE_CHECKING:
    from zsaa.dial import Trace

DEFAULTS = {"alpha": 1.0, **asdict(Rule()), "alpha_range": None}
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # arguments of a decoder with one column per token

Alpha = float | tuple[float, ...]  # a tuple: one per request of the batch


class Mark:
    """Says whose settings a configuration holds: of the dial that has the same mark. Copied and pickled along with the
    model, in which both then have the same new one."""


class Saved(dict):
    """Settings in a configuration (`config.zsaa`), written by a living dial and not read from a file."""

    def __init__(self, settings: dict, mark: Mark):
        super().__init__(settings)
        self.mark = mark

    def __reduce__(self):
        return Saved, (dict(self), self.mark)


class Dial:
    """Settings of one enabled decoder, and the hook that gives each forward pass its Prefill or Decode."""

    def __init__(self, decoder: nn.Module, family: Family):
        self.own: Alpha  # where no block and no call says otherwise
        self.own, self.rule = DEFAULTS["alpha"], Rule()
        self.trained: tuple[float, float] | None = None  # the range of alpha that fine-tuning drew from
        self.warned = self.warned_of_hooks = False
        self.family = family
        self.reads: str | None = None  # how the head reads the decoder, see `guards.reads`
        self.tracer: Trace | None = None  # of all passes outside of `trace` blocks
        self.graphs = Graphs()
        self.signature = inspect.signature(type(decoder).forward)
        self.hooks = [decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
        self.mark = Mark()

    def __getstate__(self) -> dict:
        # What caches results by a hash of the model, as datasets does, must see the alpha that calls have now.
        return {**vars(self), "in_force": self.alpha}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "in_force"})

    @property
    def alpha(self) -> Alpha:
        """Of a call that is made here and is given none."""
        block = innermost(self, "alpha")
        return self.own if block is None else block.values["alpha"]

    def settings(self) -> dict:
        """As calls made here have them."""
        return {"alpha": self.alpha, **asdict(self.rule), "alpha_range": self.trained}

    def saved(self) -> Saved:
        """The settings that are saved with the model: blocks are none of its."""
        return Saved({**self.settings(), "alpha": self.own}, self.mark)

    def record(self, config) -> None:
        """Write the settings into the decoder's configuration, unless it holds those of another model that shares it;
        `save_pretrained` writes them in any case."""
        held = getattr(config, "zsaa", None)
        if not isinstance(held, Saved) or held.mark is self.mark:
            config.zsaa = self.saved()

    def turn(self, alpha: Alpha) -> None:
        """Set the model's own alpha; inside an `at` block, that block's, too."""
        self.check_trained(alpha)
        self.own = alpha
        block = innermost(self, "alpha")
        if block is not None:
            block.values["alpha"] = alpha

    def at(self, alpha: float | Sequence[float] | Tensor) -> AbstractContextManager:
        """A block in which calls have this alpha, but for those that are given one."""
        alpha = check_alphas(alpha)
        self.check_trained(alpha)
        return opened(self, alpha=alpha)

    def check_trained(self, alpha: Alpha) -> None:
        """Warn, once, of an alpha below those that the model was trained for."""
        # alpha = 1 is the stock model, trained for or not.
        if self.trained and not self.warned and least(alpha) < min(self.trained[0], 1.0):
            self.warned = True
            warnings.warn(
                f"alpha = {least(alpha)} is below the range [{self.trained[0]}, {self.trained[1]}] that this model was "
                "fine-tuned for; expect accuracy to fall off.",
                stacklevel=4,
            )

    @torch.compiler.disable
    def before_head(self, model: nn.Module, args: tuple, kwargs: dict):
        """The hook of a classifier whose head reads one row of each sample: the decoder is told that it is asked by it,
        and not by somebody who wants all rows of the body."""
        return args, {**kwargs, "zsaa_head": True}

    @torch.compiler.disable
    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """The hook: the arguments of a decoder's forward, with what this pass needs to prune."""
        call = self.signature.bind_partial(decoder, *args, **kwargs).arguments
        call.pop("self")
        extra = call.pop("kwargs", {})
        head, own = extra.pop("zsaa_head", False), any(name in extra for name in ("alpha", *MASKS))
        alpha, masks = self._call_alpha(decoder, extra), {name: extra.pop(name) for name in MASKS if name in extra}
        block = innermost(self, "trace")
        trace = self.tracer if block is None else block.values["trace"]
        cache, ids, embeds = (call.get(name) for name in ("past_key_values", "input_ids", "inputs_embeds"))
        fresh = is_empty(cache)
        pruned = is_pruned(cache) and not fresh
        prefill = fresh and (least(alpha) < 1 or trace is not None)
        stock = ((), {**call, **extra}) if own or head else None
        if (ids is None) == (embeds is None):  # the stock decoder says what is wrong with that
            return stock
        tokens = ids if embeds is None else embeds[..., 0]
        if not (pruned or prefill):
            if least(alpha) < 1 and tokens.shape[-1] > 1:
                warnings.warn(
                    "alpha has no effect on this call: it continues a key/value cache that was not pruned, such as one "
                    "filled at alpha = 1, or the virtual tokens of prefix tuning. Start from an empty cache.",
                    stacklevel=2,
                )
            return stock
        # GPT-2 takes several choices for each sample, [batch, choices, tokens], and sets them one below the other.
        shape = (tokens.shape[:-1].numel(), tokens.shape[-1])
        if tokens.dim() == 3 and isinstance(mask := call.get("attention_mask"), Tensor) and mask.dim() == 3:
            call["attention_mask"] = mask.flatten(0, 1)
        prompt = self._prompt()
        if prompt is not None:
            prompt.check(call, cache.get_seq_length() if pruned else 0)
        self._check_layers(decoder)
        check_call(decoder, call, extra, shape, seen=cache.get_seq_length() if pruned else 0)
        if pruned:
            step = self._decode(decoder, call, cache, shape)
        elif appended := self._appended(decoder, call):
            call, step = self._prefill_and_decode(decoder, call, extra, alpha, appended, shape)
        else:
            how = "row" if head else self.reads if self.reads == "own" else None
            masks = self._masks(masks, given(call).flatten(0, tokens.dim() - 2))
            step = self._prefill(decoder, call, extra, alpha, trace, shape, how, masks)
        # The stock decoder would now build a full-length mask. It returns a 4-D one as it is, and ours is never read.
        call["attention_mask"] = torch.empty((1, 1, 1, 1), device=tokens.device)
        return (), {**call, **extra, "zsaa": step}

    def _check_layers(self, decoder: nn.Module) -> None:
        said = check_layers(decoder, self.family, self.family.num_layers(decoder))
        if said is not None and not self.warned_of_hooks:
            self.warned_of_hooks = True
            warnings.warn(said, stacklevel=3)

    def _call_alpha(self, decoder: nn.Module, extra: dict) -> Alpha:
        """The alpha of a call, taken out of its arguments if it is there."""
        given = extra.pop("alpha", None)
        if given is None:
            if getattr(decoder, "_is_replica", False) and innermost(self, "alpha") is None:
                self._check_replica()
            return self.alpha
        given = check_alphas(given)
        self.check_trained(given)
        return given

    def _check_replica(self) -> None:
        if opened_anywhere(self, "alpha"):
            raise RuntimeError(
                "torch.nn.DataParallel runs its copies of the model in threads of their own, in which no `with "
                "zsaa.at(...)` of yours is open: the alpha of that block would be ignored. Use zsaa.set_alpha, give "
                "alpha with the call, or run one process for each GPU."
            )

    def _masks(self, given: dict[str, Tensor | None], read: Tensor) -> dict[str, Tensor]:
        """The masks of a pass's tokens, by name: given with the call, or with the running `generate`, whose batch may
        be a multiple of the requests."""
        prompt, shape, masks = self._prompt(), read.shape[:2], {}
        held = {} if prompt is None else prompt.masks_of(read)
        for name, mask in {**held, **{name: mask for name, mask in given.items() if mask is not None}}.items():
            batch = check_mask(name, mask).shape[0]
            if 0 < batch < shape[0] and shape[0] % batch == 0:
                mask = mask.repeat_interleave(shape[0] // batch, dim=0)
            masks[name] = check_mask(name, mask, shape).to(read.device)
        return masks

    def _named(self, masks: dict[str, Tensor], ids: Tensor | None, mask: Tensor | None, shape, piece: bool) -> tuple:
        """What the call's masks say of a pass: the columns that are never dropped (or None), how many of each sample;
        and for score "asked" the parts that ask with the ids (or None), and the most that ask in a sample."""
        exempt, question = masks.get("exempt"), masks.get("question")
        exempt, count = (None, ()) if exempt is None else check_exempt(exempt, mask)
        if self.rule.score != ASKED:
            if question is not None:
                raise ValueError(
                    f'question= is read by score="asked" alone, and this dial has score={self.rule.score!r}. Leave it '
                    "out (exempt= keeps tokens under every score), or enable that score."
                )
            return exempt, count, None, 0
        if piece:
            raise ValueError(
                'by score="asked" the question asks for tokens of the whole prompt, and prefill_chunk_size shows the '
                "first piece alone. Leave it out, or set alpha to 1 for this call."
            )
        ids = None if ids is None else ids.reshape(shape)
        part, exempt, asks = check_question(question, exempt, mask, ids, shape)
        _, count = check_exempt(exempt, mask)
        return exempt, count, (part, ids), asks

    def _appended(self, decoder: nn.Module, call: dict) -> int:
        """How many columns of a pass on an empty cache come after the prompt, as far as `generate` says."""
        prompt = self._prompt()
        return 0 if prompt is None else prompt.appended(given(call), _wants_cache(decoder, call))

    def _prompt(self) -> Prompt | None:
        block = innermost(self, "prompt")
        return None if block is None else block.values["prompt"]

    def _prefill_and_decode(
        self, decoder: nn.Module, call: dict, extra: dict, alpha: Alpha, appended: int, shape: tuple[int, int]
    ) -> tuple[dict, Decode]:
        """Run the prompt, which is pruned, and get ready for what `generate` has appended to it, which is not."""
        keep = _wants_cache(decoder, call)
        cache = pruned_cache(call.get("past_key_values"), self.family.num_layers(decoder))
        name = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        columns = [key for key in (name, *PER_TOKEN) if call.get(key) is not None]
        prompt = {key: call[key][:, :-appended] for key in columns}
        shared = {**call, "past_key_values": cache, "use_cache": True}
        before = decoder(**{**shared, **prompt}, **{**extra, "alpha": alpha, "return_dict": True})
        rest = {key: call[key][:, -appended:] for key in columns if key != "attention_mask"}
        call = {**shared, **rest}
        mask = None if call.get("attention_mask") is None else call["attention_mask"] != 0
        device = call[name].device
        return call, Decode(cache, (shape[0], appended), mask, device, before=before, keep=keep)

    def _decode(self, decoder: nn.Module, call: dict, cache, shape: tuple[int, int]) -> Decode:
        check_continued(cache, self.family.num_layers(decoder))
        mask = call.get("attention_mask")
        return Decode(cache, shape, None if mask is None else mask != 0, cache.layers[0].keys.device)

    def _prefill(
        self,
        decoder: nn.Module,
        call: dict,
        extra: dict,
        alpha: Alpha,
        trace: Trace | None,
        shape: tuple[int, int],
        head: str | None,
        masks: dict[str, Tensor],
    ) -> Prefill:
        ids, embeds, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        device = (ids if embeds is None else embeds).device
        mask = None if mask is None else mask != 0
        if head:
            mask = read_rows(head, ids, mask, shape, decoder.config)
        prompt = self._prompt()
        piece = prompt is not None and prompt.is_piece(given(call))
        if prompt is not None and mask is not None and not piece:
            check_last(mask[:, -1])
        lengths = check_lengths(mask, shape, prompt.texts[0].shape[1] if piece else None)
        exempt, count, asked, asks = self._named(masks, ids, mask, shape, piece)
        states = extra.get("output_hidden_states", call.get("output_hidden_states"))
        states = bool(decoder.config.output_hidden_states if states is None else states is not False)
        layers = self.family.num_layers(decoder)
        request = Request(
            lengths=lengths,
            width=shape[1],
            alphas=spread(alpha, shape[0]),
            rule=self.rule,
            num_layers=layers,
            carry=head != "row" or states,  # where one row is read, dropped tokens need no final state
            device=device,
            exempt=count,
            asks=asks,
        )
        scorer = getattr(decoder, self.rule.score) if self.rule.score in (LEARNED, ASKED) else None
        shapes = plan(request)
        if _wants_cache(decoder, call):
            call["past_key_values"] = cache = pruned_cache(call.get("past_key_values"), layers)
            if shapes.early:
                real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
                cache.layers[0].given = real
        return Prefill(request, shapes, mask, scorer, states, trace, exempt, asked)


def least(alpha: Alpha) -> float:
    return min(alpha) if isinstance(alpha, tuple) else alpha


def spread(alpha: Alpha, batch: int) -> tuple[float, ...]:
    """One alpha per sample. `generate` repeats each request in place for beams and returned sequences, so a batch may
    be a multiple of the requests."""
    if not isinstance(alpha, tuple):
        return (alpha,) * batch
    times, rest = divmod(batch, len(alpha))
    if rest or not times:
        raise ValueError(
            f"alpha has {len(alpha)} values, one per request, but the batch holds {batch} samples. Give one alpha for "
            "each request, or a single number for all."
        )
    return tuple(a for a in alpha for _ in range(times))


def _wants_cache(decoder: nn.Module, call: dict) -> bool:
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    if call.get("past_key_values") is not None:
        return True
    use_cache = call.get("use_cache")
    return bool(decoder.config.use_cache if use_cache is None else use_cache)
