"""The hub on this machine: every data set of Table 1 as a folder in its layout, with words of the tiny models'
vocabulary, and answers as its server gives them."""

import http.server
import json
import random

import pandas as pd

from zsaa.data.tasks import TASKS


class Server(http.server.BaseHTTPRequestHandler):
    """Answers without a log; subclasses say what, by `do_GET` calling `answer`, and with `do_HEAD = do_GET`."""

    def answer(self, status, body, headers):
        """headers: {name: value}; those that are None are left out."""
        body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


PAPER = [name for name, spec in TASKS.items() if spec.paper_column]


def rows(spec, count, seed, hidden=False):
    """Samples whose first word tells the label; label -1 where it is hidden."""
    rng = random.Random(f"{spec.hub} {spec.config} {seed}")
    made = []
    for i in range(count):
        label = rng.randrange(len(spec.label_names))
        row = {
            column: " ".join([f"w{3 + label}", *(f"w{rng.randrange(10, 90)}" for _ in range(rng.randrange(10, 16)))])
            for column in spec.columns
        }
        made.append({**row, "label": -1 if hidden else label, "idx": i})
    return made


def write(root, train=16, held_out=12, hidden=6):
    """root/imdb and root/rotten_tomatoes (their own repositories) and root/glue; returns {task: its source}."""
    sources = {}
    for name, spec in TASKS.items():
        base = root / ("glue" if spec.config else name)
        folder = base / (spec.config or "data")
        folder.mkdir(parents=True, exist_ok=True)
        splits = {"train": (train, False), spec.test: (held_out, False)}
        if spec.config:
            splits[spec.test.replace("validation", "test")] = (hidden, True)
        for split, (count, no_label) in splits.items():
            frame = pd.DataFrame(rows(spec, count, split, no_label))
            frame.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        sources[name] = str(base if spec.config else folder)
    return sources
