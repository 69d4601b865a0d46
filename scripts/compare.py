"""A few runs side by side: what became of their neurons, in numbers and in one picture.

python scripts/compare.py RUN_FOLDER RUN_FOLDER --out compare.png
python scripts/compare.py runs/Breakout*__1 --exp-name dqn_atari_lan lr1e-4   (of two experiments, side by side)

The study's figures take many runs (`plot_results.py`); this is for two or three, finished or not. In the upper row a
column is a neuron and a row an observation of activations.npz, which a run writes when it finishes. The lowest row
shows which layer of the network died, and when.
"""

import itertools
import sys
import textwrap
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils import study
from lan_utils.checks import refuse_unless
from lan_utils.cli import BadInput, launch
from lan_utils.files import replace
from plots import figures, matplotlib
from plots.events import LAYERS, REPRESENTATION
from plots.figures import Axes, Figure, Line2D, SubFigure
from plots.results import (
    GRID_POINTS,
    MOSTLY_CONSTANT,
    RecordedRun,
    choose_experiments,
    finals_of,
    layers_of,
    most_constant,
    read_run,
)

OBSERVATIONS = 150  # rows of a map of neurons
CONTRAST = 2.0  # the darkest colour stands for this many of the layer's typical standard deviations
DEAD, CONSTANT = "dead_neurons_scaled", "std_dead_neurons"


@dataclass
class Args:
    """Compare a few runs: a table on the terminal, and one picture."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """the runs' folders"""
    exp_name: tuple[str, ...] = ()
    """of these folders, take the runs of these experiments only; those after the first under names of their own"""
    out: Path = Path("compare.png")
    """the picture, which is replaced where there is one"""


def read_measured_run(folder: Path) -> RecordedRun:
    """A run with its points.

    Raises:
        BadInput: it is no run's folder, or nothing was measured in it yet.
    """
    run = read_run(folder)
    if f"{REPRESENTATION}{CONSTANT}" not in run.points:
        raise BadInput(f"{folder} has no measurement of its neurons yet; train longer, or with --metrics-frequency")
    return run


def labels_of(runs: list[RecordedRun]) -> list[str]:
    """The activations; where two runs have the same, with what else differs, such as the seed."""
    labels = [figures.label_of(run.activation) for run in runs]
    for values in (
        [run.algorithm.upper() for run in runs],
        [run.game for run in runs],
        [run.exp_name for run in runs],
        [f"seed {run.seed}" for run in runs],
        [f"folder {place + 1}" for place in range(len(runs))],
    ):
        if len(set(labels)) < len(labels) and len(set(values)) > 1:
            labels = [f"{label}, {figures.plain(value)}" for label, value in zip(labels, values, strict=True)]
    return labels


# ------------------------------------------------------------------------------------------------- table


def table(runs: list[RecordedRun]) -> list[str]:
    """The newest measurement of each run, a line per quantity."""
    finals = [finals_of(run) for run in runs]
    widths = sorted({study.style(run.activation).width for run in runs})
    quantities = (
        ("neurons dead", DEAD, "{:.1%}", "the paper's count, after dividing z by its scale"),
        ("  as in the paper", "dead_neurons", "{:.1%}", "small activations count as dead even if they vary"),
        ("  constant", CONSTANT, "{:.1%}", "standard deviation below 0.001"),
        ("effective rank", "effective_rank", "{:.0f}", f"of {' or '.join(map(str, widths))}"),
        ("return", "final_return", "{:.2f}", "mean of the last 100 games"),
    )
    rows = [("", labels_of(runs), "")]
    for name, key, form, meaning in quantities:
        values = [form.format(final[key]) if key in final else "-" for final in finals]
        if key == DEAD and "-" in values:
            meaning += f"; none where over {100 * MOSTLY_CONSTANT:.0f} % are constant"
        rows.append((name, values, meaning))
    if any(worst := [most_constant(final) for final in finals]):
        values = [f"{found[0]} {found[1]:.1%}" if found else "-" for found in worst]
        rows.insert(4, ("  most constant", values, "the layer with most constant units, where it is not z"))
    if len({run.agent_steps for run in runs}) > 1 or not all(run.finished for run in runs):
        values = [f"{run.agent_steps:,}" for run in runs]
        rows.insert(1, ("agent steps", values, "so far" if not all(run.finished for run in runs) else ""))
    columns = [max(10, *map(len, values)) + 2 for values in zip(*(values for _, values, _ in rows), strict=True)]
    return [
        f"{name:17}{''.join(map(str.rjust, values, columns))}   {meaning}".rstrip() for name, values, meaning in rows
    ]


# ----------------------------------------------------------------------------------------------- picture


def read_z(folder: Path) -> np.ndarray | None:
    """z of activations.npz, (n, width); None where there is none that can be read."""
    try:
        return figures.read_sample(folder, ["z"])["z"]
    except (OSError, ValueError):
        return None


def draw_neurons(axes: Axes, z: np.ndarray, label: str) -> None:
    """z minus each neuron's mean in the layer's typical standard deviations, the neurons that vary most first."""
    z = z - z.mean(axis=0)
    z = z[:, np.argsort(-z.std(axis=0), kind="stable")]
    scale = z.std() or 1.0
    rows = np.linspace(0, len(z) - 1, min(OBSERVATIONS, len(z))).astype(int)
    axes.imshow(z[rows] / scale, cmap="RdBu_r", vmin=-CONTRAST, vmax=CONTRAST, aspect="auto", interpolation="nearest")
    axes.set(title=label, xlabel=f"{z.shape[1]} neurons, the most varied first", yticks=[])
    axes.grid(False)


def colors_of(runs: list[RecordedRun]) -> list[str]:
    """The activations' own; of several runs of one, each after the first has another."""
    colors: list[str] = []
    others = itertools.cycle(matplotlib.colormaps["tab10"].colors)
    for run in runs:
        own = matplotlib.colors.to_hex(study.style(run.activation).color)
        while own in colors and len(colors) < 10:
            own = matplotlib.colors.to_hex(next(others))
        colors.append(own)
    return colors


def draw_curve(axes: Axes, runs: list[RecordedRun], quantity: str, **style: object) -> None:
    for run, color in zip(runs, colors_of(runs), strict=True):
        points = run.points.get(f"{REPRESENTATION}{quantity}")
        if points is not None:
            look = figures.look_of(run.activation) | {"linestyle": "-", "color": color} | style
            axes.plot(points["step"], points["value"], **look)
    figures.finish_axes(axes, last_step(runs), quantity)


def draw(runs: list[RecordedRun]) -> Figure:
    """From above: the neurons of each run, dead neurons and rank over the training, every layer over the training."""
    labels, maps = labels_of(runs), [read_z(run.folder) for run in runs]
    stacks = [{layer: run.points[f"{LAYERS}{layer}/constant"] for layer in layers_of(run.points)} for run in runs]
    tallest = max(map(len, stacks))
    heights = {"curves": 2.5}
    if all(z is not None for z in maps):
        heights = {"neurons": 2.9} | heights
    if all(stacks):
        heights["layers"] = 0.9 + 0.27 * tallest
    figure = Figure((7.2, 0.4 + sum(heights.values())), layout="constrained")
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=list(heights.values()))[:, 0]
    parts = dict(zip(heights, rows, strict=True))
    if "neurons" in parts:
        draw_maps(parts["neurons"], runs, labels, maps)
    draw_curves(parts["curves"], runs, labels)
    if "layers" in parts:
        part = parts["layers"]
        part.suptitle("Where the network dies: each layer's constant units, its input below, z on top.")
        panels = part.subplots(1, len(runs), squeeze=False)[0]
        for axes, stack, label in zip(panels, stacks, labels, strict=True):
            grid = np.linspace(0, last_step(runs), GRID_POINTS)
            between = {"left": np.nan, "right": np.nan}
            curves = {
                layer: np.interp(grid, found["step"], found["value"], **between) for layer, found in stack.items()
            }
            stack = {layer: {0: curve} for layer, curve in curves.items()}
            figures.draw_stack(axes, grid, stack, tallest, wrapped(label, len(runs)))
            axes.locator_params(axis="x", nbins=5)
        figures.add_scale(part, list(panels))
    return figure


def wrapped(title: str, panels: int) -> str:
    """Broken into lines that are as long as one of so many panels is wide."""
    return "\n".join(textwrap.wrap(title, 90 // panels))


def last_step(runs: list[RecordedRun]) -> int:
    """Of any measurement."""
    return max(int(run.points[f"{REPRESENTATION}{CONSTANT}"]["step"][-1]) for run in runs)


def draw_maps(part: SubFigure, runs: list[RecordedRun], labels: list[str], maps: list[np.ndarray]) -> None:
    panels = part.subplots(1, len(runs), squeeze=False)[0]
    for i, (axes, run, z) in enumerate(zip(panels, runs, maps, strict=True)):
        finals = finals_of(run)
        dead = "nearly all neurons are constant"
        if DEAD in finals:
            dead = f"{finals[DEAD]:.0%} of the neurons are dead"
        draw_neurons(axes, z, f"{wrapped(labels[i], len(runs))}\n{dead}")
        axes.set_ylabel("observations" if i == 0 else "")
    part.suptitle(
        "A column is a neuron, a row an observation. Pale columns: the neuron hardly depends on what is seen."
    )


def draw_curves(part: SubFigure, runs: list[RecordedRun], labels: list[str]) -> None:
    left, right = part.subplots(1, 2)
    draw_curve(left, runs, DEAD)
    draw_curve(left, runs, CONSTANT, **figures.STD_DEAD)
    left.set_ylabel(figures.axis_of(DEAD).label)
    draw_curve(right, runs, "effective_rank")
    right.set_ylim(0, max(study.style(run.activation).width for run in runs))
    handles = [Line2D([], [], color=color, label=label) for color, label in zip(colors_of(runs), labels, strict=True)]
    handles.append(Line2D([], [], color=figures.GREY, label=figures.STD_DEAD_LABEL, **figures.STD_DEAD))
    figures.add_legend(part, handles)


def main(args: Args) -> None:
    if not args.folders:
        raise BadInput("name the folders of the runs to compare")
    refuse_unless(
        args.out.suffix.lower() == ".png", f"--out {args.out}: the picture is a PNG; give it a name that ends with .png"
    )
    runs = choose_experiments([read_measured_run(folder) for folder in args.folders], args.exp_name)
    print("\n".join(table(runs)))
    with matplotlib.style.context(figures.LOOK):
        buffer = BytesIO()
        draw(runs).savefig(buffer, format="png", metadata={"Software": None})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace(args.out, lambda file: file.write(buffer.getbuffer()))


if __name__ == "__main__":
    launch(main, Args)
