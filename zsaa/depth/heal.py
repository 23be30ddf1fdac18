"""A language model without some of its layers, healed: by labels alone, by the whole model's verdicts, too, or by text
that a larger model wrote.

    python -m zsaa.depth.heal --removed 3 6 9 12 --steps 300 --exam exam.json.gz --output-dir outputs/heal
    python -m zsaa.depth.heal --exits 6 10 15 20 --steps 600 --output-dir outputs/heal

The first is the experiment of the paper beside the main one (its Tables 1 and 2) on a substitute: blocks chosen by
angular distance, LoRA on running text (and on text like the questions), judged by perplexity on held-out windows, by
multiple choices and by answers to questions about passages (zsaa/depth/exam.py); --ways sequence --told FILE has the
running text from a larger model (zsaa/depth/told.py). The second teaches one model to
predict from its lower layers, too, at every depth; zsaa/depth/draft.py at the one that drafts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zsaa
from zsaa.data.batching import pad
from zsaa.data.corpora import load_corpus
from zsaa.depth import exam, told
from zsaa.depth.similarity import similarity
from zsaa.depth.study import CONTINUATION, PREFIX, calibration, without
from zsaa.dial import trained_for
from zsaa.evaluation.accuracy import tally
from zsaa.evaluation.language import Window, bootstrap, bos_of, interval, pack, score, windows
from zsaa.families import find_decoder
from zsaa.finetune import Recipe, add_lora
from zsaa.measure import provenance, write_json
from zsaa.models import load_model

LENGTH = 256  # tokens of a piece of text to heal on
TEMPERATURE = 2.0  # of the verdicts that are distilled
WAYS = ("untuned", "text", "distilled", "sequence")


def pieces(tokenizer, texts: Sequence[str], length: int = LENGTH, seed: int = 0) -> Tensor:
    """int64 [pieces, length]: texts one behind the other, a mark of their ends between them, cut and shuffled."""
    end, stream = tokenizer.eos_token_id, []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids:
        stream += [*ids, end]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def mixed(rows: Tensor, others: Tensor) -> Tensor:
    """Pieces of two kinds in turn, the fewer others over and over; the first kind alone, if there are no others."""
    if not len(others):
        return rows
    return torch.stack([rows, others[torch.arange(len(rows)) % len(others)]], 1).flatten(0, 1)


def texts_of(options: argparse.Namespace, tokenizer, train: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
    """(pieces to heal on, by the way of healing; what a result says of a larger model that wrote some)"""
    alike, larger = exam.read(options.exam)[2], told.read(options.told)
    if "sequence" in options.ways and not larger["texts"]:
        raise ValueError("--ways sequence heals on text that a larger model wrote: give --told, by zsaa.depth.told.")
    others = pieces(tokenizer, alike, seed=options.seed) if alike else torch.empty(0, LENGTH, dtype=torch.long)
    text = mixed(pieces(tokenizer, train, seed=options.seed), others)
    if not larger["texts"]:
        return {"text": text, "distilled": text}, {}
    written = pieces(tokenizer, larger["texts"], seed=options.seed)
    by = {"teacher": larger["teacher"], "told_pieces": len(written)}
    return {"text": text, "distilled": text, "sequence": mixed(written, others)}, by


def divergence(said: Tensor, taught: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Of logits [..., vocabulary] from a teacher's, both softened by `temperature`, in nats a token; times its square,
    so that gradients keep their size (Hinton et al., arXiv 1503.02531)."""
    said, taught = (x.flatten(0, -2).float() / temperature for x in (said, taught))
    return F.kl_div(said.log_softmax(-1), taught.softmax(-1), reduction="batchmean") * temperature**2


def learn(model: nn.Module, rows: Tensor, steps: int, loss, rate: float, batch: int, deadline: float) -> dict:
    """`steps` optimizer steps of loss(ids [batch, length]) on `rows`, one after another; fewer if `deadline` (seconds
    since 1970) comes first. Returns a log."""
    weights = [p for p in model.parameters() if p.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(steps):
        if time.time() > deadline:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (0.05 * steps + 1)) * (1 - step / steps)
        ids = rows[(torch.arange(batch) + step * batch) % len(rows)].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(ids)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())
        if step % 50 == 49:
            seconds = (time.perf_counter() - started) / (step + 1)
            print(f"  step {step + 1}: loss {torch.stack(losses[-50:]).mean():.3f}, {seconds:.3f} s a step", flush=True)
    model.eval()
    curve = [round(float(torch.stack(losses[i : i + 50]).mean()), 4) for i in range(0, len(losses), 50)]
    return {"steps": len(losses), "asked": steps, "loss": curve, "seconds": round(time.perf_counter() - started, 1),
            "learning_rate": rate, "batch_size": batch, "tokens": len(losses) * batch * rows.shape[1]}  # fmt: skip


def adapted(model: nn.Module, rank: int, seed: int = 0) -> nn.Module:
    """`model` with LoRA adapters of this rank on all linear layers, in float32, its own weights frozen."""
    return add_lora(model, Recipe(tuning="lora", lora_rank=rank, lora_alpha=2 * rank, dropout=0.0, seed=seed))


def heal(student: nn.Module, how: str, teacher: nn.Module, rows: dict[str, Tensor], options) -> tuple:
    """(student with what its adapters learned, log): of the pieces of text rows[how] alone, or where it is distilled
    half of these and half of the teacher's verdicts."""
    rows, teacher = rows[how], teacher if how == "distilled" else None
    model = adapted(student, options.rank, options.seed)
    if teacher is not None:
        teacher.eval()

    def loss(ids: Tensor) -> Tensor:
        said = model(input_ids=ids, use_cache=False).logits[:, :-1]
        hard = F.cross_entropy(said.flatten(0, 1).float(), ids[:, 1:].flatten())
        if teacher is None:
            return hard
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        return (hard + divergence(said, taught)) / 2

    log = learn(model, rows, options.steps, loss, options.rate, options.batch, options.deadline)
    if options.save:
        model.save_pretrained(Path(options.save) / f"{student.config.num_hidden_layers}-layers-{how}")
    return model.merge_and_unload(), log


def judged(
    model: nn.Module, samples: Sequence[Window], base: np.ndarray | None, depth: int | None = None, alpha: float = 1.0,
    precision: str | None = None,
) -> tuple:  # fmt: skip
    """(perplexity of `samples`, and its ratio to `base`, with intervals over documents; (the windows' sums of nats, the
    likeliest tokens)). alpha: of the prefixes; precision: by default "bf16" on a GPU, "fp32" elsewhere."""
    zsaa.enable(model, alpha=alpha)
    trained_for(model, None, (1, find_decoder(model)[0].config.num_hidden_layers))  # or not: that is measured here
    zsaa.set_depth(model, depth)
    precision = precision or ("bf16" if next(model.parameters()).is_cuda else "fp32")
    scored = score(model, [(w.ids, w.start) for w in samples], 32, precision)
    zsaa.disable(model)
    nll, counts = np.array([float(x.sum()) for x, _ in scored]), np.array([len(w.ids) - w.start for w in samples])
    units = [w.unit for w in samples]
    base = nll if base is None else base
    logs, apart = bootstrap(nll, counts, units), bootstrap(nll - base, counts, units)
    likely = [tokens for _, tokens in scored]
    return {
        "perplexity": round(float(np.exp(nll.sum() / counts.sum())), 4),
        "ci95": interval(logs),
        "ratio": round(float(np.exp((nll - base).sum() / counts.sum())), 4),
        "ratio_ci95": interval(apart),
        "n": len(samples),
        "nll": pack(nll),
    }, (nll, likely)


@torch.inference_mode()
def choose(model: nn.Module, tokenizer, questions: Sequence[dict], together: int = 8) -> dict[str, dict]:
    """Of each task the tally of questions {"task", "context", "choices", "answer"} whose right choice is the likeliest
    behind the context, by nats a character, as lm-evaluation-harness's acc_norm. together: questions in a pass."""
    device, bos, right = next(model.parameters()).device, bos_of(tokenizer), {}
    for start in range(0, len(questions), together):
        some, texts = questions[start : start + together], []
        for question in some:
            head = bos + tokenizer(question["context"], add_special_tokens=False).input_ids
            tails = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in question["choices"]]
            texts += [(head, tail, len(choice) + 1) for tail, choice in zip(tails, question["choices"])]
        ids, mask = pad([head + tail for head, tail, _ in texts], 0, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            said = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        nats = []
        for row, (head, tail, characters) in zip(said, texts):
            told = row[len(head) - 1 : len(head) - 1 + len(tail)].float().log_softmax(-1)
            nats.append(float(told[torch.arange(len(tail)), torch.tensor(tail)].sum()) / characters)
        for question in some:
            mine, nats = nats[: len(question["choices"])], nats[len(question["choices"]) :]
            right.setdefault(question["task"], []).append(int(int(np.argmax(mine)) == question["answer"]))
    return {task: tally(flags) for task, flags in right.items()}


def blocks(options: argparse.Namespace, model: nn.Module, tokenizer, data, samples, rows) -> Iterator[dict]:
    """A row for the whole model, and for each block that is removed: as it is left, healed by text, distilled."""
    device = next(model.parameters()).device
    asked, questions, _ = exam.read(options.exam)
    found = similarity(model, [{k: v.to(device) for k, v in batch.items()}
                               for batch in calibration(tokenizer, data.train, 64, LENGTH)])  # fmt: skip
    zsaa.disable(model)
    base = None if "untuned" in options.ways else judged(model, samples, None)[1][0]
    for removed in (0, *options.removed):
        gone = found.block(removed) if removed else []
        for how in options.ways:
            if removed == 0 and how != "untuned" and not (how == "text" and options.whole):
                continue  # it is the teacher
            if time.time() > options.deadline:
                return
            started, student, log = time.perf_counter(), without(model, gone), None
            if how != "untuned":
                student = without(load_model(options.model, device=str(device))[0], gone)
                student, log = heal(student, how, model, rows, options)
            scores, (nll, _) = judged(student, samples, base)
            base = nll if base is None else base
            yield {"removed": removed, "layers": gone, "healed": how, "mac_reduction": round(
                found.num_layers / (found.num_layers - removed), 4), **scores,
                "choices": choose(student, tokenizer, asked), "answers": exam.answers(student, tokenizer, questions),
                "log": log,
                "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip


def exits(options: argparse.Namespace, model: nn.Module, tokenizer, data, samples, rows) -> Iterator[dict]:
    """A row for each depth, before and after one model was taught to predict from all of them: by the text, and by what
    its own last layer says; and how often both say the same next token."""
    layers, draw = find_decoder(model)[0].config.num_hidden_layers, random.Random(0)
    shallowest = min(options.exits)

    def rows_of(net: nn.Module, trained: bool) -> Iterator[dict]:
        base = None
        for depth in (layers, *options.exits):
            scores, (nll, likely) = judged(net, samples, None if base is None else base[0], depth)
            base = (nll, likely) if base is None else base
            same = torch.cat([a == b for a, b in zip(likely, base[1])]).double().mean()
            yield {"depth": depth, "trained": trained, "agreement": round(100 * float(same), 2), **scores}

    yield from rows_of(model, False)
    taught = adapted(model, options.rank, options.seed)
    decoder, _ = find_decoder(taught)
    norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm

    def loss(ids: Tensor) -> Tensor:
        out = taught(input_ids=ids, use_cache=False, output_hidden_states=True)
        said = out.logits[:, :-1]
        hard = F.cross_entropy(said.flatten(0, 1).float(), ids[:, 1:].flatten())
        depth = draw.randint(shallowest, layers - 1)
        early = model.get_output_embeddings()(norm(out.hidden_states[depth]))[:, :-1]
        own = F.cross_entropy(early.flatten(0, 1).float(), ids[:, 1:].flatten())
        return (hard + (own + divergence(early, said.detach(), 1.0)) / 2) / 2

    log = learn(taught, rows["text"], options.steps, loss, options.rate, options.batch, options.deadline)
    state = {k: v.half() for k, v in taught.state_dict().items()}
    taught.save_pretrained(Path(options.output_dir) / f"{options.name}-adapter", state_dict=state)
    for row in rows_of(taught.merge_and_unload(), True):
        yield {**row, "log": log if row["depth"] == layers else None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.heal", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--source", default="auto", help="auto, packaged, hub or a folder")
    add("--removed", type=int, nargs="*", default=[], help="layers in the blocks that are removed")
    add("--ways", nargs="+", default=list(WAYS[:3]), choices=WAYS)
    add("--whole", action="store_true", help="adapters for the whole model, too, by text alone")
    add("--exits", type=int, nargs="*", default=[], help="depths to judge, and from the least of them on to teach")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=16, help="pieces of 256 tokens in a step")
    add("--rate", type=float, default=1e-3)
    add("--rank", type=int, default=16, help="of the LoRA adapters")
    add("--seed", type=int, default=0, help="of the order of the text, and of the adapters")
    add("--texts", type=int, default=None, help="training texts at most")
    add("--windows", type=int, default=400, help="windows of 224 + 32 tokens that are scored")
    add("--exam", help="questions, and text of their kind, by zsaa.depth.exam: half of the pieces are of that text")
    add("--told", help="text that a larger model wrote, by zsaa.depth.told: of --ways sequence")
    add("--save", help="a folder for the adapters")
    add("--deadline", type=float, default=float("inf"), help="seconds since 1970 after which no step begins")
    add("--name", default="heal", help="of the result file")
    add("--output-dir", default="outputs/depth")
    options = parser.parse_args(arguments)
    data = load_corpus(options.corpus, options.source, train=options.texts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, device=device)
    model.eval().requires_grad_(False)
    samples = windows(data, tokenizer, "prefix", PREFIX, CONTINUATION, count=options.windows)
    rows, by = texts_of(options, tokenizer, data.train)
    study, found = (exits if options.exits else blocks), []
    path = Path(options.output_dir) / f"{options.name}-{Path(options.model).name}.json"
    for row in study(options, model, tokenizer, data, samples, rows):
        found.append(row)
        print({k: v for k, v in row.items() if k not in ("nll", "choices", "answers", "log")}, flush=True)
        write_json(path, {
            "name": f"{options.name}-{Path(options.model).name}", "kind": "healing",
            "command": "python -m zsaa.depth.heal " + " ".join(_told(options)),
            "model": {"name": Path(options.model).name},
            "task": {"name": options.corpus, "source": data.source, "substitute": data.substitute, "title": data.title},
            "recipe": {"method": "lora", "lora_rank": options.rank, "temperature": TEMPERATURE, **by},
            "protocol": {"name": "whole", "prefix": PREFIX, "continuation": CONTINUATION},
            "rows": found,
            "provenance": provenance(
                torch.device(device), seed=options.seed, train_samples=len(rows["text"]), eval_samples=len(samples)),
        })  # fmt: skip
    return 0


def _told(options: argparse.Namespace) -> list[str]:
    """The options that bear on the numbers, as they are given."""
    said, bearing = [], "model removed ways exits steps batch rate rank seed windows whole exam told"
    for name in bearing.split():
        value = getattr(options, name)
        if value is True:
            said += [f"--{name}"]
        elif name in ("exam", "told") and value:
            said += [f"--{name}", Path(value).name]
        elif value:
            said += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return said


if __name__ == "__main__":
    raise SystemExit(main())
