"""Alpha-sampled fine-tuning: Eq. 3, resuming, LoRA, saving and loading, on tiny models and synthetic samples."""

import dataclasses
import errno
import json

import datasets
import numpy as np
import pytest
import tiny
import torch
import transformers

import zsaa
from zsaa import finetune
from zsaa.dial import settings
from zsaa.finetune import Recipe, alpha_range, draw_alpha, fine_tune, trainer


def samples(count=48, seed=0):
    """Label 1 when token 7 occurs: learnable, and only by attending."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        n = int(torch.randint(8, 30, (1,), generator=generator))
        ids = torch.randint(8, 97, (n,), generator=generator).tolist()
        if i % 2:
            ids[n // 2] = 7
        rows.append({"input_ids": ids, "attention_mask": [1] * n, "labels": i % 2})
    return datasets.Dataset.from_list(rows)


def model(family="llama", dtype=torch.float32):
    return tiny.make(family, "sequence-classification", dtype=dtype)


def test_the_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs, recipe.dropout, recipe.tau) == (4e-5, 8, 5, 0.1, 5)
    assert alpha_range(recipe, tiny.make("gpt2")) == (0.02, 1.0)
    assert alpha_range(recipe, tiny.make("llama")) == alpha_range(recipe, tiny.make("gemma2")) == (0.5, 1.0)
    assert alpha_range(Recipe(method="conventional"), tiny.make("llama")) == (1.0, 1.0)
    assert alpha_range(Recipe(alpha_range=(0.2, 0.3)), tiny.make("llama")) == (0.2, 0.3)


def test_eq_3_draws_are_uniform_reproducible_and_differ_by_step_and_seed():
    draws = [draw_alpha(0.02, 1.0, 0, step) for step in range(4000)]
    assert draws == [draw_alpha(0.02, 1.0, 0, step) for step in range(4000)]
    assert draws[:10] != [draw_alpha(0.02, 1.0, 1, step) for step in range(10)]
    assert min(draws) >= 0.02 and max(draws) <= 1.0
    shares = torch.histc(torch.tensor(draws), bins=10, min=0.02, max=1.0) / 4000
    assert (shares - 0.1).abs().max() < 0.02, "each tenth of the range gets a tenth of the draws"


@pytest.mark.parametrize(
    "bad", [{"method": "magic"}, {"tuning": "half"}, {"alpha_range": (0.9, 0.1)}, {"alpha_range": (0, 1)}]
)
def test_bad_recipes(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "|alpha"):
        Recipe(**bad)


OPEN, AT_LEAST_1 = r"in \(0, inf\)", "a whole number, 1 or more"
NO_NUMBERS = (None, "4e-5", "1", True, float("nan"), float("inf"), -1, [1])
FIELDS = {  # what each may be, and more that it may not
    "learning_rate": (OPEN, 0, 0.0),
    "epochs": (OPEN, 0),
    "lora_alpha": (OPEN, 0),
    "dropout": (r"in \[0, 1\)", -0.1, 1, 1.0),
    "distill": (r"in \[0, 1\]", 1.1),
    "crops": (r"in \[0, 1\]", 1.1),
    "strongest": (r"in \[1, inf\)", 0.9),
    **dict.fromkeys(("batch_size", "gradient_accumulation", "max_length", "lora_rank"), (AT_LEAST_1, 0, 2.0)),
    "max_steps": (rf"{AT_LEAST_1}, or -1 \(none, epochs decide\)", 0, -2, 5.0),
    "seed": ("a whole number from 0 to 4294967295", 2**32, 0.0),
    "exits": ("a whole number, 0 or more", -1, 2.0),
    "group_by_length": ("True or False", 0, "false"),
    "gradient_checkpointing": ("True or False", 1, "false"),
}


def values_to_try():
    for name, (allowed, *more) in FIELDS.items():
        good = {"max_steps": [-1]}.get(name, [True] if allowed == "True or False" else [])
        for value in (*NO_NUMBERS, *more):
            if not any(value is g or (type(value) is type(g) and value == g) for g in good):
                yield pytest.param(name, value, allowed, id=f"{name}={value!r}")


@pytest.mark.parametrize(("name", "value", "allowed"), list(values_to_try()))
def test_numbers_out_of_range_are_refused_with_the_range(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}, got ") as caught:
        Recipe(**{name: value}, **({"sampling": "ladder"} if name in ("distill", "crops") else {}))
    assert repr(value) in str(caught.value)
    remedy = "which is text: give a number (YAML reads 2e-5 as text"
    assert (remedy in str(caught.value)) == (isinstance(value, str) and "True" not in allowed)


def test_every_number_of_a_recipe_has_its_range():
    numbers = {f.name for f in dataclasses.fields(Recipe) if isinstance(f.default, (int, float))}
    assert numbers == {*FIELDS, "tau"}, "tau's is the dial's"
    for tau in (0, "5", 5.0):
        with pytest.raises((TypeError, ValueError), match="tau must be"):
            Recipe(tau=tau)
    for pair in (0.5, (0.5,), (0.1, 0.5, 1.0), "lo"):
        with pytest.raises((TypeError, ValueError), match="alpha"):
            Recipe(alpha_range=pair)


def test_numpy_s_scalars_are_numbers():
    recipe = Recipe(learning_rate=np.float32(0.5), batch_size=np.int64(4), alpha_range=(np.float64(0.5), 1))
    assert recipe == Recipe(learning_rate=0.5, batch_size=4, alpha_range=(0.5, 1.0))
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["learning_rate"] == 0.5


@pytest.mark.parametrize("how", ["alpha-sampled", "ladder", "lora", "the last step", "accumulated"])
def test_a_training_that_diverges_is_refused_and_leaves_nothing(how, tmp_path):
    """Also where checkpoints were saved before, and where only the last update, which no loss has seen, spoils all."""
    more = {"ladder": {"sampling": "ladder"}, "lora": {"tuning": "lora"}, "accumulated": {"gradient_accumulation": 2}}
    recipe = Recipe(**{"learning_rate": 1e30, "max_steps": 4, **more.get(how, {})})
    if how == "the last step":
        recipe = dataclasses.replace(recipe, learning_rate=1e39, max_steps=1)
    net = model()
    with pytest.raises(
        ValueError, match=r"(loss is|weights \S+ are) .*diverged.*learning_rate below 1e\+3\d"
    ) as caught:
        fine_tune(net, tiny.Padder(), samples(), recipe, tmp_path / "out", save_steps=1, log_steps=1, progress=False)
    assert ("weights" in str(caught.value)) or how != "the last step"
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert settings(net)["alpha"] == 1


def test_a_checkpoint_holds_numbers(tmp_path, monkeypatch):
    """Or a run that is started again would begin with what has spoilt it."""
    saved = []
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", lambda self, *a: saved.append(self.state.global_step))
    net = model()

    def spoil(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                net.score.weight[0, 0] = float("inf")

    monkeypatch.setattr(finetune.AlphaSampler, "on_step_end", spoil)
    with pytest.raises(ValueError, match=r"weights score.weight are not finite in step 2"):
        fine_tune(net, tiny.Padder(), samples(), Recipe(max_steps=3), tmp_path, save_steps=1, progress=False)
    assert saved == [1]


BAD_LABELS = {"words": "positive", "float": 0.5, "whole float": 1.0, "hidden": -1, "left out": -100, "too large": 2,
              "flag": True, "none": None, "list": [1]}  # fmt: skip


@pytest.mark.parametrize("value", BAD_LABELS.values(), ids=list(BAD_LABELS))
def test_labels_that_are_no_class_are_refused_before_anything_is_trained(value, tmp_path):
    rows = samples(8).to_list()
    uniform = isinstance(value, int) and not isinstance(value, bool)
    changed = [{**row, "labels": value if i == 5 or not uniform else row["labels"]} for i, row in enumerate(rows)]
    number = 5 if uniform else 0
    match = rf"sample {number} of the training set has the label .*a whole number from 0 to 1. Mend or remove it"
    for data in (changed, datasets.Dataset.from_list(changed)):
        net = model()
        with pytest.raises(ValueError, match=match) as caught:
            fine_tune(net, tiny.Padder(), data, Recipe(max_steps=1), tmp_path / "out", progress=False)
        assert value is None or repr(value) in str(caught.value)
        assert not (tmp_path / "out").exists() and not hasattr(net.model, "_zsaa")


def texts(labels):
    """Samples of a language model."""
    ids = [row["input_ids"] for row in samples(4)]
    return [{"input_ids": i, "attention_mask": [1] * len(i), "labels": labels(i)} for i in ids]


@pytest.mark.parametrize(
    "labels", [lambda i: [-100] * len(i), lambda i: [97] * len(i), lambda i: [-1, *i[1:]], lambda i: i[1:],
               lambda i: 1, lambda i: [0.5] * len(i), lambda i: ["w"] * len(i)],
    ids=["all -100", "no token", "-1", "too few", "a class", "floats", "words"],
)  # fmt: skip
def test_labels_of_a_language_model_that_teach_nothing_are_refused(labels, tmp_path):
    net = tiny.make("llama", dtype=torch.float32)
    with pytest.raises(
        ValueError, match="sample 0 of the training set has the labels .*-100 where none counts, but not"
    ):
        fine_tune(net, tiny.Padder(), texts(labels), Recipe(max_steps=1), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_samples_that_cannot_be_read_are_refused(tmp_path):
    rows = samples(4).to_list()
    cases = {
        "the training set is empty": [],
        "no column 'input_ids'": [{"labels": 1}],
        "no column 'labels'": [{"input_ids": [3]}],
        r"sample 0 .* has the input_ids \[\]": [{**rows[0], "input_ids": []}],
        r"sample 1 .*input_ids \[97\]; they must be whole numbers from 0 to 96": [
            rows[0],
            {**rows[0], "input_ids": [97]},
        ],
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=message):
            fine_tune(model(), tiny.Padder(), data, Recipe(max_steps=1), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    for name in ("save_steps", "log_steps"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, 1 or more"):
            fine_tune(model(), tiny.Padder(), rows, Recipe(max_steps=1), tmp_path / "out", **{name: 0})


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_learns_saves_and_loads_with_the_dial_ready(tuning, tmp_path):
    recipe = Recipe(tuning=tuning, learning_rate=3e-3, epochs=6, alpha_range=(0.6, 1.0), tau=4, lora_rank=4)
    net = model()
    base = tmp_path / "base"
    net.save_pretrained(base)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    trained, log = fine_tune(net, tiny.Padder(), samples(), recipe, tmp_path, log_steps=4, progress=False)
    assert log["steps"] == 36 and log["alpha_range"] == [0.6, 1.0]
    losses = [loss for _, loss in log["loss"]]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses
    rule = {"tau": 4, "score": "column_sum", "schedule": "geometric"}
    assert settings(trained) == {"alpha": 1.0, **rule, "alpha_range": (0.6, 1.0), "depth": None, "depth_range": None}
    folder = tmp_path / "model"
    file = json.loads((folder / ("zsaa.json" if tuning == "lora" else "config.json")).read_text())
    assert (file if tuning == "lora" else file["zsaa"])["alpha_range"] == [0.6, 1.0]
    assert (folder / "zsaa.json").is_file() == (tuning == "lora")
    assert not (tmp_path / "checkpoints").exists()
    if tuning == "full":
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(stock).__name__ == "LlamaForSequenceClassification"
    else:
        import peft

        stock = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        stock = peft.PeftModel.from_pretrained(stock, folder)
    ids = tiny.tokens([25])[0]
    trained, stock = trained.eval(), stock.eval()
    torch.testing.assert_close(stock(ids).logits, trained(ids).logits)


def test_the_dial_is_turned_every_step(tmp_path, monkeypatch):
    turned = []
    monkeypatch.setattr(zsaa, "set_alpha", lambda net, alpha: turned.append(alpha))
    fine_tune(model(), tiny.Padder(), samples(), Recipe(max_steps=5), tmp_path, progress=False)
    assert turned == [*(draw_alpha(0.5, 1.0, 0, step) for step in range(5)), 1.0]


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.full)])
def test_resuming_gives_the_same_weights(tuning, tmp_path):
    recipe = Recipe(tuning=tuning, learning_rate=1e-3, max_steps=8, dropout=0.1)

    def run(folder, **kwargs):
        return fine_tune(model(), tiny.Padder(), samples(), recipe, folder, save_steps=4, progress=False, **kwargs)[0]

    whole = run(tmp_path / "whole").state_dict()

    class Killed(Exception):
        pass

    def die(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.AlphaSampler, "on_step_end", die)
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / "checkpoint-4").is_dir()
    resumed = run(tmp_path / "parts").state_dict()
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def killed(folder, recipe, net=None, data=None):
    """A training that is killed after its checkpoint at step 2."""

    class Killed(Exception):
        pass

    def die(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetune.AlphaSampler, "on_step_end", die)
        fine_tune(net or model(), tiny.Padder(), data or samples(), recipe, folder, save_steps=2, progress=False)


def drawn(monkeypatch):
    """The steps that are trained from here on."""
    steps = []
    monkeypatch.setattr(trainer, "draw_alpha", lambda *a: steps.append(a[-1]) or draw_alpha(*a))
    return steps


def named(folder, seed):
    tiny.make("llama", "sequence-classification", seed=seed, dtype=torch.float32).save_pretrained(folder)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("other", ["recipe", "data", "model"])
def test_checkpoints_of_another_training_are_refused(other, tmp_path, monkeypatch):
    recipe = Recipe(learning_rate=1e-3, max_steps=4)
    killed(tmp_path, recipe, named(tmp_path / "first/m", 0))
    here = {"recipe": recipe, "data": samples(), "model": named(tmp_path / "second/m", 0)}  # the folder may move
    changed = {"recipe": Recipe(learning_rate=2e-3, max_steps=4), "data": samples(seed=1), "model": None}
    changed["model"] = named(tmp_path / "third/m", 1)
    what = {"recipe": "recipe: learning_rate 0.001 there, 0.002 here", "data": "data ", "model": "model: embeddings "}

    def run(given):
        order = (given["model"], tiny.Padder(), given["data"], given["recipe"], tmp_path)
        return fine_tune(*order, save_steps=3, progress=False)

    with pytest.raises(ValueError, match=f"another training .{what[other]}.*remove .*resume=False"):
        run({**here, other: changed[other]})
    steps = drawn(monkeypatch)
    run(here)
    assert steps == [2, 3], "it goes on where it stopped"
    assert not (tmp_path / "checkpoints").exists()


def test_beginning_anew_leaves_no_checkpoint_of_another_training(tmp_path):
    killed(tmp_path, Recipe(learning_rate=1e-3, max_steps=4))
    recipe = Recipe(learning_rate=2e-3, max_steps=3)
    found = []

    def look(self, args, state, control, **kwargs):
        found.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.AlphaSampler, "on_save", look, raising=False)
        options = {"resume": False, "save_steps": 1, "progress": False}
        fine_tune(model(), tiny.Padder(), samples(), recipe, tmp_path, **options)
    assert found[0] == ["checkpoint-1", "training.json"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_checkpoints_of_earlier_versions_are_taken_up_unless_they_tell_of_another_recipe(tuning, tmp_path, monkeypatch):
    recipe = Recipe(tuning=tuning, learning_rate=1e-3, max_steps=4)
    killed(tmp_path, recipe)
    (tmp_path / "checkpoints" / finetune.TRAINING_FILE).unlink()
    others = {"max_steps": 5, "batch_size": 4, **({"lora_rank": 4} if tuning == "lora" else {"tau": 2})}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"another training .recipe: {name} {getattr(recipe, name)} there"):
            changed = dataclasses.replace(recipe, **{name: value})
            fine_tune(model(), tiny.Padder(), samples(), changed, tmp_path, save_steps=2, progress=False)
    steps = drawn(monkeypatch)
    fine_tune(model(), tiny.Padder(), samples(), recipe, tmp_path, progress=False)
    assert steps == [2, 3]


def test_accumulated_batches_report_the_loss_of_one_large_batch(tmp_path):
    """transformers alone reports it twice as large for a classifier, and doubles the gradients."""
    losses = []
    for size, times in ((4, 1), (2, 2)):
        recipe = Recipe(batch_size=size, gradient_accumulation=times, max_steps=3, dropout=0.0, alpha_range=(0.6, 1.0))
        _, log = fine_tune(model(), tiny.Padder(), samples(), recipe, tmp_path / str(size), log_steps=1, progress=False)
        losses.append([loss for _, loss in log["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    def run(seed, name):
        recipe = Recipe(learning_rate=1e-3, max_steps=3, seed=seed)
        return fine_tune(model(), tiny.Padder(), samples(), recipe, tmp_path / name, progress=False)[0].score.weight

    assert torch.equal(run(0, "a"), run(0, "b"))
    assert not torch.equal(run(0, "c"), run(1, "d"))


def test_a_full_disk_leaves_the_old_model_in_place(tmp_path, monkeypatch):
    net = zsaa.enable(model())
    finetune.save(net, tiny.Padder(), tmp_path / "model")
    before = sorted(p.name for p in (tmp_path / "model").iterdir())

    def full(self, folder, *args, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def makes_folder(folder, *args, **kwargs):
        folder.mkdir()
        full(None, folder)

    monkeypatch.setattr(net, "save_pretrained", makes_folder)
    with pytest.raises(OSError, match="No space left on device. Free some space"):
        finetune.save(net, tiny.Padder(), tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_loading_a_folder_that_zsaa_did_not_save(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither zsaa.json"):
        finetune.load(tmp_path)
    for name in ("openai-community/gpt2", tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=f"there is no folder {name}.*zsaa.models.load_model, then zsaa.enable"
        ):
            finetune.load(name)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_folders_of_earlier_versions_are_loaded_if_their_schedule_is_there(adapter, tmp_path):
    """Those that name none had Eq. 2 alone."""
    model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    net = finetune.add_lora(net, Recipe(tuning="lora")) if adapter else net
    folder = tmp_path / "model"
    finetune.save(zsaa.enable(net, tau=3, score="column_mean"), tiny.tokenizer(), folder)
    file = folder / ("zsaa.json" if adapter else "config.json")
    written = json.loads(file.read_text())
    entry = written if adapter else written["zsaa"]
    assert entry.pop("schedule") == "geometric"
    for schedule in ({}, {"schedule": "geometric"}, {"schedule": "rising"}):
        entry.update(schedule)
        file.write_text(json.dumps(written))
        again, _ = finetune.load(folder, kind="sequence-classification")
        rule = {"tau": 3, "score": "column_mean", **(schedule or {"schedule": "geometric"})}
        assert settings(again) == {"alpha": 1.0, **rule, "alpha_range": None, "depth": None, "depth_range": None}
    entry["schedule"] = "once"
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"with schedule 'once'.*only 'geometric' .*, 'rising' and 'entry' are"):
        finetune.load(folder, kind="sequence-classification")


def test_recipes_are_plain_data():
    assert Recipe(**dataclasses.asdict(Recipe(seed=3))) == Recipe(seed=3)
