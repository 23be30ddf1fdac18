"""Checkpoints of a training that is killed and started again: the newest one, and whether it is this training's."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zsaa.dials.settings import with_schedule
from zsaa.families import find_decoder
from zsaa.finetune.recipe import Recipe
from zsaa.measure import hash_of, write_json
from zsaa.measure.distributed import gather, place
from zsaa.rule import RULE

TRAINING_FILE = "training.json"  # beside the checkpoints: which training they are of
LORA_FIELDS = (("rank", "r"), ("alpha", "lora_alpha"))  # of a recipe, and what PEFT calls them


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`, as the first process sees it. A run killed while it saved leaves one
    without its state, which is written last: taken up, it would begin again at step 0 with trained weights."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / TRAINER_STATE_NAME).is_file()]
    newest = max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    newest, wrote = gather((newest, newest and len(list(newest.glob("rng_state*.pth")))))[0]
    if newest is None:
        return None
    processes = place()[1]
    if wrote != processes:
        raise ValueError(
            f"{newest} holds the state of {wrote} process(es), but {processes} resume it. Launch {wrote}, or pass "
            "resume=False to begin anew."
        )
    return str(newest)


def training_of(model: nn.Module, train_dataset, recipe: Recipe) -> dict:
    """What a training is, for telling whose checkpoints lie in a folder: recipe, data and model. Of the weights it
    looks at the embeddings alone: a new head may be another one each time, and the checkpoint brings its own."""
    decoder = find_decoder(model)[0]
    config, weights = decoder.config, decoder.get_input_embeddings().weight
    name = Path(getattr(config, "_name_or_path", None) or "").name  # folders may move
    shape = {"family": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size}
    # Without a name it was made on the spot, and may have other random weights when a killed run is started again.
    start_of = hash_of(weights[:64].detach().float().cpu().tolist()) if name else None
    shape["bits"] = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    digest = hashlib.sha256()
    for row in train_dataset if hasattr(train_dataset, "__len__") else ():  # a stream is not read twice
        columns = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()}
        digest.update(f"{sorted(columns.items())}\n".encode("utf-8", "surrogatepass"))
    return {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "data": digest.hexdigest(),
        "model": {"name": name, **shape, "embeddings": start_of},
    }


def differences(checkpoint: Path, training: dict) -> list[str]:
    """In what `checkpoint` is of another training than `training`, in words; nothing if it can go on from there."""
    note, recipe = checkpoint.parent / TRAINING_FILE, training["recipe"]
    if note.is_file():
        there = json.loads(note.read_text(encoding="utf-8"))
        defaults = json.loads(json.dumps(asdict(Recipe())))  # of fields that are newer than the checkpoint
        pairs = [(f"recipe: {k}", {**defaults, **there["recipe"]}.get(k), v) for k, v in recipe.items()]
        pairs += [(f"model: {k}", there["model"].get(k), v) for k, v in training["model"].items()]
        pairs += [("data", there["data"][:8], training["data"][:8])]
    else:  # earlier versions left no note, but the checkpoint itself tells this much
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        pairs = [("recipe: batch_size", state.get("train_batch_size"), recipe["batch_size"])]
        if recipe["max_steps"] > 0:
            pairs += [("recipe: max_steps", state.get("max_steps"), recipe["max_steps"])]
        else:
            pairs += [("recipe: epochs, rounded up", state.get("num_train_epochs"), math.ceil(recipe["epochs"]))]
        adapter, config = checkpoint / "adapter_config.json", checkpoint / "config.json"
        if adapter.is_file() and recipe["tuning"] == "lora":
            noted = json.loads(adapter.read_text(encoding="utf-8"))
            pairs += [(f"recipe: lora_{k}", noted.get(name), recipe[f"lora_{k}"]) for k, name in LORA_FIELDS]
        elif config.is_file():
            noted = json.loads(config.read_text(encoding="utf-8"))
            rule = with_schedule(noted["zsaa"]) if "zsaa" in noted else {}
            pairs += [(f"recipe: {k}", v, recipe[k]) for k, v in rule.items() if k in RULE]
            pairs += [("model: family", noted.get("model_type"), training["model"]["family"])]
    return [f"{name} {there!r} there, {here!r} here" for name, there, here in pairs if there != here]


def note(folder: Path, training: dict, keep: bool) -> None:
    """Write down whose checkpoints `folder` will hold. keep=False: the training begins anew, and what others left there
    goes, lest it be taken for this one's."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / TRAINING_FILE, training)


def refuse_another(checkpoint: str | None, training: dict) -> None:
    """ValueError, in all processes, if `checkpoint` is of another training."""
    wrong = gather(differences(Path(checkpoint), training) if checkpoint and place()[0] == 0 else None)[0]
    if wrong:
        raise ValueError(
            f"{checkpoint} is of another training ({'; '.join(wrong)}). Give this one a folder of its own, remove "
            f"{Path(checkpoint).parent}, or pass resume=False, which begins anew."
        )
