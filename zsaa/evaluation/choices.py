"""Multiple choice along the dial (the paper's Table 3): the questions, who reads them, and what it learns from them.

Prompts, shots and scoring are lm-evaluation-harness's own for MMLU, by `evaluation.harness`: a question is pruned at
prefill, and its last token, always kept, predicts the answer. A data set is "hub", the hub's cais/mmlu, or a folder in
its layout. To learn, one letter is to be predicted.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lm_eval
import torch.nn.functional as F
import yaml
from lm_eval.tasks import TaskManager, get_task_dict
from torch import nn

import zsaa
from zsaa.data import choice, folders
from zsaa.data.batching import own_seeds
from zsaa.dial import rule
from zsaa.evaluation.accuracy import tally
from zsaa.evaluation.controls import applied, check_targets, cut, plan
from zsaa.evaluation.harness import ZsaaLM
from zsaa.families import find_decoder
from zsaa.kit.files import is_stray
from zsaa.models import AssetError, check_hub
from zsaa.score import seeded

HUB = "cais/mmlu"
# "alpha": solved by Eq. 2 for the reduction; "printed": the alpha that the paper prints beside it, whatever it gives.
CONTROLS = ("alpha", "printed", "last", "random")
FORMATS = ("letters", "text")  # lm-eval's two: the likelihood of A to D, or of the answers' own words
FORMS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json")  # formats that hold a list of choices
TEMPLATES = Path(lm_eval.__file__).parent / "tasks" / "mmlu"


def _split(source: Path, subject: str, split: str) -> list[str]:
    """Files of a split: SUBJECT/SPLIT-*.parquet (or json) as on the hub, SUBJECT/SPLIT/data-*.arrow in the package."""
    return [str(path) for path in folders.find(source / subject, split, formats=FORMS)]


def _read(files: Sequence[str]) -> dict:
    """What `datasets.load_dataset` takes to read such files: it would read a [ in their names as a pattern."""
    kind = {".parquet": "parquet", ".arrow": "arrow"}.get(Path(files[0]).suffix, "json")
    return {"path": kind, "data_files": [glob.escape(file) for file in files]}


def _files(source: Path, subject: str) -> dict:
    """{"dev": paths, "test": paths} of one subject."""
    found = {split: _split(source, subject, split) for split in ("dev", "test")}
    if not all(found.values()):
        missing = next(split for split, paths in found.items() if not paths)
        raise AssetError(
            f"no {missing} questions in {source / subject}: an MMLU folder holds SUBJECT/dev* and SUBJECT/test* (json, "
            f"jsonl or parquet), as made by: hf download {HUB} --repo-type dataset --local-dir FOLDER"
        )
    return found


def _check_questions(files: Sequence[str]) -> None:
    """AssetError unless each row is a question with four choices and the number of the right one."""
    columns = ("question", "choices", "answer")
    table = folders.read(map(Path, files), columns)
    if absent := [column for column in columns if column not in table.columns]:
        raise AssetError(
            f"{files[0]} has no column {absent[0]!r}; it has {', '.join(table.found)}. Rename its columns."
        )
    if (names := table.names.get("answer", list("ABCD"))) != list("ABCD"):
        raise AssetError(
            f"{files[0]} calls its answers {', '.join(map(str, names))}: they must be A, B, C and D, in order."
        )
    for row, (question, choices, answer) in enumerate(zip(*(table.columns[column] for column in columns)), start=1):
        texts = [question, *choices] if isinstance(choices, list) else []
        if len(texts) != 5 or not all(isinstance(text, str) for text in texts):
            raise AssetError(f"row {row} of {files[0]} is no question with four choices, all of them texts. Mend it.")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer <= 3:
            raise AssetError(
                f"row {row} of {files[0]} has the answer {answer!r}; answers are 0 to 3, for A to D. Mend it."
            )


def subjects_of(source: str | Path) -> list[str]:
    if source == "hub":
        return sorted(p.stem.removeprefix("mmlu_") for p in (TEMPLATES / "default").glob("mmlu_*.yaml"))
    inside = [p for p in Path(source).glob("*/") if p.is_dir() and not is_stray(p, Path(source))]
    return sorted(p.name for p in inside if p.name != "all" and _split(Path(source), p.name, "dev"))


def tasks(source: str | Path, form: str = "letters", shots: int = 5, subjects: Sequence[str] | None = None) -> dict:
    """lm-eval's task object of each subject, by name.

    source: "hub", or a folder in its layout. form: one of FORMATS. shots: solved questions before each one, from the
    subject's dev split. subjects: which ones; None takes all.
    """
    if form not in FORMATS:
        raise ValueError(f"the form must be one of {', '.join(FORMATS)}, got {form!r}.")
    if isinstance(shots, bool) or not isinstance(shots, int) or not 0 <= shots <= 5:
        raise ValueError(f"shots must be a whole number from 0 to 5, the rows of MMLU's dev splits, got {shots!r}.")
    known = subjects_of(source)
    if not known:
        raise AssetError(f"no subject in {source}: an MMLU folder holds SUBJECT/dev* and SUBJECT/test*.")
    chosen = list(known if subjects is None else subjects)
    if unknown := sorted({*chosen} - {*known}):
        raise ValueError(f"unknown subject {unknown[0]!r}; these are known: {', '.join(known)}")
    template = {"letters": "default/_default_template_yaml", "text": "continuation/_continuation_template_yaml"}[form]
    names = []
    with tempfile.TemporaryDirectory() as folder:
        for subject in chosen:
            about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            task = {
                "include": str(TEMPLATES / template),
                "task": f"mmlu_{subject}",
                "description": about if form == "letters" else "",
                "num_fewshot": shots,
            }
            if source == "hub":
                task["dataset_name"] = subject
            else:
                files = _files(Path(source), subject)
                for paths in files.values():
                    _check_questions(paths)
                read = {split: _read(paths) for split, paths in files.items()}
                if len({how["path"] for how in read.values()}) > 1:
                    raise AssetError(f"dev and test of {Path(source) / subject} are of different formats: use one.")
                named = {split: how["data_files"] for split, how in read.items()}
                task |= {"dataset_path": read["test"]["path"], "dataset_kwargs": {"data_files": named}}
            if form == "text" and subject == choice.SUBJECT:
                task["doc_to_text"] = "{{passage}}"  # the answers continue it
            (Path(folder) / f"{subject}.yaml").write_text(yaml.safe_dump(task))
            names.append(task["task"])
        if source == "hub" and not _cached():
            check_hub(HUB, "dataset")
        manager = TaskManager(include_path=folder, include_defaults=False)
        # lm-eval 0.4.13 has load, and warns of the older way, which turns the order round.
        made = manager.load(names)["tasks"] if hasattr(manager, "load") else get_task_dict(names, manager)
        return {name: made[name] for name in names}


def _cached() -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / HUB.replace("/", "___")).is_dir()


class Reader(ZsaaLM):
    """ZsaaLM whose contexts are cut as a row of `evaluation.controls.plan` says; `lengths` are those it last read."""

    row: dict | None = None
    lengths: Sequence[int] = ()

    def _loglikelihood_tokens(self, requests, **kwargs):
        if self.row and self.row["keep_tokens"]:
            k, side, bos = self.row["keep_tokens"], self.row["control"], self.tokenizer.bos_token_id
            requests = [(key, cut(context, k, side, bos), answer) for key, context, answer in requests]
        contexts = dict.fromkeys((tuple(context), len(answer)) for _, context, answer in requests)
        room = self.max_length + 1
        longest = {context: min(len(context), room - n) for context, n in contexts}
        self.lengths = list(longest.values())
        return super()._loglikelihood_tokens(requests, **kwargs)

    def _continue(self, contexts, *arguments):
        # A seed of a question's own, for the score "random", as in zsaa.evaluation.accuracy.predict.
        with seeded(own_seeds(contexts)):
            return list(super()._continue(contexts, *arguments))


def right(reader: Reader, questions: dict, limit: int | None = None) -> tuple[list[int], str]:
    """For each question in order, subject by subject, 1 if the likeliest answer is the right one, else 0; and a sha256
    over the prompts and answers."""
    done = lm_eval.evaluate(reader, questions, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = [s for name in questions for s in sorted(done["samples"][name], key=lambda s: s["doc_id"])]
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample["arguments"], sample["target"]]).encode())
    return [int(sample["acc"]) for sample in samples], digest.hexdigest()


def curve(
    reader: Reader,
    questions: dict,
    targets: Sequence[float],
    controls: Sequence[str] = CONTROLS,
    limit: int | None = None,
    printed: dict[float, float] | None = None,
) -> tuple[list[dict], str]:
    """Score (percent) at each target, as rows of `zsaa.evaluation.accuracy.curve`, and the sha256 of `right`.

    MAC reductions are those of the prefills, summed over the questions. A target out of reach is left out.
    printed: the alpha of each target for the control of that name.
    """
    first, digest = right(reader, questions, limit)
    lengths = list(reader.lengths)
    rows = _settings(reader.model, lengths, targets, controls, printed or {})
    for row in rows:
        reader.row = row
        if row["alpha"] == 1.0:
            bits = first
        else:
            with applied(reader.model, row):
                bits, _ = right(reader, questions, limit)
        reader.row = None
        row["mac_reduction"] = round(row["mac_reduction"], 4)
        row.update(tally(bits))
        print(f"{row['control']:>8} {row['target']:>4}x  {row['accuracy']:.1f}% of {row['n']}", flush=True)
    reader.lengths = lengths
    return rows, digest


def _settings(model: nn.Module, lengths: Sequence[int], targets, controls, printed: dict[float, float]) -> list[dict]:
    """The plan's rows, and those at printed alphas, whatever these give."""
    config, chosen = find_decoder(model)[0].config, rule(model)
    solved = [control for control in controls if control != "printed"]
    rows = plan(model, lengths, targets, solved)
    for target in [t for t in targets if "printed" in controls and t > 1 and t in printed]:
        reached = zsaa.mac_reduction(config, lengths, printed[target], **chosen)
        row = {"control": "printed", "target": target, "alpha": printed[target], "keep_tokens": None}
        rows.append({**row, "mac_reduction": reached})
    if not rows:
        if solved:
            check_targets(config, lengths, targets, solved, **chosen)
        raise ValueError(
            f"the controls {list(controls)} leave no row: printed are the targets {sorted(printed)} alone."
        )
    return rows


def training_rows(source: str | Path, count: int | None, seed: int = 0):
    """`count` questions (None: all) of auxiliary_train, drawn by `seed`: on the hub, or in a folder's
    all/auxiliary_train*. Of the package, which has none, questions of its validation splits."""
    import datasets

    if source == "hub":
        if not _cached():
            check_hub(HUB, "dataset")
        rows = datasets.load_dataset(HUB, "all", split="auxiliary_train")
    else:
        files = _split(Path(source), "all", "auxiliary_train")
        files = files or sorted(map(str, Path(source).glob("*/validation/data-*.arrow")))
        if not files:
            raise AssetError(f"no questions to train on in {source}: all/auxiliary_train* is missing.")
        _check_questions(files)
        rows = datasets.load_dataset(**_read(files), split="train")
    count = len(rows) if count is None else count
    if count > len(rows):
        raise ValueError(f"{count} questions to train on were asked for, but there are {len(rows)}.")
    return rows.shuffle(seed=seed).select(range(count))


def encode(rows, tokenizer, max_length: int = 512):
    """A datasets.Dataset of input_ids, attention_mask and labels: each question in MMLU's format, without shots, and
    its letter as the label of the last token, the one that predicts it. Longer questions lose their beginning."""
    from datasets import Dataset

    letters = [tokenizer(f"{letter}", add_special_tokens=False).input_ids for letter in "ABCD"]
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"]))
        prompt = f"{row['question'].strip()}\n{listed}Answer:"
        ids = tokenizer(prompt).input_ids
        letter = "ABCD"[row["answer"]]
        whole = tokenizer(f"{prompt} {letter}").input_ids
        if len(whole) != len(ids) + 1 or whole[: len(ids)] != ids:
            raise ValueError(f"the answer {letter!r} is not one token of its own for this tokenizer: {letters}.")
        ids = cut(ids, max_length, "last", tokenizer.bos_token_id)
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * len(ids))
        columns["labels"].append([-100] * (len(ids) - 1) + [whole[-1]])
    return Dataset.from_dict(columns)


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """In this block, the loss of the language model `model` is that of the last token's prediction, whose label stands
    at its own place, as `encode` puts it, and logits are computed there only. The ordinary loss shifts labels by one:
    the answer would have to be fed, and would be the token that is always kept, in place of the one that predicts it.
    Samples must be padded on the left."""

    def loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        target = labels[:, -1].to(logits.device)
        total = F.cross_entropy(logits[:, -1].float(), target, reduction="sum")
        return total / (len(target) if num_items_in_batch is None else num_items_in_batch)

    def last(module, args, kwargs):
        return args, {**kwargs, "logits_to_keep": 1}

    before = model.loss_function
    model.loss_function = loss
    hook = model.register_forward_pre_hook(last, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.loss_function = before


def fingerprint(source: str | Path) -> str:
    """What the questions are: the hub's name, or a sha256 of a folder's files, but for what editors leave there."""
    if source == "hub":
        return HUB
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(source).rglob("*") if p.is_file() and not is_stray(p, Path(source))):
        digest.update(f"{path.relative_to(source)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
