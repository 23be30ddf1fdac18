"""Verdicts: a substitute is never a reproduction, and what was not run says so."""

import pytest

from zsaa.kit.verdicts import Cell, counts

WHERE = dict(table="Table 1", row="2x", column="IMDB")


@pytest.mark.parametrize(
    "verdict, facts",
    [
        ("not run", dict(published=92.3)),
        ("not run", dict(published=92.3, substitute="model")),
        ("reproduced", dict(published=92.3, ours=92.0, interval=(91.5, 92.5))),
        ("reproduced", dict(published=92.5, ours=92.0, interval=(91.5, 92.5))),
        ("differs", dict(published=92.6, ours=92.0, interval=(91.5, 92.5))),
        ("substitute", dict(published=92.3, ours=92.3, interval=(91.5, 92.5), substitute="data")),
        ("substitute", dict(published=None, ours=92.3, interval=(91.5, 92.5))),
        ("consistent", dict(published="MHA", ours="MHA")),
        ("differs", dict(published="MQA", ours="GQA")),
    ],
)
def test_verdict(verdict, facts):
    assert Cell(**WHERE, **facts).verdict == verdict


def test_counts_are_of_the_papers_numbers():
    cells = [
        Cell(**WHERE, published=92.3),
        Cell(**WHERE, published=92.3, ours=90, interval=(89, 91), substitute="model"),
        Cell(**WHERE, published=92.3, ours=92, interval=(91, 93)),
        Cell("Table 1", "3x", "IMDB", published=92.2),
        Cell("Table 1", "13x", "IMDB", published=None, ours=50.0, interval=(49, 51)),
    ]
    assert counts(cells) == {"reproduced": 1, "consistent": 0, "differs": 0, "substitute": 0, "not run": 1}
