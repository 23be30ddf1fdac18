"""The hook on an enabled decoder: each forward pass gets a Prefill or a Decode of its own, and the alpha that it has.

Which alpha a call has: the one that it is given (`model(..., alpha=0.9)`, `model.generate(..., alpha=0.9)`), else that
of the `at` block which it runs in, else the model's own, set by `enable` and `set_alpha`. Likewise which depth.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsaa import guards
from zsaa.cache import pruned_cache
from zsaa.call import Call
from zsaa.depth.stop import Stop, check_depth, check_room, check_stock_cache, untrained
from zsaa.dials.settings import DEFAULTS, Alpha, Mark, Range, Saved, least
from zsaa.families import Family
from zsaa.fast.graphs import Graphs
from zsaa.fast.plans import plan
from zsaa.heads.classification import read_rows
from zsaa.heads.generation import Prompt
from zsaa.learned.asked import check_question
from zsaa.passes import Decode, Given, Prefill, Request
from zsaa.rule import ASKED, LEARNED, Rule, check_alphas
from zsaa.scope import innermost, opened, opened_anywhere

if TYPE_CHECKING:
    from zsaa.dials.trace import Trace


class Dial:
    """Settings of one enabled decoder, and the hook that gives each forward pass its Prefill or Decode."""

    def __init__(self, decoder: nn.Module, family: Family):
        self.own: Alpha  # where no block and no call says otherwise
        self.own, self.rule = DEFAULTS["alpha"], Rule()
        self.own_depth: int | None = None  # None: all layers
        self.trained: Range = None  # of alpha, what fine-tuning drew from
        self.trained_depth: Range = None
        self.warned = self.warned_of_depth = self.warned_of_hooks = False
        self.family = family
        self.layers = family.num_layers(decoder)
        self.reads: str | None = None  # how the head reads the decoder, see `heads.classification.reads`
        self.tracer: Trace | None = None  # of all passes outside of `trace` blocks
        self.graphs = Graphs()
        self.signature = inspect.signature(type(decoder).forward)
        self.hooks = [decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)]
        self.mark = Mark()

    def __getstate__(self) -> dict:
        # What caches results by a hash of the model, as datasets does, must see what is set for calls now.
        return {**vars(self), "in_force": (self.alpha, self.depth)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "in_force"})

    @property
    def alpha(self) -> Alpha:
        """Of a call that is made here and is given none."""
        return self._opened("alpha", self.own)

    @property
    def depth(self) -> int | None:
        """Likewise; None: all layers."""
        return self._opened("depth", self.own_depth)

    def _opened(self, name: str, otherwise: Any = None) -> Any:
        """What an open block says here."""
        block = innermost(self, name)
        return otherwise if block is None else block.values[name]

    def settings(self) -> dict:
        """As calls made here have them."""
        ranges = {"alpha_range": self.trained, "depth": self.depth, "depth_range": self.trained_depth}
        return {"alpha": self.alpha, **asdict(self.rule), **ranges}

    def saved(self) -> Saved:
        """The settings that are saved with the model: blocks are none of its."""
        return Saved({**self.settings(), "alpha": self.own, "depth": self.own_depth}, self.mark)

    def record(self, config) -> None:
        """Write the settings into the decoder's configuration, unless it holds those of another model that shares it;
        `save_pretrained` writes them in any case."""
        held = getattr(config, "zsaa", None)
        if not isinstance(held, Saved) or held.mark is self.mark:
            config.zsaa = self.saved()

    def turn(self, alpha: Alpha) -> None:
        """Set the model's own alpha; inside an `at` block, that block's, too."""
        self.own = self.checked_alpha(alpha)
        self._in_block("alpha", self.own)

    def stop_at(self, depth: int | None) -> None:
        """Set the model's own depth; inside an `at` block, that block's, too."""
        self.own_depth = None if depth is None else self.checked_depth(depth)
        self._in_block("depth", self.own_depth)

    def _in_block(self, name: str, value: Any) -> None:
        block = innermost(self, name)
        if block is not None:
            block.values[name] = value

    def at(
        self, alpha: float | Sequence[float] | Tensor | None = None, depth: int | None = None
    ) -> AbstractContextManager:
        """A block in which calls have this alpha and depth, but for those that are given some."""
        given: dict[str, Any] = {} if alpha is None else {"alpha": self.checked_alpha(alpha)}
        return opened(self, **given if depth is None else {**given, "depth": self.checked_depth(depth)})

    def checked_depth(self, depth: int) -> int:
        """As `check_depth`; warns, once, of a depth that the model was not trained for."""
        depth = check_depth(depth, self.layers)
        low, high = self.trained_depth or (self.layers, self.layers)
        if not low <= depth <= high and depth < self.layers and not self.warned_of_depth:
            self.warned_of_depth = True
            warnings.warn(untrained(depth, self.trained_depth), stacklevel=5)
        return depth

    def checked_alpha(self, alpha: Any) -> Alpha:
        """As `check_alphas`; warns, once, of an alpha below those that the model was trained for."""
        alpha = check_alphas(alpha)
        # alpha = 1 is the stock model, trained for or not.
        if self.trained and not self.warned and least(alpha) < min(self.trained[0], 1.0):
            self.warned = True
            warnings.warn(
                f"alpha = {least(alpha)} is below the range [{self.trained[0]}, {self.trained[1]}] that this model was "
                "fine-tuned for; expect accuracy to fall off.",
                stacklevel=4,
            )
        return alpha

    @torch.compiler.disable
    def before_head(self, model: nn.Module, args: tuple, kwargs: dict):
        """The hook of a classifier whose head reads one row of each sample: the decoder is told that it is asked by it,
        and not by somebody who wants all rows of the body."""
        return args, {**kwargs, "zsaa_head": True}

    @torch.compiler.disable
    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict):
        """The hook: the arguments of a decoder's forward, with what this pass needs to prune."""
        call = Call(decoder, self.signature, args, kwargs)
        alpha = self._of_call(call, "alpha", self.own, self.checked_alpha)
        depth = self._of_call(call, "depth", self.own_depth, self.checked_depth)
        layers, trace = self.family.num_layers(decoder), self._opened("trace", self.tracer)
        depth = layers if depth is None else min(depth, layers)
        begins = call.fresh and (least(alpha) < 1 or trace is not None)
        if not (call.known and (call.seen or begins)):
            if call.known and least(alpha) < 1 and call.tokens.shape[-1] > 1:
                warnings.warn(
                    "alpha has no effect on this call: it continues a key/value cache that was not pruned, such as one "
                    "filled at alpha = 1, or the virtual tokens of prefix tuning. Start from an empty cache.",
                    stacklevel=2,
                )
            return self._stock(call, depth, layers)
        prompt: Prompt | None = self._opened("prompt")
        if prompt is not None:
            prompt.check(call)
        self._check_layers(decoder)
        guards.check_call(call)
        if call.seen:
            guards.check_continued(call.cache, depth)
            return call.pruned(Decode(call.cache, call.shape, call.real, call.cache.layers[0].keys.device))
        appended = 0 if prompt is None else prompt.appended(call.text, call.caches)
        if appended:
            return call.pruned(self._prefill_and_decode(call, alpha, depth, appended))
        return call.pruned(self._prefill(call, alpha, depth, prompt, trace))

    def _stock(self, call: Call, depth: int, layers: int) -> tuple[tuple, dict] | None:
        """The arguments of a pass by the stock code, through `depth` of its `layers`."""
        if self.family.all_layers:
            check_room(call.cache, layers, type(call.decoder).__name__)
        if call.known and (depth < layers or not call.fresh):
            check_stock_cache(call.cache, depth, layers)
        if depth == layers or not call.known:
            return call.stock()
        guards.check_layers(call.decoder, self.family, layers, prunes=False)
        return call.stock(Stop(depth, call.states))

    def _check_layers(self, decoder: nn.Module) -> None:
        said = guards.check_layers(decoder, self.family, self.family.num_layers(decoder))
        if said is not None and not self.warned_of_hooks:
            self.warned_of_hooks = True
            warnings.warn(said, stacklevel=3)

    def _of_call(self, call: Call, name: str, own: Any, check: Callable[[Any], Any]) -> Any:
        """The alpha or depth of a call: what it is given, else what is set where it is made."""
        if call.own.get(name) is not None:
            return check(call.own[name])
        replica = getattr(call.decoder, "_is_replica", False)
        if replica and innermost(self, name) is None and opened_anywhere(self, name):
            raise RuntimeError(
                "torch.nn.DataParallel runs its copies of the model in threads of their own, in which no `with "
                f"zsaa.at(...)` of yours is open: the {name} of that block would be ignored. Use zsaa.set_{name}, give "
                f"{name} with the call, or run one process for each GPU."
            )
        return self._opened(name, own)

    def _prefill_and_decode(self, call: Call, alpha: Alpha, depth: int, appended: int) -> Decode:
        """Run the prompt, which is pruned, and get ready for what `generate` has appended to it, which is not: all that
        is left of the call."""
        keep, decoder, dials = call.caches, call.decoder, {"alpha": alpha, "depth": depth}
        cache = pruned_cache(call.cache, depth, call.decoder.config.model_type)
        call.named |= {"past_key_values": cache, "use_cache": True}
        prompt, rest = call.split(appended)
        before = decoder(**{**call.named, **prompt}, **{**call.extra, **dials, "return_dict": True})
        call.named |= rest
        return Decode(cache, call.shape, call.real, call.tokens.device, before=before, keep=keep)

    def _prefill(self, call: Call, alpha: Alpha, depth: int, prompt: Prompt | None, trace: Trace | None) -> Prefill:
        (batch, width), decoder = call.shape, call.decoder
        how = "row" if call.head else self.reads if self.reads == "own" else None
        real = call.real if how is None else read_rows(how, call)
        piece = prompt is not None and prompt.is_piece(call.text)
        if prompt is not None and real is not None and not piece:
            guards.check_last(real[:, -1])
        whole = prompt.texts[0].shape[1] if prompt is not None and piece else None
        lengths = guards.check_lengths(real, call.shape, whole)
        exempt, counts, part, asks = self._stays(call, real, prompt, piece)
        request = Request(
            lengths=lengths,
            width=width,
            alphas=spread(alpha, batch),
            rule=self.rule,
            num_layers=self.family.num_layers(decoder),
            carry=how != "row" or call.states,  # where one row is read, dropped tokens need no final state
            device=call.tokens.device,
            exempt=counts,
            asks=asks,
            stop=depth,
        )
        shapes = plan(request)
        if call.caches:
            cache = pruned_cache(call.cache, depth, call.decoder.config.model_type)
            call.named["past_key_values"] = cache
            if shapes.early:
                all_real = torch.ones(batch, width, dtype=torch.bool, device=request.device)
                cache.layers[0].given = all_real if real is None else real
        given = Given(real if request.padded else None, exempt, part)
        if part is not None and call.ids is not None:
            given.ids = call.ids.reshape(call.shape)
        scorer = getattr(decoder, self.rule.score) if self.rule.score in (LEARNED, ASKED) else None
        return Prefill(request, shapes, given, scorer, call.states, trace)

    def _stays(self, call: Call, real: Tensor | None, prompt: Prompt | None, piece: bool) -> tuple:
        """What the masks of a pass say: the columns that are never dropped, bool [batch, tokens] (or None), and how
        many that are in each sample; by score "asked" the part by which each column asks (or None), and the most that
        ask in a sample. Masks are the call's, or those of the running `generate`, whose batch may be a multiple of the
        requests."""
        masks = {**({} if prompt is None else prompt.masks_of(call.text)), **call.masks}
        for name, mask in masks.items():
            times, rest = divmod(call.shape[0], guards.check_mask(name, mask).shape[0] or call.shape[0])
            mask = mask if rest or times < 2 else mask.repeat_interleave(times, dim=0)
            masks[name] = guards.check_mask(name, mask, call.shape).to(call.tokens.device)
        exempt, question = masks.get("exempt"), masks.get("question")
        exempt, counts = (None, ()) if exempt is None else guards.check_exempt(exempt, real)
        if self.rule.score != ASKED:
            if question is not None:
                raise ValueError(
                    f'question= is read by score="asked" alone, and this dial has score={self.rule.score!r}. Leave it '
                    "out (exempt= keeps tokens under every score), or enable that score."
                )
            return exempt, counts, None, 0
        if piece:
            raise ValueError(
                'by score="asked" the question asks for tokens of the whole prompt, and prefill_chunk_size shows the '
                "first piece alone. Leave it out, or set alpha to 1 for this call."
            )
        part, exempt, asks = check_question(question, exempt, real, call.ids, call.shape)
        return exempt, guards.check_exempt(exempt, real)[1], part, asks


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
