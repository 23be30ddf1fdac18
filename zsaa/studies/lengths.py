"""The objective "lengths": what follows from the lengths of a task's held-out samples alone (Figure 2 B and C)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from zsaa.budget import alpha_for
from zsaa.cost import mac_reduction
from zsaa.data.tasks import load_task
from zsaa.evaluation.controls import check_targets
from zsaa.families import find_decoder
from zsaa.measure import output_folder, provenance
from zsaa.models import load_model
from zsaa.rule import Rule
from zsaa.studies.accuracy import tokenized
from zsaa.studies.job import Job
from zsaa.studies.records import model_record, once, result_file, task_record


def measure(job: Job) -> dict:
    """Per target MAC reduction the alpha that reaches it, and the share of hidden activations that it preserves: the
    sum of N_l over all layers and samples, over that of N_0. Writes job.output/results/NAME.json, of kind "lengths".

    The model's tokenizer cuts the texts, and its layers are counted, or those of the shape that the settings name.
    """
    asked = job.settings
    output_folder(job.output)
    parts = ("lengths", Path(job.data).name, Path(job.model).name, *([asked.shape] if asked.shape else []))
    name = job.named("-".join(parts))
    data = load_task(job.data, source=job.source, test=job.test, seed=0)
    net, tokenizer = load_model(job.model)
    recipe = {"tau": asked.tau, "schedule": asked.schedule, "max_length": asked.max_length, "shape": asked.shape}
    header = {"name": name, "kind": "lengths", "command": job.command, "model": model_record(job.model)}
    header |= {"task": task_record(data), "recipe": recipe}

    def compute() -> dict:
        config = _config(asked.shape) or find_decoder(net)[0].config
        counted = Counter(map(len, tokenized(data.test, tokenizer, asked.max_length, net)["input_ids"]))
        tokens = sorted(counted.elements())
        facts = {"tokens_mean": round(sum(tokens) / len(tokens), 1), "tokens_median": tokens[len(tokens) // 2]}
        facts |= {"layers": config.num_hidden_layers}
        origin = provenance(torch.device("cpu"), seed=0, eval_samples=len(tokens))
        return {**header, **facts, "provenance": origin, "rows": _rows(config, counted, asked)}

    decides = {k: v for k, v in header.items() if k != "command"} | {"targets": list(asked.targets)}
    return once(result_file(job, name), decides, compute)


def _config(shape: str | None):
    from transformers import GPT2Config

    return {None: None, "gpt2": GPT2Config()}[shape]


def _rows(config, counted: Counter, asked) -> list[dict]:
    """A row for each target within reach; counted: how many samples have each length."""
    rule, layers = Rule(tau=asked.tau, schedule=asked.schedule), config.num_hidden_layers
    fixed = {"tau": rule.tau, "schedule": rule.schedule}
    tokens, rows = list(counted.elements()), []
    check_targets(config, tokens, asked.targets, ("alpha",), **fixed)
    for target in asked.targets:
        try:
            alpha = alpha_for(config, tokens, target, **fixed)
        except ValueError:  # tau keeps it out of reach
            continue
        preserved = sum(times * sum(rule.counts(n, alpha, layers)) for n, times in counted.items())
        preserved /= layers * sum(tokens)
        reached = mac_reduction(config, tokens, alpha, **fixed)
        row = {"control": "alpha", "target": target, "alpha": alpha, "mac_reduction": round(reached, 4)}
        rows.append({**row, "preserved": round(preserved, 5)})
    return rows
