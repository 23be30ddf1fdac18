"""Alpha-sampled fine-tuning: Eq. 3, resuming, LoRA, saving and loading, on tiny models and synthetic samples."""

import dataclasses
import errno
import json

import datasets
import pytest
import tiny
import torch
import transformers

import zsaa
from zsaa import finetune
from zsaa.dial import settings
from zsaa.finetune import Recipe, alpha_range, draw_alpha, fine_tune


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
    assert settings(trained) == {"alpha": 1.0, **rule, "alpha_range": (0.6, 1.0)}
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
    monkeypatch.setattr(finetune.zsaa, "set_alpha", lambda net, alpha: turned.append(alpha))
    fine_tune(model(), tiny.Padder(), samples(), Recipe(max_steps=5), tmp_path, progress=False)
    assert turned == [*(draw_alpha(0.5, 1.0, 0, step) for step in range(5)), 1.0]


@pytest.mark.parametrize("tuning", ["full", "lora"])
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
    monkeypatch.setattr(finetune, "draw_alpha", lambda *a: steps.append(a[-1]) or draw_alpha(*a))
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
        assert settings(again) == {"alpha": 1.0, **rule, "alpha_range": None}
    entry["schedule"] = "once"
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"with schedule 'once'.*only 'geometric' .* and 'rising' are"):
        finetune.load(folder, kind="sequence-classification")


def test_recipes_are_plain_data():
    assert Recipe(**dataclasses.asdict(Recipe(seed=3))) == Recipe(seed=3)
