"""How returns, dead neurons and ranks develop over a long training: what results/full/README.md says in numbers.

python experiments/over_training.py results/full/runs/* > over_training.md

Prints a table in Markdown: a line per quantity and run, a column per agent step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils.cli import BadInput, launch
from plots.events import LAYERS, REPRESENTATION, RETURN
from plots.report import NOTHING, markdown_table
from plots.results import RecordedRun, read_run
from plots.statistics import LAST_GAMES, score_curve

STEPS = (200_000, 500_000, 750_000, *range(1_000_000, 3_000_000, 500_000), *range(3_000_000, 10_000_001, 1_000_000))
WINDOW = 100_000  # agent steps before each of these over which measurements are averaged: ten of them by default
PERCENT, RANK, SCORE = "{:.1%}", "{:.0f}", "{:.1f}"
QUANTITIES = {
    "return": (RETURN, SCORE),
    "dead, the paper's count": (f"{REPRESENTATION}dead_neurons", PERCENT),
    "dead, z divided by its scale": (f"{REPRESENTATION}dead_neurons_scaled", PERCENT),
    "constant": (f"{REPRESENTATION}std_dead_neurons", PERCENT),
    "dormant": (f"{REPRESENTATION}dormant_neurons", PERCENT),
    "effective rank": (f"{REPRESENTATION}effective_rank", RANK),
    "centred rank": (f"{REPRESENTATION}effective_rank_centred", RANK),
    "entropy rank": (f"{REPRESENTATION}entropy_rank", RANK),
    **{f"constant, {name}": (f"{LAYERS}{name}/constant", PERCENT) for name in ("conv1", "conv2", "conv3")},
}


@dataclass
class Args:
    """What became of a few runs' neurons, from the first agent steps to the last."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, finished or not"""


def reached(run: RecordedRun, step: int) -> bool:
    """Whole rollouts end a little earlier than planned, so a finished run has reached all that it planned."""
    return run.agent_steps >= step or (run.finished and run.planned_steps >= step)


def value_at(run: RecordedRun, tag: str, step: int) -> float:
    """Of returns the mean of the last 100 games, of all else the mean over WINDOW; NaN where the run has none."""
    if tag not in run.points or not reached(run, step):
        return np.nan
    points = run.points[tag]
    if tag == RETURN:
        return float(score_curve(points, np.array([step]))[0])
    values = points["value"][(points["step"] > step - WINDOW) & (points["step"] <= step)]
    values = values[~np.isnan(values)]  # there is no scale to divide by while nearly all of z is constant
    return float(np.mean(values, dtype=float)) if len(values) else np.nan


def main(args: Args) -> None:
    runs: dict[str, RecordedRun] = {}
    read = [read_run(folder) for folder in args.folders]
    several = len({run.game for run in read}) > 1
    for run in read:
        name = f"{run.algorithm.upper()} {run.activation} {run.seed}" + f", {run.game}" * several
        if name in runs:
            raise BadInput(f"{run.folder} is a second run of {name}, beside {runs[name].folder}; name one of them")
        runs[name] = run
    steps = [step for step in STEPS if any(reached(run, step) for run in runs.values())]
    if not steps:
        raise BadInput(f"no run has reached {STEPS[0]:,} agent steps, the first column; train longer")
    rows = []
    for quantity, (tag, form) in QUANTITIES.items():
        for name, run in runs.items():
            values = [value_at(run, tag, step) for step in steps]
            rows.append([quantity, name, *(NOTHING if np.isnan(value) else form.format(value) for value in values)])
    print(f"Return: mean of the last {LAST_GAMES} games, or of all before the hundredth.")
    print(f"All else: mean of what was measured in the last {WINDOW:,} agent steps and has a value.")
    print("Run: algorithm, activation, seed. Columns: agent steps in millions.\n")
    print(markdown_table(["", "run", *(f"{step / 1e6:g}" for step in steps)], rows), end="")


if __name__ == "__main__":
    launch(main, Args)
