"""How many tokens each layer keeps (Eq. 2 of the paper, or a schedule beside it), and what that costs:
multiply-accumulates and memory."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from zsaa.families import FAMILIES, SUPPORTED
from zsaa.salience import WIDTH
from zsaa.score import LEARNED

SCHEDULES = ("geometric", "rising")  # the first is the paper's, Eq. 2


def as_written(number: Any) -> Any:
    """A number of NumPy or PyTorch as the shortest decimal that it stands for: 0.7 in float32 is 0.699999988, too
    little for Eq. 2 to keep 700 of 1,000 tokens. Anything else as it is."""
    if not (hasattr(number, "dtype") and hasattr(number, "item") and getattr(number, "ndim", None) == 0):
        return number
    value = number.item()
    if not isinstance(value, float):
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in candidates if (0 * number + x).item() == value), value)


def check_alpha(alpha: Any) -> float:
    """`alpha` as a float, if it is a number in (0, 1], of Python, NumPy or PyTorch; else TypeError or ValueError."""
    alpha = as_written(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(
            f"alpha must be a number in (0, 1], got {alpha!r} ({type(alpha).__name__}). "
            "alpha is the share of tokens that each layer keeps: 1 keeps all."
        )
    if not 0 < alpha <= 1:  # also catches NaN
        raise ValueError(
            f"alpha must be in (0, 1], got {alpha}. alpha is the share of tokens that each layer keeps: 1 keeps all, "
            "0.9 drops a tenth per layer."
        )
    return float(alpha)


def check_alphas(alpha: Any) -> float | tuple[float, ...]:
    """`alpha` as a float; or as a tuple, if it is a list, tuple or one-dimensional array of numbers in (0, 1], one per
    request. Else TypeError or ValueError."""
    if not isinstance(alpha, (list, tuple)) and getattr(alpha, "ndim", 0) == 0:
        return check_alpha(alpha)
    if getattr(alpha, "ndim", 1) != 1:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}: give one number, or one for each request, [batch].")
    alpha = list(alpha)
    if not alpha:
        raise ValueError("alpha is empty: give one number in (0, 1] for each request, or a single number for all.")
    return tuple(check_alpha(a) for a in alpha)


def check_tau(tau: Any) -> int:
    """`tau` as an int, if it is a whole number of at least 1; else TypeError or ValueError."""
    if isinstance(tau, bool) or not isinstance(tau, Integral):
        raise TypeError(f"tau must be a whole number >= 1, got {tau!r} ({type(tau).__name__}). The paper uses 5.")
    if tau < 1:
        raise ValueError(f"tau must be >= 1, got {tau}: at least one token must survive each layer. The paper uses 5.")
    return int(tau)


def check_schedule(schedule: Any) -> str:
    """`schedule`, if it is a name in SCHEDULES; else ValueError."""
    if schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}. Leave it out for 'geometric', Eq. 2 of "
            "the paper."
        )
    return schedule


@functools.cache
def powers(num_layers: int, schedule: str) -> tuple[float, ...]:
    """The w_l of each layer, which keeps the share alpha^w_l of what enters it. They sum to `num_layers`, so that the
    top layer is left with the same share of all tokens under every schedule."""
    steep = [math.exp(layer / num_layers) if schedule == "rising" else 1.0 for layer in range(num_layers)]
    total = sum(steep)
    return tuple(w * num_layers / total for w in steep)


@functools.lru_cache(maxsize=128)
def _shares(alpha: float, num_layers: int, schedule: str) -> tuple[float, ...]:
    # Not every C library promises that alpha to the power of 1 is alpha.
    return tuple(alpha if w == 1 else alpha**w for w in powers(num_layers, schedule))


def kept_counts(n: int, alpha: float, num_layers: int, tau: int = 5, schedule: str = "geometric") -> list[int]:
    """Tokens kept by each layer, [N_1, ..., N_L], for a sequence of N_0 = `n` tokens.

    schedule: "geometric" is Eq. 2: N_l = max(floor(alpha N_{l-1}), tau), never more than N_{l-1}. "rising" is not the
        paper's: layer l keeps alpha^w_l of what enters it, w_l growing as exp(l / L), L layers in all. Lower layers,
        where dropping costs most, drop less, upper ones more, and the top is left with as much as under Eq. 2.

    The 1e-6 keeps products that are whole numbers in exact arithmetic (0.7 x 10) from being floored to one less.
    """
    alpha, tau, schedule = check_alpha(alpha), check_tau(tau), check_schedule(schedule)
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n must be a whole number of tokens >= 1, got {n!r}.")
    counts = []
    for share in _shares(alpha, num_layers, schedule):
        n = min(n, max(math.floor(share * n + 1e-6), tau))
        counts.append(n)
    return counts


def attention_widths(config: Any) -> tuple[int, int]:
    """Numbers per row in the queries of all heads, and in the keys (or values) of all key/value heads."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def layer_weights(config: Any) -> tuple[int, int]:
    """Weights of a decoder layer's matrices, which are multiply-accumulates per row: those that see every row that
    enters (Q, K, V), and those that see the rows that go on (output projection, MLP)."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"no MAC count for a {type(config).__name__} of model_type {kind!r}. Supported: {', '.join(SUPPORTED)}."
        )
    hidden, (q_dim, kv_dim) = config.hidden_size, attention_widths(config)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return hidden * (q_dim + 2 * kv_dim), hidden * (q_dim + FAMILIES[kind].mlp_matrices * inner)


def scorer_macs(config: Any, score: str) -> int:
    """Multiply-accumulates that choosing costs per row that enters a layer which drops some: those of a learned score's
    head. The others are sums of what attention computes anyway, and count nothing."""
    return WIDTH * (config.hidden_size + 1) if score == LEARNED else 0


def macs(
    config: Any,
    n: int,
    alpha: float = 1.0,
    tau: int = 5,
    score: str = "column_sum",
    schedule: str = "geometric",
) -> int:
    """Multiply-accumulates of one prefill of `n` tokens through the decoder layers of a model with this `config`.

    Convention: every linear layer costs rows x inputs x outputs; QK^T and the weighted sum over V cost
    rows^2 x head_dim x heads each, that is, causal attention counts as a full square (as most FLOP counters do), for
    the stock model and the pruned one alike. Attention and its Q/K/V see N_{l-1} rows, the output projection and the
    MLP only the N_l kept ones. Embeddings, norms, activations, selection and the task head are left out; the head of a
    learned score is not (see `scorer_macs`).
    """
    return total_macs(config, Counter([n]), alpha, tau, score, schedule)


def kv_bytes(
    config: Any,
    n: int,
    alpha: float = 1.0,
    tau: int = 5,
    batch: int = 1,
    itemsize: int = 2,
    schedule: str = "geometric",
) -> int:
    """Bytes of the keys and values that a prefill of `batch` texts of `n` tokens leaves in the cache.

    itemsize: bytes per number (2 for float16 and bfloat16). A layer caches what entered it, N_{l-1} rows. The stock
    model's sliding layers cache the last window - 1 rows only; a pruned cache evicts nothing (see zsaa/cache.py).
    """
    from transformers import DynamicCache

    entering = [n, *kept_counts(n, alpha, config.num_hidden_layers, tau, schedule)[:-1]]
    if alpha == 1:
        windows = (getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)
        entering = [n if window is None else min(n, window - 1) for window in windows]
    return 2 * batch * attention_widths(config)[1] * sum(entering) * itemsize


def histogram(lengths: int | Iterable[int]) -> Counter:
    """How often each length occurs."""
    counted = Counter([lengths] if isinstance(lengths, Integral) else lengths)
    if not counted:
        raise ValueError("lengths is empty: give one length, or the token count of each sample.")
    return counted


def total_macs(
    config: Any,
    counted: Counter,
    alpha: float,
    tau: int = 5,
    score: str = "column_sum",
    schedule: str = "geometric",
) -> int:
    """`macs`, summed over samples: how often each length occurs."""
    per_entering_row, per_kept_row = layer_weights(config)
    (q_dim, _), per_scored_row, layers = attention_widths(config), scorer_macs(config, score), config.num_hidden_layers
    total = 0
    for n, times in counted.items():
        cost = 0
        for kept in kept_counts(n, alpha, layers, tau, schedule):
            cost += n * per_entering_row + 2 * n * n * q_dim + kept * per_kept_row
            cost += n * per_scored_row if kept < n else 0
            n = kept
        total += times * cost
    return total


def mac_reduction(
    config: Any,
    lengths: int | Iterable[int],
    alpha: float,
    tau: int = 5,
    score: str = "column_sum",
    schedule: str = "geometric",
) -> float:
    """MACs of the stock model over MACs at `alpha`, summed over samples of these `lengths` (tokens)."""
    counted = histogram(lengths)
    return total_macs(config, counted, 1.0) / total_macs(config, counted, alpha, tau, score, schedule)


def truncation_for(config: Any, lengths: int | Iterable[int], mac_reduction: float) -> int:
    """The largest k such that cutting every input to k tokens reduces the stock model's MACs by `mac_reduction`.

    The control that a dial must beat: the same compute, spent on fewer input tokens in all layers.
    """
    counted = histogram(lengths)
    stock = total_macs(config, counted, 1.0)
    low, high = 1, max(counted)  # k = low always reduces at least as much as k = high
    while low < high:
        middle = (low + high + 1) // 2
        cut = sum(times * macs(config, min(n, middle)) for n, times in counted.items())
        low, high = (middle, high) if stock / cut >= mac_reduction else (low, middle - 1)
    return low
