"""experiments/regression.py against networks written out by hand, and numbers that are known."""

import csv
import math
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, run_script
from torch import nn

sys.path.insert(0, str(ROOT / "experiments"))
import regression


def test_target_is_the_papers_function():
    """Would catch: a swapped amplitude or frequency."""
    assert regression.target(torch.tensor(0.0)) == 5.0
    x = 0.3
    expected = 10 * math.sin(2.1) + 15 * math.sin(3.0) + 5 * math.cos(1.5)
    assert regression.target(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ReLU", 200 + 200 + 200 + 1),
        ("tanh", 601),
        ("tanh-LaN", 2 * (100 + 100) + 100 + 1),
        ("deep ReLU", 2 * 200 + 2 * (200 * 200 + 200) + 201),
        ("deep tanh", 81_001),
    ],
)
def test_parameter_counts(name, expected):
    """Would catch: a LaN as wide as the others, a missing hidden layer or bias."""
    networks = regression.Networks(name, range(3))
    assert sum(p.numel() for p in networks.parameters()) == 3 * expected
    assert regression.NETWORKS[name][3] == expected


@pytest.mark.parametrize("name", list(regression.NETWORKS))
def test_each_seed_is_an_ordinary_network(name):
    """Would catch: transposed weights, a sum instead of Eq. 2's product, seeds that share an initialisation."""
    networks = regression.Networks(name, range(2))
    f, widths, parallel, _ = regression.NETWORKS[name]
    x = torch.linspace(-1, 1, 7)[:, None]
    outputs = networks(x.repeat(2, 1, 1))
    for seed in range(2):
        torch.manual_seed(seed)
        hidden = x
        inputs = 1
        for width in widths:
            factors = [nn.Linear(inputs, width) for _ in range(parallel)]
            hidden = torch.stack([f(factor(hidden)) for factor in factors]).prod(dim=0)
            inputs = width
        torch.testing.assert_close(outputs[seed], nn.Linear(inputs, 1)(hidden))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("optimizer", list(regression.OPTIMIZERS))
@pytest.mark.parametrize("name", ["tanh-LaN", "deep ReLU"])
def test_a_seed_trains_as_if_alone(name, optimizer):
    """Would catch: a loss averaged over seeds, a gradient or a normalisation that crosses them."""
    together, _ = regression.train(name, 1, optimizer, range(4), (20,))
    alone, _ = regression.train(name, 1, optimizer, range(2, 3), (20,))
    np.testing.assert_allclose(together[:, 2:3], alone, rtol=1e-3)


def test_training_is_plain_full_batch_descent():
    """Would catch: a wrong learning rate, a batch, a loss that is not the mean, a step too many.

    The oracle is a loop over one nn.Module with autograd of its own."""
    lengths = (1, 100)
    errors, snapshots = regression.train("ReLU", 1, "SGD 1e-3", range(1), lengths)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 200), nn.ReLU(), nn.Linear(200, 1))
    x = torch.linspace(-1, 1, regression.TRAINING_POINTS)[:, None]
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    expected = []
    for _ in range(101):
        error = ((network(x) - regression.target(x)) ** 2).sum() / len(x)
        expected.append(error.item())
        gradients = torch.autograd.grad(error, list(network.parameters()))
        with torch.no_grad():
            for p, v, gradient in zip(network.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(gradient)
                p.sub_(1e-3 * v)
    np.testing.assert_allclose(errors[:, 0], expected, rtol=1e-4)
    assert [snapshots[length].error[0] for length in lengths] == [errors[1, 0], errors[100, 0]]


def test_a_snapshot_measures_every_hidden_layer():
    """Would catch: ranks of the wrong layer or axis, a fit that is not the network's."""
    _, snapshots = regression.train("deep tanh", 1, "Adam 1e-2", range(2), (5,))
    snapshot = snapshots[5]
    assert snapshot.ranks.shape == (2, 3)
    assert snapshot.fits.shape == (2, regression.DENSE_POINTS)
    y = regression.target(torch.linspace(-1, 1, regression.DENSE_POINTS)).numpy()
    np.testing.assert_allclose(snapshot.dense_error, ((snapshot.fits - y) ** 2).mean(axis=1), rtol=1e-5)
    # tanh(a x + b) of one input is nearly linear at first: few directions, far from 200.
    assert (snapshot.ranks[:, 0] >= 1).all()
    assert (snapshot.ranks[:, 0] < 12).all()


def test_intervals_and_verdicts():
    """Would catch: an interval over the wrong axis, a claim confirmed by overlap or by a diverged seed."""
    mean, low, high = regression.mean_and_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    # Of the 256 resamples the sum is 4 in one, 5 in four, 6 in ten: the 2.5 % quantile is 6 / 4.
    assert (mean, low, high) == (2.5, 1.5, 3.5)
    diverged = regression.mean_and_interval(np.array([1.0, np.inf]))
    assert np.isnan(diverged).all()
    assert regression.verdict((1, 0.5, 1.5), (2, 1.6, 3)) == "yes"
    assert regression.verdict((2, 1.6, 3), (1, 0.5, 1.5)) == "no"
    assert regression.verdict((1, 0.5, 1.7), (2, 1.6, 3)) == "open"
    assert regression.verdict((1, 0.5, 1.7), diverged) == "open"
    assert regression.median_over_seeds(np.array([1.0, 2.0, np.nan])) == 2.0


def test_recorded_numbers_are_the_whole_grid():
    """Would catch: a record that lacks settings or seeds, or that this code no longer produces."""
    with (ROOT / "results" / "regression.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    settings = len(regression.HALF_RANGES) * len(regression.OPTIMIZERS) * len(regression.LENGTHS)
    assert len(rows) == settings * len(regression.NETWORKS) * len(regression.SEEDS)
    _, snapshots = regression.train("tanh-LaN", 1, "Adam 1e-2", range(2), (500,))
    recorded = [
        float(row["error"])
        for row in rows
        if (row["half_range"], row["optimizer"], row["steps"], row["network"]) == ("1", "Adam 1e-2", "500", "tanh-LaN")
    ][:2]
    np.testing.assert_allclose(snapshots[500].error, recorded, rtol=0.2)  # rounding grows over 500 steps


@pytest.mark.slow
def test_a_bad_folder_is_refused_in_one_line(tmp_path):
    """Would catch: minutes of training before the folder turns out to be a file; a traceback."""
    file = tmp_path / "file"
    file.touch()
    done = run_script("experiments/regression.py", "--out-dir", file)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(file) in done.stderr
    assert "another folder" in done.stderr


@pytest.mark.slow
def test_small_grid_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Would catch: a report, table or figure that fails on a diverged seed; an axis without a name."""
    monkeypatch.setattr(regression, "LENGTHS", (2, 3))
    monkeypatch.setattr(regression, "SEEDS", range(3))
    results = {}
    for name in regression.NETWORKS:
        for half_range in regression.HALF_RANGES:
            for optimizer in regression.OPTIMIZERS:
                results[name, half_range, optimizer] = regression.train(
                    name, half_range, optimizer, regression.SEEDS, regression.LENGTHS
                )
    errors, snapshots = results["deep ReLU", 2, "SGD 1e-3"]
    errors[2:, 1] = np.nan
    snapshots[3].error[1] = np.nan
    for (name, half_range, _), (_, snapshots) in results.items():
        if name in ("ReLU", "tanh"):  # tanh has the higher rank on one range, the lower on the other
            for snapshot in snapshots.values():
                snapshot.ranks[:, 0] = 5 + ((name == "tanh") == (half_range == 1))
    text = regression.report(results)
    assert "| 6 yes, 6 no, 0 open |\n" in text
    assert "1 of 3 diverged" in text
    assert "nan" not in text
    (tmp_path / "figures").mkdir()
    regression.write_csv(results, tmp_path / "regression.csv")
    labels, save = {}, regression.save

    def note_labels(figure, out_dir, name):
        grid = figure.axes[0].get_gridspec()
        lowest = [ax.get_xlabel() for ax in figure.axes[-grid.ncols :]]
        leftmost = [ax.get_ylabel() for ax in figure.axes[:: grid.ncols]]
        labels[name] = set(lowest), set(leftmost)
        save(figure, out_dir, name)

    monkeypatch.setattr(regression, "save", note_labels)
    regression.draw_fits(results, tmp_path)
    regression.draw_errors(results, tmp_path)
    assert labels["regression_errors"] == ({"gradient steps"}, {"mean squared error"})
    assert labels["regression_fits"][0] == {"x"}
    assert all(label.endswith("y") for label in labels["regression_fits"][1])
    assert (tmp_path / "figures" / "regression_errors.png").stat().st_size > 10_000
    lines = (tmp_path / "regression.csv").read_text().splitlines()
    assert {line.count(",") for line in lines} == {10}


@pytest.mark.slow
def test_a_killed_worker_ends_it_in_one_line(tmp_path):
    """As the out-of-memory killer does it. Would catch: a pool that waits for ever for a worker that is gone."""
    command = [sys.executable, "experiments/regression.py", "--out-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = []
    while not workers:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.1)
    workers[0].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith("error: a worker process died")
    assert "Traceback" not in stderr
    assert not (tmp_path / "regression.csv").exists()
