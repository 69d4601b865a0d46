"""The study as one command per line, for sweep.sh and sweep.slurm.

python scripts/jobs.py > jobs.txt                         (the paper's 880 runs, seed 1 of everything first)
python scripts/jobs.py --figure 5a --seeds 1,2            (what a figure needs)
python scripts/jobs.py --algorithms ppo --games Pong,Breakout --runs-dir DIR -- --total-timesteps 200000
"""

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lan_utils.cli import BadInput, launch
from lan_utils.study import ACTIVATIONS, ALGORITHMS, GAMES, RUNS_OF_FIGURES, SEEDS, Needed

FIGURES: dict[str, list[Needed]] = defaultdict(list)  # the controls have one for each algorithm
for name, runs in RUNS_OF_FIGURES.items():
    FIGURES[name.split("-")[0]].append(runs)

PAPERS = "by default the paper's, or what --figure needs"


def flag(metavar: str, text: str) -> type:
    return Annotated[str | None, arg(metavar=metavar, help=text, help_behavior_hint="")]


@dataclass
class Args:
    """Print the paper's 880 runs, or a part of them, as one command per line. Runs come in the order of the lists."""

    algorithms: flag("LIST", f"comma-separated, of {', '.join(ALGORITHMS)}; {PAPERS}") = None
    games: flag("LIST", f"comma-separated, of {', '.join(GAMES)}; {PAPERS}") = None
    activations: flag("LIST", f"comma-separated, of {', '.join(ACTIVATIONS)}; {PAPERS}") = None
    seeds: flag("LIST", "comma-separated whole numbers; by default " + ", ".join(map(str, SEEDS))) = None
    figure: flag("NUMBER", f"only what this one needs: {', '.join(FIGURES)}") = None
    runs_dir: flag("DIR", "where the runs go; a relative path starts at the project's folder") = None
    flags: Annotated[Positional[tuple[str, ...]], arg(metavar="-- FLAGS", help_behavior_hint="")] = ()
    """passed on to every run"""


def chosen(name: str, text: str | None, valid: Collection[str], default: Collection[str]) -> list[str]:
    """The items of a comma-separated list, all of them valid ones; the default ones where the flag is not given."""
    if text is None:
        return [item for item in valid if item in default]
    for item in text.split(","):
        if item not in valid:
            problem = f"unknown {item!r}" if item else "empty item"
            raise BadInput(f"{name} {text}: {problem}; choose from {','.join(valid)}")
    return text.split(",")


def job_lines(args: Args) -> list[str]:
    """The list that the flags ask for.

    Raises:
        BadInput
    """
    if args.figure not in (None, *FIGURES):
        raise BadInput(f"--figure {args.figure}: unknown figure; choose one of {','.join(FIGURES)}")
    paper = [runs for name, of_name in FIGURES.items() if name[0].isdigit() for runs in of_name]
    needed = FIGURES[args.figure] if args.figure else paper
    algorithms = chosen("--algorithms", args.algorithms, ALGORITHMS, [runs.algorithm for runs in needed])
    games = chosen("--games", args.games, GAMES, [game for runs in needed for game in runs.games])
    of_figures = [activation for runs in needed for activation in runs.activations]
    activations = chosen("--activations", args.activations, ACTIVATIONS, of_figures)
    of_all = needed[0].seeds if args.figure else SEEDS
    seeds = [str(seed) for seed in of_all] if args.seeds is None else args.seeds.split(",")
    if not all(re.fullmatch("[0-9]+", seed) for seed in seeds):
        raise BadInput(f"--seeds {args.seeds}: expected whole numbers, e.g. {','.join(map(str, SEEDS))}")
    if args.figure:
        algorithms = [algorithm for algorithm in algorithms if algorithm in {runs.algorithm for runs in needed}]
        games = [game for game in games if game in needed[0].games]
        activations = [activation for activation in activations if activation in needed[0].activations]
        if not (algorithms and games and activations):
            of_figure = ",".join(runs.algorithm for runs in needed)
            there_are = f"{of_figure}, {','.join(needed[0].games)}, {','.join(needed[0].activations)}"
            raise BadInput(f"--figure {args.figure} needs none of these runs, only {there_are}")

    passed_on = [] if args.runs_dir is None else ["--runs-dir", args.runs_dir]
    passed_on += args.flags
    if args.flags and not args.flags[0].startswith("-"):
        raise BadInput(f"unexpected {args.flags[0]!r}: lists are comma-separated, flags of the runs follow --")
    for word in passed_on:
        if re.match("--(env-id|activation|seed)(=|$)", word.replace("_", "-")):
            raise BadInput(f"{word} is set by each line; choose with --games, --activations and --seeds")
        if not word.isprintable():
            raise BadInput(f"{word!r} contains an unprintable character; a job is one printable line")
    return [
        shlex.join(
            ["python", f"{algorithm}_atari_lan.py", "--env-id", f"{game}NoFrameskip-v4", "--activation", activation]
            + ["--seed", seed, *passed_on]
        )
        for seed in seeds
        for algorithm in algorithms
        for game in games
        for activation in activations
    ]


if __name__ == "__main__":
    launch(lambda args: print(*job_lines(args), sep="\n", flush=True), Args)
