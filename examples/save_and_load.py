"""The dial's settings travel in config.json: save, load with stock transformers, put the dial back on.

python examples/save_and_load.py [--model smollm2-135m]
"""

import argparse
import tempfile

from transformers import AutoModelForCausalLM

import zsaa
from zsaa.dial import settings
from zsaa.models import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()

    model, _ = load_model(arguments.model)
    zsaa.enable(model, alpha=0.9, tau=8, score="column_mean")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)  # a stock model: the dial is off
        print("stock transformers reads the entry and leaves it alone:", loaded.config.zsaa)
        zsaa.enable(loaded)  # no settings given: those that were saved
        print("after zsaa.enable(model):", settings(loaded))


if __name__ == "__main__":
    main()
