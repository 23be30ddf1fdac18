"""The dial: enable pruning on a model, turn alpha, look at what was kept.

How it works. `enable` gives each decoder layer a subclass of its own class whose forward prunes when it is handed a
`Prefill` (or continues a pruned cache when handed a `Decode`), and hooks the decoder so that every forward pass gets
such an object of its own through the keyword arguments that all families pass down. A pass without one (alpha = 1)
runs the stock code, bit for bit. No state outlives a pass but the cache, so calls cannot influence one another.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa.attention import attend, attend_and_score, visible
from zsaa.cache import is_empty, is_pruned, pruned_cache
from zsaa.families import Family, find_decoder
from zsaa.keep import check_alpha, check_tau, kept_counts
from zsaa.score import SCORES, check_score, select


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (half-split layout) of q and k [batch, heads, rows, dim]; cos, sin [batch, rows, dim].
    Both at once: on short rows the number of operations is what costs."""
    both = torch.cat([q, k], dim=1)
    first, second = both.chunk(2, dim=-1)
    both = both * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    return both.split([q.shape[1], k.shape[1]], dim=1)


class Prefill:
    """One pruned pass over whole inputs: which rows are alive, layer after layer.

    Inputs are compacted before the first layer (real tokens first), so padding costs nothing and decides nothing. The
    choice of each layer is stored, so that a replay under gradient checkpointing repeats it instead of re-deciding.

    Stage l is what enters layer l (stage 0: the input). Per stage: `rows` int64 [batch, n], the input rows that are
    alive, in order, and `real` bool [batch, n], or None where no row is padding.
    """

    def __init__(self, dial: Dial, shape: tuple[int, int], mask: Tensor | None, device: torch.device, carry: bool):
        self.batch, self.width = shape
        self.score, self.carry = SCORES[dial.score], carry
        self.lengths = [self.width] * self.batch if mask is None else mask.sum(dim=1).tolist()
        if min(self.lengths) == 0:
            empty = self.lengths.index(0)
            raise ValueError(f"sample {empty} of the batch has no real token: its attention_mask is all 0.")
        counts = (kept_counts(n, dial.alpha, dial.num_layers, dial.tau) for n in self.lengths)
        self.counts = [list(layer) for layer in zip(*counts)]
        self.sizes = torch.tensor([self.lengths, *self.counts], device=device)  # [stages, batch]
        self.samples = torch.arange(self.batch, device=device)[:, None]
        longest = max(self.lengths)
        self.compact = min(self.lengths) < self.width  # are the rows of stage 0 a selection of the input's?
        if self.compact:
            rows = (~mask).int().argsort(dim=1, stable=True)[:, :longest]
        else:
            rows = torch.arange(self.width, device=device).expand(self.batch, -1)
        ragged = min(self.lengths) < longest
        self.rows = [rows]
        self.real = [torch.arange(longest, device=device) < self.sizes[0, :, None] if ragged else None]
        # One causal mask for all layers, unless it would be large: then attention builds it block by block.
        short = longest <= 4096
        self.future = torch.ones(longest, longest, dtype=torch.bool, device=device).triu_(1) if short else None
        self.choice: dict[int, Tensor | None] = {}
        self.entered: dict[int, Tensor] = {}

    def positions(self, stage: int) -> Tensor:
        """Original positions [batch, n], counted from each sample's first real token; -1 for padding."""
        positions = self.rows[stage] - self.rows[0][:, :1]
        real = self.real[stage]
        return positions if real is None else positions.masked_fill(~real, -1)

    def enter(self, hidden: Tensor) -> Tensor:
        """Stage 0 of hidden states [batch, width, hidden_size]."""
        return self.take(hidden, self.rows[0]) if self.compact else hidden

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [batch, n, size] at rows [batch, k]. One flat index_select: far faster than gather."""
        flat = (rows + self.samples * x.shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, flat).unflatten(0, rows.shape)

    def embeddings(self, layer: int, table: Tensor) -> Tensor:
        """Rows of a position-embedding table [1 or batch, width, dim] for what enters `layer`."""
        if layer == 0 and not self.compact:
            return table
        if table.shape[0] == 1:
            return F.embedding(self.rows[layer], table[0])
        return self.take(table, self.rows[layer])

    def keep(self, layer: int, sums: Tensor) -> Tensor | None:
        """Choose what `layer` passes on: indices [batch, k] into the rows that entered it, or None for all of them."""
        if layer in self.choice:
            return self.choice[layer]
        counts, before = self.counts[layer], self.counts[layer - 1] if layer else self.lengths
        rows, real, kept = self.rows[layer], self.real[layer], None
        if counts != before:
            ragged = min(counts) != max(counts) or real is not None
            scores = self.score(sums, self.sizes[layer])
            kept, real = select(scores, self.sizes[layer], self.sizes[layer + 1], max(counts), ragged)
            rows = rows.gather(1, kept)
            real = real if min(counts) != max(counts) else None
        self.choice[layer] = kept
        self.rows.append(rows)
        self.real.append(real)
        return kept

    def scatter(self, hidden: Tensor) -> Tensor:
        """Back to [batch, width, hidden_size] after the last layer: a dropped token leaves with the state in which it
        entered its last layer, so every real position has one; padding, and without `carry` dropped tokens, are zero.
        """
        stages = [*sorted(self.entered.items()), (len(self.rows) - 1, hidden)] if self.carry else [(-1, hidden)]
        size = self.batch * self.width
        final = hidden.new_zeros(size + 1, hidden.shape[2])  # the extra row takes the padding
        for stage, states in stages:
            flat, real = self.rows[stage] + self.samples * self.width, self.real[stage]
            flat = flat if real is None else flat.masked_fill(~real, size)
            final = final.index_copy(0, flat.flatten(), states.flatten(0, 1))
        final = final[:size]
        return final.unflatten(0, (self.batch, self.width))


class Decode:
    """One pass that continues a pruned cache: the new tokens go through all layers (Eq. 2 keeps a lone token)."""

    def __init__(self, cache, shape: tuple[int, int], mask: Tensor | None, device: torch.device):
        width = shape[1]
        first = cache.layers[0].positions.max(dim=1, keepdim=True).values + 1
        self.positions = first + torch.arange(width, device=device)
        self.all_real, self.width = True, width
        if mask is not None and not bool(mask[:, -width:].all()):
            new = mask[:, -width:]
            self.positions = (first + new.cumsum(dim=1) - 1).masked_fill(~new, -1)
            self.all_real = False

    def mask(self, layer_cache, window: int | None) -> Tensor | None:
        """Bool [batch, 1, new rows, cached rows], or None where every cached row is visible."""
        if self.width == 1 and layer_cache.all_real and window is None:
            return None
        mask = visible(self.positions, layer_cache.positions, window)
        if not self.all_real:  # a padding row sees everything rather than nothing: NaN would spread
            mask = mask | (self.positions < 0)[:, None, :, None]
        return mask


class Dial:
    """Settings of one enabled decoder, and the hook that gives each forward pass its Prefill or Decode."""

    def __init__(self, decoder: nn.Module, family: Family, alpha: float, tau: int, score: str, carry: bool):
        self.alpha, self.tau, self.score = check_alpha(alpha), check_tau(tau), check_score(score)
        self.num_layers = decoder.config.num_hidden_layers
        self.family, self.carry = family, carry
        self.trained: tuple[float, float] | None = None  # the range of alpha that fine-tuning drew from
        self.warned = False
        self.tracer: Trace | None = None
        self.signature = inspect.signature(type(decoder).forward)
        self.hook = decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def turn(self, alpha: float) -> None:
        self.alpha = check_alpha(alpha)
        # alpha = 1 is the stock model, trained for or not.
        if self.trained and not self.warned and self.alpha < min(self.trained[0], 1.0):
            self.warned = True
            warnings.warn(
                f"alpha = {alpha} is below the range [{self.trained[0]}, {self.trained[1]}] that this model was "
                "fine-tuned for; expect accuracy to fall off.",
                stacklevel=3,
            )

    def before_forward(self, decoder: nn.Module, args: tuple, kwargs: dict):
        call = self.signature.bind_partial(decoder, *args, **kwargs).arguments
        extra = call.pop("kwargs", {})
        cache = call.get("past_key_values")
        pruned = is_pruned(cache) and not is_empty(cache)
        prefill = is_empty(cache) and (self.alpha < 1 or self.tracer is not None)
        if not (pruned or prefill):
            return None

        inputs = call.get("input_ids")
        inputs = call["inputs_embeds"] if inputs is None else inputs
        shape, device = (inputs.shape[0], inputs.shape[1]), inputs.device
        mask = call.get("attention_mask")
        _check_call(decoder, call, extra, mask, shape, seen=cache.get_seq_length() if pruned else 0)
        mask = None if mask is None else mask != 0
        if pruned:
            step = Decode(cache, shape, mask, device)
        else:
            step = Prefill(self, shape, mask, device, self.carry)
            if self.tracer is not None:
                self.tracer.step = step
            if _wants_cache(decoder, call):
                call["past_key_values"] = pruned_cache(cache, self.num_layers)
        # The stock decoder would now build a full-length mask. It returns a 4-D one as it is, and ours is never read.
        call["attention_mask"] = torch.empty((1, 1, 1, 1), device=device)
        call.pop("self", None)
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
        if prefill and zsaa.carry:
            zsaa.entered.setdefault(layer, hidden_states)

        q, k, v = family.qkv(attention, getattr(self, family.attention_norm)(hidden_states))
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            cos, sin = (zsaa.embeddings(layer, table) for table in tables) if prefill else tables
            q, k = _rotate(q, k, cos, sin)

        settings = {
            "scale": attention.scaling,
            "softcap": getattr(attention, "attn_logit_softcapping", None),
            "dropout": family.dropout(attention) if self.training else 0.0,
        }
        window = _window(attention)
        if prefill:
            real = zsaa.real[layer]
            window = window if window is not None and max(zsaa.lengths) > window else None
            positions = zsaa.positions(layer) if cache is not None or window is not None else None
            if cache is not None:
                cache.layers[layer].extend(k, v, positions, real is None, zsaa.width)
            future = None if zsaa.future is None else zsaa.future[: k.shape[2], : k.shape[2]]
            output, sums = attend_and_score(
                q, k, v, real=real, positions=positions, window=window, future=future, **settings
            )
            kept = zsaa.keep(layer, sums)
            output = output.transpose(1, 2).flatten(2)
            if kept is not None:
                hidden_states, output = zsaa.take(hidden_states, kept), zsaa.take(output, kept)
        else:
            cached = cache.layers[layer]
            k, v = cached.extend(k, v, zsaa.positions, zsaa.all_real, zsaa.width)
            output = attend(q, k, v, zsaa.mask(cached, window), **settings).transpose(1, 2).flatten(2)

        output = family.output(attention, output)
        if family.after_attention_norm:
            output = getattr(self, family.after_attention_norm)(output)
        hidden_states = hidden_states + output
        output = getattr(self, family.mlp)(getattr(self, family.mlp_norm)(hidden_states))
        if family.after_mlp_norm:
            output = getattr(self, family.after_mlp_norm)(output)
        hidden_states = hidden_states + output
        return zsaa.scatter(hidden_states) if prefill and layer == len(zsaa.counts) - 1 else hidden_states

    pruned = type(layer_class.__name__, (layer_class,), {"forward": forward, "__module__": layer_class.__module__})
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


def enable(model: nn.Module, alpha: float = 1.0, tau: int = 5, score: str = "column_sum") -> nn.Module:
    """Put the dial on `model`, in place, and return it.

    model: a GPT-2, LLaMA, Mistral, Gemma 2, Gemma 3 (text), Qwen 2 or Qwen 3 decoder, bare or with a language-model or
        classification head, also inside PEFT.
    alpha: share of tokens that each layer keeps, in (0, 1] (paper, Eq. 2); 1 runs the stock model bit for bit.
    tau: least number of tokens that a layer keeps (the paper uses 5).
    score: "column_sum" (the paper's contribution) or "column_mean" (per query that can see the token).

    Calling it again changes the settings. Raises UnsupportedModelError (a TypeError) for other models, TypeError or
    ValueError for settings out of range.
    """
    decoder, family = find_decoder(model)
    layers = getattr(decoder, family.layers)
    if any("forward" in layer.__dict__ for layer in layers):
        raise RuntimeError(
            "another library has replaced the forward of single layers (accelerate does when it spreads a model over "
            "devices). Enable zsaa before dispatching the model."
        )
    # A classifier reads the last token only, so dropped tokens need no final state there.
    carry = not type(model).__name__.endswith("ForSequenceClassification")
    previous = getattr(decoder, "_zsaa", None)
    if previous is not None:
        alpha, tau, score = check_alpha(alpha), check_tau(tau), check_score(score)
        previous.alpha, previous.tau, previous.score = alpha, tau, score
        return model
    dial = Dial(decoder, family, alpha, tau, score, carry)
    object.__setattr__(decoder, "_zsaa", dial)
    for layer in layers:
        layer.__class__ = _pruned_class(type(layer), family)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Take the dial off again: the model is the stock one, classes and hooks included. Harmless if it was not on."""
    decoder, family = find_decoder(model)
    dial = getattr(decoder, "_zsaa", None)
    if dial is not None:
        dial.hook.remove()
        del decoder._zsaa
        for layer in getattr(decoder, family.layers):
            layer.__class__ = type(layer).__bases__[0]
    return model


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Turn the dial; takes effect from the next prefill on. A cache that is being continued stays as it was pruned."""
    _dial(model)[1].turn(alpha)


def settings(model: nn.Module) -> dict:
    """The dial's settings: {"alpha", "tau", "score", "alpha_range"} (the last: trained for, or None)."""
    dial = _dial(model)[1]
    return {"alpha": dial.alpha, "tau": dial.tau, "score": dial.score, "alpha_range": dial.trained}


def trained_for(model: nn.Module, alpha_range: tuple[float, float] | None) -> None:
    """Record the range of alpha that fine-tuning drew from; the dial warns once when turned below it."""
    _dial(model)[1].trained = alpha_range


@contextmanager
def at(model: nn.Module, alpha: float) -> Iterator[nn.Module]:
    """`with zsaa.at(model, 0.3): ...` runs the block at that alpha, then restores the old one, exceptions included."""
    _, dial = _dial(model)
    before = dial.alpha
    dial.turn(alpha)
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
        return self._seen().counts

    @property
    def lengths(self) -> list[int]:
        return self._seen().lengths

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
