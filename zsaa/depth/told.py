"""Texts that a larger model writes, for a smaller one to heal on: distillation by sequence (Kim and Rush, 2016).

    python -m zsaa.depth.told told.json.gz --teacher gemma3-270m --texts 320

Teacher and student may have different tokenizers: what passes between them is text. The teacher goes on from the
beginnings of training texts, by drawing from what it says; `zsaa.depth.heal --ways sequence --told told.json.gz` has
layers that were left learn it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from zsaa.data.corpora import load_corpus
from zsaa.evaluation.language import bos_of
from zsaa.kit.files import draft
from zsaa.models import load_model

BEGIN, NEW = 64, 160  # tokens of the teacher's: of a beginning, and those that it adds


@torch.inference_mode()
def told(teacher: nn.Module, tokenizer, texts: list[str], together: int = 32, seed: int = 0) -> Iterator[list[str]]:
    """The beginnings of those `texts` that are longer than they, each as the teacher goes on from it: so many at a
    time."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids[:BEGIN] for text in texts]
    begun = [bos_of(tokenizer) + one for one in ids if len(one) == BEGIN]
    device = next(teacher.parameters()).device
    torch.manual_seed(seed)
    for start in range(0, len(begun), together):
        given = torch.tensor(begun[start : start + together], device=device)
        drawn = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=tokenizer.pad_token_id)
        out = teacher.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, **drawn)
        yield tokenizer.batch_decode(out, skip_special_tokens=True)


def read(path: str | Path | None) -> dict:
    """{"teacher", "texts"} of a file that `main` left; no texts for None."""
    return json.loads(gzip.decompress(Path(path).read_bytes())) if path else {"teacher": None, "texts": []}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.told", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path)
    add("--teacher", default="gemma3-270m", help="as in zsaa.models.load_model")
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--texts", type=int, default=320, help="training texts that are begun, at most")
    add("--batch", type=int, default=32)
    options = parser.parse_args(arguments)
    data = load_corpus(options.corpus, train=options.texts)
    teacher, tokenizer = load_model(options.teacher, device="cuda" if torch.cuda.is_available() else "cpu")
    texts: list[str] = []
    for more in told(teacher.eval(), tokenizer, list(data.train), options.batch):
        texts += more
        content = {"teacher": Path(options.teacher).name, "texts": texts}
        with draft(options.output) as own:
            own.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
        print(f"  told: {len(texts)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
