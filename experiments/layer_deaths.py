"""Which layer of a DQN dies, when, and with which target: what results/collapse/README.md says in numbers.

python experiments/layer_deaths.py runs/BreakoutNoFrameskip-v4__dqn_atari_lan__* > deaths.md

Prints two tables in Markdown: the seeds of each activation and target, and the differences between them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils.cli import BadInput, launch, warn
from plots.events import RETURN, Points, read_events
from plots.report import markdown_table
from plots.results import read_config
from plots.statistics import Difference, paired_difference

RANK, Z_CONSTANT = "representation/effective_rank_centred", "representation/std_dead_neurons"
UNCENTRED, ENTROPY = "representation/effective_rank", "representation/entropy_rank"
CONV3, CONV3_ZERO = "layers/conv3/constant", "layers/conv3/zero"
EVERY, EARLY = 1000, 10_000  # agent steps between measurements, and of the beginning of learning
Group = tuple[str, str]  # activation, and "Double" or "plain"
Numbers = dict[int, dict[str, float]]  # by seed and row


@dataclass
class Args:
    """Compare runs of DQN on one game, layer by layer: with the Double target and with the plain one."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """finished run folders; those measured more rarely than every 1,000 steps have only what does not depend on it"""


class Measured(NamedTuple):
    """A run's points by tag, and the agent step from which on it learned. What it has not measured is NaN."""

    points: dict[str, Points]
    start: int

    def over(self, tag: str, statistic: Callable[[np.ndarray], float], first: float, last: float = np.inf) -> float:
        points = self.points.get(tag, self.points[RANK][:0])
        values = points["value"][(points["step"] >= first) & (points["step"] <= last)]
        return float(statistic(values)) if len(values) else np.nan

    def at(self, tag: str, since_start: int) -> float:
        return self.over(tag, np.max, self.start + since_start, self.start + since_start)

    def end(self, tag: str) -> float:
        return self.over(tag, lambda values: values[-1], 0)

    def learning(self, tag: str, statistic: Callable[[np.ndarray], float], length: float = np.inf) -> float:
        often = not np.isnan(self.at(RANK, EVERY))  # more rarely, the extremes may be missed
        return self.over(tag, statistic, self.start + 1, self.start + length) if often else np.nan

    def early(self, tag: str) -> float:
        return self.learning(tag, np.median, EARLY)

    def awake_from(self) -> float:
        z = self.points[Z_CONSTANT]
        steps = z["step"][(z["step"] > self.start) & (z["value"] < 0.5)]
        return float(steps[0]) if len(steps) else np.nan


class Unit(NamedTuple):
    form: str
    scale: int = 1
    digits: int | None = None  # of a difference; None: it has none (norms differ by powers of ten)


UNITS = {
    "share": Unit("{:.0f} %", scale=100, digits=0),
    "rank": Unit("{:.0f}", digits=0),
    "step": Unit("{:,.0f}"),
    "norm": Unit("{:.1g}"),
    "score": Unit("{:.1f}", digits=1),
}
# What each row is measured in, and what it is.
ROWS: dict[str, tuple[str, Callable[[Measured], float]]] = {
    "conv3 constant, before the first update": ("share", lambda run: run.at(CONV3, 0)),
    "conv3 constant, 1,000 steps later": ("share", lambda run: run.at(CONV3, EVERY)),
    "conv3 constant, most": ("share", lambda run: run.learning(CONV3, np.max)),
    "conv3 constant, at the end": ("share", lambda run: run.end(CONV3)),
    "conv3 always zero, before the first update": ("share", lambda run: run.at(CONV3_ZERO, 0)),
    "conv3 always zero, 1,000 steps later": ("share", lambda run: run.at(CONV3_ZERO, EVERY)),
    "conv3 always zero, most": ("share", lambda run: run.learning(CONV3_ZERO, np.max)),
    "conv2 constant, most": ("share", lambda run: run.learning("layers/conv2/constant", np.max)),
    "conv1 constant, most": ("share", lambda run: run.learning("layers/conv1/constant", np.max)),
    "z constant, at the end": ("share", lambda run: run.end(Z_CONSTANT)),
    "z dormant, at the end": ("share", lambda run: run.end("representation/dormant_neurons")),
    "z dead by the paper's count, at the end": ("share", lambda run: run.end("representation/dead_neurons")),
    "z less than half constant from step": ("step", Measured.awake_from),
    "centred rank, before the first update": ("rank", lambda run: run.at(RANK, 0)),
    "centred rank, 1,000 steps later": ("rank", lambda run: run.at(RANK, EVERY)),
    "centred rank, lowest": ("rank", lambda run: run.learning(RANK, np.min)),
    "centred rank, at the end": ("rank", lambda run: run.end(RANK)),
    "uncentred rank, lowest": ("rank", lambda run: run.learning(UNCENTRED, np.min)),
    "uncentred rank, at the end": ("rank", lambda run: run.end(UNCENTRED)),
    "entropy rank, at the end": ("score", lambda run: run.end(ENTROPY)),
    "conv3, channels with hardly a gradient, early": ("share", lambda run: run.early("layers/conv3/no_gradient")),
    "gradient norm of conv3, 1,000 steps later": ("norm", lambda run: run.at("layers/conv3/grad_norm", EVERY)),
    "gradient norm of conv3, early": ("norm", lambda run: run.early("layers/conv3/grad_norm")),
    "gradient norm of conv1, 1,000 steps later": ("norm", lambda run: run.at("layers/conv1/grad_norm", EVERY)),
    "gradient norm of conv1, early": ("norm", lambda run: run.early("layers/conv1/grad_norm")),
    "return": ("score", lambda run: float(np.mean(run.points[RETURN]["value"][-100:]))),
}


def read_runs(folders: tuple[Path, ...]) -> dict[Group, Numbers]:
    """The numbers of each group.

    Raises:
        BadInput: not finished runs of DQN on one game and of one length, a seed twice, or nothing measured.
    """
    groups: dict[Group, Numbers] = defaultdict(dict)
    kinds = {}
    for folder in folders:
        run = read_config(folder)
        if run is None or run.algorithm != "dqn" or not run.finished:
            raise BadInput(f"{folder} is no finished run of DQN; name those")
        kinds[run.game, run.planned_steps, run.flags.get("learning_starts")] = folder
        points, _, problems = read_events(sorted(folder.glob("events.out.tfevents.*")))
        for problem in problems:
            warn(f"{folder}: {problem}")
        if missing := {RETURN, RANK, Z_CONSTANT} - points.keys():
            raise BadInput(f"{folder} has no {', '.join(sorted(missing))}; leave it out")
        group = run.activation, "Double" if run.flags.get("double_q", True) else "plain"
        if run.seed in groups[group]:
            raise BadInput(f"{folder} is a second run of {', '.join(group)}, seed {run.seed}; name one of them")
        measured = Measured(points, run.flags.get("learning_starts", 0))
        groups[group][run.seed] = {row: number(measured) for row, (_, number) in ROWS.items()}
    if len(kinds) > 1:
        game, steps, start = zip(*kinds, strict=True)
        what = f"games {game}, agent steps {steps}, --learning-starts {start}"
        raise BadInput(f"runs of several kinds: {what} ({', '.join(map(str, kinds.values()))}); name those of one")
    return dict(sorted(groups.items()))


def comparisons(groups: dict[Group, Numbers]) -> dict[str, tuple[Group, Group]]:
    """Title and the two groups, first minus second: the targets of each activation, then activations with each."""
    pairs = {}
    for activation in dict.fromkeys(activation for activation, _ in groups):
        pairs[f"{activation}: plain - Double"] = (activation, "plain"), (activation, "Double")
    for target in ("Double", "plain"):
        for first, second in (("tanh-lan", "tanh"), ("tanh", "relu"), ("tanh-lan", "relu")):
            pairs[f"{target}: {first} - {second}"] = (first, target), (second, target)
    return {title: pair for title, pair in pairs.items() if groups.keys() >= set(pair)}


def compare(first: Numbers, second: Numbers, row: str) -> Difference:
    pairs = {seed: first[seed][row] - second[seed][row] for seed in first.keys() & second.keys()}
    return paired_difference({"": {seed: value for seed, value in pairs.items() if not np.isnan(value)}})


def in_points(difference: Difference, row: str) -> str:
    """With its interval; shares in percentage points."""
    _, scale, digits = UNITS[ROWS[row][0]]
    value, low, high = (scale * number for number in difference[:3])
    if np.isnan(value):
        return "-"
    return f"{value:+.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def main(args: Args) -> None:
    groups = read_runs(args.folders)

    def cell(group: Numbers, row: str) -> str:
        unit, values = UNITS[ROWS[row][0]], [group[seed][row] for seed in sorted(group)]
        return ", ".join("-" if np.isnan(value) else unit.form.format(unit.scale * value) for value in values)

    print("Seeds in ascending order. Constant: standard deviation below 0.001. Early: median of the first 10,000 agent")
    print("steps of learning. Hardly a gradient: at most 0.025 of the layer's mean. A step is as exact as the run's")
    print("--metrics-frequency.\n")
    rows = [[row, *(cell(group, row) for group in groups.values())] for row in ROWS]
    print(markdown_table(["", *map(", ".join, groups)], rows))
    print("Differences over pairs of the same seed, with 95 % intervals (Student's t); shares in percentage points.\n")
    pairs = comparisons(groups)
    compared = [row for row, (unit, _) in ROWS.items() if UNITS[unit].digits is not None]
    rows = [[row, *(in_points(compare(groups[a], groups[b], row), row) for a, b in pairs.values())] for row in compared]
    print(markdown_table(["", *pairs], rows), end="")


if __name__ == "__main__":
    launch(main, Args)
