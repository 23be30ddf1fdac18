"""What a result is called, how it was measured, and what of it stands in for the paper's own."""

from __future__ import annotations

from zsaa.kit import paper
from zsaa.rule import TAU


def label(result: dict, short: bool = False) -> str:
    """What a curve is: how it was trained; unless `short`, also data set, model, and on what it ran."""
    recipe, hardware = result["recipe"], result["provenance"]["hardware"]
    training = f"{recipe['method']} ({'LoRA' if recipe['tuning'] == 'lora' else 'full'})"
    return (
        training if short else f"{result['task']['name']}, {result['model']['name']}, {training}, {hardware['device']}"
    )


def training(result: dict, samples: str) -> str:
    """How the model of a result of the kind "perplexity" or "choice" was trained for it: "untuned", "tuned before", or
    the method and, behind a semicolon, epochs (if these, and no number of steps, were asked for), steps, `samples`
    (what they are called) in a step and in all, and the seed."""
    recipe, log = result["recipe"], result.get("train")
    if not log:
        return "untuned" if recipe["method"] in ("untuned", "none") else "tuned before"
    how = f"{recipe['method']} {'LoRA ' if recipe['tuning'] == 'lora' else ''}fine-tuning"
    many = f"{result['provenance']['train_samples']:,} {samples}"
    epochs = f"{recipe['epochs']:g} epochs, " if recipe.get("max_steps") == -1 else ""
    return f"{how}; {epochs}{log['steps']:,} steps of {step_size(result)} of {many}, seed {recipe['seed']}"


def step_size(result: dict) -> int:
    """Samples that a step of a result's training took, of all processes."""
    recipe = result["recipe"]
    return recipe["batch_size"] * recipe["gradient_accumulation"] * result["train"]["processes"]


def schedule_of(result: dict) -> str:
    """The schedule by which the dial dropped; results that name none are of the paper's."""
    return result["recipe"].get("schedule", "geometric")


def by_eq_2(result: dict) -> bool:
    """Did the dial drop by the paper's schedule?"""
    return schedule_of(result) == "geometric"


def trained_as_in_paper(result: dict) -> bool:
    """By section 4.2's settings, on the data set's own training split?"""
    recipe = result["recipe"]
    as_set = all(recipe.get(key, value) == value for key, value in paper.TABLE_1_RECIPE.items())
    return as_set and not result["task"].get("training_substitute")


def stand_ins(result: dict) -> str:
    """What of the paper's Table 1 a curve replaces: "" or "model", "model, data and training", ... A model counts as
    the paper's if it came from its repository on the hub; data, if they are held out for real."""
    model = result["model"]
    found = [] if model["name"] in paper.TABLE_1_HUB and model.get("kind") == "hub" else ["model"]
    found += ["data"] if result["task"]["substitute"] else []
    found += [] if trained_as_in_paper(result) else ["training"]
    return " and ".join(part for part in (", ".join(found[:-1]), *found[-1:]) if part)


def status(result: dict) -> str:
    return f"substitute: {stand_ins(result)}" if stand_ins(result) else "the paper's model, data and settings"


def perplexity_subject(result: dict) -> str:
    """The model, how it was trained for the task, its schedule if that is not the paper's, and the text, between
    semicolons."""
    seed = result["provenance"]["seed"]  # of the windows that were drawn; a training says its own, which is the same
    drawn = f", seed {seed}" if seed and not result.get("train") else ""
    drops = "" if by_eq_2(result) else f", schedule {result['recipe']['schedule']}"
    return f"{result['model']['name']}, {training(result, 'windows')}{drawn}{drops}; {result['task']['title']}"


def perplexity_protocol(result: dict) -> str:
    """How the pruned model was scored, with a warning where the score reads the future."""
    how = result["protocol"]
    if how["name"] == "last-word":
        return "last word after a pruned context, causal"
    if how["name"] == "whole":
        return f"{how['prefix']} read + {how['continuation']} scored, causal"
    if how["reads_future"]:
        return f"carry-through, {how['prefix'] + how['continuation']} tokens; WHAT IS KEPT READS THE FUTURE"
    return f"prefix, {how['prefix']} pruned + {how['continuation']} scored, causal"


def choice_subject(result: dict) -> str:
    """The model, its quantization, and how it was trained to answer."""
    model = result["model"]
    return f"{' '.join(filter(None, (model['name'], model['quantization'])))}, {training(result, 'questions')}"


def device_of(result: dict) -> str:
    hardware = result["provenance"]["hardware"]
    if hardware["device"] != "cpu":
        return hardware["device"]
    return f"CPU, {threads(hardware['threads'])}"


def threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------- the columns of points.csv

METHODS = {
    "first": "first tokens only",
    "last": "last tokens only",
    "ends": "both ends only",
    "random": "random tokens",
    "scorer": "scorer alone",
    "all": "dial's code, nothing dropped",
    "whole": "whole text",
    "salient": "salient words only",
    "layers": "first layers only",
    "confidence": "first layers only, until sure",
    "both": "dial, first layers only",
    "both-confidence": "dial, first layers only, until sure",
    "layers-sure": "first layers only, until sure",
    "tokens-sure": "dial, until sure",
    "both-fixed": "dial, first layers only",
    "both-sure": "dial, first layers only, until sure, again with more",
    "bag": "bag of words",
    "words-first": "bag of words until sure, then another model",
    "words-first-dial": "bag of words until sure, then the dial",
    "bm25": "BM25 sentences",
    "asked": "dial (score asked, schedule entry)",
}
CACHED = {"llama": "smollm2-135m", "qwen2": "qwen2.5-coder-0.5b, Q4_K_M"}  # families of ablation.bits
HEALED = {
    "untuned": "without a block of layers, by angular distance",
    "text": "without a block of layers, healed by text",
    "distilled": "without a block of layers, healed by text and the whole model",
    "sequence": "without a block of layers, healed by text that a model wrote",
}
LAYERS = {  # kinds of results about fewer layers, whose rows say so by their fields
    "healing": lambda row: _healed(row),
    "drafting": lambda row: "stock" if row["way"] == "generate" else f"drafts, {row['way']}",
}
WHOLE = {"untuned": "stock", "text": "adapters for all layers"}
BENCHMARKS = {
    "bench-prefill": "prefill",
    "bench-memory": "prefill",
    "bench-recordings": "prefill",
    "bench-replicas": "prefill, a copy on each GPU",
    "bench-scale": "prefill, layers on several GPUs",
    "footprint": "prefill",
    "ttft": "prefill",
    "bench-question": "prefill of a prompt that asks at its end",
    "bench-baselines": "prefill",
    "bench-rivals": "prefill",
    "bench-decode": "decoding",
    "bench-generate": "decoding by generate",
    "bench-attention": "attention",
    "bench-train": "training step",
}

GENERATES = {  # how `zsaa.bench generate` decodes
    "stock": "stock",
    "static cache, compiled": "stock, static cache, compiled",
    "graphs": "dial",
    "by kernel": "dial, without CUDA graphs",
}


def task_of(result: dict) -> str:
    """What was done: a data set, with the protocol where it has several, or what was timed."""
    kind, task = result["kind"], result.get("task")
    if kind in BENCHMARKS:
        return BENCHMARKS[kind]
    if not isinstance(task, dict):
        return kind
    if kind in ("perplexity", "depth"):
        return f"{task['title']}; {perplexity_protocol(result)}"
    if kind == "choice":
        return f"{task['name']}, {task['form']}, {task['shots']} shots"
    name = result.get("row") if kind == "ablation" else None
    return f"{task['name']}, {name}" if name in ("continuation", "sensitivity", "words") else task["name"]


def timed_task(result: dict) -> str:
    return f"{result['task']['name']}, forward pass"


def model_of(result: dict, row: dict) -> str:
    """The model's name, quantization or number format, and "random weights" where these decide nothing."""
    if result["kind"] == "cache-bits":
        return CACHED[row["model"]]
    if "model" in row:
        eager = ["eager attention"] if row.get("attention") == "eager" else []
        return ", ".join([row["model"], *eager, "random weights", row.get("storage") or result["dtype"]])
    if result["kind"] == "bench-attention":
        return f"{row['heads']} heads of {row['dim']}, {row['kv_heads']} of keys and values, {result['dtype']}"
    if "model" not in result:
        return "-"
    model, shape = result["model"], result.get("recipe", {}).get("shape")
    parts = [" ".join(filter(None, (model["name"], model.get("quantization"))))]
    parts += [f"layers of {shape}"] if shape else []
    parts += ["random weights"] if model.get("kind") == "random weights" else []
    return ", ".join(parts)


def _healed(row: dict) -> str:
    if "removed" in row:
        return HEALED[row["healed"]] if row["removed"] else WHOLE[row["healed"]]
    return f"first layers only, {'taught' if row['trained'] else 'untaught'}"


def method_of(result: dict, row: dict) -> str:
    """How compute is saved; see zsaa.kit.points."""
    control = row.get("control", "alpha")
    if result["kind"] == "bench-baselines":  # stock compiled, recorded, ...; the dial with and without its recordings
        return row["way"] if row["alpha"] == 1 else "dial by kernel" if "by kernel" in row["way"] else "dial"
    if control == "printed":
        return "dial at the printed alpha"
    if control != "alpha":
        return METHODS[control]
    if result["kind"] == "cache-bits":
        along = "" if row["axis_key"] is None else f", keys by {'tokens' if row['axis_key'] else 'channels'}"
        return f"{'stock' if row['alpha'] == 1 else 'dial'}, cache in {row['bits']} bits{along}"
    if "variant" in row:
        return row["variant"]
    if result["kind"] in LAYERS:
        return LAYERS[result["kind"]](row)
    kind, recipe = result["kind"], result.get("recipe", {})
    if kind == "card":
        return "stock" if row["alpha"] == 1 else "dial"
    if kind == "perplexity" and row["score"] is None:
        return "stock"
    if kind in BENCHMARKS:
        if kind == "bench-train":
            return "alpha-sampled"
        if kind == "bench-generate":
            return GENERATES[row["how"]]
        return "stock" if row["alpha"] == 1 else "dial" if result.get("fused", True) else "dial, PyTorch's kernels"
    if not isinstance(result.get("task"), dict):  # no measurement of the method: whatever names the row
        return ", ".join(row[name] for name in row if isinstance(row[name], str) and name != "nll") or "-"
    rule = {"score": "column_sum", "schedule": "geometric", "tau": TAU}
    used = {**rule, **{name: recipe[name] for name in rule if recipe.get(name) is not None}}
    used |= {name: row[name] for name in ("score", "schedule") if row.get(name)}
    others = [f"{name} {used[name]}" for name in rule if used[name] != rule[name]]
    return f"dial ({', '.join(others)})" if others else "dial"


def recipe_of(result: dict) -> str:
    """How the model was trained; "" where weights decide nothing."""
    kind, recipe = result["kind"], result.get("recipe", {})
    if kind in ("perplexity", "choice", "questions"):
        return training(result, "windows" if kind == "perplexity" else "questions")
    if kind == "ablation" and "training" in result:
        trained = result["training"]
        if "epochs" not in trained:  # a bag of words is fitted
            return result["row"]
        long = f"compute of {trained['compute']:g}" if trained.get("compute") else f"{trained['epochs']:g}"
        clock = f" or {trained['seconds']:g} s" if trained.get("seconds") else ""
        return f"{result['row']}, {long} epochs{clock} at {trained['learning_rate']:g}"
    if kind == "answers":
        return answers_recipe(result)
    if kind != "curve":
        return ""
    parts = [label(result, short=True)]
    if recipe.get("max_steps", -1) > 0:
        parts.append(f"{recipe['max_steps']} steps")
    elif "epochs" in recipe:
        parts.append(f"{recipe['epochs']:g} epochs")
    taught = result["task"].get("training_substitute")
    return ", ".join(parts) + (f", on {taught}" if taught else "")


def answers_recipe(result: dict) -> str:
    """How the model that answers was trained; steps are logged every 20th, so that an early end is known to 20."""
    if not (log := result.get("log")):
        return result["recipe"]["method"]
    done, planned = log[-1]["step"], log[-1]["of"]
    steps = f"{done}" if done == planned else f"{done} to {min(done + 19, planned)} of {planned}"
    return f"{result['recipe']['method']} (LoRA), {steps} steps"


def split_of(result: dict) -> str:
    """Where the inputs come from."""
    if result["kind"] in BENCHMARKS or result.get("model", {}).get("timed on"):
        return "random tokens"
    if not isinstance(result.get("task"), dict):
        return "-"
    return result["task"]["source"].split(": ", 1)[-1]
