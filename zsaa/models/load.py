"""The doors: `load_model` for whatever a name stands for, `resolve` to say what that is."""

import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

import torch

from zsaa.compat import check_transformers
from zsaa.kit.files import is_stray
from zsaa.models.adapters import adapter_config, base_of, is_adapter, put_on
from zsaa.models.errors import AssetError
from zsaa.models.hub import from_hub
from zsaa.models.integrity import sha256
from zsaa.models.packages import PACKAGED, convert, gguf_sha256
from zsaa.models.pretrained import KINDS, from_pretrained
from zsaa.models.quantize import never_repack, quantized, stored_as, stores_bits


def load_model(
    name="smollm2-135m",
    kind="causal-lm",
    num_labels=None,
    dtype=None,
    device="cpu",
    seed=0,
    quantization=None,
    **kwargs,
):
    """Load a model and its tokenizer, ready for the dial.

    name: a key of PACKAGED, a hub id, a folder (a saved model, or a PEFT adapter, whose base may be any of these),
        or a GGUF file, read into plain weights of `dtype`; a tokenizer that lies beside it goes before its own. A
        PACKAGED name wins over a folder of that name: write "./smollm2-135m" for the folder.
    kind: "causal-lm" or "sequence-classification". A causal checkpoint gets a fresh classification head, a
        normal draw (std: the config's initializer_range) from `seed`: the same bits in each run, whatever the
        state of torch's global generator, which is left as it was. A checkpoint that has a head keeps it.
    num_labels: None means what the checkpoint says, else 2.
    dtype: of the weights; None means float32, and for a quantized model on a GPU that has it bfloat16. float16 is
        never chosen: Gemma 3's hidden states exceed it, and LLaMA's come near.
    quantization: "nf4" (4 bits, as in the paper's section 4.3) or "int8" stores the decoder's linear layers so, by
        bitsandbytes; embeddings, norms and head keep `dtype`. 4-bit layers compute in `dtype` if that has 16 bits,
        else in the GPU's best 16 bits (float16 where it has no bfloat16), on a CPU in float32. A packaged model's
        weights were rounded to about 4 bits before, and are rounded once more.
        int8 layers compute columns that hold an outlier in 16 bits, for all tokens of a pass: which other tokens are
        alive shifts a token by up to half a rounding step per such column, as batch-mates do in the stock model.
    kwargs: go to from_pretrained (revision, token, cache_dir, attn_implementation, device_map, ...).

    Returns (model, tokenizer): the model in eval mode, a PeftModel for an adapter; the pad token is set on
    tokenizer, config and generation config; padding is on the right for classification and on the left for
    generation.
    Raises AssetError (missing, out of reach, damaged), ValueError or TypeError (bad arguments).
    """
    check_transformers()
    _check_request(kind, num_labels)
    where, name = where_is(name)
    if where == "local" and Path(name).suffix.lower() == ".gguf":
        name, kwargs = _folder_of_gguf(name, kwargs)
    if quantization is not None:
        dtype, kwargs = quantized(quantization, dtype, device, kwargs)
    elif where == "local" and stores_bits(name):  # or transformers puts it on a GPU where there is one
        kwargs = {"device_map": {"": device}, **kwargs}
    dtype = torch.float32 if dtype is None else dtype
    model, tokenizer = _read(where, name, kind, num_labels, dtype, device, seed, kwargs)
    _set_padding(model, tokenizer, kind)
    stored = stored_as(model)
    if quantization not in (None, stored):
        raise ValueError(f"{name} is stored as {stored}, and cannot become {quantization}: load it as it is")
    if stored is not None:  # bitsandbytes has placed its weights itself
        never_repack(model)
    # Where FSDP is to load the weights once, processes after the first get theirs from it, later.
    elif "device_map" not in kwargs and not any(p.is_meta for p in model.parameters()):
        model.to(device)
    return model.eval(), tokenizer


def _read(where, name, kind, num_labels, dtype, device, seed, kwargs):
    """(model, tokenizer) as they are stored, called by a name that finds them again."""
    if where == "local" and not kwargs.get("gguf_file") and is_adapter(name):
        base, labels, more = base_of(name, kind, num_labels)
        model, tokenizer = load_model(base, kind, labels, dtype, device, seed, **{**more, **kwargs})
        return put_on(model, name), tokenizer
    if where == "hub":
        model, tokenizer = from_hub(name, kind, num_labels, dtype, seed, kwargs)
    else:
        folder = convert(name) if where == "packaged" else Path(name).expanduser()
        model, tokenizer = from_pretrained(str(folder), kind, num_labels, dtype, seed, kwargs)
    if where in ("packaged", "hub"):
        # What is saved later (PEFT's base_model_name_or_path) must name the model, not a cache folder.
        model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    elif kwargs.get("gguf_file"):
        model.name_or_path = model.config._name_or_path = str(Path(name) / kwargs["gguf_file"])
    return model, tokenizer


def _check_request(kind, num_labels):
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}; it must be a whole number, 1 or more, or None")


def _folder_of_gguf(name, kwargs):
    """A GGUF file as transformers takes it: (its folder, arguments with the file's name)."""
    if kwargs.get("gguf_file"):
        raise ValueError(f"{name} is a GGUF file itself: leave out gguf_file={kwargs['gguf_file']!r}")
    file = Path(name).expanduser()
    return str(file.parent), {**kwargs, "gguf_file": file.name}


def _set_padding(model, tokenizer, kind):
    """A pad token for tokenizer and configs; padding behind texts to classify, before prompts."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right" if kind == "sequence-classification" else "left"
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def load_adapter(folder, kind="causal-lm", **kwargs):
    """load_model for a PEFT adapter folder; unlike load_model, it insists that the folder is one."""
    if not is_adapter(folder):
        raise AssetError(f"no PEFT adapter in {folder}: it has no adapter_config.json")
    return load_model(folder, kind, **kwargs)


def resolve(name):
    """Say what `name` is, for provenance; loads nothing and never asks the network.

    Returns a dict: kind ("packaged", "hub" or "local"), name, revision (one line that tells two versions
    apart; None for a hub model that was not fetched yet) and, for packaged models and folders, the sha256 of
    the weights. Adapters add base, a dict of the same kind. Raises AssetError for a package or folder that is
    not there.
    """
    where, name = where_is(name)
    if where == "packaged":
        sha = gguf_sha256(name)
        packages = dict.fromkeys(dist for dist, _ in PACKAGED[name].parts)
        versions = ", ".join(f"{dist} {importlib.metadata.version(dist)}" for dist in packages)
        return {"kind": where, "name": name, "revision": f"{versions}, sha256 {sha[:16]}", "sha256": sha}
    if where == "hub":
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")  # .../snapshots/<commit>/config.json
        return {
            "kind": where,
            "name": name,
            "revision": Path(config).parent.name if isinstance(config, str) else None,
        }
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    if folder.is_file():
        return {"kind": where, "name": name, "revision": f"sha256 {sha256(folder)[:16]}", "sha256": sha256(folder)}
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*config.json")
    for file in sorted(p for kind in kinds for p in folder.glob(kind) if not is_stray(p, folder)):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    found = {
        "kind": where,
        "name": name,
        "revision": f"sha256 {digest.hexdigest()[:16]}",
        "sha256": digest.hexdigest(),
    }
    if (folder / "adapter_config.json").is_file():
        found["base"] = resolve(adapter_config(folder)["base_model_name_or_path"])
    return found


def where_is(name):
    """("packaged" | "hub" | "local", name as a string)."""
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"a model's name is a string or a path, not {type(name).__name__}")
    text = os.fspath(name)
    if text in PACKAGED and isinstance(name, str):
        return "packaged", text
    path = Path(text).expanduser()
    if text and (path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf")):
        return "local", text
    if text and path.is_file():
        raise AssetError(f"{text} is a file and no model: give the folder that it lies in, or a GGUF file (.gguf)")
    if path.suffix.lower() == ".gguf":
        raise AssetError(
            f"there is no file {text}. Check the path; a model's GGUF file on the hub is named by gguf_file="
        )
    # A hub id is "name" or "owner/name"; what starts like a path, or has more parts, was meant as a folder.
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        return "hub", text
    raise AssetError(
        f"no model {text!r}: there is no such folder, and it is neither a packaged model "
        f"({', '.join(PACKAGED)}) nor a Hugging Face id (owner/name)"
    )
