"""Recorded training passes: the gradients of the passes that they replace, in rooms of few sizes.

Without a GPU a stand-in runs the recorded functions again, which read their buffers and the table of sizes as a replay
does. With a GPU the real thing is tested too.
"""

import datasets
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import zsaa
from zsaa.dial import captured
from zsaa.fast import graphs, training
from zsaa.finetune import Recipe, fine_tune
from zsaa.passes import Plan, Request
from zsaa.rule import Rule

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
BATCHES = [([23, 23], "right"), ([23, 9, 30], "left"), ([40, 5, 17], "right")]


class StandIn:
    def __init__(self, device, pool):
        pool[:] = ["pool"]

    def record(self, run):
        self.replay = run
        return run(), 1000


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu", "cuda"))


def pair(family="llama", head="sequence-classification", device="cpu", **kwargs):
    """The same model, recorded and not."""
    options = dict(alpha=0.7, tau=3)
    made = [tiny.make(family, head, **kwargs).to(device).train() for _ in range(2)]
    return [zsaa.enable(model, graphs=mode, **options) for model, mode in zip(made, (True, False))]


def loss_of(model, lengths, seed=0, padding="right", **options):
    ids, mask, _ = tiny.tokens(lengths, seed, padding)
    device = model.device
    labels = torch.arange(len(lengths)) % 2 if hasattr(model, "score") else ids.masked_fill(mask == 0, -100)
    given = dict(attention_mask=mask.to(device), labels=labels.to(device), use_cache=False)
    return model(ids.to(device), **given, **options).loss


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alike(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=0, atol=atol * max(1.0, float(theirs[name].abs().max()))
        )


def made(model):
    return [(row["rows"], row["alpha"], row["replays"]) for row in captured(model)["training"]]


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=5),
    st.floats(0.02, 1.0),
    st.integers(1, 9),
    st.sampled_from(["geometric", "rising"]),
    st.integers(0, 40),
)
def test_a_bucket_has_room_for_whatever_falls_into_it(lengths, alpha, tau, schedule, more):
    request = Request(
        lengths=tuple(lengths),
        width=max(lengths) + more,
        alphas=(alpha,) * len(lengths),
        rule=Rule(tau, schedule=schedule),
        num_layers=6,
        carry=True,
        device=torch.device("cpu"),
    )
    bucket = training.bucket_of(request)
    plan, room = Plan(request), Plan(bucket)
    fits = training.fitted(room, plan.sizes, tau)
    assert training.bucket_of(bucket).alphas == bucket.alphas
    assert bucket.width > request.width and bucket.lengths[0] >= max(lengths)
    assert all((size <= width).all() for size, width in zip(plan.sizes, room.widths))
    assert all(drops or not exact for drops, exact in zip(fits.drops, plan.drops))
    for real, sizes, width in zip(fits.real, plan.sizes, room.widths):
        assert real.shape == (len(lengths), width)
        assert torch.equal(real.sum(1), sizes)


def test_buckets_are_few():
    rooms = {training.rows_of(n) for n in range(1, 513)}
    assert len(rooms) == 24 and all(training.rows_of(n) == n for n in rooms)
    assert all(training.rows_of(n) < n * 1.15 for n in range(128, 5000))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("lengths", "padding"), BATCHES, ids=str)
@pytest.mark.parametrize("head", ["sequence-classification", "causal-lm"])
def test_gradients_are_those_of_the_pass(stand_in, family, lengths, padding, head):
    ours, theirs = pair(family, head)
    for alpha in (0.7, 0.72, 0.9):
        for seed in range(2):
            losses = [loss_of(model, lengths, seed, padding, alpha=alpha) for model in (ours, theirs)]
            torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
            for loss in losses:
                loss.backward()  # gradients add up over the passes
    alike(gradients(ours), gradients(theirs), 1e-6)
    assert captured(ours)["off"] is None and sum(row[2] for row in made(ours)) == 6
    assert len(made(ours)) == 2 and not made(theirs)


def test_one_recording_serves_many_lengths_and_alphas(stand_in):
    ours, theirs = pair()
    for lengths, alpha in (([23, 23], 0.7), ([25, 29], 0.74), ([32, 4], 0.71)):
        for model in (ours, theirs):
            loss_of(model, lengths, alpha=alpha).backward()
    alike(gradients(ours), gradients(theirs), 1e-9)
    assert made(ours) == [(32, 0.75, 3)]


@pytest.mark.parametrize("score", ["column_mean", "random", "salience"])
def test_other_scores(stand_in, score):
    from zsaa.learned import salience

    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(0)
        if score == "salience":
            salience.attach(model, salience.fresh(model))
        zsaa.enable(model, score=score)
        for seed in range(2):
            loss_of(model, [23, 9, 30], seed).backward()
    alike(gradients(ours), gradients(theirs), 1e-9)
    assert made(ours) == [(32, 0.75, 2)]


def test_a_second_pass_before_the_first_ones_backward_runs_as_it_is(stand_in):
    ours, theirs = pair()
    for model in (ours, theirs):
        first, second = loss_of(model, [23, 23]), loss_of(model, [23, 23], seed=1)
        (first + second).backward()
        with torch.no_grad():
            loss_of(model, [23, 23])
        dropped = loss_of(model, [23, 23], seed=2)
        del dropped  # nobody can ask for its backward
        loss_of(model, [23, 23], seed=3).backward()
    alike(gradients(ours), gradients(theirs), 1e-9)
    assert made(ours) == [(32, 0.75, 3)]


def test_a_second_backward_says_so(stand_in):
    model, _ = pair()
    loss = loss_of(model, [23, 23])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="graphs=False"):
        loss.backward()


def test_what_cannot_be_recorded_runs_as_it_is(stand_in):
    ours, theirs = pair()
    for model in (ours, theirs):
        with zsaa.trace(model):
            loss_of(model, [23, 23]).backward()
        ids, mask, _ = tiny.tokens([23, 23])
        model(ids, use_cache=True, labels=torch.tensor([0, 1])).loss.backward()
        model(ids, exempt=mask.cumsum(1) < 4, use_cache=False, labels=torch.tensor([0, 1])).loss.backward()
        model(inputs_embeds=model.model.embed_tokens(ids), use_cache=False, labels=torch.tensor([0, 1])).loss.backward()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, [23, 23]).backward()
    alike(gradients(ours), gradients(theirs), 1e-9)
    assert not made(ours) and captured(ours)["off"] is None


def test_weights_that_are_replaced_are_recorded_anew(stand_in):
    ours, theirs = pair()
    for model in (ours, theirs):
        loss_of(model, [23, 23]).backward()
        model.zero_grad()
        norm = model.model.layers[1].input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
        loss_of(model, [23, 23]).backward()
    alike(gradients(ours), gradients(theirs), 1e-9)
    assert made(ours) == [(32, 0.75, 1)]


def test_a_replay_that_differs_is_never_used(stand_in, monkeypatch):
    monkeypatch.setattr(StandIn, "record", lambda self, run: setattr(self, "replay", lambda: None) or (run(), 0))
    ours, theirs = pair()
    with pytest.warns(UserWarning, match="records no training passes"):
        loss_of(ours, [23, 23]).backward()
    loss_of(theirs, [23, 23]).backward()
    alike(gradients(ours), gradients(theirs), 1e-12)


def test_a_deep_model_is_checked_on_numbers_that_are_some(stand_in):
    """A token without a state has a gradient that grows a thousandfold in every layer: none is made for the check."""
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers, config.initializer_range, config.num_labels = 30, 0.2, 2
    model = zsaa.enable(tiny.HEADS["sequence-classification"].from_config(config).train(), alpha=0.6, graphs=True)
    loss_of(model, [23, 9]).backward()
    assert captured(model)["off"] is None and made(model) == [(32, 0.625, 1)]


def test_adapters_learn_alike(stand_in):
    import peft

    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", init_lora_weights=False)
    kept = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny.make("llama", "sequence-classification"), settings).train()
        zsaa.enable(model, alpha=0.7, tau=3, graphs=mode)
        for seed in range(2):
            loss_of(model, [23, 9], seed).backward()
        kept.append(gradients(model))
    alike(*kept, 1e-9)


@pytest.mark.parametrize("name", ["paper", "zsaa+"])
def test_a_recipe_learns_the_same(stand_in, tmp_path, name):
    """A ladder's first pass is watched where a score is learned, and runs as it is; the other two are replayed."""
    recipe = Recipe.named(name, max_steps=6, batch_size=4, dropout=0.0, precision="fp32")
    texts = [tiny.tokens([12 + 3 * i], seed=i)[0][0].tolist() for i in range(8)]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2} for i, ids in enumerate(texts)]
    logs = []
    for mode in (True, False):
        model = tiny.make("llama", "sequence-classification", dtype=torch.float32)
        given = (model, tiny.tokenizer(), datasets.Dataset.from_list(rows), recipe, tmp_path / str(mode))
        model, log = fine_tune(*given, progress=False, log_steps=1, graphs=mode)
        logs.append(log)
        assert captured(model)["mode"] == "auto" and not made(model)
    losses = [torch.tensor(log["loss"]) for log in logs]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert logs[0]["replays"] == (12 if name == "zsaa+" else 6) and "replays" not in logs[1]


@on_gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("lengths", "padding"), [([150, 150], "right"), ([150, 40, 200], "left")], ids=str)
def test_real_graphs_give_the_same_gradients(family, lengths, padding):
    """float32: sums in another order are as far apart as rounding is."""
    ours, theirs = pair(family, device="cuda", dtype=torch.float32)
    held = []
    for alpha in (0.7, 0.9, 0.72, 0.97, 0.7):
        for seed in range(2):
            losses = [loss_of(model, lengths, seed, padding, alpha=alpha) for model in (ours, theirs)]
            torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
            for loss in losses:
                loss.backward()
            held.append(losses)  # as a caller may: what they hang on stays
    alike(gradients(ours), gradients(theirs), 2e-3)
    assert captured(ours)["off"] is None
    assert sum(row[2] for row in made(ours)) == 10 and len(made(ours)) == 3


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_graphs_under_autocast(dtype):
    ours, theirs = pair("llama", device="cuda", dtype=torch.float32)
    for seed in range(4):
        for model in (ours, theirs):
            with torch.autocast("cuda", dtype):
                loss = loss_of(model, [200, 200], seed, alpha=1 - 1e-9)  # all go on: nothing hangs on a near tie
            loss.backward()
    alike(gradients(ours), gradients(theirs), 0.05)
    assert captured(ours)["off"] is None and sum(row[2] for row in made(ours)) == 4


@on_gpu
def test_real_graphs_train_as_the_trainer_does(tmp_path):
    """Adam over many buckets: losses stay together."""
    ours, theirs = pair("llama", device="cuda", dtype=torch.float32)
    kept = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        optimizer, kept[name] = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
        for step in range(24):
            alpha = (0.55, 0.8, 0.93, 0.99)[step % 4]
            loss = loss_of(model, [60 + step, 150, 90], seed=step % 3, alpha=alpha)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            kept[name].append(loss.item())
    assert captured(ours)["off"] is None
    torch.testing.assert_close(torch.tensor(kept["ours"][:8]), torch.tensor(kept["theirs"][:8]), rtol=0.02, atol=0.02)
