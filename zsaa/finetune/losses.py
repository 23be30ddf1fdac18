"""The loss of a language head in chunks of rows: the logits of a whole batch are never there at once.

transformers computes all logits, brings them to float32, and holds as much twice more for the backward pass: of 8,192
tokens and GPT-2's vocabulary 1.6 GB each. Here the gradients of a chunk follow at once from its logits, which then go.
On a GPU the vocabulary is filled up to a multiple of 64, as products of odd sizes run on slow kernels there. (PyTorch
has the like from 2.13 on, F.linear_cross_entropy with options, without that.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ELEMENTS = 1 << 26  # logits of a chunk: 256 MB in float32
EVEN = 64  # on a GPU the vocabulary is a multiple of it
# Their logits are the head's product and nothing else.
MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel",
          "GemmaForCausalLM", "Gemma3ForCausalLM")  # fmt: skip


def _computed_in(hidden: Tensor) -> torch.dtype:
    """Autocast's type where it is on: a function with gradients of its own must follow it by itself."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _filled(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [vocabulary, hidden_size] in `dtype`, on a GPU with rows of zeros behind it."""
    more = -len(weight) % EVEN if weight.is_cuda else 0
    return F.pad(weight.to(dtype), (0, 0, 0, more)) if more else weight.to(dtype)


class _Summed(torch.autograd.Function):
    """hidden [rows, hidden_size], weight [vocabulary, hidden_size], labels int64 [rows] -> the sum of their
    cross-entropies, at least in float32; rows labelled `ignored` add nothing."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int) -> Tensor:
        dtype, (of_hidden, of_weight, *_) = _computed_in(hidden), ctx.needs_input_grad
        exact = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, words = hidden.to(dtype), _filled(weight, dtype)
            pull = torch.empty_like(rows) if of_hidden else None
            slope = torch.zeros_like(words, dtype=exact) if of_weight else None
            total = torch.zeros((), dtype=exact, device=hidden.device)
            step = max(1, ELEMENTS // len(words))
            for first in range(0, len(rows), step):
                part = slice(first, first + step)
                real = labels[part] != ignored
                wanted = labels[part].where(real, 0)[:, None]
                logits = rows[part] @ words.T
                logits[:, len(weight) :] = -torch.inf
                said = logits.log_softmax(-1, dtype=exact)
                del logits
                total -= said.gather(1, wanted)[:, 0].where(real, 0).sum()
                if not (of_hidden or of_weight):
                    continue
                said = said.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=exact))
                gradient = said.mul_(real[:, None]).to(dtype)  # not yet over the count: 16 bits hold it better
                if pull is not None:
                    torch.mm(gradient, words, out=pull[part])
                if slope is not None and dtype == exact:
                    slope.addmm_(gradient.T, rows[part])
                elif slope is not None:
                    slope += gradient.T @ rows[part]
        ctx.save_for_backward(pull, None if slope is None else slope[: len(weight)])
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, times: Tensor):
        saved = zip(ctx.saved_tensors, ctx.dtypes)  # scaled in full precision: one over the count is small
        return *(None if x is None else (x.to(times.dtype) * times).to(dtype) for x, dtype in saved), None, None


def head_of(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The language model (inside PEFT, too) and its head; ValueError unless the loss of both is known."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(whole, "lm_head", None)
    stock = [base for base in type(whole).__mro__ if base.__name__ in MODELS]
    known = any(x.__module__.startswith("transformers.") and x.forward is type(whole).forward for x in stock)
    plain = type(head) is nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)
    capped = getattr(whole.config, "final_logit_softcapping", None) is not None
    if not (known and plain) or capped or hasattr(head.weight, "placements"):
        raise ValueError(
            f"the loss of a {type(whole).__name__} comes in one piece: its logits are capped, sharded or no product of "
            f"lm_head alone that we know. Known are, unsharded: {', '.join(MODELS)}. Leave chunked_loss=False."
        )
    return whole, head


@contextlib.contextmanager
def chunked(model: nn.Module) -> Iterator[None]:
    """In this block `model(..., labels=...)` has its loss in chunks; what it returns as logits are the states before
    the head. ValueError as in `head_of`."""
    whole, head = head_of(model)

    def loss(logits: Tensor, labels: Tensor, *_, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **__):
        """transformers' ForCausalLMLoss, but of states [batch, tokens, hidden_size] in the logits' place."""
        shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        shifted = shifted.reshape(-1).to(logits.device)
        total = _Summed.apply(logits.reshape(-1, logits.shape[-1]), head.weight, shifted, ignore_index)
        count = (shifted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    before = vars(whole).get("_loss_function")
    whole.loss_function, head.forward = loss, lambda states: states
    try:
        yield
    finally:
        del head.forward
        if before is None:
            del whole._loss_function
        else:
            whole.loss_function = before
