"""A question about a long document, faster: only what the question asks for enters the model.

    python examples/question.py [--document FILE] [--question "Who ...?"] [--alphas 1 0.5 0.3]

The adapter is the repository's (results/adapters/coqa-asked), for SmolLM2-135M-Instruct (Q4_1):
it answers in a few words.
"""

import argparse
import time
from pathlib import Path

import torch

import zsaa
from zsaa import finetune

ADAPTER = Path(__file__).resolve().parent.parent / "results/adapters/coqa-asked"
DOCUMENT = """The ferry left the harbour at nine, an hour late. Mara had counted the crates twice and found one missing,
the one with the lamps for the lighthouse. The captain said that nobody had come aboard at night, but the cook
remembered a small boat without lights, rowing towards the northern cliffs.

In the bakery of the old town the ovens are lit at three. Jonas kneads the rye dough by hand, as his grandmother did,
and lets it rest under a blue cloth. The first loaves go to the hospital, the next ones to the school. On Sundays the
shop is closed, and Jonas repairs bicycles in the yard.

The expedition reached the lake on the fourth day. Doctor Amadi set up her instruments on the eastern shore and found
that the water was warmer than anyone had expected: eleven degrees, in the middle of winter. Her assistant blamed the
thermometer, and was sent to fetch the spare one from the second sledge.

The museum bought the clock in 1931 from a widow in Trieste. It strikes thirteen at noon. A watchmaker who opened it
found a note between two wheels, which said that the thirteenth stroke was for the children who came late."""


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ask(model, tokenizer, document, question, alpha, new_tokens=24):
    """The answer in a few words, the positions of the prompt that were kept, the prompt's tokens, and the seconds."""
    # As it was trained: the passages, then the question; `question` says which tokens ask.
    body = tokens(tokenizer, "Passage:") + tokens(tokenizer, " " + document.strip()) + tokens(tokenizer, "\n\n")
    line = tokens(tokenizer, f"Question: {question}\nAnswer:")
    ids = torch.tensor([body + line])
    asks = torch.tensor([[False] * len(body) + [True] * len(line)])
    end = tokens(tokenizer, "\n")[0]
    began = time.perf_counter()
    with zsaa.trace(model) as trace:
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            question=asks,
            alpha=alpha,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[0, ids.shape[1] :]
    seconds = time.perf_counter() - began
    return tokenizer.decode(answer).strip(), trace.kept[0][0].tolist(), ids.shape[1], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--document", type=Path, help="a text file; default: four short stories")
    parser.add_argument("--question", default="What did the watchmaker find in the clock?")
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.5, 0.3])
    arguments = parser.parse_args()
    document = arguments.document.read_text(encoding="utf-8") if arguments.document else DOCUMENT

    model, tokenizer = finetune.load(ADAPTER, kind="causal-lm")
    for alpha in arguments.alphas:
        answer, kept, length, seconds = ask(model, tokenizer, document, arguments.question, alpha)
        print(f"alpha = {alpha:g}: {len(kept)} of {length} tokens, {seconds:.2f} s: {answer}")


if __name__ == "__main__":
    main()
