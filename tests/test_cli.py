"""cli.py: from words to Args, from errors to one line and an exit code."""

import errno
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from conftest import ROOT, SCRIPTS, launch_in_process, run_script

import dqn_atari_lan as dqn
from lan_utils import cli


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_parsed_is_exit_code_2(script, tmp_path, monkeypatch, capsys):
    for flags in (["--activation", "swish"], ["--seed", "one"], ["--no-such-flag"]):
        code, stderr = launch_in_process(monkeypatch, capsys, script, [*flags, "--runs-dir", tmp_path / "runs"])
        assert code == 2
        assert "Traceback" not in stderr
        assert flags[-1].strip("-") in stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_from_the_shell(script, tmp_path):
    """Would catch: a script that does not hand its main to `launch`."""
    bad = run_script(script, "--env-id", "Pnog", "--runs-dir", tmp_path / "runs")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown game 'Pnog'; did you mean PongNoFrameskip-v4?\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["dqn_atari_lan.py", "ppo_atari_lan.py", "pqn_atari_lan.py", "plot_results.py", "experiments/regression.py"],
)
def test_help_that_nobody_reads_ends_quietly(script):
    """As behind `| head`. Would catch: a traceback of BrokenPipeError below the help."""
    command = f"{sys.executable} {script} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_resume_line_never_overwrites(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dqn_atari_lan.py", "--seed", "2", "--overwrite", "--exp-name", "a b"])
    assert cli.same_command() == "python dqn_atari_lan.py --seed 2 --exp-name 'a b'"


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (cli.BadInput("--seed is odd"), 2, "error: --seed is odd\n"),
        (cli.RunFailed("it diverged"), 1, "error: it diverged\n"),
        (cli.Stopped(signal.SIGTERM, saved=True), 143, "stopped by SIGTERM; this resumes it: python x.py --seed 3\n"),
        (
            cli.Stopped(signal.SIGINT, saved=False),
            130,
            "stopped by SIGINT; nothing was saved; this starts anew: python x.py --seed 3\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; every file is whole, run this again: python x.py --seed 3\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/model.pt"),
            1,
            "error: cannot use runs/a/model.pt: No space left on device. What was saved is whole: "
            "free some space, then run this again: python x.py --seed 3\n",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "runs/a/model.pt"),
            1,
            "error: cannot use runs/a/model.pt: Permission denied. What was saved is whole: "
            "fix this, then run this again: python x.py --seed 3\n",
        ),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 1, f"{cli.TOO_MANY}\n"),  # of a fork
        (RuntimeError("can't start new thread"), 1, f"{cli.TOO_MANY}\n"),
        (
            OSError("[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nffmpeg"),
            1,
            "error: cannot use a file: [Errno 32] Broken pipe. What was saved is whole: fix this, then run this again: "
            "python x.py --seed 3\n",
        ),
        (
            torch.OutOfMemoryError("tried to allocate 2 GiB\nand more"),
            1,
            "error: out of memory: tried to allocate 2 GiB; free some, then run this again: python x.py --seed 3\n",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "error: out of memory: DefaultCPUAllocator: can't allocate memory; free some, then run this again: "
            "python x.py --seed 3\n",
        ),
        (
            BrokenProcessPool("a child process terminated abruptly"),
            1,
            "error: a worker process died (out of memory?); free some, then run this again: python x.py --seed 3\n",
        ),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    """Would catch: a traceback, an exit code that a sweep takes for another, a resume line that is not the command."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "3"])
    with pytest.raises(SystemExit) as stopped:
        cli.launch(raising(error), dqn.Args)
    assert (stopped.value.code, capsys.readouterr().err) == (code, message)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    """Would catch: bugs reported as if the user had caused them."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ZeroDivisionError):
        cli.launch(raising(ZeroDivisionError("ours")), dqn.Args)


def test_progress_where_there_is_no_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    """Would catch: a log of a million lines, a rate that counts the steps of an earlier process."""
    clock = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    progress = cli.Progress(total=1000, done=500)
    for step in range(510, 701, 10):
        clock[0] += 5
        progress.update(step, last_100_games="2.5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # of 100 seconds
    assert all("/1000" in line and "last_100_games=2.5" in line and "2.00step/s" in line for line in lines)
    assert progress.speed() == 2.0
    progress.close()
