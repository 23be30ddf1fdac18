"""A learned score: how much the loss hangs on each token's state.

Where a layer may drop tokens, a small head looks at the state in which each row enters it, alone, and says how much
the answer would change with it. The teacher is the gradient: in a training step's alpha = 1 pass, which the dial leaves
to the stock code, |<state, d loss / d state>| says to first order how much of the loss each state carries, and the
head learns each token's share of the sum over its text. It needs neither attention nor labels of its own.

The module is a child of the decoder, so that it moves, trains and synchronizes with the model. It computes in float32
whatever the model does, is saved in a file of its own beside the model or adapter, which stock transformers ignores,
and is trained by zsaa.finetune. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsaa.families import Part, find_decoder

FILE = "salience.safetensors"
CHILD = "salience"  # its name in the decoder
WIDTH = 64  # of a head's hidden layer: 1% of the multiply-accumulates of a SmolLM2-135M layer

Entered = dict[int, tuple[Tensor, Tensor]]  # layer -> states [batch, rows, hidden_size], and their pull [batch, rows]


class Affine(nn.Module):
    """What nn.Linear is, weights, names and draws included, but for its class: PEFT takes every nn.Linear for one of
    the model's ("all-linear"), and quantizers do too. A head is trained whole, by a lesson of its own."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        drawn = nn.Linear(inputs, outputs, dtype=torch.float32)
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def head(hidden_size: int) -> nn.Sequential:
    """One layer's: states [..., hidden_size] to scores [..., 1]. Its cost is counted in `zsaa.cost.prices`."""
    scored = nn.Sequential(Affine(hidden_size, WIDTH), nn.GELU(), Affine(WIDTH, 1))
    norm = nn.LayerNorm(hidden_size, dtype=torch.float32)
    return nn.Sequential(norm, scored)  # nested as in the ablation, whose files fit


class Learned(nn.Module):
    """A scorer that was taught: a child of the decoder, called `child`, saved in `file`; it stays in float32."""

    child: str
    file: str

    def facts(self) -> dict[str, str] | None:
        """What the file says beside the weights."""
        return None

    def state_to_save(self) -> dict[str, Tensor]:
        return self.state_dict()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Moves, but stays in float32, when the model is cast."""

        def moved(x: Tensor) -> Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        return super()._apply(moved, recurse)


class Salience(Learned):
    """A learned score: how much the model's answer hangs on each token's state, as gradients taught it.

    The heads of `layers` (0: the first), for a decoder with this `config`."""

    child, file = CHILD, FILE

    def __init__(self, config, layers: Iterable[int]):
        super().__init__()
        self.heads = nn.ModuleDict({str(layer): head(config.hidden_size) for layer in layers})

    @property
    def layers(self) -> list[int]:
        return sorted(map(int, self.heads))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores [batch, rows], float32, of the states [batch, rows, hidden_size] that enter a layer."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.heads[str(layer)](hidden.float()).squeeze(-1)

    def loss(self, entered: Entered, real: Tensor) -> Tensor:
        """Cross-entropy of the softmax of the scores over each text's tokens to their shares of its pull; the mean over
        texts, the sum over layers. entered: of an alpha = 1 pass under `watch`, after its backward pass. real: bool
        [batch, rows], False for padding."""
        total = real.new_zeros((), dtype=torch.float32)
        for layer, (states, pull) in entered.items():
            share = pull * real
            share = share / share.sum(1, keepdim=True).clamp(min=1e-20)
            said = self(layer, states).masked_fill(~real, float("-inf")).log_softmax(1).masked_fill(~real, 0)
            total = total - (share * said).sum(1).mean()
        return total

    def groups(self) -> list[dict]:
        """For an optimizer: the heads learn faster than the model."""
        return [{"params": list(self.parameters()), "lr": 1e-3, "weight_decay": 0.01}]


@contextmanager
def watch(model: nn.Module, scorer: Salience) -> Iterator[Entered]:
    """Notes the states that enter the layers of `scorer` in one alpha = 1 pass inside the block, and, once its backward
    pass has run, their pull |<state, d loss / d state>| [batch, rows], float32, times whatever scales the loss.

    Hooks on the decoder's layers: under LoRA, whose embeddings are frozen, the first layer's input takes no gradient,
    and the layer reads a tensor of our own that does, for the input may be the caller's; under gradient checkpointing,
    where layers run again, what was noted stands."""
    decoder, family = find_decoder(model)
    entered: Entered = {}

    def note(layer: int, args: tuple) -> tuple | None:
        if not torch.is_grad_enabled():
            return None
        given = hidden = args[0]
        # A tensor of our own where the input may be the caller's, whenever the layer runs: also when it runs again.
        if not given.requires_grad:
            hidden = given.detach().requires_grad_()
        elif given.is_leaf:
            hidden = given.view_as(given)
        if layer not in entered:
            states = hidden.detach()
            entered[layer] = states, states.new_zeros(states.shape[:2], dtype=torch.float32)

            def pulled(gradient: Tensor) -> None:
                entered[layer] = states, (states.float() * gradient.float()).sum(-1).abs()

            hidden.register_hook(pulled)
        return None if hidden is given else (hidden, *args[1:])

    layers = getattr(decoder, family.layers)
    hooks = [layers[n].register_forward_pre_hook(lambda _, args, n=n: note(n, args)) for n in scorer.layers]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def scorer_of(model: nn.Module) -> Salience | None:
    """The scorer on the decoder inside `model`, if there is one."""
    return getattr(find_decoder(model)[0], CHILD, None)


def scorers_of(model: nn.Module) -> list[Learned]:
    """All that were taught to score, on the decoder inside `model`."""
    return [child for child in find_decoder(model)[0].children() if isinstance(child, Learned)]


def attach(model: nn.Module, scorer: Learned) -> Learned:
    """Make `scorer` a child of the decoder inside `model`, on its device; `save_pretrained` leaves it out."""
    decoder, _ = find_decoder(model)
    decoder.add_module(scorer.child, scorer.to(next(decoder.parameters()).device))
    scorer.train(decoder.training)
    for owner, names in _left_out(model, scorer):
        owner._keys_to_ignore_on_save = sorted({*(owner._keys_to_ignore_on_save or ()), *names})
    return scorer


def detach(model: nn.Module) -> None:
    """Take scorers off again, if there are any."""
    for scorer in scorers_of(model):
        for owner, names in _left_out(model, scorer):
            owner._keys_to_ignore_on_save = [k for k in owner._keys_to_ignore_on_save or () if k not in names] or None
        delattr(find_decoder(model)[0], scorer.child)


def _left_out(model: nn.Module, scorer: Learned) -> list[tuple[PreTrainedModel, set[str]]]:
    """The models around `scorer`, and the names that its weights have in each."""
    found = []
    for owner in model.modules():
        prefix = next((name for name, module in owner.named_modules() if module is scorer), None)
        if isinstance(owner, PreTrainedModel) and prefix:
            found.append((owner, {f"{prefix}.{name}" for name in scorer.state_dict()}))
    return found


def fresh(model: nn.Module) -> Salience:
    """An untrained scorer for `model`, with a head for each layer; attach it."""
    config = find_decoder(model)[0].config
    return Salience(config, range(config.num_hidden_layers))


def save(scorer: Learned, folder: str | Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in scorer.state_to_save().items()}
    save_file(weights, Path(folder) / scorer.file, scorer.facts())


def read(config, folder: str | Path) -> Salience:
    """The scorer in `folder`, for a decoder with this `config`. Other precisions become float32. ValueError for the
    file of another model, or of something else."""
    weights = load_file(Path(folder) / FILE)
    try:
        layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("heads.")})
        if not layers or layers[-1] >= config.num_hidden_layers:
            raise ValueError(f"it has heads for the layers {layers}")
        if f"heads.{layers[0]}.1.weight" in weights:
            raise ValueError(
                "its heads have no hidden layer, as in earlier versions. Train it anew, with finetune.fine_tune and "
                'Recipe.named("zsaa+")'
            )
        scorer = Salience(config, layers)
        scorer.load_state_dict(weights)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{Path(folder) / FILE} is not a scorer for this {config.model_type} ({config.num_hidden_layers} layers, "
            f"{config.hidden_size} wide): {str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return scorer


def needed(decoder: Part) -> Salience:
    """The scorer on `decoder`, else the one that was saved with it; ValueError if there is none, or one that lacks a
    head for a layer: each may drop tokens, under every schedule."""
    scorer, folder = getattr(decoder, CHILD, None), Path(getattr(decoder.config, "_name_or_path", "") or ".")
    if scorer is None and not (folder.parts and (folder / FILE).is_file()):
        raise ValueError(
            'score="salience" is learned, and this model has none: train it with finetune.fine_tune and '
            'Recipe.named("zsaa+"), or load a model that was saved with one by finetune.load (a plain save_pretrained '
            f"leaves out {FILE}; finetune.save does not)."
        )
    scorer = read(decoder.config, folder) if scorer is None else scorer
    lacking = sorted(set(range(decoder.config.num_hidden_layers)) - set(scorer.layers))
    if lacking:
        raise ValueError(
            f"every layer may drop tokens, but for layers {lacking} (0: the first) this model's scorer has no head (it "
            f"has {scorer.layers}). Train it anew, or use a score that is not learned."
        )
    return scorer
