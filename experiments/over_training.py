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
from lan_utils.cli import BadInput, launch, warn
from plots.events import LAYERS, REPRESENTATION, RETURN, read_events
from plots.report import NOTHING, markdown_table
from plots.results import RecordedRun, read_config, without_rounding
from plots.statistics import LAST_GAMES

STEPS = (200_000, 500_000, 1_000_000, 1_500_000, *range(2_000_000, 10_000_001, 1_000_000))
WINDOW = 100_000  # agent steps before each of these over which measurements are averaged: ten of them by default
ROLLOUT = 4096  # agent steps of PQN's: 10 M end in a whole rollout, up to so many earlier
PERCENT, RANK, SCORE = "{:.1%}", "{:.0f}", "{:.1f}"
QUANTITIES = {
    "return": (RETURN, SCORE),
    "dead, the paper's count": (f"{REPRESENTATION}dead_neurons", PERCENT),
    "dead, z divided by its scale": (f"{REPRESENTATION}dead_neurons_scaled", PERCENT),
    "constant": (f"{REPRESENTATION}std_dead_neurons", PERCENT),
    "dormant": (f"{REPRESENTATION}dormant_neurons", PERCENT),
    "effective rank": (f"{REPRESENTATION}effective_rank", RANK),
    "centred rank": (f"{REPRESENTATION}effective_rank_centred", RANK),
    **{f"constant, {name}": (f"{LAYERS}{name}/constant", PERCENT) for name in ("conv1", "conv2", "conv3")},
}


@dataclass
class Args:
    """What became of a few runs' neurons, from the first agent steps to the last."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, finished or not"""


def read_run(folder: Path) -> RecordedRun:
    """A run with its points.

    Raises:
        BadInput: it is no run's folder.
    """
    run = read_config(folder)
    if run is None:
        raise BadInput(f"{folder} is not a run's folder: its config.json is missing or unreadable; name a run")
    points, run.agent_steps, run.problems = read_events(sorted(folder.glob("events.out.tfevents.*")))
    run.points = without_rounding(points)
    for problem in run.problems:
        warn(f"{folder}: {problem}")
    return run


def reached(run: RecordedRun, step: int) -> bool:
    return run.agent_steps > step - ROLLOUT


def value_at(run: RecordedRun, tag: str, step: int) -> float:
    """Of returns the mean of the last 100 games, of all else the mean over WINDOW; NaN where the run has none."""
    points = run.points.get(tag, [])
    if not len(points) or not reached(run, step):
        return np.nan
    until = points[points["step"] <= step]
    values = until["value"][-LAST_GAMES:] if tag == RETURN else until["value"][until["step"] > step - WINDOW]
    values = values[~np.isnan(values)]  # there is no scale to divide by while nearly all of z is constant
    return float(np.mean(values, dtype=float)) if len(values) else np.nan


def main(args: Args) -> None:
    runs = [read_run(folder) for folder in args.folders]
    steps = [step for step in STEPS if any(reached(run, step) for run in runs)]
    rows = []
    for quantity, (tag, form) in QUANTITIES.items():
        for run in runs:
            values = [value_at(run, tag, step) for step in steps]
            cells = [NOTHING if np.isnan(value) else form.format(value) for value in values]
            rows.append([quantity, f"{run.algorithm.upper()} {run.activation} {run.seed}", *cells])
    print(
        f"Return: mean of the last {LAST_GAMES} games. All else: mean of the measurements in the last {WINDOW:,} agent"
    )
    print("steps. Run: algorithm, activation, seed. Columns: agent steps in millions.\n")
    print(markdown_table(["", "run", *(f"{step / 1e6:g}" for step in steps)], rows), end="")


if __name__ == "__main__":
    launch(main, Args)
