"""What is done to a model before it learns: adapters, quantized weights made ready for them, dropout."""

from __future__ import annotations

from torch import nn
from transformers import set_seed

from zsaa.families import find_decoder
from zsaa.finetune.recipe import Recipe


def add_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`model` with fresh LoRA adapters on every linear layer of the decoder, and its task head trainable."""
    from peft import LoraConfig, TaskType, get_peft_model

    classifier = hasattr(model, "score")
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # GPT-2 stores its linear layers transposed (Conv1D)
    )
    set_seed(recipe.seed)
    return get_peft_model(model, config)


def prepare_quantized(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`model` (bitsandbytes, see `zsaa.models.load_model`) ready for adapters: frozen, and all that is not quantized in
    float32, so that norms are exact and gradients can be scaled. Adapters that it has already stay trainable."""
    from peft import prepare_model_for_kbit_training

    from zsaa.models import never_repack

    adapted = hasattr(model, "peft_config")
    if recipe.tuning == "full" and not adapted:
        raise ValueError(
            "tuning='full' cannot train a quantized model, whose weights take no gradient. Use tuning='lora' (QLoRA), "
            "or load the model without quantization=."
        )
    if never_repack(model):
        raise ValueError(
            "bitsandbytes has repacked this model's weights for evaluation on this CPU, and they pass no gradient any "
            "more. Load it anew, with zsaa.models.load_model."
        )
    trainable = [p for p in model.parameters() if p.requires_grad] if adapted else []
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for parameter in trainable:
        parameter.requires_grad = True
    return model


def set_dropout(model: nn.Module, p: float) -> None:
    """LLaMA-like models have attention dropout only; GPT-2 has its own dropout modules."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    decoder, _ = find_decoder(model)
    if decoder.config.model_type == "gpt2":
        for module in decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
