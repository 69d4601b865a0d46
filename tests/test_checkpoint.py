"""checkpoint.py, and what both scripts do with it: refusals, the environment, kills and resumes."""

import os
import sys

import pytest
from conftest import ROOT, run_script

import checkpoint

GAMES = ["BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball"]
SCRIPTS = ["dqn_atari_lan.py"]

# --------------------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "unknown game": (
        "--env-id BrekoutNoFrameskip-v4",
        "there is no game 'BrekoutNoFrameskip-v4'; did you mean Breakout",
    ),
    "no game at all": ("--env-id x", "there is no game 'x'; --env-id takes <Game>NoFrameskip-v4"),
    "not Atari": ("--env-id CartPole-v1", "CartPole-v1 is not an Atari environment; --env-id takes"),
    "v5": ("--env-id ALE/Breakout-v5", "use --env-id BreakoutNoFrameskip-v4"),
    "frame skip": ("--env-id Breakout-v4", "use --env-id BreakoutNoFrameskip-v4"),
    "sticky actions": ("--env-id BreakoutNoFrameskip-v0", "use --env-id BreakoutNoFrameskip-v4"),
    "no steps": ("--total-timesteps 0", "--total-timesteps is 0; it must be positive"),
    "negative learning rate": ("--learning-rate -1", "--learning-rate is -1.0; it must be positive"),
    "gamma": ("--gamma 1.5", "--gamma is 1.5; it must lie in [0, 1]"),
    "threads": ("--num-threads -1", "--num-threads is -1; it must not be negative"),
    "seed": ("--seed -1", "--seed is -1; it must not be negative"),
    "few samples": ("--metrics-samples 511", "--metrics-samples is 511; it must be at least 512"),
    "few samples for wide": ("--activation wide-1024 --metrics-samples 1023", "must be at least 1024"),
    "video of nothing": ("--capture-video", "--capture-video films the evaluation; add e.g. --eval-episodes 1"),
    "no wandb": ("--track", "--track needs Weights & Biases; install it: pip install wandb"),
    "name": ("--exp-name a/b", "--exp-name is a/b; it must be part of a folder's name"),
    "file as folder": (f"--runs-dir {ROOT}/README.md/runs", "is not a folder; name another one"),
    "read-only folder": ("--runs-dir /proc/runs", "name a"),
}
BAD_DQN_INPUT = {
    "zero batch": ("--batch-size 0", "--batch-size is 0; it must be positive"),
    "negative memory": ("--buffer-size -5", "--buffer-size is -5; it must be positive"),
    "late start": ("--total-timesteps 100", "--learning-starts is 80000; it must not exceed --total-timesteps 100"),
    "early start": ("--learning-starts 31", "--learning-starts is 31; it must be at least --batch-size 32"),
    "memory below a batch": ("--buffer-size 31", "--buffer-size is 31; it must be at least --batch-size 32"),
    "memory": (
        "--buffer-size 1000000000 --total-timesteps 1000000000 --exploration-fraction 0.1",
        "not enough memory: 1100.8 GB needed",
    ),
    "exploration": ("--end-e 1.1", "--end-e is 1.1; it must lie in [0, 1]"),
}
ALL_BAD_INPUT = [
    pytest.param(script, *case, id=f"{script[:3]}-{name}")
    for script in SCRIPTS
    for name, case in (BAD_INPUT | (BAD_DQN_INPUT if script.startswith("dqn") else {})).items()
]


def launch_in_process(monkeypatch, capsys, script, arguments):
    """`python <script> <arguments>` without starting python: (exit code, stderr)."""
    module = __import__(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as stopped:
        checkpoint.launch(module.main, module.Args)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("script", "flags", "message"), ALL_BAD_INPUT)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(monkeypatch, capsys, tmp_path, script, flags, message):
    runs_dir = tmp_path / "runs"
    before = sorted(tmp_path.iterdir())
    arguments = ["--runs-dir", str(runs_dir), *flags.split()]
    code, stderr = launch_in_process(monkeypatch, capsys, script, arguments)
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_parsed_is_exit_code_2_from_the_shell(script, tmp_path):
    for flags in (["--activation", "swish"], ["--seed", "one"], ["--no-such-flag"]):
        done = run_script(script, *flags, "--runs-dir", tmp_path / "runs")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert flags[-1].strip("-") in done.stderr
    bad = run_script(script, "--env-id", "Pnog", "--runs-dir", tmp_path / "runs")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: there is no game 'Pnog'; did you mean PongNoFrameskip-v4?\n"
    assert not (tmp_path / "runs").exists()
