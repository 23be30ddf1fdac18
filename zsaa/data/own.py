"""A data set of your own: a folder with a file for each split, and the columns text and label.

    mine/train.csv      text,label               load_task("mine")
    mine/test.csv       "Never came.",complaint

Files, formats and parts are those of zsaa.data.folders (csv, tsv, json, jsonl, parquet, arrow). A column text_pair
makes pairs of texts. What is evaluated on is the split test, or validation where there is no test. Labels are numbers
from 0 on, or names, which are numbered by the alphabet unless the file or README.md gives them an order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zsaa.data import folders
from zsaa.models import AssetError

COLUMNS = ("text", "text_pair", "label")
TEST = ("test", "validation")


def read(folder: str | Path) -> tuple[list[folders.Table], list[str], tuple[str, ...]]:
    """(tables of train and test, names of these splits, label names in the order of their numbers).

    AssetError names the folder, what is missing or odd in it, and what to do."""
    folder = Path(folder).expanduser()
    found = {split: folders.find(folder, split, formats=folders.TABLES) for split in ("train", *TEST)}
    test = next((split for split in TEST if found[split]), None)
    if not found["train"] or test is None:
        missing = "train" if not found["train"] else "test"
        raise AssetError(
            f"{folder} has no split {missing!r}; {folders.listing(folder)}. A data set of your own has a file for "
            "each of two splits, such as train.csv and test.csv, with the columns text and label."
        )
    splits = ["train", test]
    tables = [folders.read(found[split], COLUMNS) for split in splits]
    for split, table in zip(splits, tables):
        if absent := [name for name in ("text", "label") if name not in table.columns]:
            has = ", ".join(f"{name!s:.40}" for name in table.found)
            raise AssetError(
                f"split {split!r} of {folder} has no column {absent[0]!r}; it has {has}. Rename its columns."
            )
    if len({"text_pair" in table.columns for table in tables}) > 1:
        raise AssetError(f"one of the splits of {folder} has a column text_pair, the other has none. Give both one.")
    return tables, splits, label_names(folder, tables)


def label_names(folder: Path, tables: Sequence[folders.Table]) -> tuple[str, ...]:
    """Those that a file or README.md gives, or the labels themselves: numbers from 0 on, or words by the alphabet."""
    told = [table.names["label"] for table in tables if "label" in table.names]
    if given := (told[0] if told else folders.card_names(folder, None, "label")):
        return tuple(map(str, given))
    labels = {str(value).strip() for table in tables for value in table.columns["label"] if value is not None} - {""}
    if all(re.fullmatch(r"\d+(\.0+)?", label) for label in labels):
        labels = {str(number) for number in range(1 + max((int(float(label)) for label in labels), default=0))}
        ordered = sorted(labels, key=int)
    else:
        ordered = sorted(labels)
    if not 2 <= len(ordered) <= 1000:
        raise AssetError(
            f"{folder} has {len(ordered)} different labels ({', '.join(ordered[:3])} ...), and a task has 2 to 1,000 "
            "classes. Check its column label; numbers must begin at 0."
        )
    return tuple(ordered)
