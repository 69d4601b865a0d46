"""Prints the study as one command per line, for sweep.sh and sweep.slurm:
880 runs, seed 1 of everything first. A part of it:

  python scripts/jobs.py --figure 5a --seeds 1,2      what a figure needs
  python scripts/jobs.py --algorithms ppo --games Pong,Breakout
  python scripts/jobs.py --runs-dir DIR -- FLAGS      FLAGS go to every run

Lists are comma-separated, and runs come in their order.
"""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lan_utils.study import ACTIVATIONS, ALGORITHMS, GAMES, SEEDS
from lan_utils.study import RUNS_OF_FIGURES as FIGURES


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2."""
        print(f"error: {message}; try --help (what is meant for the runs goes behind --)", file=sys.stderr)
        sys.exit(2)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def chosen(flag: str, text: str | None, valid: Collection[str]) -> list[str]:
    """The items of a comma-separated list, all of them valid ones; all that are valid where the flag is not given."""
    if text is None:
        return list(valid)
    for item in text.split(","):
        if item not in valid:
            problem = "it has an empty item" if not item else f"there is no {item!r}"
            fail(f"{flag} {text}: {problem}; it takes some of {','.join(valid)}")
    return text.split(",")


def job_lines(arguments: list[str]) -> list[str]:
    """The list that the command line asks for. Exits with 2 where it asks for what there is not."""
    own, passed_on = arguments, []
    if "--" in arguments:
        end = arguments.index("--")
        own, passed_on = arguments[:end], arguments[end + 1 :]
    parser = Parser(
        description=__doc__,
        usage="python scripts/jobs.py [flags] [-- flags of every run]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--algorithms", metavar="LIST", help=", ".join(ALGORITHMS))
    parser.add_argument("--games", metavar="LIST", help=", ".join(GAMES))
    parser.add_argument("--activations", metavar="LIST", help=", ".join(ACTIVATIONS))
    parser.add_argument("--seeds", metavar="LIST", help="whole numbers; by default " + ", ".join(map(str, SEEDS)))
    parser.add_argument("--figure", metavar="NUMBER", help=f"only what this one needs: {', '.join(FIGURES)}")
    parser.add_argument("--runs-dir", metavar="DIR", help="where the runs go; a relative one starts at the project")
    flags = parser.parse_args(own)

    algorithms = chosen("--algorithms", flags.algorithms, ALGORITHMS)
    games = chosen("--games", flags.games, GAMES)
    activations = chosen("--activations", flags.activations, ACTIVATIONS)
    seeds = SEEDS if flags.seeds is None else flags.seeds.split(",")
    if not all(re.fullmatch("[0-9]+", str(seed)) for seed in seeds):
        fail(f"--seeds {flags.seeds}: it takes whole numbers, e.g. {','.join(map(str, SEEDS))}")
    if flags.figure is not None:
        if flags.figure not in FIGURES:
            fail(f"--figure {flags.figure}: there is no such one; it takes one of {','.join(FIGURES)}")
        needed = FIGURES[flags.figure]
        algorithms = [algorithm for algorithm in algorithms if algorithm == needed.algorithm]
        games = [game for game in games if game in needed.games]
        activations = [activation for activation in activations if activation in needed.activations]
        seeds = needed.seeds if flags.seeds is None else seeds
        if not (algorithms and games and activations):
            there_are = f"{needed.algorithm}, {','.join(needed.games)}, {','.join(needed.activations)}"
            fail(f"--figure {flags.figure} needs none of these runs, only {there_are}")

    for word in passed_on:
        if re.match("--(env-id|activation|seed)(=|$)", word.replace("_", "-")):
            fail(f"{word} is set by each line; choose with --games, --activations and --seeds")
    if flags.runs_dir is not None:
        passed_on = ["--runs-dir", flags.runs_dir, *passed_on]
        if flags.runs_dir.startswith("-"):  # a word of its own would be taken for a flag
            passed_on = [f"--runs-dir={flags.runs_dir}", *passed_on[2:]]
    for word in passed_on:
        if not word.isprintable():
            fail(f"{word!r} holds an unprintable character; a job is one printable line")
    return [
        shlex.join(
            ["python", f"{algorithm}_atari_lan.py", "--env-id", f"{game}NoFrameskip-v4", "--activation", activation]
            + ["--seed", str(seed), *passed_on]
        )
        for seed in seeds
        for algorithm in algorithms
        for game in games
        for activation in activations
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly behind `| head`
    print(*job_lines(sys.argv[1:]), sep="\n")
