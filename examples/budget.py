"""A time instead of alpha: what every setting costs on this machine, and the largest alpha for a latency.

    python examples/budget.py [--model smollm2-135m] [--tokens 512] [--batch 1] [--device cpu] [--latency-ms 120]

The first call times the model (under a minute for the default one); the next one reads what was measured.
"""

import argparse

import torch

import zsaa
from zsaa.measure import alternate
from zsaa.models import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--latency-ms", type=float, help="default: half of what the stock model takes")
    parser.add_argument("--refresh", action="store_true", help="measure again")
    arguments = parser.parse_args()
    n, batch = arguments.tokens, arguments.batch

    model, _ = load_model(arguments.model, device=arguments.device)
    calibration = zsaa.calibrate(model, n, batch, refresh=arguments.refresh)
    table = zsaa.report(model, n, batch=batch)
    print(table.to_string())
    print({name: table.attrs[name] for name in ("model", "n", "batch", "tau", "dtype", "device", "timing")})

    wanted = arguments.latency_ms or calibration.stock_ms / 2
    alpha = zsaa.alpha_for(model, n, latency_ms=wanted, batch=batch)
    print(f"\nalpha for {wanted:.1f} ms: {alpha:.5f}, predicted {calibration.predict(alpha):.1f} ms", end="")
    print(f" (for 3x fewer MACs: {zsaa.alpha_for(model, n, mac_reduction=3):.5f})")

    zsaa.enable(model)
    ids = torch.randint(model.config.vocab_size, (batch, n), device=arguments.device)

    def prefill(alpha):
        with zsaa.at(model, alpha), torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)

    timed = alternate({"stock": lambda: prefill(1.0), "alpha": lambda: prefill(alpha)}, repeats=9)
    for name, row in timed.items():
        low, high = row["latency_ms_quartiles"]
        print(f"then measured, {name}: {row['latency_ms']:.1f} ms (middle half of 9 runs: {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
