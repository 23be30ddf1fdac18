"""Self-speculative decoding: a model drafts with its own first layers, and checks the draft with all of them.

    python -m zsaa.depth.draft --teach 800 --exits 3 6 --output-dir outputs/draft
    python -m zsaa.depth.draft --adapter outputs/draft/drafter --exits 3 6 --ahead 3 5 --output-dir outputs/draft

By transformers' assistant_early_exit, the dial on. The text is that of greedy decoding, which is checked for every
prompt; what changes is the time, and how much depends on how often the lower layers say what all would say. The first
command teaches them that, by the whole model's verdicts on reviews and on what it writes itself: adapters of a high
rank below, of a low one above, where the last layer is to go on as it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import zsaa
from zsaa.data.corpora import load_corpus
from zsaa.depth.heal import divergence, learn, mixed, pieces
from zsaa.evaluation.language import windows
from zsaa.families import find_decoder
from zsaa.finetune.exits import final_norm
from zsaa.measure import provenance, write_json
from zsaa.models import load_model

PROMPT = 128  # tokens that are read
RANKS = (64, 8)  # of the adapters of the layers that draft, and of those above


def written(model: nn.Module, rows: Tensor, count: int, together: int = 128) -> Tensor:
    """int64 [count, tokens]: the first half of so many pieces, and what the model says greedily behind it."""
    device, half, found = next(model.parameters()).device, rows.shape[1] // 2, []
    for start in range(0, min(count, len(rows)), together):
        ids = rows[start : min(start + together, count), :half].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found.append(model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=half, min_new_tokens=half, do_sample=False,
                pad_token_id=0).cpu())  # fmt: skip
    return torch.cat(found) if found else rows[:0]


def adapted(model: nn.Module, depth: int) -> nn.Module:
    """`model` with LoRA adapters: of RANKS[0] on the linear layers of its first `depth` layers, of RANKS[1] above."""
    from peft import LoraConfig, get_peft_model

    high, low = RANKS
    above = "|".join(str(n) for n in range(depth, find_decoder(model)[0].config.num_hidden_layers))
    pattern = {rf"layers\.(?:{above})\..*": low}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=high, lora_alpha=2 * high, lora_dropout=0.0, target_modules="all-linear",
        rank_pattern=pattern, alpha_pattern=dict.fromkeys(pattern, 2 * low),
    )  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(model, config)


def taught(model: nn.Module, rows: Tensor, exits: Sequence[int], options: argparse.Namespace) -> tuple[nn.Module, dict]:
    """(`model` whose exits say what it says itself, log): in each step one of `exits`, and the last layer, learn the
    untaught model's verdicts on `rows`."""
    teacher, draw = copy.deepcopy(model).eval(), random.Random(0)
    student = adapted(model, max(exits))
    norm, head = final_norm(find_decoder(student)[0]), model.get_output_embeddings()

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        out = student(input_ids=ids, use_cache=False, output_hidden_states=True)
        early = head(norm(out.hidden_states[draw.choice(exits)]))
        return (divergence(out.logits, wanted, 1.0) + divergence(early, wanted, 1.0)) / 2

    log = learn(student, rows, options.teach, loss, options.rate, options.batch, options.deadline)
    return student, log


def once(model: nn.Module, ids: torch.Tensor, new: int, way: tuple | None) -> tuple[list[int], float]:
    """The tokens that are generated greedily behind ids [1, tokens], and the seconds that it took. way: (layers that
    draft, tokens that they draft at most, how sure they must be of each); None: nothing is drafted."""
    config, options = model.generation_config, {}
    if way is not None:
        options = {"assistant_early_exit": way[0]}
        config.num_assistant_tokens, config.assistant_confidence_threshold = way[1:]
        config.num_assistant_tokens_schedule = "constant"
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                             do_sample=False, pad_token_id=0, **options)  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), time.perf_counter() - started


def measured(
    model: nn.Module, prompts: list[torch.Tensor], new: int, ways: list[tuple], rounds: int, alpha: float = 1.0
) -> list[dict]:
    """A row for plain decoding and one for each way, in turn, prompt by prompt: tokens a second (median over prompts of
    each one's best of `rounds`), the speed-up over plain decoding of the same prompts, paired (each, their median and
    quartiles), the passes of the whole model per new token, and for how many prompts the text is the same."""
    zsaa.enable(model, alpha=alpha)
    model.generation_config.eos_token_id = None
    passes = [0]
    decoder, family = find_decoder(model)
    last = getattr(decoder, family.layers)[-1]
    hook = last.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    found: dict[tuple | None, list[tuple[list[int], float, int]]] = {way: [] for way in (None, *ways)}
    for prompt in prompts:
        for way, runs in found.items():
            passes[0] = 0
            tries = [once(model, prompt, new, way) for _ in range(rounds)]
            runs.append((tries[0][0], min(seconds for _, seconds in tries), passes[0] // rounds))
    hook.remove()
    zsaa.disable(model)
    rows, plain = [], found[None]
    for way, runs in found.items():
        ratios = [a[1] / b[1] for a, b in zip(plain, runs)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append({
            "depth": way and way[0], "ahead": way and way[1], "sure": way and way[2], "alpha": alpha,
            "tokens_per_second": round(new / statistics.median(s for _, s, _ in runs), 2),
            "speedup": round(quartiles[1], 3), "speedup_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "speedups": [round(ratio, 3) for ratio in ratios],
            "passes_per_token": round(sum(p for *_, p in runs) / (new * len(runs)), 3),
            "same_text": sum(a[0] == b[0] for a, b in zip(plain, runs)), "n": len(runs),
        })  # fmt: skip
    return rows


def croppable() -> None:
    """Let caches of transformers before 5.18 be cropped where a layer holds nothing yet: those above an early exit."""
    from transformers.cache_utils import DynamicLayer

    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18):
        return
    crop = DynamicLayer.crop
    DynamicLayer.crop = lambda self, *given: None if self.keys is None else crop(self, *given)


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.draft", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    add("--adapter", help="of a model that was taught to draft")
    add("--teach", type=int, default=0, help="teach it first, in so many steps; the adapter goes beside the result")
    add("--written", type=int, default=2048, help="pieces that the model writes itself, to learn on")
    add("--batch", type=int, default=16, help="pieces of 256 tokens in a step")
    add("--rate", type=float, default=1e-3)
    add("--texts", type=int, default=None, help="training texts at most")
    add("--deadline", type=float, default=float("inf"), help="seconds since 1970 after which no step begins")
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--exits", type=int, nargs="+", default=[3, 6], help="layers that draft")
    add("--ahead", type=int, nargs="+", default=[3, 5], help="tokens that are drafted at most")
    add("--sure", type=float, nargs="+", default=[0.4], help="how sure a drafted token must be")
    add("--alphas", type=float, nargs="+", default=[1.0], help="of the prompts")
    add("--prompts", type=int, default=8)
    add("--new", type=int, default=64, help="tokens to generate")
    add("--rounds", type=int, default=2)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output-dir", default="outputs/draft")
    options = parser.parse_args(given)
    croppable()
    model, tokenizer = load_model(options.model, device=options.device)
    data = load_corpus(options.corpus, train=options.texts if options.teach else 0)
    out, log = Path(options.output_dir), None
    model.eval().requires_grad_(False)
    if options.teach:
        rows = pieces(tokenizer, data.train)
        student, log = taught(model, mixed(rows, written(model, rows, options.written)), options.exits, options)
        student.save_pretrained(out / "drafter", state_dict={k: v.half() for k, v in student.state_dict().items()})
        model = student.merge_and_unload()
    elif options.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter).merge_and_unload()
    samples = windows(data, tokenizer, "prefix", PROMPT, 1, count=options.prompts)
    prompts = [torch.tensor([sample.ids[:PROMPT]], device=options.device) for sample in samples]
    once(model.eval(), prompts[0], 4, None)  # what is compiled or allocated at first
    ways, rows = list(itertools.product(options.exits, options.ahead, options.sure)), []
    name = f"draft-{Path(options.model).name}-{'taught' if options.teach or options.adapter else 'untaught'}"
    for name_of_one_machine in ("--adapter", "--output-dir", "--deadline"):
        if name_of_one_machine in given:
            at = given.index(name_of_one_machine)
            del given[at : at + 2]
    for alpha in options.alphas:
        rows += measured(model, prompts, options.new, ways, options.rounds, alpha)
        for row in rows[-len(ways) - 1 :]:
            print({k: v for k, v in row.items() if k != "speedups"}, flush=True)
        write_json(out / f"{name}.json", {
            "name": name, "kind": "drafting", "command": " ".join(["python -m zsaa.depth.draft", *given]),
            "model": {"name": Path(options.model).name, "taught": bool(options.teach or options.adapter)}, "log": log,
            "task": {"name": options.corpus, "source": data.source, "substitute": data.substitute, "title": data.title},
            "threads": torch.get_num_threads(), "prompt_tokens": PROMPT, "new_tokens": options.new, "rows": rows,
            "provenance": provenance(torch.device(options.device), seed=0, eval_samples=len(prompts)),
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
