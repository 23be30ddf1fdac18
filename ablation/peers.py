"""The blocks that other tools would remove from the same model, on the same texts.

    python -m ablation.peers --output-dir outputs/peers      # PruneMe and ShortGPT beside zsaa.depth
    python -m ablation.peers --show

Both are computed as their code does it, from the hidden states that transformers gives (`output_hidden_states`), so by
none of what `zsaa.depth.similarity` does: PruneMe (arcee-ai/PruneMe, compute_block_similarity) leaves the first of
these out, begins no block with the first layer and does not spare the last one, whose states transformers gives behind
the final norm; ShortGPT (arXiv 2403.03853, Eq. 1) has layers of least influence, one by one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zsaa.data.corpora import load_corpus
from zsaa.depth import similarity
from zsaa.depth.study import CONTINUATION, PREFIX, calibration
from zsaa.kit.store import RESULTS
from zsaa.measure import provenance, write_json
from zsaa.models import load_model

REMOVED = (3, 6, 9, 12)
FILE = RESULTS / "depth" / "peers-smollm2-135m.json"


@torch.inference_mode()
def hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return model(**batch, use_cache=False, output_hidden_states=True).hidden_states


def pruneme(states: Iterable[Sequence[Tensor]], n: int) -> tuple[list[int], list[float]]:
    """(the block of n layers, the distance of each block that may go) of texts without padding, by last tokens."""
    sums: list[float] = []
    for layers in states:
        ends = [layer[0, -1].double() for layer in layers[1:]]
        angles = [math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))) / math.pi
                  for a, b in zip(ends, ends[n:])]  # fmt: skip
        sums = [x + y for x, y in zip(sums, angles)] if sums else angles
    start = sums.index(min(sums)) + 1  # `ends` begins behind the first layer, so with what the second is given
    return list(range(start, start + n)), sums


def shortgpt(states: Iterable[Sequence[Tensor]]) -> list[float]:
    """Each layer's influence: 1 less the mean cosine of what it is given and what it gives, over all tokens."""
    alike, tokens = torch.zeros(0), 0
    for layers in states:
        pairs = itertools.pairwise(layer.double() for layer in layers)
        found = torch.stack([torch.cosine_similarity(a, b, dim=-1).sum() for a, b in pairs])
        alike, tokens = found + (alike if len(alike) else 0), tokens + layers[0].shape[1]
    return (1 - alike / tokens).tolist()


def compared(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], removed: Sequence[int] = REMOVED) -> list[dict]:
    """A row for each peer and number of layers: what it removes, what `zsaa.depth` does, and whether that is the same;
    apart: the largest difference of a number behind the choice that both have (behind no final norm)."""
    ours, states = similarity(model, batches), [hidden(model, batch) for batch in batches]
    influence, rows, last = shortgpt(states), [], ours.num_layers - 1
    order = sorted(range(1, len(influence)), key=lambda layer: influence[layer])
    for n in removed:
        block, sums = pruneme(states, n)
        mine = [float(ours.angular[start, start + n]) for start in ours.candidates(n)]
        rows.append({"variant": "PruneMe", "removed": n, "layers": block, "ours": ours.block(n), "apart": max(
            abs(a / len(batches) - b) for a, b in zip(sums, mine))})  # fmt: skip
        rows.append({"variant": "ShortGPT", "removed": n, "layers": sorted(order[:n]),
                     "ours": ours.least_influential(n), "apart": max(
                         abs(influence[layer] - float(ours.influence[layer])) for layer in range(last))})  # fmt: skip
    return [{**row, "same": row["layers"] == row["ours"], "apart": float(f"{row['apart']:.2g}")} for row in rows]


def table(path: Path = FILE):
    import pandas as pd

    rows = json.loads(path.read_text("utf-8"))["rows"]
    return pd.DataFrame([
        {"peer": row["variant"], "layers removed": row["removed"], "its choice": named(row["layers"]),
         "ours": "the same" if row["same"] else named(row["ours"]), "numbers apart by at most": f"{row['apart']:.0e}"}
        for row in sorted(rows, key=lambda row: row["variant"])
    ])  # fmt: skip


def named(layers: Sequence[int]) -> str:
    """[1, 2, 3, 7] as "1 to 3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=64, help="training texts of 256 tokens")
    parser.add_argument("--output-dir", default="outputs/peers")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args(arguments)
    if options.show:
        print(table().to_markdown(index=False, disable_numparse=True))
        return
    data = load_corpus("wikitext-103", train=None)
    model, tokenizer = load_model("smollm2-135m")
    rows = compared(model.eval(), calibration(tokenizer, data.train, options.texts, PREFIX + CONTINUATION))
    write_json(Path(options.output_dir) / FILE.name, {
        "name": FILE.stem, "kind": "depth-peers", "command": f"python -m ablation.peers --texts {options.texts}",
        "model": {"name": "smollm2-135m"}, "recipe": {"method": "untuned"},
        "task": {"name": "wikitext-103", "source": data.source, "substitute": data.substitute, "title": data.title},
        "rows": rows, "provenance": provenance(torch.device("cpu"), seed=0),
    })  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
