"""What can be measured here: the clock of each phase, the peak of memory, joules.

A phase runs as often as fills `seconds`, so that counters which advance some ten times a second mean something. Joules
are those of the whole device, idle power included, whoever used it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zsaa.dial import at
from zsaa.families import only_last_logits
from zsaa.kit.energy import energy


class Phases:
    """What is measured of one model and input, at one alpha at a time; the model is as it was afterwards."""

    def __init__(self, model: nn.Module, ids: Tensor, new: int):
        self.model, self.ids, self.new = model, ids, new
        self.language = hasattr(model, "lm_head")
        self.wait = torch.cuda.synchronize if ids.is_cuda else (lambda: None)
        self.decoding_ms: dict[float, list[float]] = {}  # of all new tokens, by alpha

    @torch.no_grad()
    def prefill(self, alpha: float):
        with at(self.model, alpha):
            return self.model(self.ids, use_cache=self.language, **only_last_logits(self.model))

    @torch.no_grad()
    def answer(self, alpha: float) -> None:
        """A prefill, and `new` tokens after it, the likeliest first."""
        output = self.prefill(alpha)
        self.wait()
        started = time.perf_counter()
        with at(self.model, alpha):
            for _ in range(self.new):
                token = output.logits[:, -1:].argmax(dim=-1)
                output = self.model(token, past_key_values=output.past_key_values, use_cache=True)
        self.wait()
        self.decoding_ms.setdefault(alpha, []).append(1000 * (time.perf_counter() - started))

    def step(self, alpha: float) -> None:
        """Forward and backward of a training step; the optimizer's own work is none of it."""
        classes = self.ids.new_zeros(len(self.ids))
        with at(self.model, alpha), torch.enable_grad():
            loss = self.model(self.ids, labels=self.ids if self.language else classes, use_cache=False).loss
        loss.backward()
        for p in self.model.parameters():
            p.grad = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        before, held = self.model.training, [p.grad for p in self.model.parameters()]
        self.model.train()
        try:
            yield
        finally:
            self.model.train(before)
            for p, grad in zip(self.model.parameters(), held):
                p.grad = grad


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """All that PyTorch holds on the GPU at its most while `run` runs, the weights included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def joules(run: Callable[[], object], milliseconds: float, seconds: float, device: torch.device) -> tuple:
    """Joules of one run, and where they come from: NVML's counter of a GPU, RAPL's of a CPU, else codecarbon's
    estimate; (None, why) where there is none of these."""
    times = max(1, round(1000 * seconds / max(milliseconds, 1e-3)))
    with energy() as spent, _estimated(device, spent):
        for _ in range(times):
            run()
    kind = "gpu_joules" if device.type == "cuda" else "cpu_joules"
    if spent[kind] is not None:
        return spent[kind] / times, "measured (NVML)" if device.type == "cuda" else "measured (RAPL)"
    if spent.get("estimate"):
        return spent["estimate"] / times, "estimated (codecarbon: rated power of the processor and its load)"
    return None, "not measured: this machine shows no counter; pip install 'zsaa[energy]' estimates a CPU's"


@contextlib.contextmanager
def _estimated(device: torch.device, spent: dict) -> Iterator[None]:
    """On a CPU, with codecarbon installed: its joules of processors, under "estimate"; of nothing else, as it counts
    memory at a flat rate."""
    if device.type != "cpu" or importlib.util.find_spec("codecarbon") is None:
        yield
        return
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    options = {"save_to_file": False, "measure_power_secs": 1, "log_level": "error", "allow_multiple_runs": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of names that codecarbon will change
        tracker = OfflineEmissionsTracker(country_iso_code="USA", tracking_mode="machine", **options)
    tracker.start()
    try:
        yield
    finally:
        tracker.stop()
        spent["estimate"] = 3.6e6 * tracker.final_emissions_data.cpu_energy
