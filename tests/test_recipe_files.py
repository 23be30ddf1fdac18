"""Recipes are files: what each says, word for word, and what a wrong one is told."""

import hashlib
import json
from dataclasses import asdict

import pytest
import tiny

from zsaa.finetune import RECIPES, Recipe, describe
from zsaa.finetune.recipe import FOLDER
from zsaa.studies.command import job_of

PAPER = {
    "method": "alpha-sampled", "tuning": "full", "alpha_range": None, "tau": 5, "score": "column_sum",
    "schedule": "geometric", "learning_rate": 4e-5, "batch_size": 8, "epochs": 5.0, "max_steps": -1, "dropout": 0.1,
    "seed": 0, "max_length": 512, "lora_rank": 8, "lora_alpha": 16, "precision": "auto", "group_by_length": False,
    "gradient_checkpointing": False, "gradient_accumulation": 1, "sampling": "alpha", "distill": 0.0, "crops": 0.0,
    "strongest": 12.0, "exits": 0,
}  # fmt: skip
PLUS = {
    "score": "salience", "tau": 2, "sampling": "ladder", "distill": 0.5, "learning_rate": 2e-4, "batch_size": 32,
    "epochs": 1.0,
}  # fmt: skip
ADAPTERS = {
    **PLUS, "tuning": "lora", "schedule": "rising", "distill": 1.0, "crops": 0.5, "learning_rate": 1e-3,
    "lora_rank": 16, "lora_alpha": 32, "epochs": 5.0, "dropout": 0.0,
}  # fmt: skip


def exact(recipe):
    """Fields with the types they are written to result files with: 5.0 is not 5 there."""
    return {name: (type(value), value) for name, value in asdict(recipe).items()}


@pytest.mark.parametrize(
    ("asked", "changes", "fields"),
    [
        ("paper", {}, {}),
        ("paper", {"tuning": "lora"}, {"tuning": "lora"}),
        ("zsaa+", {}, PLUS),
        ("zsaa+", {"tuning": "lora"}, ADAPTERS),
        ("zsaa+", {"tuning": "full", "epochs": 2.0}, {**PLUS, "epochs": 2.0}),
        ("zsaa+", {"tuning": "lora", "lora_rank": 4, "seed": 3}, {**ADAPTERS, "lora_rank": 4, "seed": 3}),
    ],
)
def test_recipes_say_what_they_said_as_code(asked, changes, fields):
    """The values are those of the committed results; whoever changes one makes another recipe."""
    assert exact(Recipe.named(asked, **changes)) == {k: (type(v), v) for k, v in {**PAPER, **fields}.items()}


def test_every_packaged_file_is_a_recipe():
    """And the paper's lists all fields with its defaults, from which the others start."""
    made = {name: Recipe.named(name) for name in RECIPES}
    assert set(made) == {
        *("paper", "conventional", "depth", "zsaa+", "zsaa+-lora", "zsaa+-causal-lm", "zsaa+-causal-lm-lora")
    }
    assert made["zsaa+-causal-lm"] == Recipe.named("zsaa+", kind="causal-lm") != Recipe.named("zsaa+")
    assert made["zsaa+-causal-lm-lora"] == Recipe.named("zsaa+", kind="causal-lm", tuning="lora")
    assert made["zsaa+"] == Recipe.named("zsaa+", kind="sequence-classification")
    assert made["paper"] == Recipe.named("paper", kind="causal-lm")
    assert RECIPES["paper"] == {**PAPER} and made["paper"] == Recipe()
    assert made["zsaa+-lora"] == Recipe.named("zsaa+", tuning="lora")
    assert made["conventional"] == Recipe(method="conventional")
    for recipe in made.values():
        text = (FOLDER / recipe.file["name"]).read_bytes()
        assert recipe.file["sha256"] == hashlib.sha256(text).hexdigest() and text.startswith(b"#")


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_of_one_s_own(tmp_path):
    path = written(tmp_path, "# mine\ntuning: lora\nepochs: 2.0\nalpha_range: [0.4, 1.0]\n")
    recipe = Recipe.from_file(path)
    assert recipe == Recipe(tuning="lora", epochs=2.0, alpha_range=(0.4, 1.0)) == Recipe.named(str(path))
    assert recipe.file["name"] == "mine.yaml" and recipe.file["fields"]["alpha_range"] == [0.4, 1.0]
    other = Recipe.from_file(path, seed=3)
    assert other == Recipe.from_file(path).changed(seed=3) != recipe and other.file == recipe.file


def test_a_result_says_from_which_file_it_was_made(tmp_path):
    net = tiny.make("llama", "sequence-classification")
    said = json.loads(json.dumps(describe(Recipe.named("zsaa+", tuning="lora", seed=3), net)))
    assert said["file"]["name"] == "zsaa+-lora.yaml" and len(said["file"]["sha256"]) == 64
    assert {**said["file"]["fields"], "seed": 3}.items() <= {**said, "method": "alpha-sampled"}.items()
    assert describe(Recipe(), net)["file"] is None
    assert said.keys() == asdict(Recipe()).keys() | {"file"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "mine.yaml: a recipe has no field 'epoch'. Did you mean epochs. These are known: method, tuning"),
        ("2: 3", "mine.yaml: a recipe has no field 2. These are known"),
        ("file: a", "has no field 'file'"),
        ("dropout: 1.5", r"mine.yaml: dropout must be in \[0, 1\), got 1.5"),
        ("learning_rate: 4e-5", "mine.yaml: learning_rate .*got '4e-5', which is text: give a number"),
        ("tuning: [lora]", r"mine.yaml: tuning must be one of \('full', 'lora'\), got \['lora'\]"),
        ("score: luck", "mine.yaml: unknown score 'luck'. Available: column_sum"),
        ("alpha_range: [0.9, 0.5]", "mine.yaml: alpha_range must be .* low <= high"),
        ("seed: yes", "mine.yaml: seed must be a whole number"),
        ("crops: 0.5", "mine.yaml: crops=0.5 is of ladder steps: use sampling='ladder'"),
        ("- epochs", r"mine.yaml holds \['epochs'\], not fields of a recipe. Write one a line, as in `epochs: 5.0`"),
        ("", "mine.yaml holds None"),
        ("epochs: [", "mine.yaml is no YAML: .*Write one field a line"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Recipe.from_file(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe file .*mine.yml. Packaged recipes go by name: conventional"):
        Recipe.named(str(tmp_path / "mine.yml"))


def test_a_job_of_several_seeds_keeps_the_file(tmp_path):
    path = str(written(tmp_path, "tuning: lora"))
    asked = job_of(["--recipe", path, "--changes.epochs", "2.0", "--seeds", "[1, 2]"])
    recipes = [one.recipe for one in asked.each()]
    assert recipes == [Recipe(tuning="lora", epochs=2.0, seed=seed) for seed in (1, 2)]
    assert [recipe.file["name"] for recipe in recipes] == ["mine.yaml"] * 2
