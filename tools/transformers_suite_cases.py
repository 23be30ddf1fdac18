"""transformers' own model tests on all supported families; tools/transformers_suite.py runs this file with pytest.

The archive that PyPI serves carries the mixins (tests/test_modeling_common.py, tests/test_training_mixin.py) but not
the per-model files that apply them, nor tests/generation. So the small configurations are ours and every test is
theirs. ZSAA_SUITE says what each tested model gets when it is built: "stock" nothing, "dial" `zsaa.enable(model,
alpha=1)`, "traced" also a tracer, which sends every prefill through the pruning code, keeping all tokens, and "pruned"
`zsaa.enable(model, alpha=0.6, tau=2)`.
"""

import os
import sys
import types
import unittest

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import zsaa
from zsaa.dial import _dial
from zsaa.families import UnsupportedModelError

MODE = os.environ["ZSAA_SUITE"]

for absent, mixin in (("tests.exporters.test_export", "ExportTesterMixin"), ("tests.generation.test_utils", None)):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        module = sys.modules[absent] = types.ModuleType(absent)
        setattr(module, mixin or "GenerationTesterMixin", type(mixin or "GenerationTesterMixin", (), {}))

from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from tests import test_modeling_common as common  # noqa: E402


class Forgetful:
    """A tracer that remembers nothing, so that a model stays copyable while it is traced for good."""

    step = property(lambda self: None, lambda self, step: None)


def put_dial_on(model):
    try:
        zsaa.enable(model, **({"alpha": 0.6, "tau": 2} if MODE == "pruned" else {"alpha": 1.0}))
    except UnsupportedModelError:
        return
    if MODE == "traced":
        _dial(model)[1].tracer = Forgetful()
    with open(os.environ["ZSAA_SUITE_COUNT"], "a") as counter:  # proof that models got it
        counter.write(".")


if MODE != "stock":
    post_init = transformers.PreTrainedModel.post_init  # the last step of every model's __init__, also when loading

    def post_init_with_dial(self):
        post_init(self)
        put_dial_on(self)

    transformers.PreTrainedModel.post_init = post_init_with_dial


@pytest.fixture(autouse=True)
def same_numbers_in_every_mode():
    transformers.set_seed(0)
    common.global_rng.seed(0)


SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1)
ROPE = dict(SIZES, eos_token_id=2, num_key_value_heads=2, intermediate_size=37, max_position_embeddings=64)
CONFIGS = {
    "gpt2": dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1),
    "llama": ROPE,
    "mistral": dict(ROPE, sliding_window=9),
    "qwen2": dict(ROPE, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": dict(ROPE, head_dim=16),
    "gemma2": dict(ROPE, head_dim=16, sliding_window=9),
    "gemma3_text": dict(ROPE, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
}
HEADS = ("", "_FOR_CAUSAL_LM", "_FOR_SEQUENCE_CLASSIFICATION", "_FOR_TOKEN_CLASSIFICATION", "_FOR_QUESTION_ANSWERING")


class Tester:
    """What the mixins ask of a model tester: a small configuration and inputs for it."""

    is_training = True
    batch_size, seq_length, num_choices = 3, 7, 4
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, family: str):
        self.family = family
        config_class = type(self.get_config())
        mappings = [getattr(modeling_auto, f"MODEL{head}_MAPPING") for head in HEADS]
        self.classes = [mapping[config_class] for mapping in mappings if config_class in mapping]
        self.base_model_class, self.causal_lm_class = self.classes[:2]

    def get_config(self):
        return transformers.AutoConfig.for_model(self.family, **CONFIGS[self.family])

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], 99)
        mask = torch.ones_like(ids).tril()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class ModelTests(common.ModelTesterMixin, common.GenerationTesterMixin, TrainingTesterMixin):
    model_tester = None

    def setUp(self):
        self.model_tester = Tester(self.family)

    @property
    def all_model_classes(self):
        return tuple(Tester(self.family).classes)


for family in CONFIGS:
    name = f"Test_{family}"
    globals()[name] = type(name, (ModelTests, unittest.TestCase), {"family": family})
