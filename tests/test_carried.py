"""A model that travels: fewer tokens, coarser weights, the same cuts of the same texts."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import carried
from zsaa.models import load_model

TEXTS = ["the cat sat on the mat", "a cat and a hat, the thin thing", "no hats on mats: nothing"]


def tokenizer():
    """BPE over whole texts, with bytes to fall back on, as Gemma's."""
    import tokenizers
    from tokenizers import AddedToken, models, normalizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    others = ["they then that this", "cart hard heart", "mating sitting inning", "zebra quiz"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))][:20])
    backend.train_from_iterator([*TEXTS * 3, *others * 3], trainer)
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def test_a_packed_model_cuts_its_texts_alike_and_is_a_little_rougher(tmp_path, monkeypatch):
    whole = tokenizer()
    config = transformers.Gemma3TextConfig(
        **{**tiny.ROPE, "vocab_size": len(whole)}, head_dim=16, layer_types=["sliding_attention"] * 4,
        bos_token_id=whole.bos_token_id, eos_token_id=whole.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(carried, "load_model", lambda name: (model, whole))
    facts = carried.pack("some model", TEXTS[:2], tmp_path / "model.xz")
    assert facts["tokens_used"] <= facts["tokens"] < len(whole), "fewer tokens"
    assert abs(facts["nats_before"] - facts["nats_after"]) < 0.5
    folder = carried.unpack(tmp_path / "model.xz", tmp_path / "model")
    small, short = load_model(str(folder))
    for text in TEXTS[:2]:
        ids, fewer = whole(text).input_ids, short(text).input_ids
        assert whole.convert_ids_to_tokens(ids) == short.convert_ids_to_tokens(fewer)
        rows = small.get_input_embeddings().weight[fewer], before["model.embed_tokens.weight"][ids]
        steps = carried.COARSE * rows[1].std(1, keepdim=True)
        assert ((rows[0] - rows[1]).abs() <= 0.51 * steps + 1e-4).all()
    key = "model.layers.2.mlp.up_proj.weight"
    apart = (small.state_dict()[key] - before[key]).pow(2).mean().sqrt() / before[key].std()
    assert 0.065 < apart < 0.11, "a step of 0.31 deviations: over sqrt(12)"
    norm = "model.layers.1.input_layernorm.weight"
    torch.testing.assert_close(small.state_dict()[norm], before[norm])
    assert (small.config.vocab_size, small.config.bos_token_id) == (facts["tokens"], short.bos_token_id)
    rarer = carried.shortened(whole, TEXTS, 2)[1]
    assert len(rarer) < len(carried.shortened(whole, TEXTS, 1)[1])
    head, _ = load_model(str(folder), "sequence-classification", num_labels=2)
    assert head.score.weight.shape == (2, 32)


def test_only_tasks_cut_by_films_are_carried():
    with pytest.raises(ValueError, match="rotten_tomatoes is not cut by films"):
        carried.texts_of("rotten_tomatoes")
