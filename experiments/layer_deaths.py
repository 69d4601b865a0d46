"""Which layer of a DQN dies, when, and with which target: what results/collapse/README.md says in numbers.

python experiments/layer_deaths.py runs/*__dqn_atari_lan__* > deaths.md

Prints two tables in Markdown: the seeds of each activation and target, and the differences between them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils.checks import refuse_unless
from lan_utils.cli import launch
from plots.events import RETURN, Points, read_events
from plots.results import RecordedRun, read_config
from plots.statistics import Difference, paired_difference

RANK = "representation/effective_rank_centred"
EARLY = 10_000  # agent steps after the first update
Numbers = dict[int, dict[str, float]]  # by seed and row


@dataclass
class Args:
    """Compare runs of DQN on one game, layer by layer: with the Double target and with the plain one."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, with --metrics-frequency 1000 for the layers' first steps"""


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def whole(value: float) -> str:
    return f"{value:,.0f}"


# Each row, how it is written, and whether its differences are.
ROWS: dict[str, tuple[Callable[[float], str], bool]] = {
    "conv3 constant, before the first update": (percent, True),
    "conv3 constant, 1,000 steps later": (percent, True),
    "conv3 constant, most": (percent, True),
    "conv3 constant, at the end": (percent, True),
    "conv3 always zero, before the first update": (percent, True),
    "conv3 always zero, 1,000 steps later": (percent, True),
    "conv3 always zero, most": (percent, True),
    "conv2 constant, most": (percent, True),
    "conv1 constant, most": (percent, True),
    "z constant, at the end": (percent, True),
    "z less than half constant from step": (whole, False),
    "centred rank, before the first update": (whole, True),
    "centred rank, 1,000 steps later": (whole, True),
    "centred rank, lowest": (whole, True),
    "centred rank, at the end": (whole, True),
    "conv3, channels with hardly a gradient, early": (percent, True),
    "gradient norm of conv3, early": ("{:.1g}".format, False),
    "gradient norm of conv1, early": ("{:.1g}".format, False),
    "return": ("{:.1f}".format, True),
}


def describe(points: dict[str, Points], first_update: int) -> dict[str, float]:
    """The numbers of one run by their row; NaN where the run has no such measurement.

    Args:
        points: by tag, as a run logs them.
        first_update: agent step.
    """

    def at(tag: str, step: int) -> float:
        values = points[tag]["value"][points[tag]["step"] == step] if tag in points else []
        return float(values[0]) if len(values) else np.nan

    def over(tag: str, statistic: Callable, last: float = np.inf) -> float:
        steps = points[tag]["step"] if tag in points else np.zeros(0)
        learning = (steps > first_update) & (steps <= last)
        return float(statistic(points[tag]["value"][learning])) if learning.any() else np.nan

    def end(tag: str) -> float:
        return float(points[tag]["value"][-1]) if tag in points else np.nan

    def early(tag: str) -> float:
        return over(tag, np.median, first_update + EARLY)

    conv3, zero, z = "layers/conv3/constant", "layers/conv3/zero", "representation/std_dead_neurons"
    awake = points[z]["step"][(points[z]["step"] > first_update) & (points[z]["value"] < 0.5)]
    next_rank = at(RANK, first_update + 1000)
    lowest_rank = np.nan if np.isnan(next_rank) else over(RANK, np.min)  # measured more rarely, it may be missed
    numbers = (
        *(at(conv3, first_update), at(conv3, first_update + 1000), over(conv3, np.max), end(conv3)),
        *(at(zero, first_update), at(zero, first_update + 1000), over(zero, np.max)),
        *(over("layers/conv2/constant", np.max), over("layers/conv1/constant", np.max)),
        *(end(z), awake[0] if len(awake) else np.nan),
        *(at(RANK, first_update), next_rank, lowest_rank, end(RANK)),
        *(early("layers/conv3/no_gradient"), early("layers/conv3/grad_norm"), early("layers/conv1/grad_norm")),
        float(np.mean(points[RETURN]["value"][-100:])),
    )
    return dict(zip(ROWS, numbers, strict=True))


def group_of(run: RecordedRun) -> str:
    return f"{run.activation}, {'Double' if run.flags.get('double_q', True) else 'plain'}"


def comparisons(groups: dict[str, Numbers]) -> dict[str, tuple[str, str]]:
    """Title and the two groups, first minus second: the targets of each activation, then LaN and tanh with each."""
    pairs = {}
    for activation in dict.fromkeys(group.split(", ")[0] for group in groups):
        pairs[f"{activation}: plain - Double"] = f"{activation}, plain", f"{activation}, Double"
    for target in ("Double", "plain"):
        pairs[f"{target}: tanh-lan - tanh"] = f"tanh-lan, {target}", f"tanh, {target}"
    return {title: pair for title, pair in pairs.items() if groups.keys() >= set(pair)}


def compare(first: Numbers, second: Numbers, row: str) -> Difference:
    pairs = {seed: first[seed][row] - second[seed][row] for seed in first.keys() & second.keys()}
    return paired_difference({"": {seed: value for seed, value in pairs.items() if not np.isnan(value)}})


def in_points(difference: Difference, row: str) -> str:
    """With its interval; shares in percentage points."""
    scale, digits = (100, 0) if ROWS[row][0] is percent else (1, 1 if row == "return" else 0)
    value, low, high = (scale * number for number in difference[:3])
    if np.isnan(value):
        return "-"
    return f"{value:+.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def main(args: Args) -> None:
    groups: dict[str, Numbers] = defaultdict(dict)
    for folder in args.folders:
        run = read_config(folder)
        refuse_unless(run is not None and run.algorithm == "dqn", f"{folder} is no run of DQN; name others")
        points, _, problems = read_events(sorted(folder.glob("events.out.tfevents.*")))
        refuse_unless({RETURN, RANK} <= points.keys(), f"{folder} has no measurements ({problems}); leave it out")
        group = groups[group_of(run)]
        refuse_unless(run.seed not in group, f"{folder} is a second run of {group_of(run)}, seed {run.seed}; name one")
        group[run.seed] = describe(points, run.flags["learning_starts"])

    groups = dict(sorted(groups.items()))

    def cell(group: Numbers, row: str) -> str:
        values = [group[seed][row] for seed in sorted(group)]
        return ", ".join("-" if np.isnan(value) else ROWS[row][0](value) for value in values)

    print("Seeds in ascending order. Constant: standard deviation below 0.001. Early: median of the first 10,000 agent")
    print("steps of learning. Hardly a gradient: at most 0.025 of the layer's mean.\n")
    print(markdown(["", *groups], [[row, *(cell(group, row) for group in groups.values())] for row in ROWS]))
    pairs = comparisons(groups)
    differences = {title: [compare(groups[a], groups[b], row) for row in ROWS] for title, (a, b) in pairs.items()}
    print(
        "\nDifferences over pairs of the same seed, with 95 % intervals (Student's t); shares in percentage points.\n"
    )
    rows = [
        [row, *(in_points(found[place], row) for found in differences.values())]
        for place, (row, (_, is_compared)) in enumerate(ROWS.items())
        if is_compared
    ]
    print(markdown(["", *differences], rows))


if __name__ == "__main__":
    launch(main, Args)
