"""The dial: enable pruning on a model, turn alpha, look at what was kept.

How it works. `enable` gives each decoder layer a subclass of its own class whose forward prunes when it is handed a
`Prefill` (or continues a pruned cache when handed a `Decode`), and hooks the decoder so that every forward pass gets
such an object of its own through the keyword arguments that all families pass down. A pass without one (alpha = 1)
runs the stock code, bit for bit. No result of a pass outlives it but the cache, so calls cannot influence one another;
what is kept beside it (plans, recordings of CUDA graphs) follows from the shapes alone.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zsaa.attention import attend, attend_and_score, padded_rows, rotate
from zsaa.cache import is_empty, is_pruned, pruned_cache
from zsaa.compat import check_transformers
from zsaa.families import Family, find_decoder
from zsaa.fused import add_norm, mlp
from zsaa.graphs import Graphs, check_mode, empty, replaying
from zsaa.keep import SCHEDULES, check_alpha, check_schedule, check_tau
from zsaa.passes import Decode, Prefill, Request, plan
from zsaa.salience import attach, detach, needed
from zsaa.score import LEARNED, check_score

DEFAULTS = {"alpha": 1.0, "tau": 5, "score": "column_sum", "schedule": "geometric", "alpha_range": None}
RULE = ("tau", "score", "schedule")  # what decides, beside alpha, how many tokens go on and what that costs
PER_TOKEN = ("attention_mask", "position_ids")  # arguments of a decoder that have one column per token


class Dial:
    """Settings of one enabled decoder, and the hook that gives each forward pass its Prefill or Decode."""

    def __init__(self, decoder: nn.Module, family: Family, carry: bool):
        self.alpha: float | tuple[float, ...]  # a tuple: one per request of the batch
        self.alpha, self.tau, self.score, self.schedule = (DEFAULTS[name] for name in ("alpha", *RULE))
        self.trained: tuple[float, float] | None = None  # the range of alpha that fine-tuning drew from
        self.warned = False
        self.num_layers = decoder.config.num_hidden_layers
        self.family, self.carry = family, carry
        self.tracer: Trace | None = None
        self.graphs = Graphs()
        self.signature = inspect.signature(type(decoder).forward)
        self.hooks = [decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)]

    def settings(self) -> dict:
        rule = {name: getattr(self, name) for name in RULE}
        return {"alpha": self.alpha, **rule, "alpha_range": self.trained}

    def turn(self, alpha: float | tuple[float, ...]) -> None:
        self.alpha = alpha
        # alpha = 1 is the stock model, trained for or not.
        if self.trained and not self.warned and self.least < min(self.trained[0], 1.0):
            self.warned = True
            warnings.warn(
                f"alpha = {self.least} is below the range [{self.trained[0]}, {self.trained[1]}] that this model was "
                "fine-tuned for; expect accuracy to fall off.",
                stacklevel=3,
            )

    @property
    def least(self) -> float:
        return min(self.alpha) if isinstance(self.alpha, tuple) else self.alpha

    def alphas(self, batch: int) -> list[float]:
        """One alpha per sample. `generate` repeats each request in place for beams and returned sequences, so a batch
        may be a multiple of the requests."""
        if not isinstance(self.alpha, tuple):
            return [self.alpha] * batch
        times, rest = divmod(batch, len(self.alpha))
        if rest or not times:
            raise ValueError(
                f"alpha has {len(self.alpha)} values, one per request, but the batch holds {batch} samples. Give one "
                "alpha for each request, or a single number for all."
            )
        return [alpha for alpha in self.alpha for _ in range(times)]

    @torch.compiler.disable
    def before_head(self, model: nn.Module, args: tuple, kwargs: dict):
        """A language-model head asked for its last k + 1 logits, k > 0, on an empty cache is assisted decoding's first
        pass: k candidates follow the prompt. Tell the decoder, since candidates must not be pruned."""
        keep, cache = kwargs.get("logits_to_keep"), kwargs.get("past_key_values")
        if self.least == 1 or not isinstance(keep, int) or keep < 2 or cache is None or not is_empty(cache):
            return None
        return args, {**kwargs, "zsaa_candidates": keep - 1}

    @torch.compiler.disable
    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict):
        call = self.signature.bind_partial(decoder, *args, **kwargs).arguments
        call.pop("self")
        extra = call.pop("kwargs", {})
        candidates = extra.pop("zsaa_candidates", 0)
        cache = call.get("past_key_values")
        pruned = is_pruned(cache) and not is_empty(cache)
        prefill = is_empty(cache) and (self.least < 1 or self.tracer is not None)
        name = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
        if not (pruned or prefill):
            if self.least < 1 and call[name].shape[1] > 1:
                warnings.warn(
                    "alpha has no effect on this call: it continues a key/value cache that was not pruned, such as one "
                    "filled at alpha = 1, or the virtual tokens of prefix tuning. Start from an empty cache.",
                    stacklevel=2,
                )
            return None

        shape, device = tuple(call[name].shape[:2]), call[name].device
        mask = call.get("attention_mask")
        _check_call(decoder, call, extra, mask, shape, seen=cache.get_seq_length() if pruned else 0)
        if candidates and shape[1] > candidates:
            # The prompt alone is pruned; its last token, which every layer kept, is decoded again with the candidates.
            prompt = {k: call[k][:, :-candidates] for k in (name, *PER_TOKEN) if call.get(k) is not None}
            decoder(**{**call, **prompt}, **extra)
            cache.crop(-1)
            again = {k: call[k][:, -candidates - 1 :] for k in (name, "position_ids") if call.get(k) is not None}
            call, shape, pruned = {**call, **again}, (shape[0], candidates + 1), True
        mask = None if mask is None else mask != 0
        if not self.carry and name == "inputs_embeds" and mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "a classifier that is given inputs_embeds reads the last row of each sample, which is padding here, "
                "since transformers finds padding by token ids. Pad on the left, or set alpha to 1 for this call."
            )
        if pruned:
            step = Decode(cache, shape, mask, device)
        else:
            lengths = [shape[1]] * shape[0] if mask is None else mask.sum(dim=1).tolist()
            if min(lengths) == 0:
                blank = lengths.index(0)
                raise ValueError(f"sample {blank} of the batch has no real token: its attention_mask is all 0.")
            request = Request(
                lengths=tuple(lengths),
                width=shape[1],
                alphas=tuple(self.alphas(shape[0])),
                tau=self.tau,
                schedule=self.schedule,
                num_layers=self.num_layers,
                score=self.score,
                carry=self.carry,
                device=device,
            )
            scorer = decoder.salience if self.score == LEARNED else None
            step = Prefill(request, plan(request), mask, scorer)
            if self.tracer is not None:
                self.tracer.step = step
            if _wants_cache(decoder, call):
                call["past_key_values"] = pruned_cache(cache, self.num_layers)
        # The stock decoder would now build a full-length mask. It returns a 4-D one as it is, and ours is never read.
        call["attention_mask"] = torch.empty((1, 1, 1, 1), device=device)
        return (), {**call, **extra, "zsaa": step}


def _wants_cache(decoder: nn.Module, call: dict) -> bool:
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    if call.get("past_key_values") is not None:
        return True
    use_cache = call.get("use_cache")
    return bool(decoder.config.use_cache if use_cache is None else use_cache)


def _check_call(decoder: nn.Module, call: dict, extra: dict, mask, shape, seen: int) -> None:
    """Refuse, by name, what the pruned path would silently get wrong."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"zsaa needs a 2-D attention_mask [batch, tokens] (1 = real, 0 = padding) or none, got a {kind} one: a "
            "custom mask does not say which rows are real. Pass the tokenizer's mask, or set alpha to 1 for this call."
        )
    if mask is not None and tuple(mask.shape) != (shape[0], seen + shape[1]):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the input is {tuple(shape)} after {seen} cached "
            f"tokens: it must have shape {(shape[0], seen + shape[1])}."
        )
    packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if extra.get(name) is not None]
    positions = call.get("position_ids")
    if not packed and positions is not None and shape[1] > 1:
        steps = positions[:, 1:] - positions[:, :-1]
        if mask is not None:
            new = mask[:, -shape[1] :] != 0
            steps = steps.masked_fill(~(new[:, 1:] & new[:, :-1]), 1)
        if bool((steps <= 0).any()):
            packed = ["position_ids that restart or fall back"]
    if packed:
        raise ValueError(
            f"zsaa cannot prune packed sequences ({', '.join(packed)}): scores would mix separate texts. "
            "Give each text its own row and pad, or set alpha to 1 for this call."
        )
    if extra.get("output_attentions") or call.get("output_attentions") or decoder.config.output_attentions:
        raise ValueError(
            "output_attentions=True is not available with alpha < 1: pruned layers have no full attention matrix. "
            "Use zsaa.trace(model) to see what was kept, or set alpha to 1 for this call."
        )
    checkpoint = getattr(decoder, "_gradient_checkpointing_func", None)
    if decoder.training and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "zsaa needs non-reentrant gradient checkpointing. Call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )


@functools.cache
def _pruned_class(layer_class: type[nn.Module], family: Family) -> type[nn.Module]:
    """A subclass of a decoder layer that prunes. A subclass, not a patched instance: it survives deepcopy, keeps
    isinstance checks and output capturing working, and inherits gradient checkpointing."""

    def forward(self, hidden_states, *args, zsaa=None, **kwargs):
        if zsaa is None:
            return super(pruned, self).forward(hidden_states, *args, **kwargs)
        attention = getattr(self, family.attention)
        layer: int = attention.layer_idx
        # GPT-2 passes the cache by position, the others by name.
        cache = kwargs.get("past_key_values", args[0] if args else None)
        prefill = isinstance(zsaa, Prefill)
        if prefill and layer == 0:
            hidden_states = zsaa.enter(hidden_states)

        hidden_states, normed = add_norm(hidden_states, None, getattr(self, family.attention_norm))
        q, k, v = family.qkv(attention, normed)
        tables, window = kwargs.get("position_embeddings"), _window(attention)
        settings = {
            "scale": attention.scaling,
            "softcap": getattr(attention, "attn_logit_softcapping", None),
            "dropout": family.dropout(attention) if self.training else 0.0,
        }
        if prefill:
            real, n = zsaa.real[layer], q.shape[2]
            window = window if window is not None and max(zsaa.request.lengths) > window else None
            if tables is not None:
                padded = n if window or settings["softcap"] else padded_rows(q, k)
                q, k, v = zsaa.rotate(layer, q, k, v, tables, padded)
            positions = zsaa.positions(layer) if cache is not None or window is not None else None
            if cache is not None:
                cache.layers[layer].extend(k[:, :, :n], v[:, :, :n], positions, real is None, zsaa.request.width)
            given = {"rows": n, "real": real, "positions": positions, "window": window, "future": zsaa.future}
            output, sums = attend_and_score(
                q, k, v, score=zsaa.plan.drops[layer] and zsaa.scorer is None, **given, **settings
            )
            output = output.transpose(1, 2).flatten(2)
            sums = sums if zsaa.scorer is None else zsaa.judge(layer, hidden_states)
            hidden_states, output = zsaa.pass_on(layer, sums, hidden_states, output)
        else:
            if tables is not None:
                q, k = rotate(q, k, *tables)
            cached = cache.layers[layer]
            k, v = cached.extend(k, v, zsaa.positions, zsaa.all_real, zsaa.width)
            output = attend(q, k, v, zsaa.mask(cached, window), **settings).transpose(1, 2).flatten(2)

        output = family.output(attention, output)
        if family.after_attention_norm:
            output = getattr(self, family.after_attention_norm)(output)
        hidden_states, normed = add_norm(hidden_states, output, getattr(self, family.mlp_norm))
        output = mlp(getattr(self, family.mlp), normed)
        if family.after_mlp_norm:
            output = getattr(self, family.after_mlp_norm)(output)
        hidden_states = hidden_states + output
        return zsaa.scatter(hidden_states) if prefill and layer == zsaa.request.num_layers - 1 else hidden_states

    def __reduce_ex__(self, protocol):
        return empty, (_pruned_class, layer_class, family), *super(pruned, self).__reduce_ex__(protocol)[2:]

    members = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": layer_class.__module__}
    pruned = type(layer_class.__name__, (layer_class,), members)
    return pruned


def _window(attention: nn.Module) -> int | None:
    """The layer's sliding window in tokens; Mistral keeps it on the config, for all layers."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None


def _dial(model: nn.Module) -> tuple[nn.Module, Dial]:
    decoder, _ = find_decoder(model)
    dial = getattr(decoder, "_zsaa", None)
    if dial is None:
        raise RuntimeError(f"the dial is not enabled on this {type(model).__name__}. Call zsaa.enable(model) first.")
    return decoder, dial


def _check_alpha(alpha: float | Sequence[float] | Tensor) -> float | tuple[float, ...]:
    if not isinstance(alpha, (Tensor, list, tuple)):
        return check_alpha(alpha)
    if isinstance(alpha, Tensor):
        # 0.7 in float32 is 0.699999988: too little for Eq. 2 to keep 700 of 1,000 tokens.
        digits = 7 if alpha.dtype == torch.float32 else 17
        alpha = [round(a, digits) for a in alpha.tolist()] if alpha.dim() else round(alpha.item(), digits)
    if not isinstance(alpha, (list, tuple)):
        return check_alpha(alpha)
    if not alpha:
        raise ValueError("alpha is empty: give one number in (0, 1] for each request, or a single number for all.")
    return tuple(check_alpha(a) for a in alpha)


def enable(
    model: nn.Module,
    alpha: float | Sequence[float] | Tensor | None = None,
    tau: int | None = None,
    score: str | None = None,
    graphs: bool | str | None = None,
    schedule: str | None = None,
) -> nn.Module:
    """Put the dial on `model`, in place, and return it.

    model: a GPT-2, LLaMA, Mistral, Gemma 2, Gemma 3 (text), Qwen 2 or Qwen 3 decoder, bare or with a language-model or
        classification head, also inside PEFT.
    alpha: share of tokens that each layer keeps, in (0, 1] (paper, Eq. 2); 1 runs the stock model bit for bit. A tensor
        or list [batch] sets one for each request.
    tau: least number of tokens that a layer keeps (the paper uses 5).
    score: "column_sum" (the paper's contribution), "column_mean" (per query that can see the token), "random" (a
        control), or "salience" (learned, by zsaa.finetune; saved beside the model).
    graphs: record prefills as CUDA graphs: "auto" when the same shapes come a second time, True at once, False never.
        Replays equal the pass they replace bit for bit; `captured` tells what is held.
    schedule: "geometric" (the paper's Eq. 2: every layer keeps the share alpha of what enters it), or "rising" (not the
        paper's: lower layers keep more, upper ones less, the top is left with the same; see `zsaa.kept_counts`).

    What is not given stays as it was: on this model, or when it was saved (`config.zsaa`, which `save_pretrained`
    writes and stock transformers ignores); at first the paper's: alpha = 1, tau = 5, score = "column_sum", schedule =
    "geometric". Calling it again changes the settings. graphs is never saved, and "auto" at first. Raises
    UnsupportedModelError (a TypeError) for other models, TypeError or ValueError for settings out of range.
    """
    check_transformers()
    decoder, family = find_decoder(model)
    layers = getattr(decoder, family.layers)
    if any("forward" in layer.__dict__ for layer in layers):
        raise RuntimeError(
            "another library has replaced the forward of single layers (accelerate does when it spreads a model over "
            "devices). Enable zsaa before dispatching the model."
        )
    dial = getattr(decoder, "_zsaa", None)
    if dial is None:
        _refuse_wrapped(layers, "Call zsaa.enable before they are.")
    saved = current_settings(decoder)
    alpha = _check_alpha(saved["alpha"] if alpha is None else alpha)
    tau, score = check_tau(saved["tau"] if tau is None else tau), check_score(score or saved["score"])
    schedule = check_schedule(saved["schedule"] if schedule is None else schedule)
    scorer = needed(decoder) if score == LEARNED else None
    graphs = None if graphs is None else check_mode(graphs)
    trained = saved["alpha_range"]
    if dial is None:
        # A classifier reads the last token only, so dropped tokens need no final state there.
        dial = Dial(decoder, family, carry=not type(model).__name__.endswith("ForSequenceClassification"))
        object.__setattr__(decoder, "_zsaa", dial)
        for layer in layers:
            layer.__class__ = _pruned_class(type(layer), family)
        decoder.__class__ = replaying(type(decoder))
    if graphs is not None and graphs != dial.graphs.mode:
        dial.graphs = Graphs(graphs)
    head = _head(model, decoder)
    if head is not None and len(dial.hooks) == 1:
        dial.hooks.append(head.register_forward_pre_hook(dial.before_head, with_kwargs=True))
    if scorer is not None and scorer is not getattr(decoder, "salience", None):
        attach(model, scorer)
    dial.tau, dial.score, dial.schedule = tau, score, schedule
    dial.trained = tuple(trained) if trained else None
    dial.turn(alpha)
    decoder.config.zsaa = dial.settings()
    return model


def _refuse_wrapped(layers: nn.ModuleList, remedy: str) -> None:
    """FSDP and activation checkpointing put classes of their own in place of the layers'."""
    wrapped = next((type(layer).__name__ for layer in layers if type(layer).__module__.startswith("torch.")), None)
    if wrapped:
        raise RuntimeError(f"the decoder's layers are wrapped or sharded ({wrapped}). {remedy}")


def _head(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The language model in `model` whose body is `decoder`, if there is one."""
    for module in model.modules():
        body = getattr(module, getattr(module, "base_model_prefix", None) or "", None)
        if body is decoder and "logits_to_keep" in inspect.signature(type(module).forward).parameters:
            return module
    return None


def disable(model: nn.Module) -> nn.Module:
    """Take the dial off again: the model is the stock one, classes, hooks and a learned score included. Harmless if it
    was not on."""
    decoder, family = find_decoder(model)
    dial = getattr(decoder, "_zsaa", None)
    if dial is not None:
        _refuse_wrapped(getattr(decoder, family.layers), "zsaa.set_alpha(model, 1.0) runs the stock code meanwhile.")
        for hook in dial.hooks:
            hook.remove()
        del decoder._zsaa, decoder.config.zsaa
        for layer in getattr(decoder, family.layers):
            layer.__class__ = type(layer).__bases__[0]
        decoder.__class__ = type(decoder).__bases__[0]
        detach(model)
    return model


def set_alpha(model: nn.Module, alpha: float | Sequence[float] | Tensor) -> None:
    """Turn the dial; takes effect from the next prefill on. A cache that is being continued stays as it was pruned.
    A tensor or list [batch] sets one alpha for each request of the coming batches."""
    decoder, dial = _dial(model)
    dial.turn(_check_alpha(alpha))
    decoder.config.zsaa = dial.settings()


def current_settings(decoder: nn.Module) -> dict:
    """The settings of a decoder's dial; where it is off, those that `enable` would take: saved, else the defaults."""
    dial = getattr(decoder, "_zsaa", None)
    return dial.settings() if dial else {**DEFAULTS, **with_schedule(getattr(decoder.config, "zsaa", None) or {})}


def with_schedule(saved: dict) -> dict:
    """Settings from a file, with their schedule: versions that wrote none had Eq. 2 alone. ValueError for one that is
    not there, or no longer: what was trained or measured under it cannot be had again."""
    schedule = saved.get("schedule", DEFAULTS["schedule"])
    if schedule not in SCHEDULES:
        raise ValueError(
            f"these settings were saved with schedule {schedule!r}, which is not there: only 'geometric' (Eq. 2 of the "
            "paper) and 'rising' are available. Train the model anew, or go back to the version that saved them."
        )
    return {**saved, "schedule": schedule}


def settings(model: nn.Module) -> dict:
    """The dial's settings: {"alpha", "tau", "score", "schedule", "alpha_range"} (the last: trained for, or None)."""
    return _dial(model)[1].settings()


def rule(model: nn.Module) -> dict:
    """Those of the dial's settings that decide, with alpha, how many tokens each layer keeps and what that costs: as
    keyword arguments of `zsaa.macs`, `mac_reduction` and `alpha_for`."""
    dial = _dial(model)[1]
    return {name: getattr(dial, name) for name in RULE}


def captured(model: nn.Module) -> dict:
    """The CUDA graphs that `model` holds: {"mode", "graphs": one dict each (lengths, alphas, tau, score, schedule,
    cache, bytes, capture_ms, replays), "bytes": together, "off": why no more are made, or None}.
    `enable(model, graphs=False)` frees them."""
    return _dial(model)[1].graphs.report()


def trained_for(model: nn.Module, alpha_range: tuple[float, float] | None) -> None:
    """Record the range of alpha that fine-tuning drew from; the dial warns once when turned below it."""
    decoder, dial = _dial(model)
    dial.trained = tuple(alpha_range) if alpha_range else None
    decoder.config.zsaa = dial.settings()


@contextmanager
def at(model: nn.Module, alpha: float | Sequence[float] | Tensor) -> Iterator[nn.Module]:
    """`with zsaa.at(model, 0.3): ...` runs the block at that alpha, then restores the old one, exceptions included."""
    _, dial = _dial(model)
    before = dial.alpha
    dial.turn(_check_alpha(alpha))
    try:
        yield model
    finally:
        dial.alpha = before


class Trace:
    """What the last prefill under `trace` kept; positions count from the first real token of each sample.

    counts: list over layers of lists over samples, N_l. lengths: N_0 of each sample. kept: list over layers of lists
    over samples of int64 tensors, the original positions that the layer passed on.
    """

    def __init__(self):
        self.step: Prefill | None = None

    def _seen(self) -> Prefill:
        if self.step is None:
            raise RuntimeError("no prefill has run under this trace yet.")
        return self.step

    @property
    def counts(self) -> list[list[int]]:
        return self._seen().plan.counts

    @property
    def lengths(self) -> list[int]:
        return list(self._seen().request.lengths)

    @property
    def kept(self) -> list[list[Tensor]]:
        step = self._seen()
        return [[p[p >= 0].cpu() for p in step.positions(stage)] for stage in range(1, len(step.rows))]


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """`with zsaa.trace(model) as t: model(...)`, then read `t.kept`. At alpha = 1 it traces the pruned code path,
    which then keeps every token."""
    _, dial = _dial(model)
    before, dial.tracer = dial.tracer, Trace()
    try:
        yield dial.tracer
    finally:
        dial.tracer = before
