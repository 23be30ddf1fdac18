"""Text generation under the dial: an answer, streamed; a second turn; assisted decoding; a pipeline.

    python examples/generate.py [--model smollm2-135m] [--alpha 0.97]

What shortens is the prefill and the cache. The work for each new token stays what it was.
"""

import argparse

import torch
from transformers import TextStreamer, pipeline

import zsaa
from zsaa.models import load_model

STORY = (
    "The ferry left the harbour at nine, an hour late. Mara had counted the crates twice and found one missing, the "
    "one with the lamps for the lighthouse. The captain said that nobody had come aboard at night, but the cook "
    "remembered a small boat without lights, rowing towards the northern cliffs. "
)


def cache_rows(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--alpha", type=float, default=0.97)
    parser.add_argument("--new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_model(arguments.model)
    # Not fine-tuned for the dial: the score per voter keeps the recent words that the next one needs.
    zsaa.enable(model, alpha=arguments.alpha, score="column_mean")
    options = dict(max_new_tokens=arguments.new_tokens, do_sample=False, return_dict_in_generate=True)

    print("1. An answer, streamed")
    chat = [{"role": "user", "content": STORY + "Which crate was missing?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    rows = cache_rows(answer.past_key_values)
    print(f"   {prompt.input_ids.shape[1]} tokens of prompt; cached rows: {rows[0]} in layer 1, {rows[-1]} in the last")

    print("\n2. A second turn, appended to the pruned cache (it is not pruned itself)")
    text = "<|im_end|>\n<|im_start|>user\nWho saw it?<|im_end|>\n<|im_start|>assistant\n"
    turn = tokenizer(text, return_tensors="pt")
    history = torch.cat([answer.sequences, turn.input_ids], dim=1)
    mask = torch.ones_like(history)
    model.generate(
        history,
        attention_mask=mask,
        past_key_values=answer.past_key_values,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **options,
    )

    print("\n3. Assisted decoding: candidates from the prompt itself, and the very same text")
    guessed = model.generate(**prompt, **options, prompt_lookup_num_tokens=4)
    print("   same as before:", torch.equal(guessed.sequences, answer.sequences))

    print("\n4. A pipeline, until a stop string")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (out,) = generate(
        STORY + "Then", max_new_tokens=arguments.new_tokens, do_sample=False, stop_strings=["."], tokenizer=tokenizer
    )
    print("   ..." + out["generated_text"][len(STORY) :])


if __name__ == "__main__":
    main()
