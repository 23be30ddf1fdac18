"""Tiny random models of every supported family, made on the spot; windows and caps are small enough to bite."""

import pickle

import torch
import transformers as tf

COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0)
ROPE = dict(COMMON, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256)

MADE = {}  # by `make`: models, pickled, which is twice as fast as making them again
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: tf.LlamaConfig(**ROPE),
    "mistral": lambda: tf.MistralConfig(**ROPE, sliding_window=9),
    "qwen2": lambda: tf.Qwen2Config(**ROPE, use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen3": lambda: tf.Qwen3Config(**ROPE, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**ROPE, head_dim=16, sliding_window=9, attn_logit_softcapping=2.0),
    "gemma3_text": lambda: tf.Gemma3TextConfig(
        **ROPE, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}
FAMILIES = list(CONFIGS)
TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # of a pruned pass in float64 to the masked reference
NEW = 5  # tokens that are generated
QUIET = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, do_sample=False)
MIXED_CACHES = ("qwen2", "gemma2", "gemma3_text")  # of full and sliding layers
HEADS = {
    "base": tf.AutoModel,
    "causal-lm": tf.AutoModelForCausalLM,
    "sequence-classification": tf.AutoModelForSequenceClassification,
}


def make(family, head="causal-lm", seed=0, attn_implementation="sdpa", dtype=torch.float64, dropout=0.0, layers=None):
    """A random model in eval mode, of its last `layers` layers. Weights are large enough for attention to be far from
    uniform."""
    config = CONFIGS[family]()
    key = (config.to_json_string(use_diff=False), head, seed, attn_implementation, dtype, dropout, layers)
    if key not in MADE:
        MADE[key] = pickle.dumps(_made(family, config, *key[1:]))
    return pickle.loads(MADE[key])


def _made(family, config, head, seed, attn_implementation, dtype, dropout, layers):
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-layers:]
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    if family == "gemma2" and attn_implementation == "sdpa":
        attn_implementation = "eager"  # transformers offers no sdpa for Gemma 2: it would ignore the softcap
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HEADS[head].from_config(config, attn_implementation=attn_implementation, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def tokens(lengths, seed=0, padding="right", vocab=97):
    """input_ids, attention_mask, position_ids [batch, max(lengths)]; id 0 only as padding."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), max(lengths)
    ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.long)
    for b, n in enumerate(lengths):
        where = slice(0, n) if padding == "right" else slice(width - n, width)
        ids[b, where] = torch.randint(1, vocab, (n,), generator=generator)
        mask[b, where] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def tokenizer(vocab=97):
    """Words "w3" to "w96", split at spaces, for the models above."""
    import tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"Ġw{i}": i for i in range(3, vocab)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    split, encode = tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.ByteLevel(use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, encode])
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Padder:
    """The two things that a run needs of a tokenizer: padding a batch, and saving itself."""

    padding_side, model_input_names = "right", ["input_ids", "attention_mask"]

    def pad(self, samples, return_tensors=None, **kwargs):
        width = max(len(s["input_ids"]) for s in samples)
        batch = {
            "input_ids": [list(s["input_ids"]) + [0] * (width - len(s["input_ids"])) for s in samples],
            "attention_mask": [[1] * len(s["input_ids"]) + [0] * (width - len(s["input_ids"])) for s in samples],
        }
        if "labels" in samples[0]:  # of classifiers: the collator of language models pads theirs itself
            batch["labels"] = [s["labels"] for s in samples]
        return tf.BatchEncoding({k: torch.tensor(v) for k, v in batch.items()})

    def save_pretrained(self, folder):
        return ()
