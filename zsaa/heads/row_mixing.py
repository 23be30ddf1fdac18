"""Adapters around a decoder that cannot be pruned exactly: they look across tokens."""

from __future__ import annotations

from zsaa.families import Part, UnsupportedModelError

# PEFT methods whose result for one token depends on which other tokens are there, or on where they stand. All others
# that live in the linear layers and norms (LoRA and its kin, IA3, ...), and virtual tokens at the input, work.
METHODS = {
    "PREFIX_TUNING": "puts keys and values for every layer into the cache before the prompt",
    "CARTRIDGE": "puts keys and values for every layer into the cache before the prompt",
    "ADAPTION_PROMPT": "replaces attention with its own",
    "LILY": "averages over the tokens of the batch",
    "SHADOW": "runs a second network beside the decoder",
    "XLORA": "mixes its adapters by the scores of a full pass",
}


def refuse_row_mixing(model: Part) -> None:
    """UnsupportedModelError if `model` carries a PEFT adapter that cannot be pruned exactly."""
    adapters = getattr(model, "peft_config", None)
    for name, config in adapters.items() if isinstance(adapters, dict) else ():
        method = getattr(config.peft_type, "value", config.peft_type)
        why = METHODS.get(method)
        if getattr(config, "alora_invocation_tokens", None):
            method, why = "aLoRA", "counts tokens from the end of the whole prompt"
        if why:
            raise UnsupportedModelError(
                f"the PEFT adapter {name!r} is {method}, which {why}: zsaa cannot prune it exactly. Use LoRA, or "
                "prompt tuning for virtual tokens, or work on model.get_base_model() without the adapter."
            )
