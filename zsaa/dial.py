"""The dial: enable pruning on a model, turn alpha, look at what was kept.

How it works. `enable` gives each decoder layer a subclass of its own class whose forward prunes when it is handed a
`Prefill` (or continues a pruned cache when handed a `Decode`), and hooks the decoder so that every forward pass gets
such an object of its own through the keyword arguments that all families pass down. A pass without one (alpha = 1)
runs the stock code, bit for bit. No result of a pass outlives it but the cache, so calls cannot influence one another;
what is kept beside it (plans, recordings of CUDA graphs) follows from the shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from zsaa.compat import check_transformers
from zsaa.depth.stop import check_depth
from zsaa.dials.settings import Range, Saved, current_settings, taken
from zsaa.dials.trace import Trace
from zsaa.families import find_decoder
from zsaa.fast.graphs import Graphs, check_mode, replaying
from zsaa.guards import is_wrapped, refuse_foreign
from zsaa.heads.classification import reads
from zsaa.heads.generation import find_owner, owner_class
from zsaa.heads.row_mixing import refuse_row_mixing
from zsaa.hook import Dial
from zsaa.layer import MARK, pruned_class
from zsaa.learned import salience, scorer_for
from zsaa.rule import RULE, Rule, check_alphas
from zsaa.scope import opened
from zsaa.subclass import recast, restore

_pruned_class = pruned_class  # pickles of earlier versions look for it here


def _dial(model: nn.Module) -> tuple[nn.Module, Dial]:
    decoder, _ = find_decoder(model)
    refuse_row_mixing(model)
    dial = getattr(decoder, "_zsaa", None)
    if dial is None:
        raise RuntimeError(f"the dial is not enabled on this {type(model).__name__}. Call zsaa.enable(model) first.")
    return decoder, dial


def enable(
    model: nn.Module,
    alpha: float | Sequence[float] | Tensor | None = None,
    tau: int | None = None,
    score: str | None = None,
    graphs: bool | str | None = None,
    schedule: str | None = None,
    depth: int | None = None,
) -> nn.Module:
    """Put the dial on `model`, in place, and return it.

    model: a GPT-2, LLaMA, Mistral, Gemma 2, Gemma 3 (text), Qwen 2 or Qwen 3 decoder, bare or with a language-model or
        classification head, also inside PEFT.
    alpha: share of tokens that each layer keeps, in (0, 1] (paper, Eq. 2); 1 runs the stock model bit for bit. A tensor
        or list [batch] sets one for each request.
    tau: least number of tokens that a layer keeps (the paper uses 5).
    score: "column_sum" (the paper's contribution), "column_mean" (per query that can see the token), "random" (a
        control), "salience" (learned, by zsaa.finetune; saved beside the model), or "asked" (learned, too: chunks of
        tokens that the question asks for, see zsaa/learned/asked.py; it and the first tokens are never dropped).
    graphs: record prefills and decoding steps as CUDA graphs, which replays equal bit for bit: "auto" when shapes come
        again, True at once, training passes too (zsaa/fast/training.py), False never. `captured` tells what is held.
    schedule: "geometric" (the paper's Eq. 2: every layer keeps the share alpha of what enters it), "rising" (not the
        paper's: lower layers keep more, upper ones less, the top is left with the same; see `zsaa.kept_counts`), or
        "entry" (not the paper's: the share alpha enters the first layer, and goes through all; with scores that need no
        attention).
    depth: layers that run, the first ones, 1 to all; then the final norm and the head (not the paper's; for models that
        were trained so, see zsaa/depth). At alpha = 1 it is the stock code of those layers that runs.

    Calls then take, beside their own arguments, `alpha` (of this call, or one for each request), `depth` and `exempt`,
    a bool mask [batch, tokens] of prompt tokens that are never dropped; no layer keeps fewer, and the last token is
    always one. By score="asked" also `question`, a mask of the tokens that ask: True, or as whole numbers 3 for the
    question, 2 for the turn before it, 1 for older ones; without it the last 32 do. `generate` takes texts in place of
    masks, and `document`, all but which is exempt: see zsaa/heads/texts.py.

    What is not given stays as it was: on this model, or when it was saved (`config.zsaa`, which `save_pretrained`
    writes and stock transformers ignores); at first the paper's: alpha = 1, tau = 5, score = "column_sum", schedule =
    "geometric", all layers. Calling it again changes the settings. graphs is never saved, and "auto" at first. Raises
    UnsupportedModelError (a TypeError) for other models, TypeError or ValueError for settings out of range.
    """
    check_transformers()
    decoder, family = find_decoder(model)
    refuse_row_mixing(model)
    layers, owner = getattr(decoder, family.layers), find_owner(model, decoder)
    dial = getattr(decoder, "_zsaa", None)
    if dial is None:
        remedy = "Load it without device_map, call zsaa.enable, then accelerate.dispatch_model(model, device_map)."
        refuse_foreign(layers, remedy, "Call zsaa.enable before they are.")
    saved = current_settings(decoder)
    turned = None if alpha is None else check_alphas(alpha)
    depth = depth if depth is None else check_depth(depth, len(layers))
    given: dict[str, Any] = {"tau": tau, "score": score, "schedule": schedule}
    rule = Rule(**{name: saved[name] if given[name] is None else given[name] for name in RULE})
    scorer = scorer_for(decoder, rule.score)
    graphs = None if graphs is None else check_mode(graphs)
    if dial is None:
        turned, depth = taken(saved, turned, depth)
        dial = Dial(decoder, family)
        object.__setattr__(decoder, "_zsaa", dial)
        recast(decoder, replaying)
    for layer in layers:  # some may be new
        if not getattr(type(layer), MARK, False) and not is_wrapped(layer):
            recast(layer, pruned_class, family)
    if owner is not None and not getattr(owner, "_zsaa_owner", False):
        dial.reads = reads(owner)
        if dial.reads == "row":
            dial.hooks.append(owner.register_forward_pre_hook(dial.before_head, with_kwargs=True))
        recast(owner, owner_class)
    if graphs is not None and graphs != dial.graphs.mode:
        dial.graphs = Graphs(graphs)
    if scorer is not None and scorer not in salience.scorers_of(model):
        salience.attach(model, scorer)
    dial.rule = rule
    dial.trained, dial.trained_depth = (saved[name] and tuple(saved[name]) for name in ("alpha_range", "depth_range"))
    dial.layers = len(layers)
    if turned is not None:
        dial.turn(turned)
    if depth is not None:
        dial.stop_at(depth)
    dial.record(decoder.config)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Take the dial off again: the model is the stock one, classes, hooks and a learned score included. Harmless if it
    was not on."""
    decoder, family = find_decoder(model)
    dial = getattr(decoder, "_zsaa", None)
    if dial is not None:
        layers = getattr(decoder, family.layers)
        remedy = "accelerate.hooks.remove_hook_from_submodules(model) takes accelerate's off."
        refuse_foreign(layers, remedy, "zsaa.set_alpha(model, 1.0) runs the stock code meanwhile.")
        for hook in dial.hooks:
            hook.remove()
        held = vars(decoder.config).get("zsaa")
        if not isinstance(held, Saved) or held.mark is dial.mark:
            vars(decoder.config).pop("zsaa", None)
        del decoder._zsaa
        for layer in layers:
            if MARK in vars(type(layer)):
                restore(layer)
        restore(decoder)
        owner = find_owner(model, decoder)
        if owner is not None and "_zsaa_owner" in vars(type(owner)):
            restore(owner)
        salience.detach(model)
    return model


def set_alpha(model: nn.Module, alpha: float | Sequence[float] | Tensor) -> None:
    """Turn the dial, for good and for all threads, from the next prefill on; a cache that is being continued stays as
    it was pruned. alpha: in (0, 1]; a tensor or list [batch] has one for each request of the coming batches. Inside an
    `at` block of this model the block goes on at it, too. ValueError, TypeError: others; RuntimeError: no dial."""
    decoder, dial = _dial(model)
    dial.turn(check_alphas(alpha))
    dial.record(decoder.config)


def set_depth(model: nn.Module, depth: int | None) -> None:
    """Run the first `depth` layers from now on, as `set_alpha` turns alpha; None: all. Takes effect at the next call
    that begins with an empty cache; one that was filled at another depth cannot be continued (ValueError)."""
    decoder, dial = _dial(model)
    dial.stop_at(depth)
    dial.record(decoder.config)


def settings(model: nn.Module) -> dict:
    """The dial's settings as a call made here would have them: {"alpha", "tau", "score", "schedule", "alpha_range",
    "depth", "depth_range"} (ranges: trained for, or None; depth None: all layers). RuntimeError if the dial is off."""
    return _dial(model)[1].settings()


def rule(model: nn.Module) -> dict:
    """Those of the dial's settings that decide, with alpha, how many tokens each layer keeps and what that costs: as
    keyword arguments of `zsaa.macs`, `mac_reduction` and `alpha_for`."""
    return asdict(_dial(model)[1].rule)


def captured(model: nn.Module) -> dict:
    """The CUDA graphs that `model` holds: {"mode", "graphs": one dict each (lengths, alphas, tau, score, schedule,
    cache, bytes, capture_ms, replays), "steps": of decoding (batch, rows: the most of a layer, bytes, ...), "training":
    passes, "bytes": together, "off": why no more are made, or None}. `enable(model, graphs=False)` frees them."""
    return _dial(model)[1].graphs.report()


def trained_for(model: nn.Module, alpha_range: Range, depth_range: Range = None) -> None:
    """Record the ranges of alpha and depth that fine-tuning drew from; the dial warns once when turned below them."""
    decoder, dial = _dial(model)
    dial.trained = (alpha_range[0], alpha_range[1]) if alpha_range else None
    dial.trained_depth = (depth_range[0], depth_range[1]) if depth_range else None
    dial.record(decoder.config)


@contextmanager
def at(
    model: nn.Module, alpha: float | Sequence[float] | Tensor | None = None, depth: int | None = None
) -> Iterator[nn.Module]:
    """`with zsaa.at(model, 0.3): ...` runs the block at that alpha, and leaves the model's own as it is; with depth=15
    through the first 15 layers. What is not given stays as it was.

    It holds for calls of this thread and task. A thread that is started inside has the model's own alpha: give it one
    with the call, `model.generate(..., alpha=0.3)`. In a generator it holds while the generator runs.
    """
    _, dial = _dial(model)
    if alpha is None and depth is None:
        raise TypeError("zsaa.at turns a dial: give alpha, depth or both.")
    with dial.at(alpha, depth):
        yield model


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """`with zsaa.trace(model) as t: model(...)`, then read, of the last prefill of this thread and task,
    `t.kept[layer][sample]`, the positions that the layer passed on (int64 [N_l], 0 is the first real token; paper,
    section 3.3), `t.counts`, how many, and `t.lengths`, N_0. At alpha = 1 the pruned path runs, and keeps all."""
    _, dial = _dial(model)
    with opened(dial, trace=Trace()) as block:
        yield block.values["trace"]
