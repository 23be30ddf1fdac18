"""PEFT adapters: which base model they are for, and the adapter put on it."""

import json
import re
from pathlib import Path

from zsaa.models.errors import AssetError, DamagedError
from zsaa.models.integrity import check_safetensors
from zsaa.models.pretrained import HEADS


def is_adapter(folder):
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder).expanduser() / "adapter_config.json").is_file()


def adapter_config(folder):
    """What is in adapter_config.json, its base_model_name_or_path for certain."""
    file = Path(folder).expanduser() / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] + ""
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{file} is damaged, or names no base_model_name_or_path ({error}). Save or copy the adapter again."
        ) from error


def base_of(folder, kind, num_labels):
    """(name of the base model, number of labels, arguments for loading it) for the adapter in `folder`."""
    from safetensors import safe_open

    folder = Path(folder).expanduser()
    config = adapter_config(folder)
    for_kind = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}.get(config.get("task_type"), kind)
    if for_kind != kind:
        raise ValueError(f"the adapter {folder} is for kind={for_kind!r}, not {kind!r}")
    check_safetensors(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and not (folder / "adapter_model.bin").is_file():
        raise AssetError(f"the adapter {folder} has no adapter_model.safetensors. Save or copy it again.")
    if num_labels is None and kind == "sequence-classification" and weights.is_file():
        with safe_open(weights, framework="pt") as file:  # the trained head tells its number of labels
            shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        heads = [s for k, s in shapes.items() if any(f".{head}." in k for head in HEADS) and k.endswith(".weight")]
        num_labels = heads[0][0] if heads else None
    revision = {"revision": config["revision"]} if config.get("revision") else {}
    return config["base_model_name_or_path"], num_labels, revision


def put_on(base, folder):
    """`base` with the adapter in `folder` on it, a PeftModel."""
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = Path(folder).expanduser()
    _check_layers(base, folder)
    try:
        return PeftModel.from_pretrained(base, str(folder))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        named = adapter_config(folder)["base_model_name_or_path"]
        raise AssetError(f"the adapter {folder} does not fit its base {named}, or is damaged: {error}") from error


def _check_layers(base, folder):
    """AssetError for an adapter that names a layer which `base` lacks: PEFT would leave that part out without a word,
    and put the rest on by number."""
    from safetensors import safe_open

    weights, layers = folder / "adapter_model.safetensors", getattr(base.config, "num_hidden_layers", None)
    if layers is None or not weights.is_file():
        return
    with safe_open(weights, framework="pt") as file:
        named = [int(n) for key in file.keys() for n in re.findall(r"\.(?:layers|h)\.(\d+)\.", key)]  # noqa: SIM118
    if named and max(named) >= layers:
        raise AssetError(
            f"the adapter {folder} is for layer {max(named)}, too, and its base has layers 0 to {layers - 1}: put it "
            "on the model that it was trained on, and remove layers after merge_and_unload."
        )
