"""Self-speculative decoding: a model drafts with its own first layers, and checks the draft with all of them.

    python -m zsaa.depth.draft --exits 3 6 10 --steps 3000 --output-dir outputs/draft
    python -m zsaa.depth.draft --drafters outputs/draft --exits 3 6 10 --ahead 2 4 6 --output-dir outputs/draft

The first command has the model continue reviews greedily, and teaches its first layers (by adapters, and a linear map
before the head) to go on as it does: the model itself stays as it is, and so does its text. The second decodes with
them (zsaa/depth/speculate.py) beside plain greedy decoding and drafts of what stood before (prompt lookup): the best
way of each kind is chosen on some prompts, and judged on others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa.data.corpora import load_corpus
from zsaa.depth.heal import learn, pieces
from zsaa.depth.remove import remove_layers
from zsaa.depth.speculate import Before, Exit, Reader, continued
from zsaa.evaluation.language import windows
from zsaa.families import find_decoder
from zsaa.measure import provenance, write_json
from zsaa.models import load_model

PROMPT = 128  # tokens that are read
RANKS = 192  # of the adapters, times the layers that draft: as much to learn for all
SAID = 8192  # tokens that a draft may have: the head of all takes more time than three layers


def written(model: nn.Module, rows: Tensor, together: int = 1024, deadline: float = float("inf")) -> Tensor:
    """int64 [rows, 2 x tokens]: `rows`, and what the model says greedily behind each, as many tokens. Those that come
    after `deadline` (seconds since 1970) are left out."""
    device, width, found = next(model.parameters()).device, rows.shape[1], []
    for start in range(0, len(rows), together):
        if found and time.time() > deadline:
            break
        ids = rows[start : start + together].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found.append(model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=width, min_new_tokens=width, do_sample=False,
                pad_token_id=0).cpu())  # fmt: skip
        print(f"  written: {start + len(ids)}", flush=True)
    return torch.cat(found)


def first(model: nn.Module, depth: int) -> nn.Module:
    """A model of the first `depth` layers of `model`, on weights of its own, with a linear map behind its last norm
    that changes nothing yet."""
    layers = find_decoder(model)[0].config.num_hidden_layers
    less = remove_layers(copy.deepcopy(model), range(depth, layers))
    size, like = less.config.hidden_size, next(less.parameters())
    onward = nn.Linear(size, size, bias=False, device=like.device, dtype=like.dtype)
    nn.init.eye_(onward.weight)
    less.model.norm = nn.Sequential(less.model.norm, onward)
    return less.requires_grad_(False)


def adapted(less: nn.Module, depth: int) -> nn.Module:
    """`less` with adapters on the linear layers of its blocks; its norm and map are trained whole."""
    from peft import LoraConfig, get_peft_model

    inside = [name for name, module in less.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    rank = RANKS // depth
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=inside,
                        modules_to_save=["model.norm"])  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(less, config)


def taught(
    model: nn.Module, depth: int, rows: Tensor, words: Tensor, options: argparse.Namespace, deadline: float
) -> tuple:
    """(the first `depth` layers with adapters that go on as `rows` do in their second halves, log)."""
    student = adapted(first(model, depth), depth)
    decoder, half = find_decoder(student)[0], rows.shape[1] // 2
    device = next(student.parameters()).device
    head = model.get_output_embeddings().weight.detach()[words.to(device)]
    number = torch.full((model.config.vocab_size,), -100, device=device)
    number[words.to(device)] = torch.arange(len(words), device=device)

    def loss(ids: Tensor) -> Tensor:
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, half - 1 : -1]
        said = F.linear(states, head.to(states.dtype)).flatten(0, 1).float()
        return F.cross_entropy(said, number[ids[:, half:]].flatten(), ignore_index=-100)

    log = learn(student, rows, options.steps, loss, options.rate, options.batch, deadline)
    return student, log


@torch.no_grad()
def foretold(drafter: nn.Module, rows: Tensor, words: Tensor) -> float:
    """Per cent of the tokens in the second halves of `rows` that `drafter`, which may say `words`, would draft."""
    device, half, right = next(drafter.parameters()).device, rows.shape[1] // 2, []
    head = drafter.get_output_embeddings().weight[words.to(device)]
    for ids in rows.to(device).split(64):
        states = find_decoder(drafter)[0](input_ids=ids, use_cache=False).last_hidden_state[:, half - 1 : -1]
        right.append(words.to(device)[F.linear(states, head).argmax(-1)] == ids[:, half:])
    return round(100 * float(torch.cat(right).double().mean()), 2)


def school(options: argparse.Namespace, model: nn.Module, tokenizer, data) -> Iterator[dict]:
    """Teach a drafter for each of `exits`, and leave it in the output folder; each time, what is known so far."""
    pages = pieces(tokenizer, data.train, PROMPT)[: options.written]
    started, left = (
        time.time(),
        options.deadline - time.time(),
    )  # a third to write in, an equal part of the rest for each
    rows = written(model, pages, deadline=started + left / 3)
    held = written(model, prompts_of(data, tokenizer, min(256, options.written), seed=1))
    counts = torch.bincount(rows[:, PROMPT:].flatten(), minlength=model.config.vocab_size)
    words = counts.argsort(descending=True, stable=True)[: options.said].sort().values
    found = {"written": len(rows), "said_share": round(100 * float(counts[words].sum() / counts.sum()), 2), "rows": []}
    for number, depth in enumerate(options.exits, 1):
        until = started + left * (1 / 3 + 2 / 3 * number / len(options.exits))
        student, log = taught(model, depth, rows, words, options, until)
        folder = Path(options.output_dir) / f"drafter-{depth}"
        halves = {name: value.half() for name, value in student.state_dict().items()}
        student.save_pretrained(folder, state_dict=halves, save_embedding_layers=False)
        (folder / "words.json").write_text(json.dumps(words.tolist()))
        net = student.merge_and_unload().eval()
        row = {"way": "taught", "depth": depth, "rank": RANKS // depth, "foretold": foretold(net, held, words),
               "foretold_untaught": foretold(first(model, depth), held, words), "log": log}  # fmt: skip
        print({k: v for k, v in row.items() if k != "log"}, flush=True)
        found["rows"].append(row)
        yield found


def loaded(model: nn.Module, folder: Path, depth: int) -> tuple[nn.Module, Tensor]:
    """(drafter, the tokens that it may say) as `school` left them; FileNotFoundError where it did not."""
    less, device = first(model, depth), next(model.parameters()).device
    if not (folder / f"drafter-{depth}").exists():
        raise FileNotFoundError(f"{folder} holds no drafter-{depth}: teach one by --exits {depth} --steps 3000.")
    from peft import PeftModel

    words = json.loads((folder / f"drafter-{depth}" / "words.json").read_text())
    net = PeftModel.from_pretrained(less, folder / f"drafter-{depth}").merge_and_unload().eval()
    return net.requires_grad_(False), torch.tensor(words, device=device)


def prompts_of(data, tokenizer, count: int, seed: int) -> Tensor:
    """int64 [count, PROMPT]: beginnings of windows of held-out texts."""
    found = windows(data, tokenizer, "prefix", PROMPT, 1, count=count, seed=seed)
    return torch.tensor([sample.ids[:PROMPT] for sample in found])


Way = Callable[[Tensor], tuple[list[int], int]]  # of a prompt the tokens behind it, and the passes of the whole model


def by_transformers(model: nn.Module, new: int, **options) -> Way:
    """Greedy decoding by stock `generate`, drafted as `options` say."""

    def run(prompt: Tensor) -> tuple[list[int], int]:
        passes: list[int] = []
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        with torch.inference_mode():
            out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new,
                                 min_new_tokens=new, do_sample=False, pad_token_id=0, **options)  # fmt: skip
        hook.remove()
        return out[0, len(prompt) :].tolist(), len(passes)

    return run


def assisted(model: nn.Module, new: int, drafter: nn.Module, ahead: int) -> Way:
    """The same, `ahead` tokens at a time drafted by `drafter`."""
    plain = by_transformers(model, new, assistant_model=drafter)

    def run(prompt: Tensor) -> tuple[list[int], int]:
        config = drafter.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = ahead, "constant"
        config.assistant_confidence_threshold = 0.0
        return plain(prompt)

    return run


def ways_of(model: nn.Module, drafters: dict[int, tuple], options: argparse.Namespace) -> dict[tuple, Way]:
    """What decodes a prompt, by (what it is, layers that draft, tokens ahead). "generate", "lookup" and "assisted" (by
    the first of the drafters) are transformers'; "plain" (nothing drafted), "before", "exit" and "paced"
    (an exit as far ahead as its drafts are right, at most the most of `ahead`) are those of zsaa.depth.speculate, on a
    GPU also "recorded" as CUDA graphs."""
    new, most = options.new, max(options.ahead)
    room = PROMPT + new + most + 1
    found: dict[tuple, Way] = {("generate", None, None): by_transformers(model, new)}
    for ahead in options.ahead:
        found["lookup", None, ahead] = by_transformers(model, new, prompt_lookup_num_tokens=ahead)
        for depth in options.exits[:1]:
            found["assisted", depth, ahead] = assisted(model, new, drafters[depth][0], ahead)
    for recorded in (False, True) if next(model.parameters()).is_cuda else (False,):
        reader, name = Reader(model, room, recorded=recorded), "recorded " * recorded

        def by(draft, reader=reader) -> Way:
            return lambda prompt: continued(reader, prompt, new, draft)

        found[f"{name}plain", None, None] = by(None)
        for ahead in options.ahead:
            found[f"{name}before", None, ahead] = by(Before(ahead))
        for depth, (net, words) in drafters.items():
            small = Reader(net, room, words, recorded)
            found |= {(f"{name}exit", depth, ahead): by(Exit(small, ahead)) for ahead in options.ahead}
            if not recorded:  # each length would be recorded where it first comes
                found["paced", depth, most] = by(Exit(small, 2, most))
    return found


def timed(ways: dict[tuple, Way], prompts: Tensor, rounds: int, deadline: float = float("inf")) -> Iterator[list[dict]]:
    """After each prompt a row for each way, the first the one that all are compared with: of each prompt the least
    seconds of `rounds`, all ways in turn. "speedup" is the median of the prompts' own, with quartiles; same_text counts
    the prompts whose text is the first way's. No prompt begins after `deadline` (seconds since 1970), but the first."""
    wait = torch.cuda.synchronize if prompts.is_cuda else (lambda: None)
    found: dict[tuple, list[tuple[float, list[int], int]]] = {way: [] for way in ways}
    for number, prompt in enumerate(prompts):
        if number and time.time() > deadline:
            return
        tries: dict[tuple, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                wait()
                started = time.perf_counter()
                text, passes = run(prompt)
                tries[way].append(time.perf_counter() - started)
                if len(tries[way]) == rounds:
                    found[way].append((min(tries[way]), text, passes))
        yield compared(found)


def compared(found: dict[tuple, list[tuple[float, list[int], int]]]) -> list[dict]:
    """Rows of `timed` from each way's (seconds, text, passes), one for each prompt."""
    plain, rows = next(iter(found.values())), []
    for (kind, depth, ahead), mine in found.items():
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(plain, mine)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        tokens = len(mine[0][1])
        rows.append({
            "way": kind, "depth": depth, "ahead": ahead, "n": len(mine),
            "tokens_per_second": round(tokens / statistics.median(seconds for seconds, *_ in mine), 2),
            "speedup": round(middle, 3), "speedup_quartiles": [round(low, 3), round(high, 3)],
            "speedups": [round(ratio, 3) for ratio in ratios],
            "passes_per_token": round(sum(passes for *_, passes in mine) / (tokens * len(mine)), 3),
            "same_text": sum(ours[1] == theirs[1] for ours, theirs in zip(plain, mine)),
        })  # fmt: skip
    return rows


def measure(options: argparse.Namespace, model: nn.Module, tokenizer, data) -> Iterator[dict]:
    """Time all ways on the first --choose prompts, then the best of each kind on --prompts others."""
    device = next(model.parameters()).device
    drafters = {depth: loaded(model, Path(options.drafters), depth) for depth in options.exits}
    prompts = prompts_of(data, tokenizer, options.choose + options.prompts, seed=0).to(device)
    ways, failed = ways_of(model, drafters, options), {}
    for way in list(ways):  # what is compiled, allocated or recorded at first
        try:
            ways[way](prompts[0])
        except RuntimeError as error:
            failed[" ".join(str(x) for x in way if x is not None)] = str(error)
            print(f"  {way} is left out: {error}", flush=True)
            del ways[way]
    tried: list[dict] = []
    for tried in timed(ways, prompts[: options.choose], options.rounds):
        yield {"failed": failed, "tried": tried, "rows": []}
    best: dict[str, dict] = {}
    for row in tried:
        if row["way"] not in best or row["speedup"] > best[row["way"]]["speedup"]:
            best[row["way"]] = row
    taken = {(row["way"], row["depth"], row["ahead"]) for row in best.values()}
    kinds = list(best)  # as they were tried, whichever of a kind was the fastest
    ways = {way: ways[way] for way in sorted(taken, key=lambda way: kinds.index(way[0]))}
    for rows in timed(ways, prompts[options.choose :], options.rounds, options.deadline):
        print([(row["way"], row["ahead"], row["speedup"]) for row in rows], flush=True)
        yield {"failed": failed, "tried": tried, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.draft", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    add("--exits", type=int, nargs="*", default=[3, 6], help="layers that draft; none: time what needs no teaching")
    add("--steps", type=int, default=3000, help="of teaching each")
    add("--written", type=int, default=32768, help="pieces of reviews that the model continues, to teach by")
    add("--said", type=int, default=SAID, help="tokens that drafts may have: those that it writes most often")
    add("--batch", type=int, default=32, help="pieces in a step")
    add("--rate", type=float, default=1e-3)
    add("--deadline", type=float, default=float("inf"), help="seconds since 1970 after which no step begins, or prompt")
    add("--drafters", help="the output folder of such teaching: measure what these save")
    add("--ahead", type=int, nargs="+", default=[2, 4], help="tokens that are drafted")
    add("--choose", type=int, default=4, help="prompts on which ways are chosen")
    add("--prompts", type=int, default=12, help="others on which they are judged")
    add("--new", type=int, default=64, help="tokens to generate")
    add("--rounds", type=int, default=2)
    add("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--name", help="of the result file")
    add("--output-dir", default="outputs/draft")
    options = parser.parse_args(given)
    model, tokenizer = load_model(options.model, device=options.device)
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # texts are of one length, and the likeliest token is always taken
    timing = bool(options.drafters) or not options.exits
    data = load_corpus(options.corpus, train=0 if timing else None)
    for name in ("--drafters", "--output-dir", "--deadline"):  # of one machine
        if name in given:
            at = given.index(name)
            del given[at + 1 if name == "--drafters" else at : at + 2]
    name = options.name or ("draft" if timing else "drafters")
    for found in (measure if timing else school)(options, model, tokenizer, data):
        write_json(Path(options.output_dir) / f"{name}-{Path(options.model).name}.json", {
            "name": f"{name}-{Path(options.model).name}", "kind": "drafting",
            "command": " ".join(["python -m zsaa.depth.draft", *given]), "model": {"name": Path(options.model).name},
            "task": {"name": options.corpus, "source": data.source, "substitute": data.substitute, "title": data.title},
            "threads": torch.get_num_threads(), "prompt_tokens": PROMPT, "new_tokens": options.new, **found,
            "provenance": provenance(torch.device(options.device), seed=0),
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
