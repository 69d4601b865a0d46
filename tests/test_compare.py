"""scripts/compare.py: a few runs in one table and one picture."""

import sys

import pytest
from conftest import ROOT, run_script
from synthetic_study import make_run

sys.path.insert(0, str(ROOT / "scripts"))
import compare


def test_two_experiments_are_told_apart(tmp_path, runs_dir, capsys):
    """Would catch: the same label or colour for the runs of two experiments; a run that was not asked for."""
    folders = [make_run(runs_dir, "dqn", "Pong", activation, 1) for activation in ("relu", "tanh-lan")]
    for exp_name in ("lr1e-4", "other"):
        folders.append(make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, exp_name=exp_name))
    names = ("dqn_atari_lan", "lr1e-4")
    compare.main(compare.Args(tuple(folders), exp_name=names, out=tmp_path / "compare.png"))
    labels = capsys.readouterr().out.splitlines()[0]
    assert labels.split() == ["ReLU", "Tanh", "(LaN)", "Tanh", "(LaN),", "lr1e-4"]
    assert (tmp_path / "compare.png").exists()
    runs = compare.choose_experiments([compare.read_run(folder) for folder in folders], names)
    lines = compare.draw(runs).axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 3
    assert len(lines) == 2 * 3


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, runs_dir):
    """Would catch: no word on the runs that lie deeper."""
    run = make_run(runs_dir / "machineA", "dqn", "Pong", "relu", 1)
    foreign = runs_dir / "PongNoFrameskip-v4__dqn_atari__1__1614716469"
    foreign.mkdir()
    for folder, hint in ((runs_dir, f"; name a run in it, e.g. {run}"), (foreign, "")):
        with pytest.raises(compare.BadInput) as refused:
            compare.main(compare.Args((folder,), out=tmp_path / "compare.png"))
        assert str(refused.value) == (f"{folder} is not a run's folder: its config.json is missing or unreadable{hint}")
    done = run_script("scripts/compare.py", run, "--exp-name", "typo", "--out", tmp_path / "compare.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --exp-name typo: no run has it; there are: dqn_atari_lan\n"
    assert not (tmp_path / "compare.png").exists()
