"""A model made small enough to travel to a machine without a network: for the texts of one task, and a little rougher.

python -m ablation.carried pack gemma3-270m imdb_films gemma.bin
python -m ablation.carried unpack gemma.bin FOLDER

Packed are only the tokens that the task's texts use at least --often times, and those out of which the tokenizer builds
them. Texts without a rarer token are cut as by the whole tokenizer, with other numbers for the tokens; a rarer token is
cut into smaller ones. Matrices are rounded to a step of so many standard deviations of each row (STEP, and COARSE for
the embeddings), 3.8 and 3.1 bits a weight; vectors stay as they are, in float16. The folder is a plain model for
zsaa.models.load_model. What rounding costs is in the file: nats a token on reviews, before and after.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zsaa.models import load_model

STEP, COARSE = 0.31, 0.5  # of a row's standard deviation
HEAD = struct.Struct("<QQ")  # bytes of the facts, and of the weights as they are packed


def vocabulary(tokenizer: dict, used: Iterable[int]) -> list[int]:
    """The tokens that a BPE tokenizer needs for texts that use these: themselves, all from which merges build them, its
    bytes and its special ones. tokenizer: its tokenizer.json."""
    numbers, made = tokenizer["model"]["vocab"], {}
    for left, right in tokenizer["model"]["merges"]:
        made.setdefault(left + right, []).append((left, right))
    words = {number: word for word, number in numbers.items()}
    waiting = [words[number] for number in used]
    waiting += [added["content"] for added in tokenizer["added_tokens"] if added["special"]]
    waiting += [word for word in numbers if len(word) == 6 and word.startswith("<0x")]
    needed: set[str] = set()
    while waiting:
        word = waiting.pop()
        if word not in needed:
            needed.add(word)
            waiting += [part for pair in made.get(word, ()) for part in pair]
    return sorted(numbers[word] for word in needed)


def fewer_tokens(tokenizer: dict, kept: list[int]) -> dict:
    """The tokenizer.json of the tokens `kept`, numbered in their order."""
    order = {number: new for new, number in enumerate(kept)}
    vocab = {word: order[number] for word, number in tokenizer["model"]["vocab"].items() if number in order}
    merges = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) in vocab]
    added = [{**one, "id": order[one["id"]]} for one in tokenizer["added_tokens"] if one["id"] in order]
    found = {**tokenizer, "added_tokens": added, "model": {**tokenizer["model"], "vocab": vocab, "merges": merges}}
    special = (found.get("post_processor") or {}).get("special_tokens", {})
    for one in special.values():
        one["ids"] = [order[number] for number in one["ids"]]
    return found


def rounded(matrix: Tensor, step: float) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, columns] and each row's step, float16."""
    steps = (step * matrix.float().std(1)).clamp(min=1e-8).half()
    return (matrix.float() / steps[:, None].float()).round().clamp(-127, 127).to(torch.int8).numpy(), steps.numpy()


def restored(whole: np.ndarray, steps: np.ndarray) -> Tensor:
    return torch.from_numpy(whole.astype(np.float32) * steps.astype(np.float32)[:, None])


def shortened(tokenizer, texts: list[str], often: int) -> tuple[dict, list[int], list[int]]:
    """(tokenizer.json of fewer tokens, the old numbers of these in order, old numbers of those that the texts use)"""
    import tokenizers

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    counted = Counter(number for ids in tokenizer(texts).input_ids for number in ids)
    kept = vocabulary(spec, [number for number, times in counted.items() if times >= often])
    small = fewer_tokens(spec, kept)
    again = tokenizers.Tokenizer.from_str(json.dumps(small)).encode_batch(texts)
    return small, kept, sorted({kept[number] for found in again for number in found.ids})


def pack(name: str, texts: list[str], path: Path, often: int = 1) -> dict:
    """Writes the file; the facts that it begins with."""
    model, tokenizer = load_model(name)
    small, kept, used = shortened(tokenizer, texts, often)
    tensors, blobs, place = [], [], {number: new for new, number in enumerate(kept)}
    before = nats(model, tokenizer, texts[:4])
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            embedding = weight.shape[:1] == (model.config.vocab_size,)
            if weight.dim() == 2:
                blob, steps = rounded(weight[used], COARSE) if embedding else rounded(weight, STEP)
                new = restored(blob, steps).to(weight)
                weight[used if embedding else slice(None)] = new
                blobs += [steps.tobytes(), blob.tobytes()]
            else:
                blobs.append(weight.half().numpy().tobytes())
            tensors.append([key, list(weight[used].shape if embedding else weight.shape), embedding])
    config = {**model.config.to_dict(), "vocab_size": len(kept)}
    config |= {k: place[v] for k, v in config.items() if k.endswith("_token_id") and v in place}
    facts = {
        "from": name, "often": often, "step": STEP, "coarse": COARSE, "tokens": len(kept), "tokens_used": len(used),
        "config": config,
        "nats_before": before, "nats_after": nats(model, tokenizer, texts[:4]),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        "used": [place[number] for number in used], "tensors": tensors, "tokenizer": small,
    }  # fmt: skip
    told = lzma.compress(json.dumps(facts).encode())
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)  # noise repeats nothing
    packed = coder.compress(b"".join(blobs)) + coder.flush()
    path.write_bytes(HEAD.pack(len(told), len(packed)) + told + packed)
    return facts


@torch.no_grad()
def nats(model, tokenizer, texts: list[str]) -> float:
    """The mean loss of a token in the first 128 of each text."""
    rows = [tokenizer(text, return_tensors="pt").input_ids[:, :128] for text in texts]
    return round(sum(model(ids, labels=ids).loss.item() for ids in rows) / len(rows), 4)


def unpack(path: Path, folder: Path) -> Path:
    """The model's folder, as transformers saves one."""
    import transformers
    from safetensors.torch import save_file

    file = path.read_bytes()
    told, packed = HEAD.unpack_from(file)
    facts = json.loads(lzma.decompress(file[HEAD.size : HEAD.size + told]))
    whole, at, weights = zlib.decompress(file[HEAD.size + told : HEAD.size + told + packed], -15), 0, {}

    def take(count: int, kind: type) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(whole, kind, count, at)
        at += found.nbytes
        return found

    for key, shape, embedding in facts["tensors"]:
        if len(shape) == 1:
            weights[key] = torch.from_numpy(take(shape[0], np.float16).astype(np.float32))
            continue
        steps = take(shape[0], np.float16)
        weights[key] = restored(take(math.prod(shape), np.int8).reshape(shape), steps)
        if embedding:
            all_rows = torch.zeros(facts["tokens"], shape[1])
            all_rows[facts["used"]] = weights[key]
            weights[key] = all_rows
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in facts["config"].items() if k not in ("transformers_version", "_name_or_path")}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(facts["tokenizer"]), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **facts["special"], clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    told = {
        key: facts[key]
        for key in ("from", "often", "step", "coarse", "tokens", "tokens_used", "nats_before", "nats_after")
    }
    (folder / "carried.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return folder


def texts_of(task: str) -> list[str]:
    """All texts of a task that is cut by films."""
    from ablation import films, run

    if "films" not in run.load_config()["tasks"][task]:
        raise ValueError(f"{task} is not cut by films; only such tasks' texts are carried.")
    return [text for part in films.PARTS for text in films.side(part)[0]["text"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.carried", description=__doc__.split("\n")[0])
    ways = parser.add_subparsers(dest="way", required=True)
    packing, unpacking = ways.add_parser("pack"), ways.add_parser("unpack")
    packing.add_argument("model")
    packing.add_argument("task")
    packing.add_argument("file", type=Path)
    packing.add_argument("--often", type=int, default=1, help="leave out tokens that the texts use fewer times")
    unpacking.add_argument("file", type=Path)
    unpacking.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.way == "unpack":
        print(unpack(options.file, options.folder))
        return 0
    facts = pack(options.model, texts_of(options.task), options.file, options.often)
    told = ("from", "tokens", "tokens_used", "nats_before", "nats_after")
    print({key: facts[key] for key in told}, f"{options.file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
