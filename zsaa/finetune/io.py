"""A fine-tuned model (or adapter) as a folder, with the dial's settings and a learned score."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import nn

import zsaa
from zsaa.dial import settings, trained_for
from zsaa.dials.settings import with_schedule
from zsaa.families import find_decoder
from zsaa.learned import asked, salience
from zsaa.rule import RULE

SETTINGS_FILE = "zsaa.json"


def save(model: nn.Module, tokenizer, folder: str | Path, weights: dict | None = None) -> None:
    """Write model (or adapter), tokenizer and the dial's settings to `folder`, all at once: a crash or a full disk
    leaves what was there before. weights: the state dict, where the model holds only a shard of it. The settings lie in
    the model's config.json; an adapter has none, and gets zsaa.json. A learned score gets a file of its own."""
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        if hasattr(model, "peft_config"):
            (draft / SETTINGS_FILE).write_text(json.dumps(settings(model), indent=2) + "\n")
        for scorer in salience.scorers_of(model):
            salience.save(scorer, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save the model to {folder}: {error.strerror}. Free some space, or choose another folder.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: str | Path, **kwargs) -> tuple[nn.Module, object]:
    """A model (or adapter, on its base model) saved by `save`, with its tokenizer and the dial ready at alpha = 1, all
    layers running.

    The dial knows the ranges of alpha and depth that the model was trained for, and warns once when it is turned beyond
    them.
    Keyword arguments go to `zsaa.models.load_model`.
    """
    from zsaa.models import load_model

    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: this reads what fine_tune or save wrote. For any other model, call "
            "zsaa.models.load_model, then zsaa.enable."
        )
    adapter, config = Path(folder) / SETTINGS_FILE, Path(folder) / "config.json"
    saved = json.loads(adapter.read_text()) if adapter.is_file() else None
    if saved is None and config.is_file():
        saved = json.loads(config.read_text()).get("zsaa")
    if saved is None:
        raise FileNotFoundError(
            f"{folder} holds neither {SETTINGS_FILE} (an adapter) nor a config.json with zsaa's settings: it was not "
            "saved with the dial on. Load it with load_model and call zsaa.enable."
        )
    saved = with_schedule(saved)  # before the weights are loaded, which can take minutes
    model, tokenizer = load_model(str(folder), **kwargs)
    for learned in (salience, asked):
        if (Path(folder) / learned.FILE).is_file():
            salience.attach(model, learned.read(find_decoder(model)[0].config, folder))
    layers = find_decoder(model)[0].config.num_hidden_layers
    zsaa.enable(model, alpha=1.0, depth=layers, **{name: saved[name] for name in RULE})
    zsaa.set_depth(model, None)
    trained_for(model, saved["alpha_range"], saved.get("depth_range"))
    return model, tokenizer
