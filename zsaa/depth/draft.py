"""Self-speculative decoding: a model drafts with its own first layers, and checks the draft with all of them.

    python -m zsaa.depth.draft --adapter results/adapters/reviews-exits --exits 6 9 12 --output-dir outputs/draft

By transformers' assistant_early_exit, the dial on. The text is that of greedy decoding, which is checked for every
prompt; what changes is the time, and how much depends on how often the lower layers say what all would say.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import zsaa
from zsaa.data.corpora import load_corpus
from zsaa.evaluation.language import windows
from zsaa.families import find_decoder
from zsaa.measure import provenance, write_json
from zsaa.models import load_model

PROMPT = 128  # tokens that are read


def once(model: nn.Module, ids: torch.Tensor, new: int, depth: int | None) -> tuple[list[int], float]:
    """The tokens that are generated greedily behind ids [1, tokens], drafted by the first `depth` layers (None: not),
    and the seconds that it took."""
    options = {} if depth is None else {"assistant_early_exit": depth}
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                             do_sample=False, pad_token_id=0, **options)  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), time.perf_counter() - started


def measured(model: nn.Module, prompts: list[torch.Tensor], new: int, exits: list[int], rounds: int) -> list[dict]:
    """A row for plain decoding and one for each exit, in turn, prompt by prompt: tokens a second (median over prompts
    of each one's best of `rounds`), the speed-up over plain decoding of the same prompts, paired (median and
    quartiles), the passes of the whole model per new token, and for how many prompts the text is the same."""
    zsaa.enable(model, alpha=1.0)
    passes = [0]
    decoder, family = find_decoder(model)
    last = getattr(decoder, family.layers)[-1]
    hook = last.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    found: dict[int | None, list[tuple[list[int], float, int]]] = {depth: [] for depth in (None, *exits)}
    for prompt in prompts:
        for depth, runs in found.items():
            passes[0] = 0
            tries = [once(model, prompt, new, depth) for _ in range(rounds)]
            runs.append((tries[0][0], min(seconds for _, seconds in tries), passes[0] // rounds))
    hook.remove()
    zsaa.disable(model)
    rows, plain = [], found[None]
    for depth, runs in found.items():
        ratios = sorted(a[1] / b[1] for a, b in zip(plain, runs))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append({
            "depth": depth, "tokens_per_second": round(new / statistics.median(s for _, s, _ in runs), 2),
            "speedup": round(quartiles[1], 3), "speedup_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "passes_per_token": round(sum(p for *_, p in runs) / (new * len(runs)), 3),
            "same_text": sum(a[0] == b[0] for a, b in zip(plain, runs)), "n": len(runs),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.draft", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    add("--adapter", help="a LoRA adapter that was taught exits, by zsaa.depth.heal")
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--exits", type=int, nargs="+", default=[6, 9, 12])
    add("--prompts", type=int, default=8)
    add("--new", type=int, default=64, help="tokens to generate")
    add("--rounds", type=int, default=2)
    add("--output-dir", default="outputs/draft")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, device=device)
    if options.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter).merge_and_unload()
    model.eval()
    data = load_corpus(options.corpus, train=0)
    samples = windows(data, tokenizer, "prefix", PROMPT, 1, count=options.prompts)
    prompts = [torch.tensor([sample.ids[:PROMPT]], device=device) for sample in samples]
    once(model, prompts[0], 4, None)  # what is compiled or allocated at first
    rows = measured(model, prompts, options.new, options.exits, options.rounds)
    for row in rows:
        print(row, flush=True)
    adapter = Path(options.adapter).name if options.adapter else None
    name = f"draft-{Path(options.model).name}{'' if adapter is None else '-exits'}"
    write_json(Path(options.output_dir) / f"{name}.json", {
        "name": name, "kind": "drafting",
        "command": "python -m zsaa.depth.draft" + (f" --adapter {options.adapter}" if adapter else "")
        + f" --exits {' '.join(map(str, options.exits))} --prompts {options.prompts} --new {options.new}",
        "model": {"name": Path(options.model).name, "adapter": adapter},
        "task": {"name": options.corpus, "source": data.source, "substitute": data.substitute, "title": data.title},
        "threads": torch.get_num_threads(), "prompt_tokens": PROMPT, "new_tokens": options.new, "rows": rows,
        "provenance": provenance(torch.device(device), seed=0, eval_samples=len(prompts)),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
