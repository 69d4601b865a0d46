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
from plots.results import RecordedRun, read_config
from plots.statistics import Difference, paired_difference

RANK, Z_CONSTANT = "representation/effective_rank_centred", "representation/std_dead_neurons"
CONV3, CONV3_ZERO = "layers/conv3/constant", "layers/conv3/zero"
EVERY, EARLY = 1000, 10_000  # agent steps between measurements, and of the beginning of learning
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


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def whole(value: float) -> str:
    return f"{value:,.0f}"


# How each row is written, and what it is.
ROWS: dict[str, tuple[Callable[[float], str], Callable[[Measured], float]]] = {
    "conv3 constant, before the first update": (percent, lambda run: run.at(CONV3, 0)),
    "conv3 constant, 1,000 steps later": (percent, lambda run: run.at(CONV3, EVERY)),
    "conv3 constant, most": (percent, lambda run: run.learning(CONV3, np.max)),
    "conv3 constant, at the end": (percent, lambda run: run.end(CONV3)),
    "conv3 always zero, before the first update": (percent, lambda run: run.at(CONV3_ZERO, 0)),
    "conv3 always zero, 1,000 steps later": (percent, lambda run: run.at(CONV3_ZERO, EVERY)),
    "conv3 always zero, most": (percent, lambda run: run.learning(CONV3_ZERO, np.max)),
    "conv2 constant, most": (percent, lambda run: run.learning("layers/conv2/constant", np.max)),
    "conv1 constant, most": (percent, lambda run: run.learning("layers/conv1/constant", np.max)),
    "z constant, at the end": (percent, lambda run: run.end(Z_CONSTANT)),
    "z less than half constant from step": (whole, Measured.awake_from),
    "centred rank, before the first update": (whole, lambda run: run.at(RANK, 0)),
    "centred rank, 1,000 steps later": (whole, lambda run: run.at(RANK, EVERY)),
    "centred rank, lowest": (whole, lambda run: run.learning(RANK, np.min)),
    "centred rank, at the end": (whole, lambda run: run.end(RANK)),
    "conv3, channels with hardly a gradient, early": (percent, lambda run: run.early("layers/conv3/no_gradient")),
    "gradient norm of conv3, 1,000 steps later": ("{:.1g}".format, lambda run: run.at("layers/conv3/grad_norm", EVERY)),
    "gradient norm of conv3, early": ("{:.1g}".format, lambda run: run.early("layers/conv3/grad_norm")),
    "gradient norm of conv1, 1,000 steps later": ("{:.1g}".format, lambda run: run.at("layers/conv1/grad_norm", EVERY)),
    "gradient norm of conv1, early": ("{:.1g}".format, lambda run: run.early("layers/conv1/grad_norm")),
    "return": ("{:.1f}".format, lambda run: float(np.mean(run.points[RETURN]["value"][-100:]))),
}
COMPARED = [row for row in ROWS if "norm" not in row and "step" not in row.split()]  # norms differ by powers of ten


def read_runs(folders: tuple[Path, ...]) -> dict[str, Numbers]:
    """The numbers of each group, e.g. "tanh, Double".

    Raises:
        BadInput: not finished runs of DQN on one game and of one length, a seed twice, or nothing measured.
    """
    groups: dict[str, Numbers] = defaultdict(dict)
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
        group = groups[group_of(run)]
        if run.seed in group:
            raise BadInput(f"{folder} is a second run of {group_of(run)}, seed {run.seed}; name one of them")
        measured = Measured(points, run.flags.get("learning_starts", 0))
        group[run.seed] = {row: number(measured) for row, (_, number) in ROWS.items()}
    if len(kinds) > 1:
        game, steps, start = zip(*kinds, strict=True)
        what = f"games {game}, agent steps {steps}, --learning-starts {start}"
        raise BadInput(f"runs of several kinds: {what} ({', '.join(map(str, kinds.values()))}); name those of one")
    return dict(sorted(groups.items()))


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
    groups = read_runs(args.folders)

    def cell(group: Numbers, row: str) -> str:
        values = [group[seed][row] for seed in sorted(group)]
        return ", ".join("-" if np.isnan(value) else ROWS[row][0](value) for value in values)

    print("Seeds in ascending order. Constant: standard deviation below 0.001. Early: median of the first 10,000 agent")
    print("steps of learning. Hardly a gradient: at most 0.025 of the layer's mean. A step is as exact as the run's")
    print("--metrics-frequency.\n")
    print(markdown(["", *groups], [[row, *(cell(group, row) for group in groups.values())] for row in ROWS]))
    pairs = comparisons(groups)
    print(
        "\nDifferences over pairs of the same seed, with 95 % intervals (Student's t); shares in percentage points.\n"
    )
    rows = [[row, *(in_points(compare(groups[a], groups[b], row), row) for a, b in pairs.values())] for row in COMPARED]
    print(markdown(["", *pairs], rows))


if __name__ == "__main__":
    launch(main, Args)
