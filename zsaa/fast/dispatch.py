"""What computes attention and its scores: PyTorch alone, or with this package's Triton kernels on NVIDIA GPUs.

"auto" takes the kernels where they run: in float16 or bfloat16 on an NVIDIA GPU, Ampere or newer (on a T4 Triton leaves
the tensor cores idle), with Triton installed. `use_backend` forces one or the other, and so does the environment
variable ZSAA_BACKEND.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("auto", "torch", "triton")
_chosen: str | None = None  # None: not asked for yet, the environment decides
_fused = True


@functools.cache
def _without_triton(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on `device`; None if they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install zsaa[gpu])"
    if importlib.util.find_spec("zsaa.kernels") is None:
        return "zsaa.kernels is not installed (pip install -e . in a checkout)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # slow, on any device; for tests
    if device.type != "cuda" or torch.version.cuda is None:
        return "they need an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
    return None


def chosen() -> str:
    """What `use_backend` or the environment said."""
    global _chosen
    if _chosen is None:
        use_backend(os.environ.get("ZSAA_BACKEND", "auto"))
    return _chosen


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_backend(name: str) -> None:
    """Choose what computes attention and scores, for all models of this process: "auto" (the default), "torch", or
    "triton", which is an error where the kernels cannot run, instead of a quiet detour."""
    global _chosen
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}. Available: {', '.join(NAMES)}.")
    reason = _without_triton(_default_device()) if name == "triton" else None
    if reason:
        raise RuntimeError(f'the backend "triton" does not run here: {reason}. Use "auto" or "torch".')
    _chosen = name


def backends(device: str | torch.device | None = None) -> dict[str, str]:
    """What is available on `device` (default: the GPU if there is one) for half precision, and what is used:
    {"chosen": "auto", "used": "torch", "torch": "available", "triton": "not available: ..."}."""
    reason = _without_triton(torch.device(device) if device is not None else _default_device())
    used = "torch" if reason or chosen() == "torch" else "triton"
    triton = f"not available: {reason}" if reason else "available"
    return {"chosen": chosen(), "used": used, "torch": "available", "triton": triton}


def row_kernels(x: Tensor) -> ModuleType | None:
    """The kernels that choose and move rows of x, if they are to be used, else None. torch.compile fuses its own."""
    fits = x.dtype in (torch.float16, torch.bfloat16) or (x.is_cuda and x.dtype == torch.float32)
    if not fits or chosen() == "torch" or torch.compiler.is_compiling() or _without_triton(x.device):
        return None
    if x.is_cuda and not _rows_agree(x.device):
        return None
    from zsaa.kernels import rows

    return rows


def use_fused(on: bool) -> None:
    """Whether pruned passes take the fused norms and activations of kernels/layer.py, which stock models do not have:
    without them a benchmark shows what pruning alone gives."""
    global _fused
    _fused = bool(on)


def layer_kernels(x: Tensor) -> ModuleType | None:
    """The fused norms and activations, if they are to be used for hidden states like x, else None."""
    fits = _fused and x.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled()
    if not fits or torch.compiler.is_compiling() or chosen() == "torch" or _without_triton(x.device):
        return None
    if torch.is_autocast_enabled(x.device.type) or not _layers_agree(x.device):
        return None
    from zsaa.kernels import layer

    return layer


def in_place(x: Tensor) -> bool:
    """Are norms and activations of a pruned pass to write over what they have made? On a CPU new memory is half of what
    they cost."""
    plain = _fused and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return plain and not torch.compiler.is_compiling() and chosen() != "torch" and not torch.is_autocast_enabled("cpu")


def fuses_training(x: Tensor) -> bool:
    """Are PyTorch's own fused operations to stand in for norms and activations of a pruned pass with gradient?"""
    on = _fused and x.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return on and chosen() != "torch"


def _agreed(failed: list[str], what: str, who: str) -> bool:
    """Did nothing fail? Warns if something did, and says who does the work instead."""
    if failed:
        warnings.warn(
            f"zsaa's {what} ({failed[0]}): {who} their work, more slowly. Please report it with the versions of torch "
            "and triton.",
            stacklevel=3,
        )
    return not failed


@functools.cache
def _layers_agree(device: torch.device) -> bool:
    """Are the fused norms and activations as near to the exact numbers on this device as PyTorch's? Warns if not."""
    from zsaa.kernels import layer, naive

    failed = []
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # whatever is the default
            generator = torch.Generator().manual_seed(0)
            x, y, *_ = xs = [torch.randn(3, 5, 200, generator=generator).half().to(device) for _ in range(2)]
            weight, bias = (torch.randn(200, generator=generator).half().to(device) for _ in range(2))
            wide = [t.double() for t in (*xs, weight, bias)]
            runs = {
                "add_norm": (lambda k, x, y, w, b: k.add_norm(x, y, w, None, 1e-6)),
                "add_norm with a bias": (lambda k, x, y, w, b: k.add_norm(x, y, w, b, 1e-6)),
                "silu_mul": (lambda k, x, y, w, b: (k.silu_mul(x, y),)),
            }
            for name, run in runs.items():
                ours, theirs, exact = run(layer, x, y, weight, bias), run(naive, x, y, weight, bias), run(naive, *wide)
                for a, b, c in zip(ours, theirs, exact, strict=True):
                    worst = (a.double() - c).abs().max()
                    failed += [name] * bool(~(worst <= 2 * (b.double() - c).abs().max() + 1e-6))
    except Exception as error:  # a compiler's, most likely
        failed.append(f"{type(error).__name__}: {error}")
    return _agreed(
        failed, f"fused norms and activations do not agree with PyTorch on {device}", "the models' own modules do"
    )


def matmul_precision() -> str:
    """What products in float32 are computed in: by PyTorch's setting of old, which it refuses to tell where one of the
    newer ones was used (as transformers' Trainer does for TF32), and by those, from PyTorch 2.9 on."""
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        named = "mixed"
    parts = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    return "/".join([named, *(str(getattr(part, "fp32_precision", None)) for part in parts)])


def copies(device: torch.device) -> bool:
    """Does a kernel copy what a recording hands out?"""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and chosen() != "torch" and _without_triton(device) is None


@functools.cache
def _rows_agree(device: torch.device, n: int = 777) -> bool:
    """Do the row kernels do on this GPU what PyTorch does? Asked once, of a ragged batch of n rows; warns if not."""
    from zsaa.attention import rotate
    from zsaa.kernels import rows
    from zsaa.score import select

    failed = []
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # whatever is the default
            generator = torch.Generator().manual_seed(0)
            scores = torch.rand(3, n, generator=generator).mul(n // 3).floor().to(device, torch.float32)  # with ties
            lengths = torch.tensor([n, n // 8, n // 2], device=device)
            counts = torch.tensor([n - 5, n // 8 - 1, n // 6], device=device)
            index = torch.arange(n, device=device).expand(3, -1)
            kept, places, passed = rows.choose(scores, lengths, counts, n - 5, index)
            want, _ = select(scores.clone(), lengths, counts, n - 5, True)
            failed += ["choose"] * (not (torch.equal(kept, want) and torch.equal(passed, want)))
            hidden, output = (torch.randn(3, n, size, generator=generator).half().to(device) for size in (96, 64))
            moved = rows.move(hidden, output, kept, places, lengths, index)
            expected = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in (hidden, output))
            failed += ["move"] * (not all(torch.equal(a, b) for a, b in zip(moved[:2], expected)))
            q, k, v = (torch.randn(3, n, h, 64, generator=generator).half().to(device) for h in (6, 2, 2))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            angles = torch.rand(1, n, 64, generator=generator).to(device) * 6
            cos, sin = angles.cos().half(), angles.sin().half()
            exact = rotate(*(x.float() for x in (q, k, cos, sin)))
            for turned, wanted in zip(rows.rotate(q, k, v, cos, sin, index, n), exact):
                failed += ["rotate"] * bool((turned.float() - wanted).abs().max() > 1e-2)
    except Exception as error:  # a compiler's, most likely
        failed.append(f"{type(error).__name__}: {error}")
    where = torch.cuda.get_device_name(device) if failed else ""
    return _agreed(failed, f"row kernels do not agree with PyTorch on {where}", "PyTorch does")


def kernels(q: Tensor) -> ModuleType | None:
    """The attention kernels if they are to be used for tensors like q [batch, heads, rows, dim], else None. Compiled
    models take PyTorch's: Inductor passes numbers in float64, which the kernels do not expect."""
    if torch.compiler.is_compiling() or chosen() == "torch" or _without_triton(q.device):
        return None
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and 16 <= q.shape[-1] <= 256
    if not fits:
        if chosen() == "triton":
            raise ValueError(
                "the Triton kernels take float16 or bfloat16 and head sizes from 16 to 256 in steps of 8, got "
                f'{q.dtype} and {q.shape[-1]}. Call zsaa.use_backend("auto").'
            )
        return None
    from zsaa.kernels import attention

    return attention


def step_kernels(keys: Tensor) -> ModuleType | None:
    """The kernels of a decoding step over a cache of keys like these [batch, kv_heads, rows, dim], if they are to be
    used, else None."""
    if kernels(keys) is None or (keys.is_cuda and not _steps_agree(keys.device, keys.dtype)):
        return None
    from zsaa.kernels import decode

    return decode


@functools.cache
def _steps_agree(device: torch.device, dtype: torch.dtype, rows: int = 600) -> bool:
    """Are the kernels of a decoding step as near to the exact numbers on this GPU as PyTorch's? Warns if not."""
    from zsaa.attention import attend, rotate
    from zsaa.kernels import decode

    failed = []
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # whatever is the default
            generator = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(2, h, 1, 64, generator=generator).to(device, dtype) for h in (6, 2, 2))
            keys, values = (torch.randn(2, 2, rows + 1, 64, generator=generator).to(device, dtype) for _ in "kv")
            columns = torch.arange(rows + 1).expand(2, -1).contiguous().to(device)
            angles = torch.rand(1, 1, 64, generator=generator).to(device) * 6
            tables = angles.cos().to(dtype), angles.sin().to(dtype)
            table = torch.tensor([[x.data_ptr() for x in (keys, values, columns)] + [rows, rows + 1, rows]]).to(device)
            turned = decode.append(q, k, v, tables, table, 0)
            got = decode.attend(turned, 2, table, 0, 4, scale=0.125, window=500)
            seen = (columns > rows - 500)[:, None, None]
            wide, narrow = ([x.to(kind) for x in (q, k, *tables, keys, values)] for kind in (torch.float64, dtype))
            exact, plain = (attend(rotate(*x[:4])[0], *x[4:], seen, scale=0.125, softcap=None) for x in (wide, narrow))
            worst = (got.view(exact.shape).double() - exact).abs().max()
            failed += ["attend"] * bool(~(worst <= 2 * (plain.double() - exact).abs().max() + 1e-3))
            off = (keys[:, :, -1:].double() - rotate(*wide[:4])[1]).abs().max()
            failed += ["append"] * bool(~(off <= 2e-2) | (values[:, :, -1:] != v).any())
    except Exception as error:  # a compiler's, most likely
        failed.append(f"{type(error).__name__}: {error}")
    return _agreed(failed, f"kernels of decoding steps do not agree with PyTorch on {device}", "PyTorch does")
