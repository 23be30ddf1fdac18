"""Weights in fewer bits beside fewer layers and fewer tokens, in one table: what each costs, and what it saves in time.

    python -m zsaa.depth.combined --shape smollm2-135m --tokens 512 --new 8        (times, random weights)
    python -m zsaa.depth.combined --model smollm2-135m --windows 200 --untimed     (perplexity)

The paper beside the main one has such a table (its Table 3: seconds by precision, with and without 20% of the layers).
float32, bfloat16; for the decoder's linear layers int8 and nf4 (bitsandbytes) and hqq (4 bits, a scale and a zero for
each 32 weights: the blocks of the 4-bit file that the model comes from); compiled (torch.compile of each layer, in
bfloat16 on a GPU); OpenVINO on a CPU, as the accelerator that there is, in float32 and bfloat16. Each with all layers,
without blocks of them (by angular distance; healed, if adapters are given), and with fewer tokens.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import zsaa
from zsaa.bench.baselines import compiled, without_mask
from zsaa.bench.shapes import build
from zsaa.data.corpora import load_corpus
from zsaa.depth.heal import judged
from zsaa.depth.similarity import similarity
from zsaa.depth.study import CONTINUATION, PREFIX, calibration, without
from zsaa.evaluation.language import windows
from zsaa.families import find_decoder
from zsaa.measure import alternate, provenance, write_json
from zsaa.models import load_model
from zsaa.models.quantize import say_no_casts

ROUNDED = ("int8", "nf4", "hqq")
OPENVINO = {"openvino": "f32", "openvino-bf16": "bf16"}
STORAGES = ("float32", "bfloat16", *ROUNDED, "compiled", *OPENVINO)


def stored(model: nn.Module, storage: str) -> nn.Module:
    """`model` as `storage` holds its weights, in place. Head, embeddings and norms keep 32 or 16 bits."""
    gpu = next(model.parameters()).is_cuda
    if storage in ("bfloat16", "compiled") or (storage in ROUNDED and gpu):
        model.to(torch.bfloat16 if gpu or storage == "bfloat16" else torch.float32)
    if storage in ROUNDED:
        say_no_casts()
        decoder, family = find_decoder(model)
        for parent in list(getattr(decoder, family.layers).modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear:
                    setattr(parent, name, _rounded(linear, storage))
    return model


def _rounded(linear: nn.Linear, storage: str) -> nn.Module:
    """The same layer in fewer bits."""
    if storage == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        how = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
        made = HQQLinear(linear, how, compute_dtype=linear.weight.dtype, device=str(linear.weight.device))
        return made.requires_grad_(False)
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    bias, weight = linear.bias is not None, linear.weight.data
    with torch.device("meta"):
        if storage == "nf4":
            made = Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=weight.dtype)
        else:
            made = Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False, threshold=6.0)
    kind = {"requires_grad": False, **({"quant_type": "nf4"} if storage == "nf4" else {"has_fp16_weights": False})}
    made.weight = (Params4bit if storage == "nf4" else Int8Params)(weight.cpu(), **kind).to(weight.device)
    made.bias = linear.bias
    return made


def pruned(model: nn.Module, gone: dict[int, list[int]], adapters: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, model of its own) of all layers and of each block that goes; healed by the adapter that is given."""
    for count, layers in {0: [], **gone}.items():
        less = copy.deepcopy(without(model, layers))  # adapters are merged into the weights
        if count in adapters:
            from peft import PeftModel

            less = PeftModel.from_pretrained(less, adapters[count]).merge_and_unload()
        yield ("all layers" if not count else f"{count} layers fewer"), less


def bytes_of(model: nn.Module) -> int:
    """Of weights, as they are stored; tied ones once."""
    held = [*model.parameters()]
    for module in model.modules():  # hqq keeps what is beside the weights in a dict
        held += [value for value in getattr(module, "meta", {}).values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())


def prefill(model: nn.Module, ids: Tensor, alpha: float) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False, logits_to_keep=1, **({} if alpha == 1 else {"alpha": alpha})).logits


def answer(model: nn.Module, ids: Tensor, new: int, alpha: float) -> Tensor:
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, **({} if alpha == 1 else {"alpha": alpha}),
        )  # fmt: skip


def openvino(model: nn.Module, ids: Tensor, precision: str) -> Callable[[], object]:
    """A prefill of `ids`, compiled by OpenVINO for the CPU, on as many threads as torch takes. precision: f32 or bf16.
    ValueError for bf16 on one thread, where OpenVINO 2026.4's fused MLP ends the process with a division by zero."""
    threads = torch.get_num_threads()
    if precision == "bf16" and threads == 1:
        raise ValueError("OpenVINO's fused MLP divides by zero in bf16 on 1 thread: give it 2 or more, or f32.")
    import openvino as ov

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False, logits_to_keep=1).logits

    how = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    with torch.no_grad():  # of one shape, or its MLP is not fused
        graph = ov.convert_model(Last().eval(), example_input=ids, input=list(ids.shape))
    compiled = ov.compile_model(graph, "CPU", how)
    return lambda: torch.from_numpy(compiled([ids.numpy()])[0])


def times(model: nn.Module, storage: str, options: argparse.Namespace, alphas: dict[str, float]) -> dict[str, dict]:
    """Milliseconds of a prefill of --batch texts, and of one answer of --new tokens behind one of them, at each of
    `alphas`; compiled ones of a prefill of all tokens alone."""
    device, vocabulary = next(model.parameters()).device, model.config.vocab_size
    ids = torch.randint(0, vocabulary, (options.batch, options.tokens), device=device)
    runs: dict[str, Callable] = {}
    if storage in OPENVINO:
        runs["all tokens, prefill"] = openvino(without_mask(model), ids, OPENVINO[storage])
    elif storage == "compiled":
        net = compiled(without_mask(model))
        runs["all tokens, prefill"] = lambda: prefill(net, ids, 1.0)
    else:
        zsaa.enable(model)
        for name, alpha in alphas.items():
            runs[f"{name}, prefill"] = lambda alpha=alpha: prefill(model, ids, alpha)
            if options.new:
                runs[f"{name}, answer"] = lambda alpha=alpha: answer(model, ids[:1], options.new, alpha)
    found = alternate(runs, repeats=options.repeats, seconds=options.seconds)
    return {name: {k: v for k, v in row.items() if k != "speedup"} for name, row in found.items()}


def table(options: argparse.Namespace, keep: Callable[[list[dict]], object]) -> list[dict]:
    """A row for each storage and each way of pruning; `keep` is told after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape:
        model, samples = zsaa.disable(build(options.shape, options.tokens, device, torch.float32)), []
        count = model.config.num_hidden_layers
        gone = {n: list(range(count - n - 1, count - 1)) for n in options.removed}
    else:
        model, tokenizer = load_model(options.model, device=device)
        data = load_corpus(options.corpus, train=options.texts)
        samples = windows(data, tokenizer, "prefix", PREFIX, CONTINUATION, count=options.windows)
        batches = calibration(tokenizer, data.train, options.compared, length=PREFIX + CONTINUATION)
        found = similarity(model, [{k: v.to(device) for k, v in batch.items()} for batch in batches])
        gone = {n: found.block(n) for n in options.removed}
    model.eval().requires_grad_(False)
    alphas = {"all tokens": 1.0}
    alphas |= {f"{r:g}x by tokens": zsaa.alpha_for(model, options.tokens, r) for r in options.reductions}
    rows, base = [], None
    for storage in options.storage:
        for name, less in pruned(model, gone, dict(zip(options.removed, options.adapters))):
            row = {"storage": storage, "pruning": name, "layers": less.config.num_hidden_layers}
            try:
                net = stored(less, storage)
                row |= {"bytes": bytes_of(net)}
                if samples and storage not in ("compiled", *OPENVINO):
                    precision = "fp32" if storage == "float32" else None  # and not what a GPU takes by default
                    scores, (nll, _) = judged(net, samples, base, precision=precision)
                    base = nll if base is None else base
                    row |= scores
                    if name == "all layers":
                        row["by_tokens"] = {
                            f"{r:g}x by tokens": judged(
                                net, samples, base, alpha=zsaa.alpha_for(net, PREFIX, r), precision=precision
                            )[0]
                            for r in options.reductions
                        }
                        zsaa.disable(net)
                if not options.untimed:
                    row["times"] = times(net, storage, options, alphas if name == "all layers" else {"all tokens": 1.0})
            except ImportError as error:
                row["not_run"] = str(error)
            rows.append(row)
            print({k: v for k, v in row.items() if k not in ("nll", "by_tokens")}, flush=True)
            keep(rows)
            del less
            gc.collect()
    return rows


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.combined", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    add("--shape", help="random weights of this shape (zsaa.bench) in its place: times alone")
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--removed", type=int, nargs="*", default=[6, 12], help="layers in the blocks that go")
    add("--adapters", nargs="*", default=[], help="of each block, by zsaa.depth.heal")
    add("--storage", nargs="+", default=list(STORAGES), choices=STORAGES)
    add("--reductions", type=float, nargs="*", default=[2.0], help="of MACs, by fewer tokens")
    add("--tokens", type=int, default=512, help="of a prompt that is timed")
    add("--batch", type=int, default=8, help="prompts in a prefill that is timed")
    add("--new", type=int, default=16, help="tokens of an answer that is timed")
    add("--repeats", type=int, default=5)
    add("--seconds", type=float, default=20.0, help="limit for the rounds of one cell")
    add("--untimed", action="store_true")
    add("--windows", type=int, default=200, help="windows of 224 + 32 tokens that are scored")
    add("--texts", type=int, default=2000, help="training texts at most")
    add("--compared", type=int, default=64, help="texts on which layers are compared")
    add("--name", default="combined")
    add("--output-dir", default="outputs/depth")
    options = parser.parse_args(given)
    for name in ("--output-dir", "--adapters"):  # paths of one machine
        if name in given:
            at = given.index(name)
            del given[at : at + (2 if name == "--output-dir" else 1 + len(options.adapters))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = options.shape or Path(options.model).name

    def keep(rows: list[dict]) -> None:
        scored = next(({"eval_samples": row["n"]} for row in rows if "n" in row), {})
        write_json(Path(options.output_dir) / f"{options.name}-{name}.json", {
            "name": f"{options.name}-{name}", "kind": "combined",
            "command": "python -m zsaa.depth.combined " + " ".join(given),
            "model": {"name": name, "random": bool(options.shape), "healed": bool(options.adapters)},
            "tokens": options.tokens, "batch": options.batch, "new": options.new, "threads": torch.get_num_threads(),
            "rows": rows, "provenance": provenance(torch.device(device), seed=0, **scored),
        })  # fmt: skip

    table(options, keep)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
