"""How well do shallow and deep networks fit a wavy curve? (paper, Fig. 2 and 12)

python experiments/regression.py                 two and a half minutes on two CPU cores; replaces results/regression*

python experiments/regression.py --out-dir out   the same into another folder

The paper gives no range, optimizer, learning rate or length, so a small grid of them is trained with ten seeds each and
reported in full. Full batch, squared error, PyTorch's default initialisation.
"""

import csv
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from drawing import launch, plt, save, write_text
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

import metrics
from lan_utils import study
from plots.report import markdown_table

# f, width of each hidden layer, how many layers are multiplied (Eq. 2), and the paper's number of parameters.
NETWORKS = {
    "ReLU": (torch.relu, (200,), 1, 601),
    "tanh": (torch.tanh, (200,), 1, 601),
    "tanh-LaN": (torch.tanh, (100,), 2, 501),
    "deep ReLU": (torch.relu, (200, 200, 200), 1, 81_001),
    "deep tanh": (torch.tanh, (200, 200, 200), 1, 81_001),
}
STYLES = {
    "ReLU": (study.style("relu").color, "-"),
    "tanh": (study.style("tanh").color, "-"),
    "tanh-LaN": (study.style("tanh-lan").color, "-"),
    "deep ReLU": (study.style("relu").color, "--"),
    "deep tanh": (study.style("tanh").color, "--"),
}
HALF_RANGES = (1, 2)  # x in [-1, 1] and in [-2, 2]
OPTIMIZERS = {
    "Adam 1e-3": functools.partial(torch.optim.Adam, lr=1e-3, fused=True),
    "Adam 1e-2": functools.partial(torch.optim.Adam, lr=1e-2, fused=True),
    "SGD 1e-3": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
}
LENGTHS = (500, 1000, 2000)  # gradient steps
SEEDS = range(10)
SHOWN = ((1, "Adam 1e-3"), (2, "Adam 1e-2"))  # the settings whose fits are drawn
TRAINING_POINTS = 64  # evenly spaced over the range; on the wider one ten per period of sin(10x)
DENSE_POINTS = 400  # for the error between the training points, and for ranks up to 200

# What the paper says, as (lower error, higher error).
CLAIMS = (
    ("tanh-LaN", "tanh"),
    ("tanh-LaN", "ReLU"),
    ("tanh", "ReLU"),
    ("tanh-LaN", "deep ReLU"),
    ("tanh-LaN", "deep tanh"),
    ("deep ReLU", "deep tanh"),
)


def target(x: Tensor) -> Tensor:
    """The function to fit (paper, Fig. 2)."""
    return 10 * torch.sin(7 * x) + 15 * torch.sin(10 * x) + 5 * torch.cos(5 * x)


class Linear(nn.Module):
    """One `nn.Linear` per seed, side by side."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """(seeds, n, inputs) -> (seeds, n, outputs)."""
        return torch.baddbmm(self.bias, x, self.weight)


class Networks(nn.Module):
    """One network of `NETWORKS` per seed: hidden layers f(A1 x + B1), or for a LaN the product of two (Eq. 2)."""

    def __init__(self, name: str, seeds: range):
        super().__init__()
        self.f, widths, parallel, parameters = NETWORKS[name]
        of_each_seed = []
        for seed in seeds:
            torch.manual_seed(seed)
            shapes = [shape for shape in itertools.pairwise((1, *widths)) for _ in range(parallel)]
            layers = nn.ModuleList(nn.Linear(*shape) for shape in (*shapes, (widths[-1], 1)))
            assert sum(p.numel() for p in layers.parameters()) == parameters, name
            of_each_seed.append(layers)
        *hidden, self.output = (Linear(layers) for layers in zip(*of_each_seed, strict=True))
        self.hidden = nn.ModuleList(nn.ModuleList(hidden[i : i + parallel]) for i in range(0, len(hidden), parallel))

    def representations(self, x: Tensor) -> list[Tensor]:
        """(seeds, n, 1) -> the activations of each hidden layer, (seeds, n, width)."""
        layers = []
        for factors in self.hidden:
            x = functools.reduce(torch.mul, (self.f(factor(x)) for factor in factors))
            layers.append(x)
        return layers

    def forward(self, x: Tensor) -> Tensor:
        """(seeds, n, 1) -> (seeds, n, 1)."""
        return self.output(self.representations(x)[-1])


class Snapshot(NamedTuple):
    """What was measured after some number of gradient steps, one row per seed."""

    error: np.ndarray  # (seeds,) mean squared error on the training points
    dense_error: np.ndarray  # (seeds,) on the dense points
    ranks: np.ndarray  # (seeds, hidden layers) effective rank; 0 where the network diverged
    fits: np.ndarray  # (seeds, DENSE_POINTS)


def train(
    name: str, half_range: float, optimizer: str, seeds: range = SEEDS, lengths: tuple[int, ...] = LENGTHS
) -> tuple[np.ndarray, dict[int, Snapshot]]:
    """Train one network per seed, all at once; no seed's weights touch another's.

    Args:
        name, optimizer: of `NETWORKS`, `OPTIMIZERS`.
        half_range: x lies in [-half_range, half_range].
        lengths: gradient steps after which to measure, ascending; the last one ends the training.

    Returns:
        Mean squared errors on the training points before each step and after the last, (steps + 1, seeds), and the
        snapshots by length.
    """
    networks = Networks(name, seeds)
    x = torch.linspace(-half_range, half_range, TRAINING_POINTS)[:, None].repeat(len(seeds), 1, 1)
    y = target(x)
    stepper = OPTIMIZERS[optimizer](networks.parameters())
    errors, snapshots = [], {}
    for step in range(lengths[-1] + 1):
        error = (networks(x) - y).square().mean(dim=(1, 2))
        errors.append(error.detach())
        if step in lengths:
            snapshots[step] = measure(networks, half_range, error)
        stepper.zero_grad()
        error.sum().backward()  # each seed gets its own gradient: the other terms do not depend on its weights
        stepper.step()
    return torch.stack(errors).numpy(), snapshots


@torch.no_grad()
def measure(networks: Networks, half_range: float, error: Tensor) -> Snapshot:
    seeds = len(error)
    x = torch.linspace(-half_range, half_range, DENSE_POINTS)[:, None].repeat(seeds, 1, 1)
    layers = networks.representations(x)
    fits = networks.output(layers[-1])
    ranks = [[metrics.effective_rank(z) if z.isfinite().all() else 0 for z in layer] for layer in layers]
    dense_error = (fits - target(x)).square().mean(dim=(1, 2))
    return Snapshot(error.detach().numpy(), dense_error.numpy(), np.transpose(ranks), fits[..., 0].numpy())


def mean_and_interval(errors: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds, (seeds,), and its 95 % percentile bootstrap interval; NaN if a seed has diverged."""
    if not np.isfinite(errors).all():
        return (float("nan"),) * 3
    interval = stats.bootstrap((errors,), np.mean, method="percentile", rng=0).confidence_interval
    return float(errors.mean()), float(interval.low), float(interval.high)


def median_over_seeds(errors: np.ndarray) -> np.ndarray:
    """(..., seeds) -> (...); a seed that has diverged counts as infinitely bad."""
    return np.median(np.nan_to_num(errors, nan=np.inf, posinf=np.inf), axis=-1)


def verdict(better: tuple[float, float, float], worse: tuple[float, float, float]) -> str:
    """Whether the first error is lower: "yes" or "no" if the intervals are apart, "open" if they overlap or are NaN.

    Args:
        better, worse: mean, low and high as `mean_and_interval` returns them.
    """
    if better[2] < worse[1]:
        return "yes"
    return "no" if worse[2] < better[1] else "open"


# ------------------------------------------------------------------------------------------------ report


def interval_text(errors: np.ndarray) -> str:
    diverged = int((~np.isfinite(errors)).sum())
    if diverged:
        return f"{diverged} of {len(errors)} diverged"
    return "{:.3g} [{:.3g}, {:.3g}]".format(*mean_and_interval(errors))


def emphasise_lowest(texts: dict[str, str], values: dict[str, float]) -> list[str]:
    lowest = np.nanmin(list(values.values()))
    return [f"**{text}**" if values[name] == lowest else text for name, text in texts.items()]


def report(results: dict) -> str:
    """Every mean and interval of the grid, what they say about the paper's claims, and the ranks, as markdown."""
    error_rows, median_rows, dense_rows, claim_rows, rank_rows = [], [], [], [], []
    counts: dict[str, Counter] = defaultdict(Counter)
    for half_range, optimizer, length in itertools.product(HALF_RANGES, OPTIMIZERS, LENGTHS):
        setting = [f"[-{half_range}, {half_range}]", optimizer, str(length)]
        snapshots = {name: results[name, half_range, optimizer][1][length] for name in NETWORKS}

        intervals = {name: mean_and_interval(snapshot.error) for name, snapshot in snapshots.items()}
        texts = {name: interval_text(snapshot.error) for name, snapshot in snapshots.items()}
        error_rows.append(setting + emphasise_lowest(texts, {name: mean for name, (mean, _, _) in intervals.items()}))
        for rows, part in ((median_rows, "error"), (dense_rows, "dense_error")):
            medians = {name: median_over_seeds(getattr(snapshot, part)) for name, snapshot in snapshots.items()}
            rows.append(setting + emphasise_lowest({name: f"{m:.3g}" for name, m in medians.items()}, medians))

        verdicts = {f"{better} < {worse}": verdict(intervals[better], intervals[worse]) for better, worse in CLAIMS}
        relu_rank, tanh_rank = (mean_and_interval(snapshots[name].ranks[:, 0]) for name in ("ReLU", "tanh"))
        verdicts["rank of ReLU < rank of tanh"] = verdict(relu_rank, tanh_rank)
        for claim, said in verdicts.items():
            counts[claim][said] += 1
        claim_rows.append(setting + list(verdicts.values()))
        ranks = [snapshot.ranks.mean(axis=0) for snapshot in snapshots.values()]
        rank_rows.append(setting + [", ".join(f"{rank:.1f}" for rank in layers) for layers in ranks])
    total = [f"{n['yes']} yes, {n['no']} no, {n['open']} open" for n in counts.values()]

    grid = ["range of x", "optimizer", "steps"]
    names = [f"{name} ({parameters:,})" for name, (*_, parameters) in NETWORKS.items()]
    return "\n".join(
        [
            "# Regression of y = 10 sin(7x) + 15 sin(10x) + 5 cos(5x)\n",
            f"`python experiments/regression.py`; {len(SEEDS)} seeds, {TRAINING_POINTS} training points, full batch; "
            "SGD with momentum 0.9. Every run is in `regression.csv`.\n",
            "## Mean squared error on the training points\n",
            "Mean over seeds [95 % bootstrap interval]; bold: the lowest mean. In brackets the parameters.\n",
            markdown_table(grid + names, error_rows),
            "## Its median over seeds\n",
            "Where it is far below the mean, a few seeds got stuck or were caught in a spike.\n",
            markdown_table(grid + names, median_rows),
            f"## The same on {DENSE_POINTS} points, most of them between the training points\n",
            "Where it is far above the former, the network fits the points and not the function.\n",
            markdown_table(grid + names, dense_rows),
            "## Is the first one's mean error lower, as the paper says, and tanh's effective rank higher?\n",
            "yes or no: the intervals are apart. open: they overlap, or a seed diverged.\n",
            markdown_table(
                grid + list(counts),
                claim_rows + [["**all**", "", ""] + total],
            ),
            "## Effective rank of each hidden layer\n",
            f"Mean over seeds, of the activations on {DENSE_POINTS} points; first layer first.\n",
            markdown_table(grid + list(NETWORKS), rank_rows),
        ]
    )


def write_csv(results: dict, file: Path) -> None:
    """One row per network, setting, length and seed; a shallow network has only rank_1."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(
            ["half_range", "optimizer", "steps", "network", "parameters", "seed", "error", "dense_error"]
            + ["rank_1", "rank_2", "rank_3"]
        )
        for (name, half_range, optimizer), (_, snapshots) in results.items():
            for length, snapshot in snapshots.items():
                setting = (half_range, optimizer, length, name, NETWORKS[name][3])
                for seed, error, dense_error, ranks in zip(SEEDS, *snapshot[:3], strict=True):
                    padded = [*ranks, "", ""][:3]
                    writer.writerow((*setting, seed, f"{error:.6g}", f"{dense_error:.6g}", *padded))
    print(f"wrote {file}")


def draw_fits(results: dict, out_dir: Path) -> None:
    """Fig. 2: the function, and for each network the seed with the median error."""
    figure, rows = plt.subplots(len(SHOWN), len(NETWORKS), figsize=(11, 4.4), sharey=True, sharex="row")
    for axes, (half_range, optimizer) in zip(rows, SHOWN, strict=True):
        x = torch.linspace(-half_range, half_range, DENSE_POINTS)
        axes[0].set_ylabel(f"{optimizer}, {LENGTHS[-1]:,} steps\n\ny")
        for ax, name in zip(axes, NETWORKS, strict=True):
            snapshot = results[name, half_range, optimizer][1][LENGTHS[-1]]
            median = np.argsort(snapshot.error)[len(SEEDS) // 2]
            ax.plot(x, target(x), color="#b0b0b0", linewidth=3.2)
            ax.plot(x, snapshot.fits[median], color=STYLES[name][0], linewidth=1.2)
            ax.set_title(f"{name}, {NETWORKS[name][3]:,}\nerror {snapshot.error[median]:.2g}")
    for ax in rows[-1]:
        ax.set_xlabel("x")
    figure.suptitle("The function (grey), its fit by the seed with the median error, and the number of parameters")
    save(figure, out_dir, "regression_fits")


def draw_errors(results: dict, out_dir: Path) -> None:
    """Fig. 12: error over training, in every setting."""
    figure, rows = plt.subplots(
        len(HALF_RANGES), len(OPTIMIZERS), figsize=(11, 6), sharex=True, sharey=True, squeeze=False
    )
    for axes, half_range in zip(rows, HALF_RANGES, strict=True):
        axes[0].set_ylabel("mean squared error")
        for ax, optimizer in zip(axes, OPTIMIZERS, strict=True):
            ax.set_title(f"x in [-{half_range}, {half_range}], {optimizer}")
            for name, (color, style) in STYLES.items():
                errors = results[name, half_range, optimizer][0][::10]
                steps = np.arange(len(errors)) * 10
                ax.plot(steps, median_over_seeds(errors), style, color=color, label=f"{name}, {NETWORKS[name][3]:,}")
                errors = np.nan_to_num(errors, nan=1e9, posinf=1e9)
                ax.fill_between(steps, errors.min(axis=1), errors.max(axis=1), color=color, alpha=0.12, linewidth=0)
            ax.set_yscale("log")
            ax.set_ylim(1e-3, 300)
    for ax in rows[-1]:
        ax.set_xlabel("gradient steps")
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(NETWORKS),
        title=f"network, parameters (line: median of {len(SEEDS)} seeds; band: all of them)",
    )
    save(figure, out_dir, "regression_errors")


# -------------------------------------------------------------------------------------------------- main


def start_worker() -> None:
    torch.set_num_threads(1)  # one process per core; two threads in each would fight
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: they die with a killed parent


def train_task(task: tuple[str, float, str]) -> tuple:
    return task, train(*task)


def main(out_dir: Path) -> None:
    # The deep networks take longest: they come first, so that no core waits for the last one.
    tasks = sorted(itertools.product(NETWORKS, HALF_RANGES, OPTIMIZERS), key=lambda task: -NETWORKS[task[0]][3])
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    # Not a multiprocessing.Pool, which would wait for ever for a worker that was killed.
    with ProcessPoolExecutor(min(cores, len(tasks)), multiprocessing.get_context("spawn"), start_worker) as pool:
        trained = (training.result() for training in as_completed([pool.submit(train_task, task) for task in tasks]))
        done = dict(tqdm(trained, total=len(tasks), unit="training"))
    results = {task: done[task] for task in itertools.product(NETWORKS, HALF_RANGES, OPTIMIZERS)}
    text = report(results)
    write_csv(results, out_dir / "regression.csv")
    write_text(out_dir / "regression.md", text)
    draw_fits(results, out_dir)
    draw_errors(results, out_dir)
    print(text)


if __name__ == "__main__":
    launch(main, __doc__)
