"""What several processes must get right. tests/test_distributed.py starts it on the CPU; on GPUs it runs by itself:

    torchrun --nproc-per-node 2 tests/distributed_worker.py --device cuda --speed 60 512 16 --out distributed.json

Each case is trained by all processes together, and beforehand by the first one alone with that many times the batch:
both must see the same samples at the same alpha in each step, and end with the same weights (float64).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file

import zsaa
from zsaa import finetune
from zsaa.dial import captured, settings
from zsaa.evaluation import accuracy as evaluate
from zsaa.families import find_decoder
from zsaa.finetune import AlphaSampler, Recipe, fine_tune
from zsaa.measure import distributed, provenance

BATCH = 4
COMMON = dict(batch_size=BATCH, max_steps=6, learning_rate=1e-3, dropout=0.0, precision="fp32")
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
CLASSES, WORDS = "sequence-classification", "causal-lm"
TASKS = {  # model, head, recipe: what is learnt, whoever learns it
    "classifier": ("llama", CLASSES, {}),
    "adapter": ("llama", CLASSES, {"tuning": "lora"}),
    "language model": ("gpt2", WORDS, {"alpha_range": (0.3, 1.0)}),
    "SmolLM2's shape": ("smollm2", CLASSES, {"max_steps": 3, "learning_rate": 1e-4}),
}


@dataclass(frozen=True)
class Case:
    task: str
    strategy: str = "ddp"  # or "fsdp2"; torch's FSDP 1 clips gradients in float32 only
    recipe: dict = field(default_factory=dict)
    interrupted: bool = False
    environment: dict = field(default_factory=dict)  # as `accelerate launch` would set it


HALVES = {"batch_size": BATCH // 2, "gradient_accumulation": 2}
WHOLE, RECOMPUTE = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
BROADCAST = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # only the first process has the weights to begin with
CASES = {
    "ddp": Case("classifier"),
    "ddp, accumulated": Case("classifier", recipe=HALVES),
    "ddp, interrupted": Case("classifier", interrupted=True),
    "ddp, recomputing": Case("classifier", recipe={"gradient_checkpointing": True}),
    "ddp, LoRA": Case("adapter"),
    "ddp, language model": Case("language model"),
    "fsdp2": Case("classifier", "fsdp2"),
    "fsdp2, accumulated": Case("classifier", "fsdp2", HALVES),
    "fsdp2, interrupted": Case("classifier", "fsdp2", interrupted=True),
    "fsdp2, interrupted, whole checkpoints": Case("classifier", "fsdp2", interrupted=True, environment=WHOLE),
    "fsdp2, recomputing": Case("classifier", "fsdp2", {"gradient_checkpointing": True}),
    "fsdp2, FSDP recomputing": Case("classifier", "fsdp2", environment=RECOMPUTE),
    "fsdp2, broadcast": Case("classifier", "fsdp2", environment=BROADCAST),
    "fsdp2, LoRA": Case("adapter", "fsdp2"),
    "fsdp2, language model": Case("language model", "fsdp2"),
    "ddp, SmolLM2's shape": Case("SmolLM2's shape"),
    "fsdp2, SmolLM2's shape": Case("SmolLM2's shape", "fsdp2"),
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_")


class Killed(Exception):
    pass


def build(task: str, device: str, dtype=torch.float64):
    family, head, _ = TASKS[task]
    if family in tiny.CONFIGS:
        return tiny.make(family, head, dtype=dtype).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.HEADS[head].from_config(transformers.LlamaConfig(**SMOLLM2), dtype=dtype).to(device)


def samples(task: str, count: int, seed: int, lengths: tuple[int, int] | None = None) -> list[dict]:
    """For a classifier, label 1 where token 7 occurs; for a language model, the tokens again."""
    family, head, _ = TASKS[task]
    vocab, lengths = (97, lengths or (8, 30)) if family in tiny.CONFIGS else (49152, lengths or (100, 200))
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        n = int(torch.randint(*lengths, (1,), generator=generator))
        ids = torch.randint(8, vocab, (n,), generator=generator).tolist()
        if i % 2:
            ids[n // 2] = 7
        rows.append({"input_ids": ids, "attention_mask": [1] * n, "labels": i % 2 if head == CLASSES else ids})
    return rows


@contextlib.contextmanager
def alone():
    """As if no launcher had started this process: to train before the processes join, and to evaluate at any time."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(evaluate, "place", lambda: (0, 1)))
        stack.enter_context(mock.patch.object(evaluate, "gather", lambda value: [value]))
        for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
            del os.environ[name]
        yield


@contextlib.contextmanager
def launched(strategy: str, device: str, environment: dict):
    """What `accelerate launch --use_fsdp` sets. Accelerate shards on accelerators only: on the CPU it is told that it
    has one; all else is its own code and FSDP's."""
    if strategy == "ddp":
        yield
        return
    chosen = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": strategy[-1],
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",  # finds the layers by the name of their class
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "true" if strategy == "fsdp2" else "FULL_SHARD",
        **environment,
    }
    create = transformers.Trainer.create_accelerator_and_postprocess

    def pretend(trainer):
        if device == "cpu":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    patch = mock.patch.object(transformers.Trainer, "create_accelerator_and_postprocess", pretend)
    with mock.patch.dict(os.environ, chosen), patch:
        yield


def train(task: str, device: str, folder: Path, recipe: dict, interrupted: bool = False):
    """Fine-tune; returns the model and, of each pass, what this process was given: (alpha, samples)."""
    given: list[tuple] = []

    def note(decoder, args, kwargs):
        ids, mask = args[0] if args else kwargs["input_ids"], kwargs["attention_mask"]
        given.append((settings(decoder)["alpha"], [tuple(row[real != 0].tolist()) for row, real in zip(ids, mask)]))

    def run():
        model = build(task, device)
        find_decoder(model)[0].register_forward_pre_hook(note, with_kwargs=True)
        chosen = Recipe(**{**COMMON, **TASKS[task][2], **recipe})
        # One and a half epochs for 2 processes: the order of the second one counts too.
        data = samples(task, 32, seed=0)
        every = 2 if TASKS[task][0] in tiny.CONFIGS else None
        return fine_tune(model, tiny.Padder(), data, chosen, folder, save_steps=every, log_steps=1, progress=False)[0]

    if interrupted:

        def die(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

        with mock.patch.object(AlphaSampler, "on_step_end", die), contextlib.suppress(Killed):
            run()
        del given[-1:]  # the fifth step is done again, from the fourth's checkpoint
        distributed.on_first((folder / "checkpoints/checkpoint-5").mkdir)  # killed just as it began to save
    model = run()
    return model, list(given)  # evaluation is not training


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted((folder / "model").glob("*.safetensors")) for k, v in load_file(file).items()}


def reload(task: str, folder: Path, device: str):
    """The saved model in one piece, with the dial on."""
    model = build(task, device)
    if TASKS[task][2].get("tuning") == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "model").to(torch.float64)
    else:
        missing = model.load_state_dict(weights(folder), strict=False).missing_keys
        assert not missing or model.config.tie_word_embeddings, missing
    return zsaa.enable(model, alpha=1.0)


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def evaluated(model, inputs: list, precision: str = "fp32") -> tuple[list[int], dict]:
    """Predictions, and the logits of every batch that this process ran, by what was in it."""
    logits = {}

    def note(module, args, kwargs, output):
        logits[tuple(kwargs["input_ids"].flatten().tolist())] = output.logits.cpu()

    hook = model.register_forward_hook(note, with_kwargs=True)
    predicted = evaluate.predict(model, inputs, BATCH, precision)
    hook.remove()
    return predicted, logits


def same_bits(shared: list[tuple], single: tuple) -> bool:
    """Did the processes between them run the batches of one process, to the same logits, and all learn the result?"""
    predicted, logits = single
    ran = {batch for _, part in shared for batch in part}
    equal = (torch.equal(value, logits[batch]) for _, part in shared for batch, value in part.items())
    return ran == logits.keys() and all(equal) and all(theirs == predicted for theirs, _ in shared)


def reference(task: str, device: str, folder: Path, processes: int) -> dict:
    """What one process does with the whole batch."""
    batch = {"batch_size": BATCH * processes}
    with alone():
        before = build(task, device).state_dict()
        _, given = train(task, device, folder / task, batch)
    after = weights(folder / task)
    known = [k for k in after if k in before or "lora_B" in k]  # the latter begin at zero
    return {
        "weights": after,
        "moved": max((after[k] - before[k].cpu() if k in before else after[k]).abs().max().item() for k in known),
        "steps": [(alpha, sorted(rows)) for alpha, rows in given],
    }


def check(name: str, device: str, folder: Path, references: dict) -> dict:
    case, (number, processes) = CASES[name], distributed.place()
    folder = folder / name
    with launched(case.strategy, device, case.environment):
        model, given = train(case.task, device, folder, case.recipe, case.interrupted)
    result, inputs = {}, [row["input_ids"] for row in samples(case.task, 21, seed=1)]
    if TASKS[case.task][1] == CLASSES:  # a sharded model, too, is evaluated by all processes
        with zsaa.at(model, 0.7):
            # Twice, so that shapes come again: what may be recorded as a CUDA graph is replayed.
            shared = distributed.gather([evaluated(model, inputs) for _ in range(2)][1])
        if case.strategy != "ddp":
            result["recordings_equal"] = captured(model)["graphs"] == []  # none of a sharded model
        if number == 0:
            with alone(), zsaa.at(whole := reload(case.task, folder, device), 0.7):
                result["evaluation_equal"] = same_bits(shared, evaluated(whole, inputs))
    everyone = distributed.gather(given)
    if number:
        return {}
    passes = case.recipe.get("gradient_accumulation", 1)
    alphas = [[alpha for alpha, _ in theirs] for theirs in everyone]
    steps = [
        (alphas[0][i], sorted(row for theirs in everyone for _, rows in theirs[i : i + passes] for row in rows))
        for i in range(0, len(given), passes)
    ]
    single = references[case.task]
    return result | {
        "strategy": case.strategy,
        "processes": processes,
        "alphas": [alpha for alpha, _ in steps],
        "alphas_equal": all(theirs == [a for a, _ in steps for _ in range(passes)] for theirs in alphas),
        "samples_equal": steps == single["steps"],
        "max_difference": difference(weights(folder), single["weights"]),
        "moved": single["moved"],
        "files": sorted(p.name for p in folder.iterdir()),
    }


def check_evaluation(task: str, device: str, precision: str) -> dict:
    """Every count of samples and batches over processes, uneven and empty ones too: the bits of one process."""
    model, equal = zsaa.enable(build(task, device, torch.float32), tau=3), {}
    for count in (21, 9, 8, 1, 0):
        inputs = [row["input_ids"] for row in samples(task, count, seed=2)]
        for alpha in (1.0, 0.7):
            with zsaa.at(model, alpha):
                shared = distributed.gather(evaluated(model, inputs, precision))
                with alone():
                    equal[f"{count} samples at {alpha}"] = same_bits(shared, evaluated(model, inputs, precision))
    return equal


def check_mixed_precision(device: str) -> dict:
    """Layers that compute in bf16, FSDP casting their inputs, against the model in bf16: the same tokens and bits."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = zsaa.enable(build("classifier", device, torch.bfloat16), alpha=0.6, tau=3)
    model = zsaa.enable(build("classifier", device, torch.bfloat16).float(), alpha=0.6, tau=3)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*find_decoder(model)[0].layers, model):
        fully_shard(module, mp_policy=policy)
    ids, mask, _ = (x.to(device) for x in tiny.tokens([29, 17, 23]))
    with torch.no_grad(), zsaa.trace(model) as sharded, zsaa.trace(whole) as expected:
        a, b = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (model, whole))
    kept, wanted = ([p.tolist() for layer in t.kept for p in layer] for t in (sharded, expected))
    said = {"bits_equal": torch.equal(a, b), "kept_equal": kept == wanted}
    said["fewest_kept"] = min(map(len, sharded.kept[-1]))
    said["refusals"] = []
    for action, subject in ((zsaa.disable, model), (zsaa.enable, fully_sharded(device))):
        try:
            action(subject)
        except RuntimeError as error:
            said["refusals"].append(str(error))
    return said


def fully_sharded(device: str):
    """A model whose layers were sharded before the dial came."""
    from torch.distributed.fsdp import fully_shard

    model = build("classifier", device, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    return model


def check_refusals(folder: Path) -> dict:
    """What every process says when they are not asked alike, and when the first one cannot save."""
    number, _ = distributed.place()
    model = zsaa.enable(build("classifier", "cpu", torch.float32))
    said = {}
    try:
        evaluate.predict(model, [[9, 10, 11]] * (2 + number), 1)
    except ValueError as error:
        said["asked differently"] = str(error)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with mock.patch.object(finetune.loop, "save", full):
        try:
            train("classifier", "cpu", folder / "full", {"max_steps": 1})
        except (OSError, RuntimeError) as error:
            said["could not save"] = f"{type(error).__name__}: {error}"
    everyone = distributed.gather(said)
    return {name: [theirs[name] for theirs in everyone] for name in said}


def check_experiment(folder: Path) -> dict:
    """`python -m zsaa.experiment` by all processes, from a local model and data set to one result file."""
    from test_experiment import arguments
    from test_models import save_tiny
    from test_tasks import write

    from zsaa import experiment
    from zsaa.data.tasks import load_task, tokenize

    places = {"model": str(folder / "tiny"), "source": str(folder / "data"), "out": folder / "out"}

    def prepare():
        save_tiny(folder / "tiny")
        for split, count in (("train", 24), ("test", 21)):
            texts = [" ".join(f"w{(7 * i + j) % 95}" for j in range(20 + i % 10)) for i in range(count)]
            write(folder / "data", split, [{"text": text, "label": i % 2} for i, text in enumerate(texts)])

    distributed.on_first(prepare)
    given = ["--name", "run", "--max-steps", "2", "--batch-size", "4", "--tau", "1", "--alpha-range", "0.7", "0.9"]
    given += ["--max-length", "128"]
    done = experiment.main(arguments(places, *given))
    if distributed.place()[0]:
        return {}
    result = json.loads((folder / "out/results/run.json").read_text())
    with alone():
        model, tokenizer = finetune.load(folder / "out" / result["trained"], kind=CLASSES)
        test = tokenize(load_task("imdb", source=places["source"], seed=0).test, tokenizer, 128)
        size, precision = (result["evaluation"][k] for k in ("batch_size", "precision"))
        rows = evaluate.curve(model, tokenizer, test, batch_size=size, precision=precision, progress=False)
    return {
        "exit": done,
        "files": sorted(p.name for p in (folder / "out/results").iterdir()),
        "command": result["command"],
        "processes": result["train"]["processes"],
        "sharded": result["train"]["sharded"],
        "right": {f"{r['control']} {r['target']}": r["right"] for r in result["rows"]},
        "right_alone": {f"{r['control']} {r['target']}": r["right"] for r in rows},
        "timed": any("latency_ms" in row for row in result["rows"]),
    }


def speed(strategy: str, device: str, folder: Path, steps: int, length: int, batch: int) -> float:
    """Training tokens per second of all processes, over all steps but the first quarter."""
    started = []
    begin = AlphaSampler.on_step_begin

    def note(self, args, state, control, **kwargs):
        if device == "cuda":
            torch.cuda.synchronize()
        started.append(time.perf_counter())
        begin(self, args, state, control, **kwargs)

    model = build("SmolLM2's shape", device, torch.float32)
    recipe = Recipe(batch_size=batch, max_steps=steps, dropout=0.0)
    data = samples("SmolLM2's shape", batch * 8, seed=3, lengths=(length, length + 1))
    _, processes = distributed.place()
    with launched(strategy, device, {}), mock.patch.object(AlphaSampler, "on_step_begin", note):
        fine_tune(model, tiny.Padder(), data, recipe, folder / f"speed {strategy}", progress=False)
    first = steps // 4
    return processes * batch * length * (steps - 1 - first) / (started[-1] - started[first])


def die(folder: Path):
    """One process fails in the midst of training. Whoever waits for it must be ended, and nothing be left as done."""

    def fail(self, args, state, control, **kwargs):
        if distributed.place()[0] == 1 and state.global_step == 1:
            raise Killed("process 1 fails on purpose")

    with mock.patch.object(AlphaSampler, "on_step_end", fail):
        train("classifier", "cpu", folder / "died", {})


def failures(said: dict) -> list[str]:
    """The checks that did not hold. Weights: LLaMA's norms round to float32 within, and Adam divides by gradients as
    small as that noise, so that even in float64 a little of it stays; a wrong alpha or sample moves them by 1."""
    kinds = said.get("evaluation", {}).items()
    failed = [f"{kind} {name}" for kind, names in kinds for name, ok in names.items() if not ok]
    for name, case in said["cases"].items():
        failed += [f"{name}: {k}" for k, ok in case.items() if k.endswith("_equal") and not ok]
        if not case["max_difference"] < 0.01 * case["moved"]:
            failed.append(f"{name}: weights differ by {case['max_difference']:.1e}, moved by {case['moved']:.1e}")
    mixed = said.get("mixed_precision", {})
    failed += [f"mixed precision: {k}" for k in ("bits_equal", "kept_equal") if not mixed.get(k, True)]
    return failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, anew after every check")
    parser.add_argument("--runs", type=Path, help="where the runs' models lie meanwhile (default: a temporary folder)")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="default: all that the device can do")
    parser.add_argument("--experiment", action="store_true", help="run zsaa.experiment as well (needs datasets)")
    parser.add_argument("--speed", type=int, nargs=3, metavar=("STEPS", "TOKENS", "BATCH"), help="e.g. 60 512 16")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many nothing new is begun")
    parser.add_argument("--die", action="store_true", help="at the end fail in one process, on purpose")
    options = parser.parse_args()
    # The launcher's processes agree on its port.
    scratch = Path(tempfile.gettempdir()) / f"zsaa-distributed-{os.environ['MASTER_PORT']}"
    options.runs = options.runs or scratch
    # SmolLM2's shape in float64 would take a CPU minutes. Whole checkpoints need
    # gloo beside NCCL: on GPUs they run when they are asked for, and all else with NCCL alone.
    options.cases = options.cases or [
        name
        for name, case in CASES.items()
        if (case.environment != WHOLE if options.device == "cuda" else "shape" not in case.task)
    ]
    return options


def experiment(strategy: str, folder: Path) -> dict:
    with launched(strategy, "cpu", BROADCAST):
        return check_experiment(folder / f"experiment {strategy}")


def planned(options: argparse.Namespace, references: dict) -> list[tuple[str, str, Callable[[], Any]]]:
    """What is to be done, in order: the section and the name in the file, and how. Large models come last."""
    device, folder = options.device, options.runs
    cases = [("cases", name, partial(check, name, device, folder, references)) for name in options.cases]
    timed = [
        ("tokens_per_second", strategy, partial(speed, strategy, device, folder, *options.speed))
        for strategy in (("ddp", "fsdp2") if options.speed else ())
    ]
    plan = [("evaluation", "classifier", partial(check_evaluation, "classifier", device, "fp32"))]
    if device == "cuda":
        task = "SmolLM2's shape"
        plan.append(("evaluation", f"{task}, bf16", partial(check_evaluation, task, device, "bf16")))
    plan.append(("mixed_precision", "", partial(check_mixed_precision, device)))
    if device == "cpu":
        plan.append(("refusals", "", partial(check_refusals, folder)))
    if options.experiment:  # FSDP's bf16 on a GPU is not autocast's
        strategies = ("ddp", "fsdp2") if device == "cpu" else ("ddp",)
        plan += [("experiment", strategy, partial(experiment, strategy, folder)) for strategy in strategies]
    small, large = ([case for case in cases if ("shape" in case[1]) == big] for big in (False, True))
    return [*small, *timed, *plan, *large]


def alone_before(options: argparse.Namespace, said: dict, processes: int) -> dict:
    """What the first process does before it joins the others, who wait: the references of all tasks."""
    shutil.rmtree(options.runs, ignore_errors=True)
    names = {CASES[name].task: None for name in options.cases}
    references = {task: reference(task, options.device, options.runs / "reference", processes) for task in names}
    if options.speed:
        with alone():
            folder = options.runs / "alone"
            said["tokens_per_second"] = {"one process": speed("ddp", options.device, folder, *options.speed)}
    return references


def follow(plan: list, options: argparse.Namespace, said: dict, began: float) -> None:
    """Do what is planned, as far as the time goes; the first process writes the file after each part."""
    number, _ = distributed.place()
    for section, name, run in plan:
        started = time.perf_counter()
        if distributed.gather(started - began > options.seconds)[0]:  # the first process's clock counts
            said["not_run"].append(f"{section}: {name}".removesuffix(": "))
            continue
        result = run()
        if name:
            said.setdefault(section, {})[name] = result
        else:
            said[section] = result
        if number == 0:
            print(f"{section}, {name} ({time.perf_counter() - started:.1f} s): {result}", flush=True)
            keep(said, options.out)
    if number == 0:
        keep(said, options.out)  # with what was not run


def keep(said: dict, path: Path) -> None:
    said["failed"], said["provenance"] = failures(said), provenance(processes=distributed.place()[1])
    path.write_text(json.dumps(said, indent=1) + "\n")


def main() -> None:
    began, options = time.perf_counter(), arguments()
    whole = any(CASES[name].environment == WHOLE for name in options.cases)
    number, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    said: dict = {"kind": "distributed", "device": options.device, "speed": options.speed, "not_run": [], "cases": {}}
    references = alone_before(options, said, processes) if number == 0 else {}
    AcceleratorState._reset_state(reset_partial_state=True)  # the first process has been alone
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true", **WHOLE} if whole else {}):
        distributed.start()
    distributed.on_first(lambda: print(f"{processes} processes on {options.device}", flush=True))
    follow(planned(options, references), options, said, began)
    if number == 0:
        print(json.dumps({k: v for k, v in said.items() if k != "cases"}, indent=1), flush=True)
    distributed.gather(None)
    if options.die:
        die(options.runs)
    shutil.rmtree(options.runs, ignore_errors=True)
    torch.distributed.destroy_process_group()
    if said.get("failed"):
        raise SystemExit(f"{len(said['failed'])} checks failed: {said['failed']}")


if __name__ == "__main__":
    main()
