"""scripts/jobs.py: the study as a list of commands."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from launchers import bash, jobs

GAMES = {"BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball"}
MAIN = {"relu", "tanh", "sigmoid", "tanh-lan"}
FIGURES = {  # figure: algorithm, games, activations, seeds
    "1": ("dqn", GAMES, {"relu", "tanh"}, 5),
    "4": ("dqn", {"Breakout"}, {"tanh", "tanh-lan"}, 1),
    "5a": ("dqn", GAMES, MAIN, 5),
    "5b": ("dqn", GAMES, {"relu", "tanh", "tanh-lan", "layernorm", "wide-1024"}, 5),
    "6": ("dqn", GAMES, MAIN, 5),
    "7": ("dqn", GAMES, {"relu", "selu", "tanh-lan", "tanh-addlan", "tanh-2xlan"}, 5),
    "8": ("ppo", GAMES, MAIN, 5),
    "10": ("dqn", {"Breakout"}, {"tanh", "tanh-lan"}, 1),
    "11": ("dqn", {"Breakout"}, {"tanh", "tanh-lan", "sigmoid", "sigmoid-lan"}, 1),
    "13": ("dqn", GAMES, {"relu", "relu-lan", "sigmoid", "sigmoid-lan", "tanh", "tanh-lan"}, 5),
    "14": ("dqn", GAMES, {"relu", "relu-lan"}, 5),
    "15": ("dqn", GAMES, MAIN, 5),
    "16": ("dqn", GAMES, MAIN, 5),
    "17": ("ppo", GAMES, MAIN, 5),
}
CONTROLS = {"bilinear", "tanh-glu", "layernorm-lan", "layernorm-relu", "relu-1024", "crelu", "gelu"}


def run_jobs(*arguments, **variables):
    command = [sys.executable, ROOT / "scripts" / "jobs.py", *arguments]
    env = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def parsed(line):
    words = shlex.split(line)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    return (
        words[1].split("_")[0],
        flags["--env-id"].removesuffix("NoFrameskip-v4"),
        flags["--activation"],
        flags["--seed"],
    )


def test_the_whole_study_seed_1_first():
    """880 distinct runs. Would catch: an activation that a script gained; seed 2 before all of seed 1."""
    lines = jobs()
    runs = [parsed(line) for line in lines]
    assert len(lines) == len(set(runs)) == 880
    assert [seed for *_, seed in runs] == [seed for seed in "12345" for _ in range(176)]
    assert {game for _, game, _, _ in runs} == GAMES
    for algorithm in ("dqn", "ppo"):
        in_script = (ROOT / f"{algorithm}_atari_lan.py").read_text()
        table = set(re.findall(r'^    "([\w-]+)": Recipe\(', in_script, re.MULTILINE))
        assert {activation for name, _, activation, _ in runs if name == algorithm} == table - CONTROLS
    comparison = runs[:11]
    assert len({activation for _, _, activation, _ in comparison}) == 11
    assert len({(algorithm, game) for algorithm, game, _, _ in comparison}) == 1
    assert lines[0] == "python dqn_atari_lan.py --env-id BeamRiderNoFrameskip-v4 --activation relu --seed 1"


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figures_runs(figure):
    algorithm, games, activations, seeds = FIGURES[figure]
    runs = [parsed(line) for line in jobs("--figure", figure)]
    expected = {
        (algorithm, game, activation, str(seed + 1))
        for game in games
        for activation in activations
        for seed in range(seeds)
    }
    assert len(runs) == len(expected)
    assert set(runs) == expected


def test_the_runs_of_the_controls():
    """Of both algorithms. Would catch: controls without what they are compared with."""
    others = {"relu", "tanh", "tanh-lan", "layernorm", "wide-1024"}
    expected = {
        (algorithm, game, activation, seed)
        for algorithm in ("dqn", "ppo")
        for game in GAMES
        for activation in CONTROLS | others
        for seed in "12345"
    }
    lines = jobs("--figure", "controls")
    assert len(lines) == len(expected)
    assert set(map(parsed, lines)) == expected
    of_ppo = jobs("--figure", "controls", "--algorithms", "ppo", "--seeds", "2")
    assert set(map(parsed, of_ppo)) == {run for run in expected if run[0] == "ppo" and run[3] == "2"}
    one = jobs("--algorithms", "dqn", "--games", "Pong", "--activations", "crelu", "--seeds", "1", "--",
               "--conv-activation", "tanh-lan")  # fmt: skip
    script = "python dqn_atari_lan.py --env-id PongNoFrameskip-v4 --activation crelu --seed 1"
    assert one == [f"{script} --conv-activation tanh-lan"]


def test_filters_and_flags_that_are_passed_on():
    """Would catch: a name that the shell, or the launcher, would split or expand."""
    name = 'it\'s a $HOME `name` with "quotes" * é'
    flags = ["--exp-name", name, "--no-double-q", "--total-timesteps", "1000"]
    lines = jobs("--algorithms", "dqn", "--games", "Pong,Breakout", "--activations", "tanh,relu", "--seeds", "7,2",
                 "--runs-dir", "my runs", "--", *flags)  # fmt: skip
    assert len(lines) == 8
    script = ["python", "dqn_atari_lan.py", "--env-id", "PongNoFrameskip-v4"]
    start = [*script, "--activation", "tanh", "--seed", "7", "--runs-dir"]
    assert shlex.split(lines[0]) == [*start, "my runs", *flags]
    as_bash_reads_it = bash("-c", f"printf '%s\\n' {lines[0]}").stdout.splitlines()
    assert as_bash_reads_it == [*start, "my runs", *flags]
    assert jobs("--figure", "8", "--seeds", "3", "--games", "Pong") == [
        f"python ppo_atari_lan.py --env-id PongNoFrameskip-v4 --activation {activation} --seed 3"
        for activation in ("relu", "tanh", "sigmoid", "tanh-lan")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--games Pnog", "--games Pnog: unknown 'Pnog'; choose from BeamRider,Breakout,"),
        ("--games *", "--games *: unknown '*'"),
        ("--games Pong,", "--games Pong,: empty item; choose from"),
        ("--games Pong Breakout", "unexpected 'Breakout': lists are comma-separated, flags of the runs follow --"),
        ("--algorithms a2c", "choose from dqn,ppo"),
        ("--activations relu,silu", "--activations relu,silu: unknown 'silu'; choose from relu,tanh,"),
        ("--seeds one", "--seeds one: expected whole numbers"),
        ("--seeds 1,,2", "expected whole numbers"),
        ("--figure 2", "--figure 2: unknown figure; choose one of 1,4,5a,5b,6,7,8,10,11,13,14,15,16,17,controls"),
        ("--figure 8 --algorithms dqn", "--figure 8 needs none of these runs, only ppo"),
        ("-- --seed 4", "--seed is set by each line; choose with --games, --activations and --seeds"),
        ("-- --env_id=x", "--env_id=x is set by each line"),
        ("-- --exp-name a\nb", "contains an unprintable character"),
    ],
)
def test_what_jobs_refuses(arguments, message):
    done = run_jobs(*arguments.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--runs-dir", "--seed 1"])
def test_flags_that_are_none_of_its_own(arguments):
    """Would catch: a flag of the runs without `--` that is dropped, so that they train with its default."""
    done = run_jobs(*arguments.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert arguments.split(" ")[0] in done.stderr


def test_what_is_no_part_of_the_paper_is_listed_on_demand_only(monkeypatch):
    """One entry in study.py each. Would catch: a whole study that grows with a control, or with a third algorithm."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("jobs")
    monkeypatch.setattr(module, "ALGORITHMS", (*module.ALGORITHMS, "third"))
    monkeypatch.setattr(module, "ACTIVATIONS", module.ACTIVATIONS | {"control": None})
    assert module.job_lines(module.Args()) == jobs()
    only = module.Args(algorithms="third", activations="control", games="Pong", seeds="2")
    line = "python third_atari_lan.py --env-id PongNoFrameskip-v4 --activation control --seed 2"
    assert module.job_lines(only) == [line]
    assert len(module.job_lines(module.Args(algorithms="third"))) == 8 * 11 * 5


def test_help_names_what_the_lists_take():
    """Would catch: names that a reader must look up in the source."""
    done = run_jobs("--help", COLUMNS=200)
    assert (done.returncode, done.stderr) == (0, "")
    for names in (("dqn", "ppo"), sorted(GAMES), FIGURES):
        assert ", ".join(names) in done.stdout


def test_it_starts_at_once():
    """Would catch: an import of torch, which takes seconds."""
    code = "import sys; sys.path.insert(0, 'scripts'); import jobs, status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
