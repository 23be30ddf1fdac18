"""An independent reference of the method: nothing is gathered, everything is masked.

The stock model, with its own eager attention, runs all rows through all layers; a dropped token is only hidden, as a
key, from the layers above. Written for clarity, one sample at a time, without a line of zsaa.
"""

import math

import torch


def parts(model):
    base = getattr(model, model.base_model_prefix) if hasattr(model, model.base_model_prefix) else model
    return base, base.h if hasattr(base, "h") else base.layers


def kept_counts(n, alpha, layers, tau, exempt=0, entry=False):
    if entry:
        return [min(n, max(math.floor(alpha * n + 1e-6), tau, exempt))] * layers
    counts = []
    for _ in range(layers):
        n = min(n, max(math.floor(alpha * n + 1e-6), tau, exempt))
        counts.append(n)
    return counts


def run(model, ids, alpha, tau=5, score="column_sum", prompt=None, exempt=(), entry=False):
    """One unpadded sample: ids [tokens]; the first `prompt` of them are pruned as a prefill, the rest are decoded.
    score: "column_sum", "column_mean", or a function of a layer and the states [1, tokens, hidden] that enter it, to
    scores [1, tokens]. exempt: places of the prompt that are never dropped; the last never is.
    entry: are all drops made before the first layer?

    Returns final hidden states [tokens, hidden] (dropped tokens: the state in which they entered their last layer),
    and the kept original positions per layer. `model` must use eager attention.
    """
    base, layers = parts(model)
    n, prompt = len(ids), len(ids) if prompt is None else prompt
    alive = torch.zeros(n, dtype=torch.bool)
    alive[:] = True
    stay = {*exempt, prompt - 1}
    counts = kept_counts(prompt, alpha, len(layers), tau, len(stay), entry)
    state = {"layer": 0}
    kept, exits = [], {}
    masks = [None] * len(layers)

    def leave(hidden, sums):
        """Hide all but the best from what follows."""
        candidates = [p for p in range(prompt) if alive[p]]
        best = sorted(candidates, key=lambda p: (p not in stay, -sums[p].item(), p))[: counts[state["layer"]]]
        for p in set(candidates) - set(best):
            exits[p] = hidden[0, p]
            alive[p] = False

    def before_layer(module, args, kwargs):
        layer = state["layer"]
        hidden = args[0] if args else kwargs["hidden_states"]
        state["entered"] = hidden
        if entry and layer == 0:
            leave(hidden, score(0, hidden)[0].detach())
        attention = module.attn if hasattr(module, "attn") else module.self_attn
        window = getattr(attention, "sliding_window", None)
        if model.config.model_type == "mistral":
            window = model.config.sliding_window
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        seen = (j <= i) & (alive[None, :] | (i == j))
        if window is not None:
            seen &= i - j < window
        masks[layer] = seen
        additive = torch.zeros(1, 1, n, n, dtype=hidden.dtype).masked_fill(~seen, float("-inf"))
        if len(args) > 2:  # gpt2 passes the mask by position
            args = (*args[:2], additive, *args[3:])
        else:
            kwargs = {**kwargs, "attention_mask": additive}
        return args, kwargs

    def after_attention(module, args, kwargs, output):
        weights = output[1][0].detach()  # [heads, n, n]
        layer = state["layer"]
        voters = alive.clone()
        voters[prompt:] = False
        sums = weights[:, voters].sum(dim=(0, 1))
        if score == "column_mean":
            rank = alive[:prompt].cumsum(0) - 1
            sums[:prompt] = sums[:prompt] / (alive[:prompt].sum() - rank).clamp(min=1)
        if callable(score):
            sums = score(layer, state["entered"])[0].detach()
        leave(state["entered"], sums)
        kept.append([p for p in range(prompt) if alive[p]])

    def after_layer(module, args, kwargs, output):
        state["layer"] += 1
        if state["layer"] == len(layers):
            rows = [exits.get(p, output[0, p]) for p in range(n)]
            return torch.stack(rows)[None]

    handles = []
    for layer in layers:
        attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
        handles += [
            layer.register_forward_pre_hook(before_layer, with_kwargs=True),
            attention.register_forward_hook(after_attention, with_kwargs=True),
            layer.register_forward_hook(after_layer, with_kwargs=True),
        ]
    try:
        output = base(ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return output.last_hidden_state[0], kept
