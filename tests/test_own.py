"""A data set of one's own: a folder with train.csv and test.csv, or what else it may be, and what is wrong with it."""

import json

import pytest

from zsaa.data.tasks import load_task
from zsaa.kit import figures, points
from zsaa.models import AssetError

TRAIN = "text,label\nNever came.,complaint\nThank you!,praise\nWhere is it?,question\n"


def folder(tmp_path, **files):
    place = tmp_path / "mine"
    place.mkdir()
    for name, text in files.items():
        (place / name.replace("_", ".", 1)).write_text(text)
    return place


def test_words_are_numbered_by_the_alphabet(tmp_path):
    task = load_task(str(folder(tmp_path, train_csv=TRAIN, test_csv="label,text\npraise,Good\nquestion,Why?\n")))
    assert (task.name, task.metric, task.paper_column, task.substitute) == ("mine", "accuracy", None, False)
    assert task.label_names == ("complaint", "praise", "question")
    assert task.train["label"] == [0, 1, 2] and task.test["label"] == [1, 2]
    assert task.test["text"] == ["Good", "Why?"] and task.source == "folder mine"


def test_numbers_json_pairs_and_a_validation_split(tmp_path):
    rows = [{"text": f"a{i}", "text_pair": f"b{i}", "label": i % 2} for i in range(8)]
    lines = "\n".join(map(json.dumps, rows))
    task = load_task(str(folder(tmp_path, train_jsonl=lines, validation_json=json.dumps(rows))), train=4, test=2)
    assert task.label_names == ("0", "1") and len(task.train) == 4 and len(task.test) == 2
    assert task.train.column_names == ["text", "text_pair", "label"]


def test_a_readme_names_the_classes_in_their_order(tmp_path):
    label = {"name": "label", "dtype": {"class_label": {"names": ["yes", "no"]}}}
    card = f"---\ndataset_info: {json.dumps({'features': [label]})}\n---\n"
    numbers = "text,label\na,0\nb,1\n"
    task = load_task(str(folder(tmp_path, train_csv=numbers, test_csv=numbers, README_md=card)))
    assert task.label_names == ("yes", "no") and task.test["label"] == [0, 1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train_csv": TRAIN}, "no split 'test'"),
        ({"test_csv": TRAIN}, "no split 'train'"),
        ({"train_csv": "text,class\na,b\n", "test_csv": TRAIN}, "no column 'label'; it has text, class"),
        (
            {"train_csv": TRAIN, "test_csv": "text,label\n,praise\n"},
            "row 1 of split 'test' of folder mine has an",
        ),
        ({"train_csv": TRAIN, "test_csv": "text,label\nx,\n"}, "row 1 of split 'test'"),
        ({"train_csv": "text,label\na,b\n", "test_csv": "text,label\na,b\n"}, "1 different labels"),
        ({"train_csv": TRAIN, "test_csv": "text,text_pair,label\na,b,praise\n"}, "text_pair"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, files, said):
    with pytest.raises(AssetError) as error:
        load_task(str(folder(tmp_path, **files)))
    assert said in str(error.value)


def test_a_name_that_is_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match="these are known: imdb, .* and folders"):
        load_task(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="leave source at 'auto'"):
        load_task(str(folder(tmp_path, train_csv=TRAIN, test_csv=TRAIN)), source="hub")


def test_its_accuracies_are_drawn():
    curve = points.read().query("file == 'accuracy/imdb-lora-alpha-sampled.json'")
    drawn = figures.accuracy_figures(curve.assign(task="mine", split="folder mine"))
    assert list(drawn) == ["mine"] and "folder mine" in drawn["mine"].get_label()
    assert not figures.accuracy_figures(curve.assign(task="other"))
