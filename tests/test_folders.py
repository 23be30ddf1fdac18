"""Data in a folder: which files are a split, what they hold, and an error for whatever is not as it seems."""

import bz2
import gzip
import json
import lzma

import datasets
import pandas as pd
import pytest

from zsaa.data.folders import card_names, find, listing, read
from zsaa.models import AssetError

ROWS = [{"text": "one, or two", "label": 0}, {"text": 'She said "N/A"', "label": 1}, {"text": "None", "label": 1}]
TEXTS = [row["text"] for row in ROWS]


def put(folder, *names, content="text\na\n"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def names(files):
    return [file.name for file in files]


# ----------------------------------------------------------------------------------------------- which files

STRAYS = ("{0}.csv.bak", "{0}.csv~", ".{0}.csv", ".{0}.csv.swp", "#{0}.csv#", "._{0}.csv", "~${0}.csv", "{0}.csv.orig",
          "{0}.csv.tmp", "{0}.csv.lock", "{0}.csv.crdownload", "{0}.xlsx", "{0}.zip", "{0}.md",
          ".ipynb_checkpoints/{0}-checkpoint.csv", "__MACOSX/{0}.csv", "old/{0}.csv", ".cache/{0}.csv")  # fmt: skip


@pytest.mark.parametrize("place", ["", "data/", "mrpc/", "a [1]*?/", "train and test/"])
def test_what_editors_and_systems_leave_is_no_data(tmp_path, place):
    folder = put(tmp_path / place, "train.csv", "test.csv")
    put(folder, *(stray.format(split) for stray in STRAYS for split in ("train", "test")))
    put(folder, "README.md", "train.py", "dataset_info.json", "state.json", "DS_Store")
    for split in ("train", "test"):
        base = tmp_path if place in ("data/", "mrpc/") else folder
        assert names(find(base, split, "mrpc")) == [f"{split}.csv"]
        assert read(find(base, split, "mrpc"), ["text"]).columns == {"text": ["a"]}


@pytest.mark.parametrize(
    "others",
    [["train.jsonl"], ["train copy.csv"], ["train (1).csv"], ["train-old.csv"], ["train_backup.csv"], ["train2.csv"],
     ["train.old.csv"], ["train.csv.gz"], ["train-00000-of-00001.csv"], ["train/0000.csv"], ["TRAIN.csv", "train.CSV"]],
    ids=str,
)  # fmt: skip
def test_files_that_may_be_the_split_as_well_are_refused(tmp_path, others):
    """Not read as more of it, and not left out unsaid."""
    put(tmp_path, "train.csv", *others)
    if "TRAIN.csv" in others:
        others = others[1:]
    with pytest.raises(AssetError, match=r"2 files in .* may be the split 'train': .*move the others away") as caught:
        find(tmp_path, "train")
    assert others[-1].split("/")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["train-00001-of-00003.csv", "train-00000-of-00003.csv", "train-00002-of-00003.csv"], [1, 0, 2]),
        (["train-00000-of-00001-3a1b2c.csv"], [0]),
        (["train_2.csv", "train_10.csv", "train_9.csv", "train_3.csv", *(f"train_{i}.csv" for i in range(4, 9))], None),
        (["train/0001.csv", "train/0000.csv"], [1, 0]),
        (["lambada_train.csv"], [0]),
        (["my-train-data.csv"], [0]),
        (["train-v2.csv"], [0]),
    ],
)
def test_numbered_parts_are_read_in_order(tmp_path, files, wanted):
    for number, name in enumerate(files):
        put(tmp_path, name, content=f"text\n{number}\n")
    found = find(tmp_path, "train")
    want = [files[i] for i in wanted] if wanted else sorted(files, key=lambda n: int(n.split("_")[1].split(".")[0]))
    assert [file.relative_to(tmp_path).as_posix() for file in found] == want
    assert read(found, ["text"]).columns["text"] == [str(files.index(name)) for name in want]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00000-of-00002.csv"], "is not whole: of its parts 0 to 1, 1 is missing"),
        (["train-00001-of-00002.csv"], "of its parts 0 to 1, 0 is missing"),
        (["train_1.csv", "train_3.csv"], "of its parts 1 to 3, 2 is missing"),
        (["train-1.csv", "train-01.csv"], "2 files .* may be the split"),
        (["train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"], "3 files .* may be"),
        (["train-0.csv", "train-1.json"], "2 files .* may be the split"),
        (["train-a.csv", "train-b.csv"], "2 files .* may be the split"),
    ],
)
def test_parts_that_are_missing_or_of_several_sets_are_refused(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(AssetError, match=message):
        find(tmp_path, "train")


def test_the_folder_itself_comes_first_and_the_configuration_s_before_it(tmp_path):
    put(tmp_path, "train.csv", "data/train.csv", "mrpc/train.csv", "mrpc/data/test.csv", "plain_text/validation.csv")
    assert find(tmp_path, "train") == [tmp_path / "train.csv"]
    assert find(tmp_path, "train", "mrpc") == [tmp_path / "mrpc/train.csv"]
    assert find(tmp_path, "test", "mrpc") == [tmp_path / "mrpc/data/test.csv"]
    assert find(tmp_path, "validation") == [tmp_path / "plain_text/validation.csv"]
    assert find(tmp_path, "test") == []


def test_other_names_of_the_validation_split(tmp_path):
    put(tmp_path / "a", "dev.csv", "test.csv")
    put(tmp_path / "b", "val.csv", "validation.csv")
    put(tmp_path / "c", "validation_matched.csv", "validation_mismatched.csv", "validation.csv")
    put(tmp_path / "d", "dev_matched.csv", "dev_mismatched.csv")
    assert names(find(tmp_path / "a", "validation")) == ["dev.csv"]
    assert names(find(tmp_path / "b", "validation")) == ["validation.csv"]
    for split in ("validation", "validation_matched", "validation_mismatched"):
        assert names(find(tmp_path / "c", split)) == [f"{split}.csv"]
    assert names(find(tmp_path / "d", "validation_mismatched")) == ["dev_mismatched.csv"]
    assert find(tmp_path / "d", "train") == [] and "it holds dev_matched.csv, dev_mismatched.csv" in listing(
        tmp_path / "d"
    )


def test_a_readme_says_which_files_are_what(tmp_path):
    put(tmp_path, "x/one.csv", "x/one.csv~", "x/.two.csv", "x/three.csv", "train.csv")
    header = {
        "{'configs': [{'config_name': 'mrpc', 'data_files': [{'split': 'train', 'path': 'x/one*'}]}]}": ["one.csv"],
        "{'configs': [{'config_name': 'mrpc', 'data_files': {'train': ['x/three.csv']}}]}": ["three.csv"],
        "{'configs': [{'config_name': 'default', 'data_dir': 'x', 'data_files': 'one*'}]}": ["one.csv"],
        "{'configs': [{'config_name': 'rte', 'data_files': 'x/one*'}]}": ["train.csv"],  # another's
        "{'configs': [{'config_name': 'mrpc', 'data_files': [{'split': 'test', 'path': 'x/one*'}]}]}": [],
        "{'license': 'mit'}": ["train.csv"],
        "[1": ["train.csv"],  # no header at all
    }
    for said, want in header.items():
        (tmp_path / "README.md").write_text(f"---\n{said}\n---\n# A data set\n")
        assert names(find(tmp_path, "train", "mrpc")) == want, said
    (tmp_path / "README.md").write_text("---\n{'configs': [{'config_name': 'mrpc', 'data_files': 'x/*'}]}\n---\n")
    with pytest.raises(AssetError, match="2 files .* may be the split 'train': one.csv, three.csv"):
        find(tmp_path, "train", "mrpc")


@pytest.mark.parametrize("names_said", [{"0": "pos", "1": "neg"}, {"1": "neg", "0": "pos"}, ["pos", "neg"]])
def test_a_readme_names_the_classes(tmp_path, names_said):
    features = [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": {"class_label": {"names": names_said}}}]
    for info in ({"features": features}, [{"config_name": "mrpc", "features": features}, {"config_name": "rte"}]):
        (tmp_path / "README.md").write_text(f"---\n{json.dumps({'dataset_info': info})}\n---\n")
        assert card_names(tmp_path, "mrpc", "label") == ["pos", "neg"]
        assert card_names(tmp_path, "mrpc", "text") is None
    (tmp_path / "README.md").unlink()
    assert card_names(tmp_path, "mrpc", "label") is None
    old = {"mrpc": {"features": {"label": {"names": ["pos", "neg"], "_type": "ClassLabel"}}}}
    (tmp_path / "dataset_infos.json").write_text(json.dumps(old))
    assert card_names(tmp_path, "mrpc", "label") == ["pos", "neg"]


# --------------------------------------------------------------------------------------------------- reading


def written(folder, kind):
    """ROWS in a file of that format."""
    path, frame = folder / f"train{kind}", pd.DataFrame(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    if kind in (".csv", ".tsv"):
        frame.to_csv(path, sep="\t" if kind == ".tsv" else ",", index=False)
    elif kind in (".jsonl", ".ndjson"):
        path.write_text(lines)
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == ".parquet":
        frame.to_parquet(path)
    elif kind == ".arrow":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder / "train")
        (path,) = (folder / "train").glob("*.arrow")
    else:
        data = frame.to_csv(index=False) if kind.startswith(".csv") else lines
        path.write_bytes(packed[path.suffix].compress(data.encode()))
    return path


KINDS = [".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv.gz", ".jsonl.bz2", ".jsonl.xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_says_the_same(tmp_path, kind):
    """Words that pandas takes for gaps stay words."""
    path = written(tmp_path, kind)
    assert find(tmp_path, "train") == [path]
    table = read([path], ["text", "label", "more"])
    assert table.columns["text"] == TEXTS and list(map(int, table.columns["label"])) == [0, 1, 1]
    assert set(table.columns) == {"text", "label"} == set(table.found)
    assert read([path], ["text"], limit=2).columns == {"text": TEXTS[:2]}
    assert read([path, path], ["text"], limit=4).columns == {"text": [*TEXTS, TEXTS[0]]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named(tmp_path, kind):
    path = written(tmp_path, kind)
    whole = path.read_bytes()
    cuts = (
        [len(whole) // 2, 10] if kind in (".parquet", ".arrow", ".csv.gz", ".jsonl.bz2", ".jsonl.xz", ".json") else []
    )
    for keep in cuts:
        path.write_bytes(whole[:keep])
        with pytest.raises(AssetError, match=r"train|data-0") as caught:
            read([path], ["text"])
        assert "copy it again" in str(caught.value).lower()
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert find(tmp_path, "train") == [path], "a link to nothing is not left out unsaid"
    with pytest.raises(AssetError, match="cannot be read"):
        read([path], ["text"])


def csv_of(tmp_path, data, name="train.csv"):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / name


def test_empty_fields_and_words_for_nothing_are_what_they_are(tmp_path):
    words = ["", "None", "N/A", "NA", "null", "NaN", "nan", "n/a", "#N/A", "-", " ", "1", "1.0", "True"]
    path = csv_of(tmp_path, "label,text\n" + "".join(f"0,{word}\n" for word in words))
    assert read([path], ["text"]).columns["text"] == words


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        ("text,label\na,1\nb, c,0\n", 3, "it has 3 fields, and the header 2"),
        ("text,label\na,1\nb\n", 3, "it has 1 fields, and the header 2"),
        ("text,label\na,1,2\nb,0,2\n", 2, "it has 3 fields"),  # pandas: an index, and everything one column to the left
        ('text,label\n"a,1\nb,0\n', 3, "unexpected end of data"),
        ('text,label\n"a" film,1\n', 2, "expected after"),
        ('text,label\n"\\"a\\"",1\n', 2, "expected after"),
    ],
)
def test_ragged_tables_are_refused_at_their_line(tmp_path, name, data, line, reason):
    data = data.replace(",", "\t") if name.endswith(".tsv") else data
    with pytest.raises(AssetError, match=rf"{name} is ragged at line {line}: .*{reason}.*in double quotes"):
        read([csv_of(tmp_path, data, name)], ["text", "label"])


def test_tables_as_programs_write_them(tmp_path):
    """With a byte order mark, other line ends, blank lines, quotes, very long texts, an index, other columns."""
    path = csv_of(tmp_path, b'\xef\xbb\xbf,text,label\r\n0,"a ""b""\nc",1\r\n\r\n1,\xc3\xa9,0\r\n')
    assert read([path], ["text", "label"]).columns == {"text": ['a "b"\nc', "é"], "label": ["1", "0"]}
    long = "x" * 300_000
    assert read([csv_of(tmp_path, f"text\n{long}\n")], ["text"]).columns["text"] == [long]
    with pytest.raises(AssetError, match="has the column 'text' twice"):
        read([csv_of(tmp_path, "text,text\na,b\n")], ["text"])
    assert read([csv_of(tmp_path, "")], ["text"]).columns == {}


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.json", "train.txt"])
def test_other_encodings_are_refused_with_the_remedy(tmp_path, name):
    text = '{"text": "café"}\n' if "json" in name else "text\n\ncafé\n"
    path = csv_of(tmp_path, text.encode("latin-1"), name)
    line = text.split("é")[0].count("\n") + 1
    with pytest.raises(
        AssetError, match=rf"{name} is not in UTF-8: line {line} has the byte 0xe9.*iconv -f LATIN1 -t UTF-8"
    ):
        read([path], ["text"])
    with pytest.raises(AssetError, match=r"is in UTF-16.*iconv -f UTF-16 -t UTF-8"):
        read([csv_of(tmp_path, text.encode("utf-16"), name)], ["text"])
    with pytest.raises(AssetError, match="is packed .zip or gzip., whatever its name says. Unpack it"):
        read([csv_of(tmp_path, gzip.compress(text.encode()), name)], ["text"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": "b', "no JSON at line 2"),
        ('{"text": "a"}\n\n[1, 2]\n', r"must hold objects.*number 3 is \[1, 2\]"),
        ('[{"text": "a"}, "b"]', "number 2 is 'b'"),
        ('{"text": ["a", "b"], "label": [1]}', "columns of different lengths"),
        ("text,label\na,1\n", "no JSON at line 1"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(AssetError, match=message):
        read([csv_of(tmp_path, text, "train.jsonl")], ["text"])


def test_json_in_its_other_shapes(tmp_path):
    columns = csv_of(tmp_path, '{"text": ["a", "b"], "label": [1, 0]}', "train.json")
    assert read([columns], ["text", "label"]).columns == {"text": ["a", "b"], "label": [1, 0]}
    odd = csv_of(tmp_path, '{"text": "a\u2028b"}\n{"label": 1}', "train.jsonl")  # no line end; a gap
    assert read([odd], ["text", "label"]).columns == {"text": ["a\u2028b", None], "label": [None, 1]}


def test_the_names_of_classes_come_along(tmp_path):
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    data = datasets.Dataset.from_list(ROWS, features=named)
    data.to_parquet(tmp_path / "train.parquet")
    data.save_to_disk(tmp_path / "saved/train")
    for folder in (tmp_path, tmp_path / "saved"):
        table = read(find(folder, "train"), ["text", "label"])
        assert table.names == {"label": ["pos", "neg"]} and table.columns["label"] == [0, 1, 1]
    other = data.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    (tmp_path / "parts").mkdir()
    data.to_parquet(tmp_path / "parts/train-00000-of-00002.parquet")
    other.to_parquet(tmp_path / "parts/train-00001-of-00002.parquet")
    with pytest.raises(
        AssetError, match="train-00001-of-00002.parquet has other columns or classes than the parts before"
    ):
        read(find(tmp_path / "parts", "train"), ["label"])
