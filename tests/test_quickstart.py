"""scripts/quickstart.sh, on a training of a few rollouts."""

import json
import signal
import subprocess
import time

import pytest
from conftest import ROOT, contents

TINY = ("--num-steps", "64", "--num-envs", "4", "--metrics-samples", "512", "--metrics-frequency", "512")
pytestmark = pytest.mark.slow


def start(runs_dir, *flags):
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--runs-dir", str(runs_dir), *TINY, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def states(runs_dir):
    files = runs_dir.glob("*/status.json")
    return {file.parent.name.split("__")[2]: json.loads(file.read_text())["state"] for file in files}


def test_both_agents_are_trained_and_compared_and_a_second_call_only_shows_them(tmp_path):
    """Would catch: an agent missing from table or picture; the study's complaints about figures; a picture nowhere; a
    second call that trains again."""
    runs_dir = tmp_path / "two words"
    quickstart = start(runs_dir, "--total-timesteps", "512")
    output, errors = quickstart.communicate(timeout=280)
    assert (quickstart.returncode, errors) == (0, "")
    table = output.split("\n\n")[1].splitlines()
    assert table[0].split() == ["ReLU", "Tanh", "(LaN)"]
    assert [line[:17].strip() for line in table[1:]] == [
        *("neurons dead", "as in the paper", "constant", "effective rank", "return")
    ]
    assert "512 agent steps are 0.0051 % of the paper's" in output
    assert (runs_dir / "quickstart.png").stat().st_size > 50_000
    assert states(runs_dir) == {"relu": "finished", "tanh-lan": "finished"}

    before = contents(runs_dir)
    again = start(runs_dir, "--total-timesteps", "512")
    assert again.communicate(timeout=280)[0].split("\n\n")[1:] == output.split("\n\n")[1:]
    assert contents(runs_dir) == before


def test_a_closed_terminal_stops_both_agents_so_that_they_resume(tmp_path):
    """Would catch: an agent that trains on alone, or that is killed before it has saved; a second call that begins
    anew; another exit code than a shell's. Ctrl-C takes the same way."""
    quickstart = start(tmp_path, "--total-timesteps", "100000")
    deadline = time.monotonic() + 120
    while states(tmp_path) != {"relu": "running", "tanh-lan": "running"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    quickstart.send_signal(signal.SIGHUP)
    _, errors = quickstart.communicate(timeout=120)
    assert quickstart.returncode == 128 + signal.SIGHUP
    assert errors.startswith("stopped; the same command continues: bash scripts/quickstart.sh --runs-dir")
    assert states(tmp_path) == {"relu": "stopped", "tanh-lan": "stopped"}
    assert len(list(tmp_path.glob("*/checkpoints/*.ckpt"))) == 2


def test_a_bad_flag_is_refused_once_and_in_one_line(tmp_path):
    """Would catch: the same error of both agents, or a picture of nothing after it."""
    quickstart = start(tmp_path / "runs", "--total-timesteps", "10")
    _, errors = quickstart.communicate(timeout=120)
    assert quickstart.returncode == 2
    assert errors.startswith("error: --total-timesteps is 10; it must be at least")
    assert errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_help_trains_nothing(tmp_path):
    """Would catch: --help that begins with an installation or a training."""
    quickstart = start(tmp_path, "--help")
    output, errors = quickstart.communicate(timeout=20)
    assert (quickstart.returncode, errors, list(tmp_path.iterdir())) == (0, "", [])
    assert "bash scripts/quickstart.sh" in output
