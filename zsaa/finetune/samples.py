"""What a model is asked to learn from: refused before anything is trained, where it can teach nothing."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from torch import nn

from zsaa.families import find_decoder


def check_samples(model: nn.Module, train_dataset) -> None:
    """ValueError for samples that `model` cannot learn from: none at all, no label, one that is no class of a
    classifier, one that is no token of a language model, or none to predict. A stream, read once, is not looked at."""
    if not hasattr(train_dataset, "__len__"):
        return
    if not len(train_dataset):
        raise ValueError("the training set is empty: give one sample or more.")
    named = "label" if "label" in train_dataset[0] else "labels"  # transformers takes both
    if absent := {"input_ids", named} - set(train_dataset[0]):
        raise ValueError(
            f"the training set has no column {min(absent)!r}: samples are input_ids, attention_mask and labels."
        )
    if isinstance(train_dataset, Dataset):
        train_dataset = train_dataset.with_format("numpy", ["input_ids", named])
    for row, sample in enumerate(train_dataset):
        try:
            _check_sample(model, np.asarray(sample["input_ids"]), np.asarray(sample[named]))
        except ValueError as error:
            raise ValueError(f"sample {row} of the training set {error}. Mend or remove it.") from None


def _check_sample(model: nn.Module, ids: np.ndarray, labels: np.ndarray) -> None:
    """ValueError, to be continued from "sample ...", for one sample that `model` cannot learn from."""

    def within(values: np.ndarray, count: int) -> bool:
        return values.dtype.kind in "iu" and bool(values.size) and values.min() >= 0 and values.max() < count

    tokens = find_decoder(model)[0].config.vocab_size
    if not within(ids, tokens):
        raise ValueError(
            f"has the input_ids {_short(ids)}; they must be whole numbers from 0 to {tokens - 1}, 1 or more"
        )
    if hasattr(model, "score"):
        classes, problem = model.config.num_labels, model.config.problem_type
        if (
            classes > 1
            and problem in (None, "single_label_classification")
            and (labels.ndim or not within(labels, classes))
        ):
            raise ValueError(f"has the label {_short(labels)}; it must be a whole number from 0 to {classes - 1}")
    elif labels.shape != ids.shape or not within(labels[labels != -100], tokens):
        raise ValueError(
            f"has the labels {_short(labels)}; they must be whole numbers, one for each token, from 0 to {tokens - 1}, "
            "or -100 where none counts, but not everywhere"
        )


def _short(values: np.ndarray) -> str:
    text = repr(values.tolist())
    return text if len(text) < 80 else f"{text[:80]} ..."
