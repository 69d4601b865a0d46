import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import synthetic_study
import torch
from conftest import ROOT, read_events, run_script
from scipy import stats
from synthetic_study import make_run, true_measurement, true_score, write_events
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

import metrics
import plot_results
from plot_results import Args, main

STEPS = 100_000


def points(*pairs):
    return np.array(list(pairs), plot_results.POINT)


def draw(runs_dir, out_dir, *only, **kwargs):
    main(Args(str(runs_dir), str(out_dir), only, **kwargs))


def rows(out_dir):
    with open(out_dir / "results.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def event_file(folder):
    (file,) = folder.glob("events*")
    return file


def read_study(runs_dir, tmp_path, allow_unfinished):
    """What the figures are drawn from, without drawing them."""
    runs, _ = plot_results.find_runs(runs_dir, tmp_path)
    for run in runs:
        run.points, run.agent_steps, run.problems = plot_results.read_run(run.folder, tmp_path / "cache")
    lengths = plot_results.select_runs(runs, allow_unfinished)
    plot_results.fill_curves(runs, lengths)
    return plot_results.Study(runs, lengths)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Two games, two seeds; scores without noise."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    few = {"games": ("Breakout", "Pong"), "seeds": 2, "agent_steps": STEPS, "noise": 0.0}
    synthetic_study.make_study(folder, ("dqn",), **few)
    synthetic_study.make_study(folder.with_name("ppo"), ("ppo",), activations=plot_results.MAIN, **few)
    for run in folder.with_name("ppo").iterdir():
        run.rename(folder / run.name)
    return folder


@pytest.fixture(scope="session")
def drawn(study, tmp_path_factory):
    """The whole study, drawn by the command a user would give."""
    out_dir = tmp_path_factory.mktemp("drawn") / "figures"
    done = run_script("plot_results.py", "--runs-dir", study, "--out-dir", out_dir)
    assert (done.returncode, done.stderr) == (0, "")
    return out_dir


# ------------------------------------------------------------------------------------------- event files


def test_check_sums_are_those_of_tensorboard():
    rng = np.random.default_rng(1)
    content = rng.bytes(5000)
    starts, lengths = rng.integers(0, 4000, 50), rng.integers(0, 900, 50)
    sums = plot_results.masked_crc32c(np.frombuffer(content, np.uint8), starts, lengths)
    assert sums.tolist() == [masked_crc32c(content[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def test_reads_every_point_that_tensorboard_reads(runs_dir):
    """Fails where points are down-sampled (TensorBoard keeps 10,000), confused between tags or lost."""
    folder = make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, games=12_000, agent_steps=1_000_000, histograms=True)
    found, last_step, problems = plot_results.read_events([event_file(folder)])
    expected = {tag: p for tag, p in read_events(folder).items() if not tag.endswith(("_length", "kde_peak"))}
    assert {tag: p.tolist() for tag, p in found.items()} == expected
    assert len(found["charts/episodic_return"]) == 12_000
    assert (last_step, problems) == (1_000_000, [])


def test_a_resumed_run_counts_each_step_once(tmp_path):
    """A kill left points up to step 30 behind; the run went on from its checkpoint at 20."""
    tag = "charts/episodic_return"
    first, second = tmp_path / "events.1", tmp_path / "events.2"
    write_events(first, [(tag, 10, 1.0), (tag, 20, 2.0), (tag, 30, 666.0)])
    write_events(second, [(tag, 25, 3.0), (tag, 40, 4.0)], purge_step=21)
    found, last_step, _ = plot_results.read_events([first, second])
    assert found[tag].tolist() == [(10, 1.0), (20, 2.0), (25, 3.0), (40, 4.0)]
    assert last_step == 40


def test_evaluation_is_no_training(tmp_path):
    """Its steps are games: they must not lengthen a run, and their scores are not the curve's."""
    write_events(tmp_path / "events", [("charts/episodic_return", 7, 1.0), ("eval/episodic_return", 99, 5.0)])
    found, last_step, _ = plot_results.read_events([tmp_path / "events"])
    assert (list(found), last_step) == (["charts/episodic_return"], 7)


def test_nan_and_repeated_points_are_named(tmp_path):
    tag = "representation/dead_neurons"
    write_events(tmp_path / "events", [(tag, 1, 0.5), (tag, 2, math.nan), (tag, 3, math.inf), (tag, 1, 0.25)])
    found, _, problems = plot_results.read_events([tmp_path / "events"])
    assert found[tag].tolist() == [(1, 0.25)]
    assert problems == [
        f"{tag}: 1 steps logged twice, the later value counts",
        f"{tag}: 2 NaN or infinite values left out",
    ]


def test_damaged_event_files(tmp_path):
    """Whatever is cut off or flipped: what is read is true, what is lost is named, nothing raises."""
    tag = "charts/episodic_return"
    file = tmp_path / "events"
    true = [(step, float(step * step)) for step in range(1, 11)]
    write_events(file, [(tag, step, value) for step, value in true])
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        found, _, problems = plot_results.read_events([file])
        kept = found.get(tag, points()).tolist()
        assert kept == true[: len(kept)]
        assert problems or not size or len(kept) == sum(size >= end for end in ends(content)) - 1
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        found, _, problems = plot_results.read_events([file])
        assert problems
        assert set(found.get(tag, points()).tolist()) < set(true) or place < ends(content)[0]


def ends(content):
    """Where each record of a TFRecord file ends."""
    position, found = 0, []
    while position < len(content):
        position += 16 + int.from_bytes(content[position : position + 8], "little")
        found.append(position)
    return found


# ------------------------------------------------------------------------------------------------- scores


def test_score_curve_is_the_mean_of_the_last_hundred_games():
    """Against a plain loop; a game counts from the very step in which it ends."""
    rng = np.random.default_rng(2)
    steps = np.sort(rng.choice(np.arange(50, 5000), 350, replace=False))
    games = points(*zip(steps, rng.normal(20, 5, 350), strict=True))
    grid = np.linspace(0, 5000, 101)
    expected = [np.mean([v for s, v in games.tolist() if s <= g][-100:] or [math.nan]) for g in grid]
    np.testing.assert_allclose(plot_results.score_curve(games, grid), expected, rtol=1e-6)
    at_its_end = plot_results.score_curve(points((10, 3.0)), np.array([9.0, 10.0]))
    np.testing.assert_array_equal(at_its_end, [math.nan, 3.0])


def test_line_and_band_by_hand():
    """The band is over seeds, of the mean over games: neither over games nor over all runs."""
    curves = {"A": {1: np.array([0.0]), 2: np.array([2.0])}, "B": {1: np.array([10.0]), 2: np.array([16.0])}}
    line, band = plot_results.line_and_band(curves)
    assert line == pytest.approx(7.0)
    assert band == pytest.approx(np.sqrt(8.0))  # of 5 and 9
    # A seed that lacks a game says nothing about the mean over games, but counts in its own.
    curves["A"][3] = np.array([4.0])
    line, band = plot_results.line_and_band(curves)
    assert (line[0], band[0]) == pytest.approx((7.5, np.sqrt(8.0)))
    assert plot_results.line_and_band({"A": {1: np.array([1.0])}})[1] is None


def test_every_number_of_results_csv(study, drawn):
    """Against the formulas that the study was made from, worked out game by game."""
    found = rows(drawn)
    assert len(found) == 2 * 2 * (11 + 4)
    ends_ = np.linspace(STEPS / 300, STEPS, 300).round().astype(int)
    human = synthetic_study.RANDOM_HUMAN
    for row in found.values():
        game, activation, seed = row["game"], row["activation"], int(row["seed"])
        relu = [np.float32(true_score(game, "relu", s, ends_ / STEPS)) for s in (1, 2)]
        grid = np.linspace(0, STEPS, 1001)
        curve = [
            np.mean([np.mean(scores[: np.sum(ends_ <= g)][-100:]) for scores in relu]) for g in grid if g >= ends_[0]
        ]
        # The study's point: both extremes lie inside, where first and last values would miss them.
        assert 0 < np.argmin(curve) < len(curve) - 1
        assert 0 < np.argmax(curve) < len(curve) - 1
        final = np.mean(true_score(game, activation, seed, ends_[-100:] / STEPS))
        random, top = human[game]
        expected = {
            "agent_steps": STEPS,
            "final_return": final,
            "normalized_score": (final - min(curve)) / (max(curve) - min(curve)),
            "human_normalized_score": (final - random) / (top - random),
        }
        for name in ("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons"):
            expected[name] = float(true_measurement(name, activation, seed, np.array(1.0)))
        expected["rank_share"] = expected["effective_rank"] / (1024 if activation == "wide-1024" else 512)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
        assert (row["finished"], row["drawn"], row["note"]) == ("True", "True", "")
    with open(drawn / "results.csv") as file:
        header = file.readline()
    assert header.startswith(
        "algorithm,game,activation,seed,agent_steps,finished,final_return,normalized_score,human_normalized_score,"
        "dead_neurons,effective_rank,entropy_rank,dormant_neurons,"
    )


# --------------------------------------------------------------------------------------------- aggregates


def test_aggregates_by_hand():
    games = [np.array([0.0, 1, 2, 3]), np.array([10.0, 10, 10, 14])]
    # Means by game: 1.5 and 11. The middle four of all eight: 2, 3, 10, 10.
    assert plot_results.aggregates(*games).tolist() == [6.25, 6.25, 6.25]
    three = [np.array([0.0, 0]), np.array([1.0, 1]), np.array([8.0, 8])]
    # Sorted 0 0 1 1 8 8: a quarter of six, rounded down, is cut at each end.
    assert plot_results.aggregates(*three).tolist() == [3.0, 1.0, 2.5]


def test_probability_of_improvement_by_hand_and_by_mann_whitney():
    x, y = [np.array([1.0, 3.0])], [np.array([2.0, 3.0])]
    # 1 loses to both, 3 beats 2 and ties with 3: 1.5 of 4.
    assert plot_results.probability_of_improvement(*x, *y) == pytest.approx(0.375)
    rng = np.random.default_rng(3)
    xs, ys = [rng.integers(0, 6, 5).astype(float) for _ in range(3)], [rng.integers(0, 6, 4) * 1.0 for _ in range(3)]
    u = [stats.mannwhitneyu(a, b).statistic / 20 for a, b in zip(xs, ys, strict=True)]
    assert plot_results.probability_of_improvement(*xs, *ys) == pytest.approx(np.mean(u))


def test_interval_resamples_within_games():
    """Games that differ much, seeds that do not: an interval that mixed games would be wide."""
    low, high = plot_results.interval(plot_results.aggregates, [np.full(5, 1.0), np.full(5, 100.0)])
    np.testing.assert_array_equal(low, high)
    assert low[0] == 50.5


def test_no_interval_from_a_single_run():
    low, high = plot_results.interval(plot_results.aggregates, [np.array([1.0]), np.array([1.0, 2.0])])
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_intervals_cover_the_truth_as_often_as_they_can(monkeypatch):
    """Means of 5 seeds in 6 games: resampling has 4/5 of the variance, so 95 % become 92 %."""
    monkeypatch.setattr(plot_results, "RESAMPLES", 500)
    rng = np.random.default_rng(4)
    centre = np.arange(6.0)
    covered = []
    for _ in range(400):
        low, high = plot_results.interval(plot_results.aggregates, list(rng.normal(centre[:, None], 1, (6, 5))))
        covered.append((low < 2.5) & (high > 2.5))
    mean, median, iqm = np.mean(covered, axis=0)
    expected = 2 * stats.norm.cdf(1.96 * np.sqrt(4 / 5)) - 1
    assert mean == pytest.approx(expected, abs=0.045)
    assert min(median, iqm) > 0.85


def test_the_interval_of_an_improvement_covers_the_truth(monkeypatch):
    """Normal scores one standard deviation better than ReLU's are better with probability Phi(1 / sqrt(2)) = 0.76.

    Would catch: runs drawn over the games' borders, X and Y in each other's place.
    """
    monkeypatch.setattr(plot_results, "RESAMPLES", 500)
    rng = np.random.default_rng(5)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = []
    for _ in range(300):
        games = list(rng.normal(1 + 3 * np.arange(6.0)[:, None], 1, (6, 5)))
        baseline = list(rng.normal(3 * np.arange(6.0)[:, None], 1, (6, 5)))
        low, high = plot_results.interval(plot_results.probability_of_improvement, games + baseline)
        covered.append(low < truth < high)
    assert 0.85 < np.mean(covered) < 0.98


# --------------------------------------------------------------------- what is left out, missing or mixed


def test_what_is_left_out_is_named_listed_and_counted(tmp_path, runs_dir, capsys):
    for seed in (1, 2, 3):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
        make_run(runs_dir, "dqn", "Pong", "tanh", seed, finished=seed != 2, stop=1 if seed != 2 else 0.5)
    make_run(runs_dir, "dqn", "Pong", "sigmoid", 1, agent_steps=50_000)
    make_run(runs_dir, "dqn", "Pong", "relu", 3, exp_name="again")
    make_run(runs_dir, "dqn", "Breakout", "tanh", 1, learning_rate=3e-4)
    (make_run(runs_dir, "dqn", "Pong", "selu", 4) / "config.json").write_text("{")
    (runs_dir / "empty").mkdir()
    (runs_dir / "other_program").mkdir()
    (runs_dir / "other_program" / "config.json").write_text('{"args": 3}')
    (runs_dir / "infinite").mkdir()
    config = '{"algorithm": "dqn", "args": {"env_id": "PongNoFrameskip-v4", "activation": "relu", "seed": Infinity}}'
    (runs_dir / "infinite" / "config.json").write_text(config)
    (runs_dir / "notes.txt").write_text("mine")
    draw(runs_dir, tmp_path / "out", "tables")
    told = capsys.readouterr().err.splitlines()
    for expected in (
        "3 folders are no runs: empty, infinite, other_program",
        "left out, algorithm unknown selu, 1 run(s), config.json is missing or unreadable: Pong 4",
        "left out, dqn tanh, 1 run(s), unfinished: Pong 2 at 50,000",
        "left out, dqn sigmoid, 1 run(s), other length than the usual 100,000 agent steps: Pong 1 at 50,000",
        "missing, dqn relu, 1 run(s) that others have: Breakout 1",
        "mixed, dqn runs differ in --learning-rate: 0.0001 in 5 run(s); "
        "0.0003 in 1 run(s) (BreakoutNoFrameskip-v4__dqn_atari_lan__tanh__1)",
        "no normalised score, dqn Breakout: no finished ReLU baseline",
    ):
        assert any(line.startswith(expected) for line in told), (expected, told)
    assert sum("same seed" in line for line in told) == 1
    found = rows(tmp_path / "out")
    assert len(found) == 10
    unfinished = found["PongNoFrameskip-v4__dqn_atari_lan__tanh__2"]
    assert (unfinished["finished"], unfinished["agent_steps"]) == ("False", "50000")
    assert (unfinished["drawn"], unfinished["note"]) == ("False", "unfinished")
    assert found["BreakoutNoFrameskip-v4__dqn_atari_lan__tanh__1"]["normalized_score"] == ""
    twins = [found[f"PongNoFrameskip-v4__{name}__relu__3"]["drawn"] for name in ("again", "dqn_atari_lan")]
    assert sorted(twins) == ["False", "True"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| DQN | Tanh | 3 | 1 | 0 |" in table
    assert "| DQN | ReLU | 3 | 1 | 1 |" in table


@pytest.mark.parametrize("allow_unfinished", [False, True])
def test_a_try_of_another_length_does_not_replace_the_studys_run(tmp_path, runs_dir, allow_unfinished):
    """Would catch: the longer of two experiments chosen, and then left out for its length, or a finished quick try."""
    for activation in ("relu", "tanh", "tanh-lan"):
        make_run(runs_dir, "dqn", "Pong", activation, 1, finished=not allow_unfinished, stop=0.8)
    make_run(runs_dir, "dqn", "Pong", "tanh", 1, agent_steps=200_000, exp_name="longer")
    make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, agent_steps=2_000, games=6, exp_name="quickstart")
    draw(runs_dir, tmp_path / "out", "tables", allow_unfinished=allow_unfinished)
    found = rows(tmp_path / "out")
    drawn = {name.split("__", 1)[1] for name, row in found.items() if row["drawn"] == "True"}
    assert drawn == {"dqn_atari_lan__relu__1", "dqn_atari_lan__tanh__1", "dqn_atari_lan__tanh-lan__1"}
    for name in ("longer__tanh", "quickstart__tanh-lan"):
        note = found[f"PongNoFrameskip-v4__{name}__1"]["note"]
        assert note == f"same seed as PongNoFrameskip-v4__dqn_atari_lan__{name.split('__')[1]}__1"


def test_many_unfinished_runs_do_not_flood_the_terminal(tmp_path, runs_dir, capsys):
    for seed in range(40):
        make_run(runs_dir, "dqn", "Pong", "relu", seed, games=3, measurements=2, finished=False)
    draw(runs_dir, tmp_path / "out", "tables")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "--allow-unfinished" in told[1]


def test_allow_unfinished_ends_a_curve_with_its_shortest_seed(runs_dir, tmp_path):
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "relu", 2, finished=False, stop=0.6)
    make_run(runs_dir, "dqn", "Pong", "tanh", 1)
    study = read_study(runs_dir, tmp_path, allow_unfinished=True)
    figure, lacking = plot_results.draw_panels(study, plot_results.FIGURES["fig01_dqn_relu_tanh"])
    relu, tanh = figure.axes[0].get_lines()
    assert relu.get_xdata()[np.isfinite(relu.get_ydata())].max() == pytest.approx(0.6 * STEPS)
    assert np.isfinite(tanh.get_ydata()[-1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ReLU, 2 runs", "Tanh, 1 run"]
    assert lacking == []


def test_a_truncated_run_is_not_drawn_as_a_whole_one(tmp_path, runs_dir, capsys):
    """It has a model.pt, but its curve ends early."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "relu", 2)
    file = event_file(make_run(runs_dir, "dqn", "Pong", "relu", 3))
    file.write_bytes(file.read_bytes()[:10_000])
    draw(runs_dir, tmp_path / "out", "tables")
    told = capsys.readouterr().err
    assert "left out, dqn relu, 1 run(s), other length than the usual 100,000 agent steps: Pong 3 at" in told
    assert re.search(r"damaged, PongNoFrameskip.*relu__3: .* the last \d+ bytes are truncated or damaged", told)


# -------------------------------------------------------------------------------------------------- cache


def test_cache_is_used_refreshed_and_rebuilt(tmp_path, runs_dir, capsys, monkeypatch):
    folders = [make_run(runs_dir, "dqn", "Pong", "relu", seed) for seed in (1, 2)]
    read = []
    original = plot_results.read_events
    monkeypatch.setattr(plot_results, "read_events", lambda files: read.append(files[0].parent) or original(files))

    def read_all():
        read.clear()
        return [plot_results.read_run(folder, tmp_path / folder.name) for folder in folders], len(read)

    first, count = read_all()
    assert count == 2
    again, count = read_all()
    assert count == 0
    assert [{tag: p.tolist() for tag, p in run[0].items()} for run in first] == [
        {tag: p.tolist() for tag, p in run[0].items()} for run in again
    ]
    write_events(folders[1] / "events.out.tfevents.1800000000", [("charts/episodic_return", STEPS + 5, 1.0)])
    changed, count = read_all()
    assert (count, changed[1][1]) == (1, STEPS + 5)
    (tmp_path / folders[0].name).write_bytes(b"PK\x03\x04 no more")
    _, count = read_all()
    assert (count, read) == (1, [folders[0]])
    monkeypatch.setattr(plot_results, "CACHE_FORMAT", -1)
    assert read_all()[1] == 2


# ------------------------------------------------------------------------------------------------ figures


def test_dead_by_standard_deviation_stands_beside_dead_by_density(study, tmp_path):
    """Would catch: a figure of dead neurons that shows one count only."""
    read = read_study(study, tmp_path, allow_unfinished=False)
    figure, _ = plot_results.draw_dying(read, plot_results.FIGURES["fig13_dqn_dying_probability"])
    tops = [axes for axes in figure.axes if "without and with" in axes.get_title()]
    for axes, base in zip(tops, plot_results.LAN_LAWS, strict=True):
        dotted = [line.get_ydata()[-1] for line in axes.get_lines() if line.get_linewidth() == 1.0]
        true = [
            np.mean([true_measurement("std_dead_neurons", f"{base}{lan}", seed, 1) for seed in (1, 2)])
            for lan in ("", "-lan")
        ]
        assert dotted == pytest.approx(true, abs=1e-6)


def test_every_figure_is_drawn(drawn):
    for name in plot_results.FIGURES:
        assert (drawn / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (drawn / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    numbers = [name.split("_")[0].removeprefix("fig") for name in plot_results.FIGURES]
    assert " ".join(numbers) == "01 04 05a 05b 06a 06b 07 08a 08b 10 11 13 14 15 16 17"


def test_figures_sh_redraws_each_figure():
    """One line per figure, under the name that it has."""
    text = (ROOT / "scripts" / "figures.sh").read_text()
    assert re.findall(r"^draw (fig\S+)", text, re.M) == list(plot_results.FIGURES)


def test_activations_differ_for_every_eye():
    """No two share a colour, and those of one figure no dashes either."""
    assert len({colour for _, colour, _ in plot_results.STYLES.values()}) == len(plot_results.STYLES)
    for name, plot in plot_results.FIGURES.items():
        if plot.quantities and plot.draw is plot_results.draw_panels:
            looks = [(plot_results.STYLES[a][2], plot_results.STYLES[a][1]) for a in plot.activations]
            dashes = [dash for dash, _ in looks]
            # ReLU and the LaN, black and vermilion, are solid both.
            assert len(set(dashes)) >= len(dashes) - 1, name


def test_densities_peak_where_the_metric_says():
    """A saturated neuron's peak is thinner than any even grid."""
    rng = np.random.default_rng(5)
    saturated = np.append(np.full(2000, 1.0), np.linspace(-1, 1, 48))
    with_outliers = np.append(np.zeros(2046), [-0.6, 1.0])
    neurons = np.stack([rng.normal(0, 1, 2048), np.full(2048, -1.0), saturated, with_outliers], axis=1)
    jittered = neurons + np.sqrt(1e-5) * np.random.default_rng(6).standard_normal((2048, 1))
    expected = metrics.kde_peak_density(torch.tensor(jittered), noise_variance=0)
    found = [plot_results.density(neuron, np.random.default_rng(6))[1].max() for neuron in neurons.T]
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_damaged_activations_are_missing_not_a_traceback(tmp_path, runs_dir, capsys):
    folder = make_run(runs_dir, "dqn", "Breakout", "tanh", 1)
    (folder / "activations.npz").write_bytes(b"PK\x03\x04")
    draw(runs_dir, tmp_path / "out", "fig04")
    assert "not drawn, no Tanh run on Breakout with a whole activations.npz" in capsys.readouterr().err


def test_a_single_run_without_baseline_still_gives_curves(tmp_path, runs_dir, capsys):
    """As the quickstart's: its game, dead neurons and rank; no normalised score, and the reason."""
    make_run(runs_dir, "dqn", "Breakout", "tanh-lan", 1, exp_name="quickstart", finished=False, games=4)
    draw(runs_dir, tmp_path / "out", allow_unfinished=True)
    for name in ("fig06a_dqn_dead_neurons", "fig06b_dqn_effective_rank", "fig16_dqn_games"):
        assert (tmp_path / "out" / f"{name}.png").exists()
    assert not (tmp_path / "out" / "fig05a_dqn_normalized.png").exists()
    told = capsys.readouterr().err
    assert "no normalised score, dqn Breakout: no finished ReLU baseline" in told
    assert "not drawn, no run with a normalised score: fig01_dqn_relu_tanh, fig05a_dqn_normalized" in told
    assert "not drawn, no PPO run: fig08a_ppo_normalized, fig08b_ppo_effective_rank, fig17_ppo_games" in told


# --------------------------------------------------------------------------------------------- the command


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, runs_dir):
    for seed in (1, 2):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
    (tmp_path / "empty").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "out"
    for arguments, expected in (
        (["--runs-dir", tmp_path / "empty"], "holds no run; train first"),
        (["--runs-dir", tmp_path / "nowhere"], "No such file or directory"),
        (["--runs-dir", next(runs_dir.iterdir())], "name its parent"),
        (["--runs-dir", runs_dir, "--only", "fig99"], "fig05a_dqn_normalized"),
        (["--runs-dir", runs_dir, "--out-dir", tmp_path / "site"], "did not make"),
        (["--runs-dir", runs_dir, "--out-dir", tmp_path / "file"], "name a folder that can be written"),
        (["--runs-dir", runs_dir, "--out-dir", next(runs_dir.iterdir())], "is a run's folder"),
        (["--runs-dir", runs_dir, "--out-dir", "x" * 300], "name a folder that can be written"),
    ):
        done = run_script("plot_results.py", "--out-dir", out, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
    assert not out.exists()
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_ctrl_c_while_drawing_is_one_line(tmp_path, study):
    """Would catch: tracebacks of the worker processes, which a terminal interrupts too, or waiting for all figures."""
    command = [sys.executable, ROOT / "plot_results.py", "--runs-dir", study, "--out-dir", tmp_path / "out"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `&` around the tests would have ignored it
    )
    while not list((tmp_path / "out").glob("fig*.pdf")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted; every file is whole, run this again\n")
    assert len(list((tmp_path / "out").glob("fig*.png"))) < len(plot_results.FIGURES)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_workers_leave_ctrl_c_to_the_program():
    """Would catch: a worker's own traceback, at the moments when none of the program's code runs in it."""
    with plot_results.workers() as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_a_full_disk_is_named(tmp_path, runs_dir):
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    command = [sys.executable, ROOT / "plot_results.py", "--runs-dir", runs_dir, "--out-dir", tmp_path / "out"]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "-", *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: cannot use {tmp_path}/out/")
    assert "Traceback" not in done.stderr


def test_only_draws_what_was_asked_for(tmp_path, study):
    draw(study, tmp_path / "out", "fig01", "fig06b")
    names = {path.stem for path in (tmp_path / "out").glob("*.*") if path.is_file()}
    assert names == {"fig01_dqn_relu_tanh", "fig06b_dqn_effective_rank"}


def test_needs_no_torch():
    """torch and the training scripts would cost seconds at every start."""
    code = "import sys, plot_results; print(*({'torch', 'checkpoint', 'metrics', 'gymnasium'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0)


# --------------------------------------------------------------------------------------------------- page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, tmp_path, fragment=""):
    """The page's document after its scripts ran, and what the browser's console said."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": str(tmp_path)})
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_page_in_a_browser(drawn, tmp_path):
    """Moved elsewhere it is still whole; numbers sort as numbers; the console is silent."""
    page = tmp_path / "elsewhere.html"
    shutil.copy(drawn / "index.html", page)
    document, console = browse(page, tmp_path, "#sort=results:-6")
    assert console == []
    assert document.count("<img") == len(plot_results.FIGURES)
    assert 'aria-sort="descending"' in document
    body = document.split('<table id="results">')[1].split("<tbody>")[1].split("</tbody>")[0]
    shown = [float(re.findall(r"<td>(.*?)</td>", row)[6]) for row in body.split("</tr>") if "<td>" in row]
    assert shown == sorted((float(row["final_return"]) for row in rows(drawn).values()), reverse=True)


def test_page_is_self_contained(drawn):
    text = (drawn / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.findall(r"url\(|@import|https?://", text)
    for name in ("SUMMARY", "MESSAGES", "FIGURES", "TABLES"):
        assert f">{name}<" not in text
        assert f"\n{name}\n" not in text


def test_names_from_folders_are_harmless_on_the_page(tmp_path, runs_dir):
    make_run(runs_dir, "dqn", "Pong", "relu", 1, exp_name="<script>alert(1)<%2Fscript>", games=3, measurements=2)
    runs, _ = plot_results.find_runs(runs_dir, tmp_path)
    table = plot_results.Table("Runs", "", ["run"], [[run.name] for run in runs])
    page = plot_results.make_page({}, {"results": table}, [f"left out: {runs[0].name}"], "1 run")
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") == 2


def test_config_of_a_run_is_enough(runs_dir):
    """The folder's name is for people: what a run is stands in config.json."""
    folder = make_run(runs_dir, "ppo", "Pong", "relu", 1)
    folder.rename(runs_dir / "renamed")
    (run,), messages = plot_results.find_runs(runs_dir, runs_dir / "figures")
    assert (run.algorithm, run.game, run.activation, run.seed, run.finished) == ("ppo", "Pong", "relu", 1, True)
    assert messages == []
    assert json.loads((runs_dir / "renamed" / "config.json").read_text())["args"] == run.args
