"""Accuracy of a classifier along the dial, beside its controls at equal compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from zsaa.data.batching import own_seeds, pad
from zsaa.dial import rule, settings
from zsaa.evaluation.controls import CONTROLS, TARGETS, applied, check_targets, cut, plan, precision_of
from zsaa.families import find_decoder
from zsaa.measure.checks import check_whole
from zsaa.measure.distributed import gather, place
from zsaa.measure.mode import evaluating
from zsaa.measure.stats import f1, f1_interval, interval, to_bits
from zsaa.score import seeded


@torch.no_grad()  # not inference_mode: a model that FSDP first ran under it could not be trained afterwards
def predict(
    model: nn.Module,
    samples: Sequence[Sequence[int]],
    batch_size: int = 8,
    precision: str = "fp32",
    bar: tqdm | None = None,
) -> list[int]:
    """Predicted class of each sample (lists of token ids), in order; batches hold samples of similar length.
    `bar` is moved on by one per sample.

    Of several processes (torchrun, accelerate) each must call it alike: they take turns at whole batches, composed as
    in a single process, and each returns all predictions, the same bits as one process on such a device.

    Raises ValueError where the model says no numbers, of which argmax would make class 0.
    """
    check_whole("batch_size", batch_size)
    decoder, _ = find_decoder(model)
    device, pad_id = next(model.parameters()).device, decoder.config.pad_token_id
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    number, processes = place()
    predicted: dict[int, int | None] = {}
    for turn in range(0, len(batches), processes):
        # With none left in the last turn a process repeats the last batch: under FSDP no pass works without all.
        batch = batches[min(turn + number, len(batches) - 1)]
        ids, mask = pad([samples[i] for i in batch], pad_id, device)
        seeds = own_seeds([samples[i] for i in batch])
        with evaluating(model), precision_of(model, precision), seeded(seeds):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        numbers = logits.isfinite().all(-1).tolist()
        said = logits.float().argmax(-1).tolist()
        predicted.update((i, label if number else None) for i, label, number in zip(batch, said, numbers))
        if bar is not None:
            bar.update(sum(map(len, batches[turn : turn + processes])))
    dial = settings(model) if hasattr(decoder, "_zsaa") else None
    asked = ([len(s) for s in samples], batch_size, precision, dial)
    for other, (theirs, part) in enumerate(gather((asked, predicted))):
        if theirs != asked:
            raise ValueError(
                f"process {other} was not given the same samples, batch size, precision and dial as process {number}: "
                "call predict alike in all of them."
            )
        predicted.update(part)
    spoilt = sorted(i for i, label in predicted.items() if label is None)
    if spoilt:
        raise ValueError(
            f"the model's logits for sample {spoilt[0]} are not finite (so for {len(spoilt)} of {len(samples)}): its "
            f"weights are spoilt, or too large for {precision}. Train or load it anew, or evaluate in fp32."
        )
    return [predicted[i] for i in range(len(samples))]


def tally(right: Sequence[int]) -> dict:
    """What a row says of samples that were answered right (1) or wrong (0): "correct", "n", "accuracy" (percent),
    "ci95" (Wilson) and "right", the flags as `stats.to_bits` packs them."""
    correct, n = sum(right), len(right)
    share, bounds = round(100 * correct / n, 2), list(interval(correct, n))
    return {"correct": correct, "n": n, "accuracy": share, "ci95": bounds, "right": to_bits(right)}


def curve(
    model: nn.Module,
    tokenizer,
    dataset,
    targets=TARGETS,
    controls=CONTROLS,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: bool = True,
    metric: str = "accuracy",
) -> list[dict]:
    """Accuracy (percent) of `model`, with the dial on, at each target MAC reduction, for the dial and its controls.

    dataset: columns input_ids and labels. Each row holds the plan's fields and "correct", "n", "accuracy", "ci95"
    (Wilson) and "right": which samples were right, as a hexadecimal bit string (sample 0 first), for paired tests.
    metric: "accuracy", or "f1" of label 1: rows then also hold "f1" (percent), "ci95" is its interval (seeded
    bootstrap), and "predicted" has the predictions, as such a bit string.
    Several processes share the work, as in `predict`. ValueError where there is no row (see `check_targets`).
    """
    samples, labels = list(dataset["input_ids"]), list(dataset["labels"])
    check_targets(find_decoder(model)[0].config, map(len, samples), targets, controls, **rule(model))
    rows = plan(model, map(len, samples), targets, controls)
    # One bar for all settings. Executed notebooks keep a line of each move, so that it seldom moves there.
    options = {"unit": "text", "mininterval": 10.0 if sys.stderr.isatty() else 60.0}
    bar = tqdm(total=len(rows) * len(samples), disable=not progress or place()[0] > 0, **options)
    for row in rows:
        side = row["control"]
        bar.set_description(f"{side} at {row['mac_reduction']:.1f}x", refresh=False)
        inputs = [cut(s, row["keep_tokens"], side, tokenizer.bos_token_id) for s in samples]
        with applied(model, row):
            predicted = predict(model, inputs, batch_size, precision, bar)
        row["mac_reduction"] = round(row["mac_reduction"], 4)
        row.update(tally([int(p == y) for p, y in zip(predicted, labels)]))
        if metric == "f1":
            row.update(f1=round(f1(labels, predicted), 2), ci95=list(f1_interval(labels, predicted)))
            row["predicted"] = to_bits(predicted)
        bar.set_postfix_str(f"{row['mac_reduction']:.1f}x: {row[metric]:.1f}%", refresh=False)
    bar.close()
    return rows
