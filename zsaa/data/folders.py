"""Data sets in a folder: which files hold a split, and what they say, exactly or not at all.

    files = find(folder, "train", "mrpc")                       # [.../train-00000-of-00001.parquet]
    table = read(files, ("sentence1", "sentence2", "label"))    # lists, by name

A split is one file or numbered parts of one, in the layout of the hub's repository: as its README.md says, or named
after the split (train.csv, train-00000-of-00002.parquet), or in a folder of that name (train/0000.parquet), in the
folder itself or in one that repositories have (INNER). What editors and systems leave behind is no data; other files
that look like the split's are refused, lest a copy of it be read as more of it.

Values are what the files hold: an empty field and the words "None" and "N/A" are texts.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsaa.kit.files import is_stray
from zsaa.models import AssetError

FORMATS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLES = tuple(kind for kind in FORMATS if kind != ".txt")  # those that have columns
PACKED = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
INNER = ("data", "plain_text", "default")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of a data set, and no data
ALSO_CALLED = {
    "validation": ("valid", "val", "dev"),
    "validation_matched": ("dev_matched",),
    "validation_mismatched": ("dev_mismatched",),
}


# ----------------------------------------------------------------------------------------------- which files


def _kind(path: Path) -> tuple[str, str, str]:
    """(stem, format, packing) of a data file: ("train", ".csv", ".gz"); the format of any other is empty."""
    stem, packing = path.name, ""
    if path.suffix.lower() in PACKED:
        stem, packing = path.stem, path.suffix.lower()
    suffix = Path(stem).suffix.lower()
    return (stem[: -len(suffix)], suffix, packing) if suffix in FORMATS else (path.name, "", "")


def _data(place: Path) -> list[Path]:
    """The data files in `place`, by name. A link to a file that is gone counts: it is not left out unsaid."""
    files = [p for p in place.iterdir() if p.is_file() or p.is_symlink()] if place.is_dir() else []
    return sorted(p for p in files if _kind(p)[1] and p.name not in ABOUT and not is_stray(p, place))


def find(folder: str | Path, split: str, config: str | None = None, formats: Sequence[str] = FORMATS) -> list[Path]:
    """The files of `split` in `folder`, in order; none where there are none. config: of the hub's repository; a folder
    of that name is looked into, if there is one. AssetError: it cannot be told which files are meant, or a part is
    missing."""
    folder = Path(folder)
    said = _card_files(folder, config, split)
    if said is not None:
        return _whole(split, [p for p in said if _kind(p)[1] in formats])
    base = folder / config if config and (folder / config).is_dir() else folder
    for place in (base, *(base / name for name in INNER)):
        files = [p for p in _data(place) if _kind(p)[1] in formats]
        for name in (split, *ALSO_CALLED.get(split, ())):
            called = re.escape(name)
            inside = [p for p in _data(place / name) if _kind(p)[1] in formats]
            begins = [p for p in files if re.match(rf"{called}(?![a-zA-Z]|_(mis)?matched)", _kind(p)[0])]
            within = [p for p in files if re.search(rf"(^|[-._ ]){called}([-._ ]|$)", _kind(p)[0])]
            if found := begins + inside or within:
                return _whole(split, found)
    return []


def listing(folder: str | Path) -> str:
    """What is in `folder`, for an error."""
    names = sorted(p.name + "/" * p.is_dir() for p in Path(folder).iterdir() if not is_stray(p, Path(folder)))
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"it holds {shown or 'nothing'}; data files end in {', '.join(FORMATS)}"


PART = re.compile(r"(?P<head>.*?)(?P<number>\d+)(?:-of-(?P<count>\d+)(?:-[0-9a-z]+)?)?$")


def _whole(split: str, files: list[Path]) -> list[Path]:
    """`files` in order, if they are one file, or all the numbered parts of one."""
    parts = [PART.match(_kind(p)[0]) for p in files]
    alike = {(p.parent, *_kind(p)[1:], m["head"], m["count"]) for p, m in zip(files, parts) if m}
    numbers = [int(m["number"]) for m in parts if m]
    if len(files) > 1 and (None in parts or len(alike) > 1 or len({*numbers}) < len(files)):
        raise AssetError(
            f"{len(files)} files in {files[0].parent} may be the split {split!r}: {', '.join(p.name for p in files)}. "
            f"A split is one file, or numbered parts of one format ({split}-00000-of-00002.csv and so on): move the "
            "others away, or rename them."
        )
    if not files or parts[0] is None or (len(files) == 1 and parts[0]["count"] is None):
        return files
    by_number = dict(zip(numbers, files))
    count = parts[0]["count"]
    wanted = range(int(count)) if count else range(min(by_number), max(by_number) + 1)
    if missing := sorted({*wanted} - {*by_number}):
        raise AssetError(
            f"the split {split!r} in {files[0].parent} is not whole: of its parts {wanted[0]} to {wanted[-1]}, "
            f"{', '.join(map(str, missing[:5]))} is missing. Copy it again."
        )
    return [by_number[number] for number in sorted(by_number)]


# ------------------------------------------------------------------------------------ what README.md says


def _card(folder: Path) -> dict:
    """The header of README.md, as the hub's repositories have one."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        card = yaml.safe_load(header[1]) if header else None
    except (OSError, yaml.YAMLError):
        card = None
    return card if isinstance(card, dict) else {}


def _of_config(entries: Any, config: str | None) -> dict | None:
    """That of `config` among a card's entries; without a config the only one, or the default."""
    entries = [e for e in (entries if isinstance(entries, list) else [entries]) if isinstance(e, dict)]
    if config is None:
        entries = [e for e in entries if e.get("default") or e.get("config_name") == "default"] or entries
        return entries[0] if len(entries) == 1 else None
    same = [e for e in entries if e.get("config_name") == config]
    alone = entries if len(entries) == 1 and entries[0].get("config_name", "default") == "default" else []
    return next(iter(same or alone), None)


def _card_files(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """The files of `split` by README.md; None if it names no files."""
    entry = _of_config(_card(folder).get("configs"), config) or {}
    files, base = entry.get("data_files"), folder / str(entry.get("data_dir") or "")
    if files is None:
        return None
    if isinstance(files, list) and all(isinstance(f, dict) for f in files):
        files = {f.get("split"): f.get("path") for f in files}
    patterns = files.get(split, ()) if isinstance(files, dict) else files if split == "train" else ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    found = {p for pattern in patterns for p in base.glob(str(pattern).lstrip("/"))}
    return sorted(p for p in found if not p.is_dir() and _kind(p)[1] and not is_stray(p, base))


def card_names(folder: str | Path, config: str | None, column: str) -> list | None:
    """The names of a column's classes by README.md or dataset_infos.json, in their order; None if neither has them."""
    entry = _of_config(_card(Path(folder)).get("dataset_info"), config) or {}
    for feature in entry.get("features") or ():
        kind = feature.get("dtype") if isinstance(feature, dict) and feature.get("name") == column else None
        if isinstance(kind, dict) and "class_label" in kind:
            names = (kind["class_label"] or {}).get("names")
            return [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    try:
        infos = json.loads((Path(folder) / "dataset_infos.json").read_text(encoding="utf-8"))
        entry = infos[config] if config in infos else next(iter(infos.values())) if len(infos) == 1 else {}
        return entry["features"][column].get("names")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


# --------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Table:
    """columns: of those asked for, the ones that there are, as lists; found: the names of all columns; names: of each
    column of classes whose names the file has, these names."""

    columns: dict[str, list]
    found: list[str]
    names: dict[str, list]


def read(files: Iterable[Path], columns: Sequence[str], limit: int | None = None) -> Table:
    """What `files` hold, one after the other; the first `limit` rows, if given. AssetError names the file, the line if
    there are lines, and what to do, for one that is damaged, or not what its name says."""
    whole: Table | None = None
    for path in files:
        left = None if limit is None or whole is None else limit - len(next(iter(whole.columns.values()), ()))
        part = _read_one(path, columns, limit if left is None else left)
        if whole is None:
            whole = part
        elif (part.columns.keys(), part.names) != (whole.columns.keys(), whole.names):
            raise AssetError(f"{path} has other columns or classes than the parts before it: {', '.join(part.found)}.")
        else:
            for name, values in part.columns.items():
                whole.columns[name].extend(values)
        if limit is not None and len(next(iter(whole.columns.values()), ())) >= limit:
            break
    return whole or Table({}, [], {})


def _read_one(path: Path, columns: Sequence[str], limit: int | None) -> Table:
    import pyarrow

    _, kind, packing = _kind(path)
    try:
        if kind in (".parquet", ".arrow"):
            if packing:
                raise AssetError(f"{path} is packed, which only text formats may be. Unpack it.")
            return (_parquet if kind == ".parquet" else _arrow)(path, columns, limit)
        text = _text(path, path.read_bytes() if not packing else PACKED[packing].decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise AssetError(
            f"{path} cannot be read, is damaged, or is no {kind[1:]} file ({error}). Mend it, or copy it again."
        ) from error
    if kind in (".csv", ".tsv"):
        return _separated(path, text, "\t" if kind == ".tsv" else ",", columns, limit)
    if kind == ".txt":
        lines = text.removesuffix("\n").split("\n") if text else []
        return Table({"text": [line.removesuffix("\r") for line in lines[:limit]]}, ["text"], {})
    return _json(path, text, columns, limit)


def _text(path: Path, data: bytes) -> str:
    if data[:4] == b"PK\3\4" or data[:2] == b"\x1f\x8b":
        raise AssetError(f"{path} is packed (zip or gzip), whatever its name says. Unpack it.")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise AssetError(f"{path} is in UTF-16, not UTF-8. {_save_as_utf8(path, 'UTF-16')}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise AssetError(
            f"{path} is not in UTF-8: line {line} has the byte 0x{byte:02x}, as in Latin-1. "
            + _save_as_utf8(path, "LATIN1")
        ) from error


def _save_as_utf8(path: Path, encoding: str) -> str:
    return f"Save it in UTF-8, for example with: iconv -f {encoding} -t UTF-8 {path.name} > new{_kind(path)[1]}"


def _separated(path: Path, text: str, separator: str, columns: Sequence[str], limit: int | None) -> Table:
    """A table of comma- or tab-separated values with a header; each row must have as many as that."""
    before = csv.field_size_limit(sys.maxsize)  # a text may be long
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = next(rows, [])
        if twice := {name for name in header if name and header.count(name) > 1}:
            raise AssetError(f"{path} has the column {min(twice)!r} twice. Rename or remove one.")
        places = {name: header.index(name) for name in columns if name in header}
        found: dict[str, list] = {name: [] for name in places}
        for number, row in enumerate(row for row in rows if row):
            if number == limit:
                break
            if len(row) != len(header):
                raise csv.Error(f"it has {len(row)} fields, and the header {len(header)}")
            for name, place in places.items():
                found[name].append(row[place])
    except csv.Error as error:
        raise AssetError(
            f"{path} is ragged at line {rows.line_num}: {error}. Put texts with commas, tabs, line breaks or quotes in "
            "double quotes, and their own quotes twice."
        ) from error
    finally:
        csv.field_size_limit(before)
    return Table(found, header, {})


def _json(path: Path, text: str, columns: Sequence[str], limit: int | None) -> Table:
    """An object a line, or one list of objects, or one object of columns."""
    try:
        whole = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise _no_json(path, error.lineno, error) from error
        whole = None  # an object a line
    if isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values()):
        if len({len(values) for values in whole.values()}) > 1:
            raise AssetError(f"{path} has columns of different lengths. Mend it.")
        return Table({name: whole[name][:limit] for name in columns if name in whole}, list(whole), {})
    rows = list(_objects(path, whole if isinstance(whole, list) else None, text, limit))
    found = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in columns if name in found}, found, {})


def _no_json(path: Path, line: int, error: json.JSONDecodeError) -> AssetError:
    return AssetError(f"{path} is no JSON at line {line} ({error.msg}), or was cut short. Mend it, or copy it again.")


def _objects(path: Path, rows: list | None, text: str, limit: int | None) -> Iterator[dict]:
    lines = text.split("\n") if rows is None else rows  # not splitlines, which takes other signs for line ends
    read = 0
    for number, line in enumerate(lines, start=1):
        if rows is None and not line.strip():
            continue
        if read == limit:
            return
        try:
            row = json.loads(line) if rows is None else line
        except json.JSONDecodeError as error:
            raise _no_json(path, number, error) from error
        if not isinstance(row, dict):
            raise AssetError(
                f'{path} must hold objects, as {{"text": ...}}, but number {number} is {row!r:.60}. Mend it.'
            )
        read += 1
        yield row


def _parquet(path: Path, columns: Sequence[str], limit: int | None) -> Table:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        wanted = [name for name in columns if name in schema.names]
        return _batches(schema, file.iter_batches(columns=wanted), wanted, limit)


def _arrow(path: Path, columns: Sequence[str], limit: int | None) -> Table:
    """As `datasets` saves it: a stream; else a file of record batches."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches: Iterable = reader
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        wanted = [name for name in columns if name in reader.schema.names]
        return _batches(reader.schema, (batch.select(wanted) for batch in batches), wanted, limit)


def _batches(schema, batches: Iterable, wanted: list[str], limit: int | None) -> Table:
    found: dict[str, list] = {name: [] for name in wanted}
    for batch in batches:
        left = None if limit is None or not wanted else limit - len(found[wanted[0]])
        if left is not None and left <= 0:
            break
        for name in wanted:
            found[name].extend(batch.column(name).slice(0, left).to_pylist())
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    classes = {name: features[name].get("names") for name in wanted if isinstance(features.get(name), dict)}
    return Table(found, list(schema.names), {name: names for name, names in classes.items() if names})
