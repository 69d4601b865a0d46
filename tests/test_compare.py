"""scripts/compare.py: a few runs in one table and one picture."""

import itertools
import sys

import matplotlib.style
import numpy as np
import pytest
from conftest import ROOT, run_script
from synthetic_study import make_run, write_events

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


def test_two_runs_of_an_activation_have_their_own_colors(tmp_path, runs_dir):
    """Would catch: two lines that nobody can tell apart, in a picture that asks which run died."""
    folders = [
        make_run(runs_dir, "dqn", "Pong", activation, seed) for activation in ("tanh", "relu") for seed in (1, 2, 3)
    ]
    figure = compare.draw([compare.read_run(folder) for folder in folders])
    lines = figure.axes[0].get_lines()
    assert len({line.get_color() for line in lines}) == 6
    assert [line.get_color() for line in lines[:6]] == [line.get_color() for line in lines[6:]]  # dead, constant
    (legend,) = (legend for part in figure.subfigs for legend in part.legends)
    assert [handle.get_color() for handle in legend.get_lines()[:6]] == [line.get_color() for line in lines[:6]]


def test_labels_say_what_differs_and_fit(tmp_path, runs_dir):
    """Would catch: folders' names for labels, titles that run into each other, a legend wider than the picture."""
    runs = [make_run(runs_dir, "dqn", "Pong", "tanh-lan", seed) for seed in (1, 2)]
    runs.append(make_run(runs_dir, "ppo", "Breakout", "tanh-lan", 1, exp_name="an_ablation_with_a_long_name"))
    runs = [compare.read_run(folder) for folder in runs]
    assert compare.labels_of(runs[:2]) == ["Tanh (LaN), seed 1", "Tanh (LaN), seed 2"]
    assert compare.labels_of([runs[0], runs[0]]) == ["Tanh (LaN), folder 1", "Tanh (LaN), folder 2"]
    with matplotlib.style.context(compare.figures.LOOK):
        figure = compare.draw(runs)
        figure.get_layout_engine().execute(figure)
        (legend,) = (legend for part in figure.subfigs for legend in part.legends)
        for box in [legend.get_window_extent()] + [axes.title.get_window_extent() for axes in figure.axes]:
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
        titles = [axes.title.get_window_extent() for axes in figure.subfigs[-1].axes if axes.get_title()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))


def test_damage_and_unequal_lengths_are_said(tmp_path, runs_dir, capsys):
    """Would catch: half a run beside a whole one as if both had ended."""
    folders = [make_run(runs_dir, "dqn", "Pong", "tanh", seed) for seed in (1, 2)]
    compare.main(compare.Args(tuple(folders), out=tmp_path / "compare.png"))
    output, errors = capsys.readouterr()
    assert "agent steps" not in output
    assert errors == ""
    events = next(folders[1].glob("events*"))
    events.write_bytes(events.read_bytes()[: events.stat().st_size // 2])
    compare.main(compare.Args(tuple(folders), out=tmp_path / "compare.png"))
    output, errors = capsys.readouterr()
    (line,) = [line for line in output.splitlines() if line.startswith("agent steps")]
    whole, half = (int(word.replace(",", "")) for word in line.split()[2:4])
    assert whole == 100_000
    assert half < 70_000
    assert errors.startswith(f"warning: {folders[1]}: ")
    assert "truncated or damaged" in errors


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if len(axes.get_yticklabels()) >= 4 and axes.get_images()}


def test_the_layer_that_died_is_named_and_shown(tmp_path, runs_dir, capsys):
    """Tanh loses conv2 at 30 % of the training, and 90 % of z; ReLU nothing, so that its z has most constant units.

    Would catch: no line, or one that names z; the other run's layers in a panel; another layer or time.
    """
    folders = (make_run(runs_dir, "dqn", "Pong", "tanh", 1, dies="conv2"), make_run(runs_dir, "dqn", "Pong", "relu", 1))
    write_events(folders[0] / "events.out.tfevents.1800000000", [("layers/z/constant", 100_000, 0.9)], wall_time=1.8e9)
    write_events(
        folders[0] / "events.out.tfevents.1800000001", [("layers/conv3/constant", 100_000, 0.95)], wall_time=1.9e9
    )
    compare.main(compare.Args(folders, out=tmp_path / "compare.png"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  most constant")]
    assert line.split()[2:5] == ["conv2", "100.0%", "-"]
    figure = compare.draw([compare.read_run(folder) for folder in folders])
    found = panels(figure)
    assert list(found) == ["Tanh", "ReLU"]
    for label, dead in (("Tanh", [False, True, True, True]), ("ReLU", [False] * 4)):
        strips = [image.get_array()[0] for image in found[label].get_images()]
        assert [strip[-1] > 0.5 for strip in strips] == dead
    time = np.linspace(0, 1, len(strips[0]))
    conv2 = found["Tanh"].get_images()[1].get_array()[0]
    assert time[np.ma.filled(conv2, 0) > 0.5][0] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("measured", [(True, True), (False, False), (True, False)])
def test_layers_are_shown_where_all_runs_have_them(tmp_path, runs_dir, capsys, measured):
    """Would catch: an old run that ends the comparison; an empty panel; a line where z has most constant units."""
    names = ("tanh", "relu")
    folders = [
        make_run(runs_dir, "dqn", "Pong", name, 1, layers=layers) for name, layers in zip(names, measured, strict=True)
    ]
    compare.main(compare.Args(tuple(folders), out=tmp_path / "compare.png"))
    assert "below z" not in capsys.readouterr().out
    figure = compare.draw([compare.read_run(folder) for folder in folders])
    assert len(panels(figure)) == (2 if all(measured) else 0)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, runs_dir):
    """Would catch: a traceback; the picture that was there before lost."""
    run = make_run(runs_dir, "dqn", "Pong", "relu", 1)
    (tmp_path / "file").write_text("theirs")
    done = run_script("scripts/compare.py", run, "--out", tmp_path / "file" / "compare.png")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot use {tmp_path}/file")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, runs_dir):
    """Would catch: no word on the runs that lie deeper."""
    run = make_run(runs_dir / "machineA", "dqn", "Pong", "relu", 1)
    foreign = runs_dir / "PongNoFrameskip-v4__dqn_atari__1__1614716469"
    foreign.mkdir()
    for folder, hint in ((runs_dir, f"; name a run in it, e.g. {run}"), (foreign, "")):
        with pytest.raises(compare.BadInput) as refused:
            compare.main(compare.Args((folder,), out=tmp_path / "compare.png"))
        assert str(refused.value) == (f"{folder} is not a run's folder: its config.json is missing or unreadable{hint}")
    with pytest.raises(compare.BadInput, match=r"compare.pdf: the picture is a PNG"):  # and no viewer would open it
        compare.main(compare.Args((run,), out=tmp_path / "compare.pdf"))
    done = run_script("scripts/compare.py", run, "--exp-name", "typo", "--out", tmp_path / "compare.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --exp-name typo: no run has it; there are: dqn_atari_lan\n"
    assert not (tmp_path / "compare.png").exists()
