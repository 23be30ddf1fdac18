"""Notebook 15: a server in a rush (docs/serving.md), simulated or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zsaa.kit.figures.style import COLOURS, STYLE, legend, panels

POLICIES = {
    "stock": ("alpha = 1", COLOURS["conventional"], "-"),
    "floor": ("always the floor", COLOURS["first"], (0, (1, 1))),
    "admission": ("alpha = 1, refuses", COLOURS["last"], "--"),
    "controller": ("the controller", COLOURS["alpha"], "-"),
}
PARTS = {"in time": "#0072B2", "late or lost": "#D55E00", "refused": "#BBBBBB"}


def rush_figure(seen: Mapping[str, Sequence[Sequence[float]]], rush: tuple[float, float], where: str):
    """How many requests are in the house, and at which alpha they are answered, second by second. seen: by policy,
    (second, alpha, requests) each. rush: its begin and end, seconds. where: what was seen, for the caption."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (house, dial) = panels(2.9, 2, 1, sharex=True)
        for policy, (name, colour, dash) in POLICIES.items():
            if policy in seen:
                seconds, alphas, requests = zip(*seen[policy])
                house.plot(seconds, requests, color=colour, linestyle=dash, label=name)
                dial.plot(seconds, alphas, color=colour, linestyle=dash, drawstyle="steps-post")
        for axis in (house, dial):
            axis.axvspan(*rush, color="#EEEEEE", linewidth=0, zorder=0)
        house.set(ylabel="requests", ylim=(0, None), xlim=(0, None))
        dial.set(ylabel=r"$\alpha$", xlabel="seconds")
        legend(figure, columns=2)
    figure.set_label(
        f"A rush (grey) by each policy, {where}. Above: requests that wait or run. Below: the alpha of a batch that "
        "starts then."
    )
    return figure


def measured_rush_figure(result: dict, profile: str = "burst 2x"):
    """`rush_figure` of a result file of zsaa.serve.load."""
    rows = [row for row in result["rows"] if row["profile"] == profile]
    begin, end = rows[0]["seconds"] / 4, rows[0]["seconds"] * 7 / 12  # as zsaa.serve.traces.bursts has it
    seen = {row["policy"]: [point for point in row["seen"] if point[0] >= 0] for row in rows}
    hardware = result["provenance"]["hardware"]
    where = f"{profile}, measured on {hardware.get('cores')} CPU cores, {rows[0]['requests']} requests"
    return rush_figure(seen, (begin, end), where)


def outcomes_figure(rows: Sequence[dict], where: str):
    """What became of the requests of a rush. rows: of "profile", "policy", "requests", "answered", "late", "lost" and
    "refused"."""
    import matplotlib.pyplot as plt

    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(0.9 * len(profiles) + 0.6, len(profiles), 1, sharex=True, squeeze=False)
        for axis, profile in zip(axes[:, 0], profiles):
            mine = [row for policy in POLICIES for row in rows if (row["profile"], row["policy"]) == (profile, policy)]
            left = [0.0] * len(mine)
            for part, colour in PARTS.items():
                shares = [100 * _parts(row)[part] / row["requests"] for row in mine]
                axis.barh(range(len(mine)), shares, 0.7, left=left, color=colour, label=part)
                left = [a + b for a, b in zip(left, shares)]
            axis.set_yticks(range(len(mine)), [POLICIES[row["policy"]][0] for row in mine])
            axis.invert_yaxis()
            axis.set_title(profile, loc="left")
        axes[-1, 0].set(xlabel="% of the requests", xlim=(0, 100))
        legend(figure)
    figure.set_label(f"What became of the requests of a rush by each policy, {where}.")
    return figure


def _parts(row: dict) -> dict[str, int]:
    late = row["late"] + row["lost"]
    return {"in time": row["requests"] - row["refused"] - late, "late or lost": late, "refused": row["refused"]}


def replicas_figure(rows: Sequence[dict]):
    """Answers in time, a second and replica, against the number of replicas. rows: of "replicas", "profile", "policy"
    and "goodput_each", of a simulation."""
    import matplotlib.pyplot as plt

    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = panels(2.2, 1, len(profiles), sharey=True, squeeze=False)
        for axis, profile in zip(axes[0], profiles):
            for policy, (name, colour, dash) in POLICIES.items():
                mine = [row for row in rows if (row["profile"], row["policy"]) == (profile, policy)]
                points = sorted((row["replicas"], row["goodput_each"]) for row in mine)
                axis.plot(*zip(*points), color=colour, linestyle=dash, marker="o", label=name)
            counts = sorted({row["replicas"] for row in rows})
            axis.set(xscale="log", xlabel="replicas")
            axis.set_xticks(counts, [f"{count:,}" for count in counts])
            axis.minorticks_off()
            axis.set_title(profile, loc="left")
        axes[0, 0].set(ylabel="answers in time,\na second and replica")
        axes[0, 0].set_ylim(0, 1.08 * max(row["goodput_each"] for row in rows))
        legend(figure, columns=2)
    figure.set_label("The same rush for many replicas, by simulation: each request goes to the emptier of two.")
    return figure
