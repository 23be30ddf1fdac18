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
from ablation.answers import second
from ablation.answers.data import Data, Sample, judge
from ablation.answers.judge import samples_of
from ablation.answers.run import ROWS, SCORERS
from ablation.answers.train import DRAWN, STRONGEST
from zsaa import finetune
from zsaa.learned import salience
from zsaa.learned.asked import Scorer, Shape
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


@torch.no_grad()
def answers(model, samples: Sequence[Sample], data: Data, reduction: float) -> dict:
    """EM and F1 of the package's answers at a reduction of MACs, one question at a time."""
    em = f1 = seconds = 0.0
    for s in samples:
        prompt = torch.tensor([s.body + s.older + s.last + s.line], device=model.device)
        part = [0] * len(s.body) + [1] * len(s.older) + [2] * len(s.last) + [3] * len(s.line)
        alpha = 1.0 if reduction == 1 else zsaa.alpha_for(model, prompt.shape[1], reduction)
        began = time.perf_counter()
        said = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            question=torch.tensor([part], device=model.device),
            alpha=alpha,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=data.newline,
            pad_token_id=0,
        )[0, prompt.shape[1] :]
        seconds += time.perf_counter() - began
        scores = judge(data.text(said.tolist()), s.references)
        em, f1 = em + scores[0], f1 + scores[1]
    n = len(samples)
    facts = {"reduction": reduction, "n": n, "em": round(100 * em / n, 2), "f1": round(100 * f1 / n, 2)}
    return {**facts, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "judge", "open"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--reductions", type=float, nargs="+", default=[1.0, 3.0, 5.0])
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
    samples = samples_of(data, "test", arguments.passages, 600)[: arguments.questions]
    for reduction in arguments.reductions:
        print(json.dumps(answers(model, samples, data, reduction)), flush=True)


if __name__ == "__main__":
    main()
