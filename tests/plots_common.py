"""What the tests of the plots share: a small study whose numbers are known, and how it is read and drawn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import synthetic_study
from conftest import ROOT  # noqa: F401 (puts the project's folder on the path)

import plot_results
from lan_utils import study as facts
from plots import events, results

STEPS = 100_000


def points(*pairs):
    return np.array(list(pairs), events.POINT)


def draw(runs_dir, out_dir, *only, **kwargs):
    plot_results.main(plot_results.Args((str(runs_dir),), str(out_dir), only, **kwargs))


def rows(out_dir):
    with open(out_dir / "results.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def event_file(folder):
    (file,) = folder.glob("events*")
    return file


def read_study(
    runs_dir: Path, tmp_path: Path, allow_unfinished: bool = False, exp_names: tuple[str, ...] = ()
) -> results.Results:
    """What the figures are drawn from, without drawing them."""
    runs, _ = results.find_runs(runs_dir, tmp_path)
    runs = results.choose_experiments(runs, exp_names)
    for run in runs:
        run.points, run.agent_steps, run.problems = events.read_run(run.folder, tmp_path / "cache")
    lengths = results.select_runs(runs, allow_unfinished)
    return results.make_results(runs, lengths)[0]


@pytest.fixture(scope="session", name="study")
def make_small_study(once):
    """Two games, two seeds; scores without noise."""
    return once("study", make_two_games) / "runs"


def make_two_games(folder):
    folder = folder / "runs"
    few = {"games": ("Breakout", "Pong"), "seeds": 2, "agent_steps": STEPS, "noise": 0.0}
    synthetic_study.make_study(folder, ("dqn",), **few)
    synthetic_study.make_study(folder.with_name("ppo"), ("ppo",), activations=facts.MAIN, **few)
    for run in folder.with_name("ppo").iterdir():
        run.rename(folder / run.name)
