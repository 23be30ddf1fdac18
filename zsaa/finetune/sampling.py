"""What an optimizer step sees: its alpha or its MAC reductions, and how much of its texts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

import zsaa
from zsaa.data.batching import own_seeds, pad
from zsaa.families import find_decoder
from zsaa.finetune.recipe import Recipe, method_of
from zsaa.rule import RULE

# Section 4.2: GPT-2 (12 layers) is trained from 0.02 on, the deeper LLaMA 3 and Gemma 2 from 0.5 on.
ALPHA_RANGE = {"gpt2": (0.02, 1.0)}
DEEP_ALPHA_RANGE = (0.5, 1.0)
LEAST_ALPHA = 1e-4  # stands in for a MAC reduction that texts are too short for: as far as tau lets them


def alpha_range(
    recipe: Recipe, model: nn.Module, lengths: Sequence[int] | None = None
) -> tuple[float, float] | tuple[None, None]:
    """The range that `recipe` draws alpha from on `model`. Of a ladder, which draws MAC reductions: down to the alpha
    that divides the MACs of samples of these `lengths`, taken together, by `strongest`; (None, None) without lengths.
    """
    if recipe.method == "conventional" or recipe.sampling == "exits":
        return 1.0, 1.0
    if recipe.sampling == "ladder":
        return (None, None) if lengths is None else (reduced_to(recipe.strongest, recipe, model, lengths), 1.0)
    return tuple(recipe.alpha_range or ALPHA_RANGE.get(find_decoder(model)[0].config.model_type, DEEP_ALPHA_RANGE))


def draw_alpha(low: float, high: float, seed: int, step: int) -> float:
    """Eq. 3 for one optimizer step: a function of seed and step alone, so that a resumed run and every process of a
    distributed one draw the same."""
    return random.Random(f"zsaa {seed} {step}").uniform(low, high)


def draw_reductions(strongest: float, seed: int, step: int) -> tuple[float, float]:
    """The MAC reductions of one ladder step, each log-uniform: from 1 to the root of `strongest`, and from there to
    `strongest`; of seed and step alone, too."""
    draw, middle = random.Random(f"zsaa ladder {seed} {step}"), math.sqrt(strongest)
    return middle ** draw.random(), middle ** (1 + draw.random())


def rule_of(recipe: Recipe) -> dict:
    """What of a recipe is the dial's: its tau, score and schedule."""
    return {name: getattr(recipe, name) for name in RULE}


def reduced_to(mac_reduction: float, recipe: Recipe, model: nn.Module, lengths: Sequence[int]) -> float:
    """The alpha that divides the MACs of a batch of these lengths so, or comes as close as tau lets it."""
    try:
        return zsaa.alpha_for(find_decoder(model)[0].config, lengths, mac_reduction, **rule_of(recipe))
    except ValueError:
        return LEAST_ALPHA


def window(text: Sequence[int], draw: random.Random) -> list[int]:
    """Successive tokens of a text, half of them or more."""
    size = min(len(text), max(1, round(len(text) * draw.uniform(0.5, 1))))  # an empty one has none
    start = draw.randint(0, len(text) - size)
    return list(text[start : start + size])


def crop(inputs: dict, recipe: Recipe, step: int, bos: int | None) -> dict:
    """A batch of a classifier with `recipe.crops` of its texts cut to a part, padded on the side it was: input_ids,
    attention_mask int64 [batch, longest]. What becomes of a text depends on seed, step and the text alone. A leading
    `bos` stays."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    texts, before = [row[mask].tolist() for row, mask in zip(ids, real)], bool((~real[:, 0]).any())
    for i, (text, own) in enumerate(zip(texts, own_seeds(texts))):
        draw = random.Random(f"zsaa crops {recipe.seed} {step} {own}")
        if draw.random() < recipe.crops:
            first = text[: int(text[:1] == [bos])]
            texts[i] = first + window(text[len(first) :], draw)
    ids, mask = pad(texts, int(ids[~real][0]) if (~real).any() else 0, ids.device, "left" if before else "right")
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def describe(recipe: Recipe, model: nn.Module) -> dict:
    """The recipe as a dict for a result file, with the range that alpha was really drawn from (None of a ladder,
    whose draws depend on the lengths; the training's log has it), the method as `method_of` names it, and the "file"
    that the recipe was read from: {"name", "sha256", "fields"}, None for one that was made in code."""
    low, high = alpha_range(recipe, model)
    return {
        **asdict(recipe),
        "method": method_of(recipe.sampling, recipe.method),
        "alpha_range": None if low is None else [low, high],
        "file": recipe.file,
    }
