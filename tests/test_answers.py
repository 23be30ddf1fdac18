"""The study of answers: real dropping equals masked dropping, no sample depends on its batch mates, costs add up."""

import copy
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zsaa
from ablation.answers import controls, cost, school, ship, teach, train, writer
from ablation.answers import judge as judging
from ablation.answers.data import Data, Sample, judge
from ablation.answers.model import adapt, adapters, merge
from ablation.answers.reader import answer, at_answers, batch, chunks_of, ranks, read
from ablation.answers.train import Dial, Row, _parts, reductions
from zsaa.learned import asked, salience
from zsaa.learned.asked import FAR, Scorer, Shape
from zsaa.learned.salience import Affine

CHUNK = 8


@pytest.fixture(scope="module")
def lm():
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
    return model.double().eval()


def sample(n: int, seed: int, turns: int = 6) -> Sample:
    rng = random.Random(seed)

    def ids(k):
        return tuple(rng.randrange(1, 97) for _ in range(k))

    return Sample(ids(n), ids(turns), ids(turns), ids(7), ids(4), (10, 12), ("a",))


def scorer_for(width: int = 32, chunk: int = CHUNK) -> Scorer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        s = Scorer(Shape(32, width, chunk=chunk), torch.arange(97) // 2, torch.rand(97) * 5)
        for p in s.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return s.eval()


def masked(lm, ids, place_alive):
    """Logits by transformers' own model, whose mask hides from each layer what has left before it."""
    n = len(ids)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    x = lm.model.embed_tokens(ids[None])
    position = torch.arange(n)[None]
    by = lm.model.rotary_emb(x, position)
    for layer, alive in zip(lm.model.layers, place_alive):
        mask = torch.zeros(n, n, dtype=x.dtype).masked_fill(~(causal & (alive[None] | torch.eye(n).bool())), -1e30)
        x = layer(x, attention_mask=mask[None, None], position_embeddings=by)
        x = x[0] if isinstance(x, tuple) else x
    return lm.lm_head(lm.model.norm(x))[0]


def test_real_dropping_equals_masked_dropping(lm):
    samples = [sample(50, 1), sample(33, 2), sample(71, 3)]
    b = batch(samples, "cpu")
    scores = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[40, 20], [30, 14], [60, 30]])
    rows = read(lm, b, (1, 3), keep, lambda x: scores, unit=chunks_of(b, CHUNK))
    logs, gold, owner = at_answers(lm, rows, b)
    for i, s in enumerate(samples):
        n, total = int(b.prompt[i]), int(b.total[i])
        rank = ranks(scores, b, chunks_of(b, CHUNK))[i, :total]
        alive = [torch.ones(total, dtype=torch.bool), rank < keep[i, 0], rank < keep[i, 0], rank < keep[i, 1]]
        assert [int(a[:n].sum()) for a in alive] == [n, *keep[i, [0, 0, 1]].tolist()]
        assert all(a[n:].all() and a[:4].all() and a[b.region[i] : n].all() for a in alive)
        want = masked(lm, b.ids[i, :total], alive)[n - 1 : total - 1].float().log_softmax(-1)
        assert torch.allclose(logs[owner == i], want.double().float(), atol=1e-5)
        assert gold[owner == i].tolist() == list(s.answer)


def test_answers_are_those_of_the_model_and_its_masked_pass(lm):
    samples = [sample(50, 1), sample(20, 2)]
    b = batch(samples, "cpu", answers=False)
    for i, said in enumerate(answer(lm, b, end=-1, limit=6)):
        n = int(b.prompt[i])
        ids = b.ids[i : i + 1, :n]
        want = lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert said == want[0, n:].tolist()
    scores, keep = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([[30], [22]])
    for i, said in enumerate(
        answer(lm, b, end=-1, limit=6, steps=(2,), keep=keep, choose=lambda x: scores, unit=chunks_of(b, CHUNK))
    ):
        n = int(b.prompt[i])
        stays = ranks(scores, b, chunks_of(b, CHUNK))[i, :n] < keep[i, 0]
        ids = b.ids[i, :n]
        for token in said:
            alive = torch.cat([stays, torch.ones(len(ids) - n, dtype=torch.bool)])
            whole = torch.ones(len(ids), dtype=torch.bool)
            assert masked(lm, ids, [whole, whole, alive, alive])[-1].argmax() == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_what_is_numbered_anew_is_read_as_a_shorter_prompt(lm):
    b = batch([sample(50, 1), sample(20, 2)], "cpu", answers=False)
    scores, keep = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([[30], [22]])
    how = {"steps": (0,), "keep": keep, "choose": lambda x: scores, "unit": chunks_of(b, CHUNK), "close": True}
    for i, said in enumerate(answer(lm, b, end=-1, limit=6, **how)):
        n = int(b.prompt[i])
        ids = b.ids[i : i + 1, :n][:, ranks(scores, b, chunks_of(b, CHUNK))[i, :n] < keep[i, 0]]
        want = lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert said == want[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("width", [0, 32])
@pytest.mark.parametrize("history", [False, True])
def test_no_sample_depends_on_its_batch_mates(lm, width, history):
    scorer, row = scorer_for(width), Row("x", "dial", "once")
    samples = [sample(50, 1), sample(23, 2, turns=0), sample(90, 3, turns=9)]
    dial = Dial(row, scorer, lm.config)
    together = batch(samples, "cpu", history=history)
    logs, _, owner = at_answers(lm, read(lm, together, **dial.how(together, 2.0)), together)
    scores = teach.look(scorer, read(lm, together, layers=0).x, together)
    for i, s in enumerate(samples):
        b = batch([s], "cpu", history=history)
        alone, _, _ = at_answers(lm, read(lm, b, **dial.how(b, 2.0)), b)
        assert torch.allclose(logs[owner == i], alone, atol=1e-6)
        one = teach.look(scorer, read(lm, b, layers=0).x, b)[0]
        assert torch.allclose(scores[i, : len(one)], one, atol=1e-5)
        assert (scores[i, len(one) :] == FAR).all()


def test_words_that_are_shared_lead_before_anything_is_learned():
    scorer = Scorer(Shape(32, 32, chunk=4), torch.arange(97), torch.ones(97)).eval()
    ids, head, part = torch.arange(1, 17)[None], torch.tensor([[9, 10, 50]]), torch.tensor([[3, 3, 3]])
    scores = scorer(torch.zeros(1, 16, 32), ids, torch.tensor([16]), torch.zeros(1, 3, 32), head, part)
    assert scores.argmax() == 2


def test_a_dial_meets_its_reduction_with_the_scorers_cost(lm):
    shape = (576, 9, 3, 64, 1536, 30)
    for schedule in cost.SCHEDULES.values():
        for reduction in (2.0, 5.0):
            kept = cost.solve(shape, 1200, 30, reduction, schedule, 10**8)
            spent = cost.macs(shape, 1200, schedule, kept) + 10**8
            assert 0.97 < cost.macs(shape, 1200) / spent / reduction < 1.05
            assert list(kept) == sorted(kept, reverse=True) and kept[-1] >= 30
    token = 576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536
    assert cost.macs(shape, 100) == 30 * (100 * token + 100 * 100 * 2 * 9 * 64)
    assert cost.macs(shape, 100, ((10, 1.0),), [50]) == (
        10 * (100 * token + 100 * 100 * 2 * 9 * 64) + 20 * (50 * token + 50 * 50 * 2 * 9 * 64)
    )
    n = cost.whole(shape, 1200, 3.0)
    assert cost.macs(shape, n) * 3 <= cost.macs(shape, 1200) < cost.macs(shape, n + 1) * 3


def test_scorer_macs_count_its_linear_layers(lm):
    scorer, counted = scorer_for(), []

    def count(module, args, out):
        if isinstance(module, Affine):
            counted.append(out[..., 0].numel() * module.weight.numel())
        elif isinstance(module, torch.nn.Conv1d):
            counted.append(out.numel() * module.in_channels // module.groups * module.kernel_size[0])

    for m in scorer.modules():
        m.register_forward_hook(count)
    s = sample(36, 1, turns=2)
    b = batch([s], "cpu", answers=False)
    teach.look(scorer, torch.zeros(*b.ids.shape, 32), b)
    region, head = int(b.region[0]), 4 + 7
    chunks = -(-region // CHUNK)
    matches = region * head * 32 + head * chunks * (4 + 2) + 2 * head * chunks
    assert scorer.macs(region, head) == sum(counted) + matches


def fake_data():
    pieces = [f"w{i}" for i in range(97)]
    for i in (5, 50):
        pieces[i] = "."
    return SimpleNamespace(canon=list(range(97)), idf={}, pieces=pieces)


def test_every_control_keeps_what_it_says_and_the_question():
    s = Sample(tuple(range(1, 81)), (81, 82), (83, 84), (20, 70, 90), (3,), (33, 34), ("x",))
    for kind, way in controls.WAYS.items():
        worth = {"given": list(range(90))}.get(way.by)
        short = controls.cut(s, 47, kind, fake_data(), random.Random(0), worth, size=CHUNK)
        prompt = short.body + short.older + short.last + short.line
        assert len(prompt) == 47 and short.line == s.line
        region = prompt[: -len(s.line)]
        assert list(region) == sorted(region), kind
        if not way.turns:
            assert short.older + short.last == s.older + s.last
        if kind == "lexical":
            assert {20, 70} <= set(short.body)
        if way.knows:
            assert {34, 35} <= set(short.body)
            assert short.body[short.gold[0] : short.gold[1] + 1] == (34, 35)
        assert (short.gold is not None) == ({34, 35} <= set(short.body))
    assert controls.cut(s, 47, "last", fake_data(), random.Random(0)).body[-1] == 84
    assert controls.cut(s, 500, "bm25", fake_data(), random.Random(0)) == s
    few = controls.cut(s, 11, "learned", fake_data(), random.Random(0), [0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0], CHUNK)
    assert few.body == tuple(range(17, 25))


def test_sentences_end_where_they_end():
    region = (1, 2, 5, 3, 50, 4)
    assert controls.sentences(region, fake_data()) == [(0, 3), (3, 5), (5, 6)]


def test_exact_match_and_f1_by_squads_rules():
    assert judge("The  White.", ["white", "no"]) == (1.0, 1.0)
    assert judge("a white cat", ["white dog"])[0] == 0.0
    assert judge("a white cat", ["white dog"])[1] == pytest.approx(0.5)
    assert judge("", ["yes"]) == (0.0, 0.0)


def test_adapters_start_at_nothing_and_merge_into_what_they_were(lm):
    model = copy.deepcopy(lm).float()
    ids = torch.arange(1, 12)[None]
    before = model(ids).logits
    trained = adapt(model, first=1)
    assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    for p in trained:
        p.data.normal_(std=0.1)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert len(adapters(model)) == len(trained)
    merge(model)
    assert torch.allclose(model(ids).logits, adapted, atol=1e-4)


def test_what_is_watched_is_the_models_own_attention(lm):
    samples = [sample(40, 1), sample(24, 2)]
    b = batch(samples, "cpu")
    eager = LlamaForCausalLM._from_config(lm.config, attn_implementation="eager").double().eval()
    eager.load_state_dict(lm.state_dict())
    for kind in ("line", "answer"):
        watch = teach.Watch(b, kind, {2: [3]})
        read(lm, b, watch=watch)
        for i in range(len(samples)):
            n, total, region = int(b.prompt[i]), int(b.total[i]), int(b.region[i])
            p = eager(b.ids[i : i + 1, :total], output_attentions=True).attentions[2][0, 3]
            rows = range(region, n) if kind == "line" else range(n - 1, total - 1)
            tokens = sum(p[r, :region] for r in rows)
            tokens[:4] = 0
            want = torch.nn.functional.pad(tokens, (0, -region % teach.FINE)).unflatten(0, (-1, teach.FINE)).sum(1)
            assert torch.allclose(watch.seen[2][i, 0, : len(want)].double(), want, atol=1e-6)


def test_gradient_shares_are_those_of_autograd(lm):
    b = batch([sample(40, 1)], "cpu")
    share = teach.gradient_shares(lm, b, "cpu")[0]
    x = lm.model.embed_tokens(b.ids).detach().requires_grad_()
    n, total, region = int(b.prompt[0]), int(b.total[0]), int(b.region[0])
    logits = lm(inputs_embeds=x).logits[0, n - 1 : total - 1].float()
    loss = torch.nn.functional.cross_entropy(logits, b.ids[0, n:total], reduction="sum")
    pull = (torch.autograd.grad(loss, x)[0] * x).detach().sum(-1)[0].abs()[:region]
    pull[:4] = 0
    want = torch.nn.functional.pad(pull, (0, -region % teach.FINE)).unflatten(0, (-1, teach.FINE)).sum(1)
    assert torch.allclose(share.double(), want / want.sum(), atol=1e-5)
    assert all(p.grad is None for p in lm.parameters())


def test_reductions_are_a_weak_and_a_strong_one_and_seeded():
    for step in range(50):
        weak, strong = reductions(step, 0)
        assert 1 <= weak <= 12**0.5 <= strong <= 12
    assert reductions(3, 0) == reductions(3, 0) != reductions(3, 1)


def test_a_drawn_step_makes_one_pass_at_its_reduction(lm, monkeypatch):
    made = []

    def seen(lm, b, **how):
        made.append((b, how))
        return read(lm, b, **how)

    monkeypatch.setattr(train, "read", seen)
    for row in (Row("o", "drawn dial", "once", "x"), Row("r", "drawn cuts", cuts=("bm25-all",))):
        model, dial = copy.deepcopy(lm).float(), Dial(row, scorer_for(), lm.config) if row.scorer else None
        part = [sample(60, 1), sample(80, 2)]
        for step in range(8):
            made.clear()
            train.lesson(row, model, dial, part, 8, FakeData(), "cpu", step, random.Random(0))
            ((b, how),) = made
            reduction = train.drawn(step, row.seed)
            assert bool(how) == (dial is not None and reduction > 1)
            if dial is None:
                shape = cost.shape_of(lm.config)
                want = [cost.whole(shape, n, reduction) for n in (60 + 19, 80 + 19)]
                assert b.prompt.tolist() == want
    assert {train.drawn(step, 0) for step in range(60)} == set(train.DRAWN)


def test_micro_batches_stay_below_their_tokens_and_lose_nobody():
    samples = [sample(n, n) for n in (10, 20, 30, 100, 200)]  # 23 tokens more each
    parts = _parts(samples, 130)
    assert [len(p) for p in parts] == [2, 1, 1, 1]
    assert [s for p in parts for s in p] == samples


class FakeData:
    """Enough of Data to train on."""

    canon, idf, pieces, newline = list(range(97)), {}, [f"w{i}" for i in range(97)], 96

    def questions(self, split):
        return list(range(6))

    def sample(self, turn, passages, rng):
        return sample(30 * passages, turn)


@pytest.mark.parametrize("row", [Row("c", "conventional", size=4), Row("k", "cuts", size=4),
                                 Row("d", "dial", "once2", "x", size=4), Row("o", "drawn dial", "once", "x", size=4),
                                 Row("r", "drawn cuts", cuts=("bm25", "last"), size=4),
                                 Row("e", "drawn dial", "once", "x", size=4, exits=2),
                                 Row("s", "drawn dial", "once", "x", size=4, stills=(1, 2, 4))])  # fmt: skip
@pytest.mark.parametrize("mixed", [False, True])
def test_every_method_trains_its_adapters_and_nothing_else(lm, row, mixed, monkeypatch):
    """Also in bfloat16, as on a GPU."""
    model = copy.deepcopy(lm).to(torch.bfloat16 if mixed else torch.float32)
    for module in (train, judging, teach):
        monkeypatch.setattr(module, "mixed", lambda device: torch.autocast("cpu", torch.bfloat16, enabled=mixed))
    frozen, seen = {n: p.clone() for n, p in model.state_dict().items()}, []
    train.fit(row, model, scorer_for(), FakeData(), "cpu", lambda **r: seen.append(r), 1e9, 3, micro=250)
    assert len(seen) == 2 and seen[-1]["step"] == 3 and seen[-1]["loss"] > 0
    moved = {n for n, p in model.named_parameters() if n.endswith(".up") and p.abs().sum() > 0}
    assert len(moved) == 7 * (4 - row.depth)
    for name, p in model.state_dict().items():
        if not name.endswith((".up", ".down")):
            assert torch.equal(p, frozen[name.replace(".base", "")]), name
    dial = Dial(row, scorer_for(), model.config) if row.method == "dial" else None
    record = judging.judged(model, [sample(40, 1), sample(60, 2)], FakeText(), "cpu", dial, 1.5)
    assert record["n"] == 2 and len(record["f1s"]) == 2 and ("reached" in record) == bool(dial)


class FakeText(FakeData):
    def text(self, ids):
        return "a"


@pytest.mark.full
def test_a_scorer_learns_where_answers_are_and_keeps_its_best_weights(lm):
    """The answer's chunk shares no word with the question: only the learned part can find it."""
    marks, rng = (90, 91, 92, 93), random.Random(0)

    def pupil(seed):
        at = rng.randrange(8, 40, 4)
        body = tuple(rng.randrange(1, 60) for _ in range(48))
        body = body[:at] + marks + body[at + 4 :]
        target = torch.zeros(3 + 1)
        target[at // teach.FINE] = 1.0
        return teach.Lesson(Sample(body, (), (), (70, 71, 72), (1,), (at, at + 3), ("a",)), target[:3])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = Scorer(Shape(32, 32, chunk=16), torch.arange(97), torch.ones(97))
        pupils, worths = [pupil(i) for i in range(64)], iter([5.0, 1.0])
        kept = []

        def judged(s):
            kept.append({k: v.clone() for k, v in s.state_dict().items()})
            return next(worths)

        teach.teach(scorer, copy.deepcopy(lm).float(), 0, pupils, 260, "cpu", lambda **r: None, 1.0, 1.0, judged, 16)
    assert len(kept) == 2 and not torch.equal(kept[0]["read.0.weight"], kept[1]["read.0.weight"])
    assert all(torch.equal(v, kept[0][k]) for k, v in scorer.state_dict().items())
    right = 0
    for p in (pupil(i) for i in range(20)):
        b = batch([p.sample], "cpu", answers=False)
        x = lm.model.embed_tokens(b.ids).float()
        right += int(teach.look(scorer, x, b)[0].argmax()) in teach.gold_chunks(p.sample, 16)
    assert right >= 16


def test_committed_answers_say_what_their_rows_sum_up():
    """Means follow from the questions' own values, and every difference that is reported from both files' questions."""
    from ablation.answers.compare import Answers
    from zsaa.measure.stats import from_bits

    a, seen = Answers(), 0
    for (name, task, split, target), row in a.rows.items():
        f1s, right = a.f1s(name, task, split, target), from_bits(row["right"], row["n"])
        assert len(f1s) == row["n"] == len(a.stories[split]) and abs(f1s.mean() - row["f1"]) < 0.5, (name, task, target)
        assert round(100 * sum(right) / row["n"], 2) == row["exact_match"]
        assert all(f == 100 for f, r in zip(f1s, right) if r), "an exact match has an F1 of 100"
        assert row["ci95"][0] < row["f1"] < row["ci95"][1]
        seen += 1
    assert seen > 500 and "reference-oracle" not in a.controls and "reference-dial-once" not in a.controls
    cell = ("coqa-1", "CoQA, 100 test stories", 11.0)
    mean, low, high, p = a.apart(("once-c16", *cell), ("reference-bm25", *cell))
    assert abs(mean - (a.rows[("once-c16", *cell)]["f1"] - a.rows[("reference-bm25", *cell)]["f1"])) < 0.5
    assert low < mean < high and p < 0.01
    same = a.apart(("once-c16", *cell), ("once-c16", *cell))
    assert same == (0.0, 0.0, 0.0, 1.0)


def test_stories_are_resampled_whole():
    """Two stories that say the opposite, many questions each: as uncertain as two questions."""
    from ablation.answers.results import over_stories

    drawn = over_stories([0.0] * 50 + [100.0] * 50, [7] * 50 + [9] * 50)
    assert set(drawn) == {0.0, 50.0, 100.0} and 0.2 < (drawn == 0).mean() < 0.3


def test_a_scorer_of_the_study_is_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(ship.SCORERS, "c8", (0, 32, CHUNK, "answer", 1.0, 1.0))
    scorer = scorer_for()
    torch.save(scorer.state_dict(), tmp_path / "scorer.pt")
    again = ship.scorer_from(tmp_path / "scorer.pt", "c8", 32)
    ids, states = torch.arange(1, 41)[None], torch.rand(1, 40, 32)
    given = (states[:, :33], ids[:, :33], torch.tensor([33]), states[:, 33:], ids[:, 33:], torch.full((1, 7), 3))
    assert torch.equal(again(*given), scorer(*given))
    with pytest.raises(ValueError, match="'d2' looks at what enters layer 2"):
        ship.scorer_from(tmp_path / "scorer.pt", "d2", 32)


def test_the_package_answers_in_batches_as_one_by_one(monkeypatch):
    model = tiny.make("llama")
    salience.attach(model, asked.by_words(model, tiny.tokenizer(), chunk=4))
    zsaa.enable(model, alpha=1.0, tau=1, **ship.RULE)
    data, samples, said = SimpleNamespace(newline=5, text=list), [sample(n, n) for n in (50, 20, 71)], []
    monkeypatch.setattr(zsaa, "alpha_for", lambda model, tokens, reduction: 1 / reduction)
    monkeypatch.setattr(ship, "judge", lambda ids, references: said.append(ids) or (0.0, 0.5))

    def expected(samples) -> float:  # half of each prompt is kept
        shape, (scorer,), times = cost.shape_of(model.config), salience.scorers_of(model), []
        for s in samples:
            n, asks = judging.length(s), judging.length(s) - len(s.body)
            spent = cost.macs(shape, n // 2) + scorer.macs(len(s.body), asks)
            times.append(cost.macs(shape, n) / spent)
        return sum(times) / len(times)

    for reduction in (1.0, 2.0):
        rows = []
        for size in (1, 3):
            said.clear()
            found = ship.answers(model, samples, data, reduction, size)
            rows.append([ids[: ids.index(5) if 5 in ids else None] for ids in said])
        assert rows[0] == rows[1] and len(rows[0]) == 3 and (found["n"], found["f1"]) == (3, 50.0)
        assert found["reached"] == (1 if reduction == 1 else pytest.approx(expected(samples), abs=1e-3))


def test_written_turns_end_at_the_first_line_that_is_none():
    ask, say, end = [7, 8], [9, 8], 5
    data = SimpleNamespace(own_question=ask, own_answer=say, newline=end, stories=[[1, 2, 3, 2]], text=str)
    first, second = [*ask, 20, 21, end], [*say, 3, end]
    made = list(writer.turns(data, 0, [*first, *second, *ask, 22, end, *say, 2, end, *say, 2, end, *first]))
    assert [t["line"] for t in made] == [[*first, *say], [*ask, 22, end, *say]]
    assert [t["answer"] for t in made] == [[3, end], [2, end]] and [t["at"] for t in made] == [2, None]
    assert made[1]["last"] == [*first, *second] and made[1]["older"] == []


def test_a_scorers_lesson_finds_its_passage_among_others():
    """What heads looked at is told of the chunks where the question's own passage stands, wherever that is."""
    stories = [[10 + i] * 30 for i in range(6)]
    data = Data.__new__(Data)
    data.stories, data.split, data.pre, data.sep = stories, ["train"] * 6, [1], [2]
    turn = {"older": [3], "last": [4, 4], "line": [5], "answer": [6], "at": 7, "span": 2, "references": ["a"]}
    data.turns = [{**turn, "story": 2}]
    share = torch.arange(1.0, 36.0)
    for seed in range(4):
        s = data.sample(0, 3, random.Random(seed))
        found = school.target(s, share, len(s.body) + 5)
        own = [i for i, t in enumerate(s.body) if t == 12]
        assert found[own].tolist() == share[1:31].tolist() and found[len(s.body) :].tolist() == [33, 34, 35, 0, 0]
        assert found.sum() == share.sum()
        assert s.gold == (own[7], own[8])


@pytest.mark.parametrize("longest", [4, 24])
def test_chunks_that_are_sentences_end_where_these_do(longest):
    pieces = ["Ġa", "Ġb", ".", '."', '"', "Ċ", "c"]
    shape = Shape(8, 0, chunk=longest, sentences=True, bm25=True)
    scorer = Scorer(shape, torch.arange(7), torch.ones(7), asked.marks(pieces))
    ids = torch.tensor([[0, 1, 2, 0, 6, 2, 6, 4, 1, 3, 1, 2, 4, 0, 5, 5, 1, 0, 0, 0, 0, 0]])
    real = torch.arange(22)[None] < 21
    cuts = [3, 10, 13, 15, 16] if longest > 4 else [3, 7, 10, 13, 15, 16, 19]
    want = [sum(i >= c for c in cuts) for i in range(21)]
    assert scorer.units(ids, real)[0].tolist() == [*want, 0]
    alone = scorer.units(ids[:, :21], real[:, :21])
    assert torch.equal(alone[0], scorer.units(ids, real)[0, :21])


def test_bm25_of_chunks_is_that_of_the_rival():
    words, ask = [[3, 4, 5, 3], [6, 7], [8, 3, 9]], [3, 7, 20]
    body = torch.tensor([[w for unit in words for w in unit]])
    scorer = Scorer(Shape(8, 0, sentences=True, bm25=True), torch.arange(30), torch.ones(30), torch.zeros(30).byte())
    unit = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3])
    times, rare = scorer._same_words(body, body > 0, torch.tensor([ask]), torch.tensor([[3, 3, 3]]), unit, 3)
    found = scorer._bm25(times, rare > 0, [torch.ones(1, 3)], torch.tensor([[4, 2, 3]]))[0, 0]
    assert found.tolist() == pytest.approx(controls.bm25(set(ask), words), abs=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: controls.Way("bm52"),
        lambda: train.Row("x", "drawn dails"),
        lambda: train.Row("x", "cuts", cuts=("bm25-al",)),
    ],
)
def test_settings_that_are_misspelt_are_refused(make):
    with pytest.raises(ValueError, match="bm52|dails|bm25-al'"):
        make()
