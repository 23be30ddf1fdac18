"""torch.compile under the dial, and what it costs: one graph for each (prompt length, alpha), none per token.

    python examples/compiled.py [--model smollm2-135m] [--tokens 256] [--alphas 1.0 0.9 0.8]

PyTorch stops compiling a function after 8 variants; raise torch._dynamo.config.recompile_limit for more settings.
"""

import argparse
import time

import torch

import zsaa
from zsaa.models import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.9, 0.8])
    arguments = parser.parse_args()

    model, _ = load_model(arguments.model)
    zsaa.enable(model)
    shape, generator = (1, arguments.tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)

    def prefill():
        started = time.perf_counter()
        with torch.inference_mode():
            logits = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits, time.perf_counter() - started

    def median():
        return sorted(prefill()[1] for _ in range(5))[2]

    eager = {}
    for alpha in arguments.alphas:
        zsaa.set_alpha(model, alpha)
        eager[alpha] = prefill()[0], median()
    model.forward = torch.compile(model.forward)
    for alpha in arguments.alphas:
        zsaa.set_alpha(model, alpha)
        logits, first = prefill()
        again = median()
        want, before = eager[alpha]
        print(
            f"alpha {alpha}: first call {first:.1f} s, then {1000 * again:.0f} ms (eager {1000 * before:.0f} ms); "
            f"largest difference of a logit {(logits - want).abs().max().item():.1e}"
        )


if __name__ == "__main__":
    main()
