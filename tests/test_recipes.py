"""A recipe of our own beside the paper's, which stays as it is: ladder steps, distillation, the learned score."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_finetune import model, samples

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import variants as bench
from ablation.scorers import Probe
from ablation.train import _passes
from ablation.training import Training
from zsaa import finetune
from zsaa.data.batching import pad
from zsaa.dial import settings
from zsaa.finetune import RECIPES, LadderTrainer, Recipe, draw_reductions, fine_tune, loop
from zsaa.finetune.adapters import set_dropout
from zsaa.learned import salience
from zsaa.measure import distributed

OWN = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "strongest": 3.0}


def run(recipe, folder, net=None, data=None, **kwargs):
    net = model() if net is None else net
    return fine_tune(net, tiny.Padder(), data or samples(24), recipe, folder, progress=False, **kwargs)


def test_the_paper_is_the_default_and_has_nothing_of_the_rest():
    assert Recipe() == Recipe.named() == Recipe.named("paper")
    paper = Recipe.named("paper")
    assert (paper.sampling, paper.schedule, paper.score, paper.distill) == ("alpha", "geometric", "column_sum", 0)
    own = Recipe.named("zsaa+", epochs=2)
    assert (own.sampling, own.schedule, own.score, own.distill) == ("ladder", "geometric", "salience", 0.5)
    assert own.tau == 2 and paper.tau == 5
    assert own.epochs == 2 and own.strongest == 12
    assert Recipe.named("zsaa+", **{name: getattr(paper, name) for name in RECIPES["zsaa+"]}) == paper
    assert own.learning_rate == 2e-4 and paper.learning_rate == 4e-5
    adapter = Recipe.named("zsaa+", tuning="lora", lora_rank=4)
    assert (adapter.schedule, adapter.distill) == ("rising", 1)
    assert (adapter.learning_rate, adapter.epochs, adapter.lora_rank, adapter.batch_size) == (1e-3, 5, 4, 32)
    assert (adapter.crops, adapter.dropout, adapter.tau) == (0.5, 0, 2)
    assert (own.crops, own.dropout) == (paper.crops, paper.dropout) == (0, 0.1)
    assert Recipe.named(tuning="lora").learning_rate == 4e-5


def test_the_paper_s_run_is_what_it_was(tmp_path):
    """Trainer with alpha turned at each step, and nothing else: the same weights bit for bit."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    trained, _ = run(Recipe.named("paper", max_steps=5), tmp_path / "a")
    plain = zsaa.enable(model())
    set_dropout(plain, 0.1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "b"), learning_rate=4e-5, per_device_train_batch_size=8, max_steps=5, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    sampler = finetune.AlphaSampler(plain, 0.5, 1.0, 0)
    collator = DataCollatorWithPadding(tiny.Padder())
    trainer = Trainer(plain, arguments, train_dataset=samples(24), data_collator=collator, callbacks=[sampler])
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    for (name, a), b in zip(trained.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sampling": "salad"}, "sampling must be one of"),
        ({"score": "luck"}, "unknown score"),
        ({"schedule": "once"}, "unknown schedule 'once'"),
        ({"distill": 0.5}, "needs the alpha = 1 pass"),
        ({"score": "salience"}, "'salience' needs the alpha = 1 pass"),
        ({"distill": 1.5, "sampling": "ladder"}, r"distill must be in \[0, 1\]"),
        ({"crops": 0.5}, "crops=0.5 is of ladder steps"),
        ({"crops": -1, "sampling": "ladder"}, r"crops must be in \[0, 1\]"),
        ({"strongest": 0.5}, r"strongest must be in \[1, inf\)"),
        ({"sampling": "ladder", "method": "conventional"}, "goes neither with"),
        ({"sampling": "ladder", "alpha_range": (0.5, 1)}, "nor with an alpha_range"),
    ],
)
def test_bad_recipes(bad, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**bad)


def test_unknown_names():
    with pytest.raises(ValueError, match="no recipe 'best'. Available: conventional, depth, paper, zsaa"):
        Recipe.named("best")


def test_reductions_are_log_uniform_reproducible_and_differ_by_step_and_seed():
    draws = [draw_reductions(12.0, 0, step) for step in range(4000)]
    assert draws == [draw_reductions(12.0, 0, step) for step in range(4000)]
    assert draws[:10] != [draw_reductions(12.0, 1, step) for step in range(10)]
    for half, drawn in enumerate(torch.tensor(draws, dtype=torch.float64).log().T / math.log(12)):
        shares = torch.histc(drawn, bins=10, min=half / 2, max=(1 + half) / 2) / 4000
        assert (shares - 0.1).abs().max() < 0.02 and shares.sum() == pytest.approx(1)
    weak, strong = torch.tensor(draws).T
    assert torch.corrcoef(torch.stack((weak, strong)))[0, 1].abs() < 0.05, "independent of each other"


@pytest.mark.full
@pytest.mark.parametrize("name", ["ladder", "salience", "zsaa+"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_learns(name, tuning, tmp_path):
    changes = {"ladder": {"sampling": "ladder"}, "zsaa+": RECIPES["zsaa+"]}
    changes["salience"] = {"sampling": "ladder", "score": "salience", "schedule": "rising"}
    recipe = Recipe(**{**changes[name], **OWN, "tuning": tuning, "max_steps": 60, "learning_rate": 3e-3})
    base = tmp_path / "base"
    net = model()
    net.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    net = type(net).from_pretrained(base)
    trained, log = run(recipe, tmp_path, net, samples(48), log_steps=6)
    losses = [loss for _, loss in log["loss"]]
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2]), losses
    assert log["steps"] == 60 and settings(trained)["alpha"] == 1 and settings(trained)["schedule"] == recipe.schedule
    low = log["alpha_range"][0]
    assert 0 < low < 1 and log["alpha_range"][1] == 1 and settings(trained)["alpha_range"][0] == low
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    again, _ = finetune.load(tmp_path / "model", kind="sequence-classification", dtype=torch.float32)
    assert settings(again) == settings(trained)
    ids = tiny.tokens([25])[0]
    with torch.no_grad(), zsaa.at(trained, 0.7), zsaa.at(again, 0.7):
        torch.testing.assert_close(again(ids).logits, trained.eval()(ids).logits)
    scorer = salience.scorer_of(trained)
    assert (scorer is not None) == (recipe.score == "salience")
    if scorer is not None:
        torch.manual_seed(recipe.seed)
        before = salience.fresh(trained).heads["0"][1][0].weight
        assert 0.01 < (scorer.heads["0"][1][0].weight - before).abs().max() < 0.2, "60 steps at 1e-3, falling"


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.full
def test_resuming_gives_the_same_weights(tuning, tmp_path, monkeypatch):
    recipe = Recipe.named("zsaa+", **{**OWN, "max_steps": 8, "tuning": tuning})
    whole, _ = run(recipe, tmp_path / "whole", save_steps=4)

    class Killed(Exception):
        pass

    step = LadderTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LadderTrainer, "training_step", die)
    with pytest.raises(Killed):
        run(recipe, tmp_path / "parts", save_steps=4)
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoints" / "checkpoint-4" / salience.FILE).is_file()
    resumed, log = run(recipe, tmp_path / "parts", save_steps=4)
    assert log["steps"] == 8
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any("salience" in name for name in whole.state_dict())


class Steps(LadderTrainer):
    """Keeps the gradients of the first step, as they are before and after they are clipped."""

    def training_step(self, model, inputs, *args):
        loss = super().training_step(model, inputs, *args)
        Steps.seen.append((loss, self.gradients(), dict(inputs)))
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        Steps.clipped.append((norm, self.gradients()))
        return norm

    def gradients(self):
        return {n: p.grad.clone() for n, p in self.dialed.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_bench_s_gradients(checkpointing, tmp_path, monkeypatch):
    """Three passes over the same batch, in the bench's plain code: loss, distillation, the scorer's lesson."""
    monkeypatch.setattr(loop, "LadderTrainer", Steps)
    monkeypatch.setattr(Steps, "seen", [], raising=False)
    monkeypatch.setattr(Steps, "clipped", [], raising=False)
    recipe = Recipe.named("zsaa+", **OWN, schedule="rising", dropout=0.0, gradient_checkpointing=checkpointing)
    net = model(dtype=torch.float64)
    torch.manual_seed(5)
    scorer = salience.attach(net, salience.fresh(net))
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    run(recipe, tmp_path, net)
    loss, gradients, inputs = Steps.seen[0]
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    texts = [row[: int(n)].tolist() for row, n in zip(ids, mask.sum(1))]
    plain = model(dtype=torch.float64).train()
    plain.load_state_dict({k: v for k, v in start.items() if "salience" not in k})
    judge = Probe(plain.config.hidden_size, range(4), wide=True)
    judge.load_state_dict({k.split("salience.")[1]: v for k, v in start.items() if "salience" in k})
    drawn = draw_reductions(recipe.strongest, 0, 0)
    alphas = [1.0, *(finetune.reduced_to(times, recipe, net, [len(t) for t in texts]) for times in drawn)]
    assert alphas[2] < alphas[1] < 1
    ladder = Training(sampling="ladder", distill=0.5, probe="wide")
    variant = bench.Variant(tau=recipe.tau, schedule=recipe.schedule)
    first, _ = _passes(plain, judge, [texts] * len(alphas), labels, alphas, variant, ladder, 1.0)
    assert loss.item() < 2 * first, "the scorer's loss does not show in the training's"
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    for name, parameter in judge.named_parameters():
        found = gradients[f"model.salience.{name}"]
        assert found.abs().max() > 1e-3 or name.endswith("1.2.bias"), "what all scores have in common chooses nothing"
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    norm, clipped = Steps.clipped[0]
    own = torch.stack([p.grad.double().norm() for p in plain.parameters()]).norm()
    assert norm.item() == pytest.approx(own.item(), rel=1e-4) and norm > 1
    for name, gradient in clipped.items():
        factor = 1.0 if "salience" in name else 1 / (norm + 1e-6)
        torch.testing.assert_close(gradient, (gradients[name] * factor).to(gradient.dtype), msg=name)


def test_a_window_is_successive_tokens_of_a_text():
    draw, text = random.Random(0), list(range(40))
    windows = [finetune.window(text, draw) for _ in range(400)]
    assert all(w == list(range(w[0], w[0] + len(w))) and len(w) >= 20 for w in windows)
    assert {21, 30, 40} <= {len(w) for w in windows} and {0, 7, 15} <= {w[0] for w in windows}
    assert finetune.window([5], draw) == [5] and finetune.window([], draw) == []


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bos", [None, 1])
def test_half_of_the_texts_are_read_in_part(side, bos):
    recipe, generator = Recipe.named("zsaa+", crops=0.5, seed=3), torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 90, (40 + i % 3,), generator=generator).tolist() for i in range(200)]
    texts = [[bos, *text[1:]] if bos else text for text in texts]
    ids, mask = pad(texts, 0, "cpu", side)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(200)}

    def read(step, given=batch):
        found = finetune.crop(given, recipe, step, bos)
        padding = found["attention_mask"] == 0
        assert (found["input_ids"][padding] == 0).all() and found["labels"] is given["labels"]
        assert not padding[:, -1 if side == "left" else 0].any()
        return [row[~out].tolist() for row, out in zip(found["input_ids"], padding)]

    found = read(0)
    shorter = [i for i in range(200) if found[i] != texts[i]]
    assert 70 < len(shorter) < 130
    for i in shorter:
        part, whole = (text[1 if bos else 0 :] for text in (found[i], texts[i]))
        at = next(k for k in range(len(whole)) if whole[k : k + len(part)] == part)
        assert len(part) >= len(whole) // 2 and at >= 0 and found[i][0] == (bos or part[0])
    lengths = [len(found[i]) for i in shorter]
    assert min(lengths) < 24 and max(lengths) > 36
    assert read(0) == found != read(1)
    alone = {key: value[:1] for key, value in batch.items()} | {"input_ids": torch.tensor([[bos or 7]])}
    alone["attention_mask"] = torch.ones(1, 1, dtype=torch.long)  # of a text without words its leading token is all
    assert all(finetune.crop(alone, recipe, step, bos)["input_ids"].tolist() == [[bos or 7]] for step in range(9))
    backwards = finetune.crop({key: value.flip(0) for key, value in batch.items()}, recipe, 0, bos)
    assert torch.equal(backwards["input_ids"].flip(0), finetune.crop(batch, recipe, 0, bos)["input_ids"])


@pytest.mark.full
def test_a_resumed_run_reads_the_same_parts(tmp_path, monkeypatch):
    """And learns the same weights; and what it reads is not what a run without crops reads."""
    recipe = Recipe.named("zsaa+", **OWN, crops=0.5, dropout=0.0)
    whole, _ = run(recipe, tmp_path / "whole")
    other, _ = run(Recipe.named("zsaa+", **OWN, dropout=0.0), tmp_path / "other")

    class Stops(LadderTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "LadderTrainer", Stops)
        run(recipe, tmp_path / "cut", save_steps=2)
    resumed, _ = run(recipe, tmp_path / "cut", save_steps=2)
    a, b, c = (net.state_dict() for net in (whole, resumed, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_the_passes_of_a_step_and_the_scorer_s_rate(tmp_path, monkeypatch):
    turned = []
    turn = zsaa.set_alpha
    monkeypatch.setattr(zsaa, "set_alpha", lambda net, alpha: (turned.append(alpha), turn(net, alpha)))
    rates = []

    class Peek(LadderTrainer):
        def create_scheduler(self, *args, **kwargs):
            rates.extend((g["lr"], g["weight_decay"], len(g["params"])) for g in self.optimizer.param_groups)
            return super().create_scheduler(*args, **kwargs)

    monkeypatch.setattr(loop, "LadderTrainer", Peek)
    net, _ = run(Recipe.named("zsaa+", **{**OWN, "max_steps": 2, "learning_rate": 2e-3}), tmp_path)
    assert len(turned) == 2 * 3 + 1 and turned[::3] == [1.0, 1.0, 1.0]
    assert 1 > turned[1] > turned[2] and 1 > turned[4] > turned[5] and turned[1] != turned[4]
    assert sum(count for *_, count in rates) == len(list(net.parameters()))
    assert rates[2:] == [(1e-3, 0.01, 4 * 6)] and {rate for rate, *_ in rates[:2]} == {2e-3}


def test_accumulated_batches_add_up(tmp_path):
    """Each batch solves alpha for its own lengths, so all have the same here."""
    data = samples(24).map(lambda row: {k: v[:8] if isinstance(v, list) else v for k, v in row.items()})
    losses = []
    for size, times in ((4, 1), (2, 2)):
        changes = {**OWN, "max_steps": 2, "batch_size": size, "gradient_accumulation": times, "dropout": 0.0}
        recipe = Recipe.named("zsaa+", **changes)
        _, log = run(recipe, tmp_path / str(size), data=data, log_steps=1)
        losses.append([loss for _, loss in log["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_language_models_are_refused(tmp_path):
    rows = samples(8).map(lambda row: {"labels": row["input_ids"]})
    for recipe in (Recipe.named("zsaa+"), Recipe(sampling="ladder")):
        with pytest.raises(ValueError, match="needs a classifier"):
            run(recipe, tmp_path, tiny.make("llama", dtype=torch.float32), rows)


@pytest.mark.full
def test_half_precision(tmp_path):
    """Autocast stays out of the scores."""
    trained, log = run(Recipe.named("zsaa+", **OWN, precision="bf16"), tmp_path, log_steps=1)
    assert all(math.isfinite(loss) for _, loss in log["loss"])
    assert all(p.dtype == torch.float32 for p in salience.scorer_of(trained).parameters())


def _shared(folder, processes):
    """One process' part of a small run, on texts of one length: alpha is then the same in all batches."""
    data = samples(32).map(lambda row: {k: v[:8] if isinstance(v, list) else v for k, v in row.items()})
    changes = {"tau": 2, "strongest": 2.0, "max_steps": 6, "learning_rate": 1e-3}
    recipe = Recipe.named("zsaa+", **changes, batch_size=8 // processes, dropout=0.0, precision="fp32")
    net, _ = run(recipe, folder, model(dtype=torch.float64), data)
    everywhere = distributed.gather({k: v.double().sum().item() for k, v in net.state_dict().items()})
    assert all(theirs == everywhere[0] for theirs in everywhere)
    distributed.on_first(lambda: torch.save(net.state_dict(), f"{folder}.pt"))


@pytest.mark.full
def test_two_processes_train_like_one(tmp_path):
    pytest.importorskip("transformers", minversion="5.18", reason="older Trainers do not train on several CPUs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hf")}
    here = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for processes in (1, 2):
        command = [*here, str(processes), __file__, str(tmp_path / str(processes)), str(processes)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    idle = [name for name in one if "salience" in name and name.endswith("1.2.bias")]
    for name in one.keys() - set(idle):  # all scores of a text have those in common: they follow rounding errors
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    _shared(sys.argv[1], int(sys.argv[2]))
