"""Model and tokenizer by transformers, from a folder or a hub id, with errors that say what to do."""

import contextlib
import os
import pickle
import warnings
from pathlib import Path

import torch
import transformers

from zsaa.models.errors import AssetError, DamagedError, first_line, refetch
from zsaa.models.integrity import check_gguf, check_safetensors, gguf_errors

KINDS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}
HEADS = ("score", "classifier")  # what transformers calls the head of a decoder's *ForSequenceClassification


def from_pretrained(source, kind, num_labels, dtype, seed, kwargs):
    """(model, tokenizer) from a folder or hub id; a missing head is drawn from `seed`."""
    classify = kind == "sequence-classification"
    extra = {"num_labels": num_labels} if classify and num_labels is not None else {}
    both = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "force_download")
    shared = {k: v for k, v in kwargs.items() if k in both}
    folder = Path(source) if os.path.isdir(source) else None
    gguf = kwargs.get("gguf_file")
    if gguf:
        kwargs = {**dequantized(), **kwargs}
        if folder:
            check_gguf(folder, gguf)
    elif folder:
        check_safetensors(folder)
    auto = getattr(transformers, KINDS[kind])
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with _said_clearly(source, extra):
        # transformers draws missing weights from the global generator; fork_rng puts its state back.
        with torch.random.fork_rng(devices=cuda), quiet(), gguf_errors(gguf and (folder or Path(source)) / gguf):
            model, info = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **extra, **kwargs)
        tokenizer = _tokenizer(source, gguf, shared)
    heads = [k for k in info["missing_keys"] if classify and k.split(".")[0] in HEADS]
    if lost := sorted(set(info["missing_keys"]) - set(heads)):
        raise AssetError(
            f"{source} lacks {len(lost)} weights that {type(model).__name__} needs, {lost[0]} for one. If "
            "it is a classifier, load it with kind='sequence-classification'; else fetch or save it again."
        )
    _draw(model, heads, seed)
    return model, tokenizer


@contextlib.contextmanager
def _said_clearly(source, given):
    """What transformers raises for weights that it cannot read becomes an AssetError; of a hub id all else passes:
    hub.py knows what to make of it. given: the number of labels that was asked for, if it was."""
    from safetensors import SafetensorError

    folder = os.path.isdir(source)
    again = "Save or copy the folder again." if folder else refetch(source)
    try:
        yield
    except SafetensorError as error:
        raise DamagedError(f"the weights of {source} are damaged ({error}). {again}") from error
    except (OSError, ValueError) as error:
        if not folder:
            raise
        raise AssetError(f"no model could be loaded from the folder {source}: {error}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if not isinstance(error, RuntimeError) or "PytorchStreamReader" in str(error):
            raise DamagedError(f"the weights of {source} are damaged ({first_line(error)}). {again}") from error
        if "mismatched_sizes" not in str(error):
            raise
        also = f", or for num_labels={given['num_labels']}" if given else ""
        raise AssetError(
            f"the weights of {source} have other sizes than its configuration says{also}. Save or copy both again"
            + (", or leave out num_labels." if given else ".")
        ) from error


@torch.no_grad()
def _draw(model, heads, seed):
    """Fresh classification heads, by the names of their parameters: the same bits on every device."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", 0.02)
    for key in sorted(heads):
        head = model.get_parameter(key)
        draw = torch.randn(head.shape, generator=generator) * std  # in float32, on the CPU
        head.copy_(draw if head.dim() > 1 else torch.zeros_like(draw))  # biases start at 0


def _tokenizer(source, gguf, shared):
    """The tokenizer of a folder or hub id; where there is none, that in its GGUF file, if that is named."""
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
            f"{gguf} holds no tokenizer that transformers can read ({first_line(error)}), and there is none beside it. "
            f"Put tokenizer.json and tokenizer_config.json of the original model into {source}"
        ) from error


def dequantized():
    """What makes transformers read a GGUF file into plain weights; older versions do so unasked."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


@contextlib.contextmanager
def quiet():
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
