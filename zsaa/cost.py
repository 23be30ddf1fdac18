"""What a pruned prefill costs: multiply-accumulates and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from zsaa.depth.stop import check_depth
from zsaa.families import FAMILIES, SUPPORTED
from zsaa.learned.asked import Shape
from zsaa.learned.salience import WIDTH
from zsaa.rule import ASKED, LEARNED, TAU, Prices, Rule, as_written, counting


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
            + (" Of a model, give its configuration: model.config." if hasattr(config, "config") else "")
        )
    hidden, (q_dim, kv_dim) = config.hidden_size, attention_widths(config)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return hidden * (q_dim + 2 * kv_dim), hidden * (q_dim + FAMILIES[kind].mlp_matrices * inner)


def prices(config: Any, score: str = "column_sum", depth: int | None = None) -> Prices:
    """What the parts of a model with this `config` cost, and choosing by `score`; `Rule.macs` puts them together, of
    the first `depth` layers. Scores made of attention are sums of what it computes anyway, and count nothing."""
    entering, kept = layer_weights(config)
    return Prices(
        layers=config.num_hidden_layers,
        entering=entering,
        kept=kept,
        pair=2 * attention_widths(config)[0],
        scored=WIDTH * (config.hidden_size + 1) if score == LEARNED else 0,
        asked=Shape(config.hidden_size).macs if score == ASKED else None,
        depth=depth if depth is None else check_depth(depth, config.num_hidden_layers),
    )


def macs(
    config: Any,
    n: int,
    alpha: float = 1.0,
    tau: int = TAU,
    score: str = "column_sum",
    schedule: str = "geometric",
    depth: int | None = None,
) -> int:
    """Multiply-accumulates of one prefill of `n` tokens through the decoder layers of a model with this `config`, the
    first `depth` of them or all.

    Convention: every linear layer costs rows x inputs x outputs; QK^T and the weighted sum over V cost
    rows^2 x head_dim x heads each, that is, causal attention counts as a full square (as most FLOP counters do), for
    the stock model and the pruned one alike. Attention and its Q/K/V see N_{l-1} rows, the output projection and the
    MLP only the N_l kept ones. Embeddings, norms, activations, selection and the task head are left out; the head of a
    learned score is not. By score="asked" the last 32 tokens ask, and a scorer of the standard
    shape (zsaa.learned.asked.Shape) is counted.
    """
    return Rule(tau, score, schedule).macs(prices(config, score, depth), n, alpha)


def kv_bytes(
    config: Any,
    n: int,
    alpha: float = 1.0,
    tau: int = TAU,
    batch: int = 1,
    itemsize: int = 2,
    schedule: str = "geometric",
    score: str | None = None,
    depth: int | None = None,
) -> int:
    """Bytes of the keys and values that a prefill of `batch` texts of `n` tokens leaves in the cache.

    itemsize: bytes per number (2 for float16 and bfloat16). score: as in `kept_counts`. depth: as in `macs`. A layer
    caches what entered it, N_{l-1} rows. The stock model's sliding layers cache the last window - 1 rows only; a pruned
    cache evicts nothing (see zsaa/cache.py).
    """
    from transformers import DynamicCache

    rows = counting(tau, schedule, score).stages(n, alpha, config.num_hidden_layers)[:-1]
    if alpha == 1:
        windows = (getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)
        rows = [n if window is None else min(n, window - 1) for window in windows]
    return 2 * batch * attention_widths(config)[1] * sum(rows[:depth]) * itemsize


def histogram(lengths: int | Iterable[int]) -> Counter:
    """How often each length occurs."""
    one = isinstance(lengths, str) or not isinstance(lengths, Iterable) or getattr(lengths, "ndim", 1) == 0
    given: Any = [lengths] if one else lengths
    counted = Counter(map(as_written, given))
    if not counted:
        raise ValueError("lengths is empty: give one length, or the token count of each sample.")
    return counted


def total_macs(config: Any, counted: Counter, alpha: float, rule: Rule | None = None, depth: int | None = None) -> int:
    """`macs`, summed over samples: how often each length occurs."""
    rule = Rule() if rule is None else rule
    priced = prices(config, rule.score, depth)
    return sum(times * rule.macs(priced, n, alpha) for n, times in counted.items())


def mac_reduction(
    config: Any,
    lengths: int | Iterable[int],
    alpha: float,
    tau: int = TAU,
    score: str = "column_sum",
    schedule: str = "geometric",
    depth: int | None = None,
) -> float:
    """MACs of the stock model over MACs at `alpha` and `depth`, summed over samples of these `lengths` (tokens)."""
    counted = histogram(lengths)
    return total_macs(config, counted, 1.0) / total_macs(config, counted, alpha, Rule(tau, score, schedule), depth)
