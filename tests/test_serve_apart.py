"""A model in a process of its own answers as it does in this one, and its end is told."""

import os
import signal
import time
from dataclasses import replace

import pytest
import tiny
import torch

pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install 'zsaa[serve]'")

import zsaa
from zsaa import finetune
from zsaa.serve import furnish
from zsaa.serve.apart import Apart
from zsaa.serve.engine import Completer, Wish

SAMPLES = [tuple(range(3, 40)), tuple(range(50, 70))]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    mood, words = zsaa.enable(tiny.make("llama", "sequence-classification", dtype=torch.float32)), tiny.tokenizer()
    finetune.save(mood, words, root / "mood")
    tiny.make("llama", dtype=torch.float32).save_pretrained(root / "writer")
    words.save_pretrained(root / "writer")
    options = {"floor": 0.7, "reference": 32, "calibrate_s": 0.0, "threads": 1}
    return furnish.Settings(model=str(root / "writer"), classifier=str(root / "mood"), **options)


@pytest.fixture(scope="module")
def apart(settings):
    return Apart(settings)


def test_classes_and_prices_are_those_of_the_model_in_this_process(apart, settings):
    here, there = furnish.engines(settings)["mood"], apart.furnished["mood"]
    assert there.engine.model is None and there.rungs[0].alpha == 1 and there.rungs[-1].alpha == 0.7
    for alphas in ([1.0, 1.0], [0.8, 0.7]):
        found, want = there.engine.run(SAMPLES, alphas), here.run(SAMPLES, alphas)
        assert torch.tensor(found).allclose(torch.tensor(want), atol=1e-5)
    assert there.engine.encode("w5 w9") == here.encode("w5 w9")
    assert there.engine.spent(30, 0.8) == here.spent(30, 0.8)


def test_completions_come_piece_by_piece_and_end_for_who_has_left(apart, settings):
    here, there = furnish.engines(settings)["writer"], apart.furnished["writer"].engine
    assert isinstance(there, Completer)
    wishes = [Wish(ids, 6 + k) for k, ids in enumerate(SAMPLES)]
    found, want = [], []
    here.run(wishes, [0.8, 1.0], lambda *said: want.append(said))
    there.run(wishes, [0.8, 1.0], lambda *said: found.append(said))
    assert found == want and len(found) > 4
    found.clear()
    there.run(wishes, [0.8, 1.0], lambda *said: found.append(said), lambda index: index == 0)
    assert [said for said in found if said[0] == 0 and said[2] is None] == []
    assert [said for said in found if said[0] == 1] == [said for said in want if said[0] == 1]


def test_a_failure_has_its_kind_and_no_words(apart):
    with pytest.raises(RuntimeError) as failure:
        apart.furnished["mood"].engine.run([("no numbers",)], [1.0])
    assert type(failure.value).__name__ != "RuntimeError" and str(failure.value) == ""
    assert len(apart.furnished["mood"].engine.run(SAMPLES, [1.0, 1.0])) == 2  # it goes on


@pytest.mark.full
def test_what_keeps_it_from_starting_is_said(settings, tmp_path):
    with pytest.raises(RuntimeError, match="--floor.*--curve"):
        Apart(replace(settings, model=None, floor=None, curve=str(tmp_path / "none.json")))


@pytest.mark.full
def test_its_end_is_told(settings):
    house = furnish.furnish(replace(settings, model=None, apart=True))
    assert house.alive()
    engine = house.lanes["mood"].engine
    os.kill(engine.run.func.__self__.process.pid, signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):
        engine.run(SAMPLES, [1.0, 1.0])
    for _ in range(100):
        if not house.alive():
            break
        time.sleep(0.05)
    assert not house.alive()
