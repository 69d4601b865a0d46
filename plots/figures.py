"""Every figure that is drawn of runs. One entry of FIGURES adds a figure; which runs it takes stands in `study.py`."""

import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MultipleLocator, PercentFormatter
from scipy import stats

from lan_utils import files, study
from lan_utils.study import RUNS_OF_FIGURES
from plots.events import LAYERS as OF_LAYERS
from plots.results import MOSTLY_CONSTANT, Results, equally_long, in_study_order, layers_of
from plots.statistics import LAST_GAMES, ByGame, Curves, curve_of_each_seed, line_and_band, normalized

DEAD_THRESHOLD = 20.0  # omega of Appendix B.1
KDE_NEURONS = 16  # of Fig. 4, 10 and 11
WIDTH = study.ACTIVATIONS["tanh"].width  # of the representation, for the right-hand axis of ranks
LAYERS = {"z": "$z$", "z_enc": "$z^{enc}$", "z_star": "$z^*$", "z_star2": "$z^{**}$"}  # as the paper writes them
LAYER_COLOURS = matplotlib.colormaps["Reds"].with_extremes(bad="#E8E8E8")  # 0 to 1, no value
FEW_GAMES = 3  # up to so many are drawn each, not their mean, in the study's figure
FEW_SEEDS = 4  # up to so many are drawn each, not as a band, where a figure says so

# Probability that a product of two neurons dies, each of which dies with probability p (paper, Table 1).
LAN_LAWS = {
    "tanh": ("$p^2$", lambda p: p**2),
    "sigmoid": ("$p$", lambda p: p),
    "relu": ("$2p - p^2$", lambda p: 2 * p - p**2),
}
SHARE, RANK, FREE = "share", "rank", "free"


class Axis(NamedTuple):
    """Of a quantity."""

    label: str
    kind: str = FREE  # SHARE: 0 to 1, in percent; RANK: from 0, on the right-hand side as a share of the width; FREE


AXES = {
    "score": Axis("return (last 100 games)"),
    "normalized_score": Axis("normalised score"),
    "human_normalized_score": Axis("human-normalised score"),
    "dead_neurons": Axis("dead neurons (KDE)", SHARE),
    "std_dead_neurons": Axis("dead neurons (std < 0.001)", SHARE),
    "dead_neurons_scaled": Axis("dead neurons (KDE, scaled)", SHARE),
    "dead_factors": Axis("dead neurons of the factors", SHARE),
    "effective_rank": Axis("effective rank", RANK),
    "effective_rank_centred": Axis("effective rank, centred", RANK),
}
# For matplotlib.style: its own defaults first, whatever the user's matplotlibrc says.
LOOK = (
    "default",
    {
        **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 8},
        **{"legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6},
        **{"lines.linewidth": 1.4, "legend.frameon": False, "legend.handlelength": 2.8, "legend.columnspacing": 1.2},
        **{"pdf.fonttype": 42, "savefig.dpi": 200},  # a PDF's text stays text
    },
)
BLACK, GREY, LIGHT = "#000000", "#666666", "#BBBBBB"
PUBLISHED_MARKERS = "<^vsD"
STD_DEAD, STD_DEAD_LABEL = {"linestyle": ":", "linewidth": 1.0}, "dead by std < 0.001"

SEED = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.45}  # of a single seed beside the mean

Drawing = tuple[Figure | None, list[str]]  # None where there is nothing to draw; and what is missing from it


class Drawn(NamedTuple):
    """A figure as it was written."""

    picture: bytes  # PNG; b"" where there was nothing to draw
    caption: str
    message: str  # what is missing from it; "" if nothing is


@dataclass(frozen=True)
class Plot:
    """A figure: how it is drawn, of which runs, and its caption."""

    draw: Callable[[Results, "Plot"], Drawing]
    caption: str
    runs: study.Needed
    quantities: tuple[str, ...] = ()  # one panel each
    each_seed: bool = False  # a thin line for each of up to FEW_SEEDS: a band hides that one run of three failed


def shown_activations(results: Results, plot: Plot) -> list[str]:
    """The figure's, and the same of other experiments; in one of the main set, also those that no figure of the paper
    shows, but the controls only where the figure is not the paper's either."""
    drawn = results.drawn
    found = set(drawn.loc[drawn["algorithm"] == plot.runs.algorithm, "activation"])
    shown = set(plot.runs.activations)
    if plot.runs.activations == study.MAIN:
        shown |= {study.split_group(name)[0] for name in found} - activations_of_study(plot.runs.algorithm)
        if plot.draw not in (draw_study, draw_layers):
            shown -= set(study.CONTROLS)
    others = in_study_order(name for name in found - set(plot.runs.activations) if study.split_group(name)[0] in shown)
    return [*plot.runs.activations, *others]


def activations_of_study(algorithm: str) -> set[str]:
    """Those that the paper's figures of it show; none for an algorithm that has no figure there."""
    paper = [runs for figure, runs in RUNS_OF_FIGURES.items() if figure[0].isdigit()]
    return {name for runs in paper if runs.algorithm == algorithm for name in runs.activations}


def axis_of(quantity: str) -> Axis:
    """Its entry in AXES; a free axis under its own name where it has none."""
    return AXES.get(quantity, Axis(quantity.replace("_", " ")))


def plain(text: str, longest: int = 32) -> str:
    """Text that matplotlib draws as it is: a dollar sign begins no formula, an underscore leaves no legend, and what is
    too long loses its middle."""
    half = longest // 2
    text = f" {text}" if text.startswith("_") else text
    return (text if len(text) <= longest else f"{text[:half]}…{text[1 - half :]}").replace("$", r"\$")


def label_of(activation: str) -> str:
    return plain(study.style(activation).label, longest=60)


def look_of(activation: str) -> dict[str, Any]:
    style = study.style(activation)
    return {"color": style.color, "linestyle": style.dashes}


def plural(runs: int) -> str:
    return f"{runs} run{'s' * (runs != 1)}"


# ------------------------------------------------------------------------------------------------ curves


def runs_of(curves: Curves, a_game: bool = False) -> str:
    """How many there are, in all or a game."""
    counts = list(map(len, curves.values()))
    if not a_game:
        return plural(sum(counts))
    fewest, most = min(counts), max(counts)
    return f"{plural(most) if fewest == most else f'{fewest} to {most} runs'} a game"


def possible(quantity: str) -> tuple[float, float]:
    """Lowest and highest value that it can have: a band ends there."""
    return {SHARE: (0.0, 1.0), RANK: (0.0, np.inf), FREE: (-np.inf, np.inf)}[axis_of(quantity).kind]


def draw_group(
    axes: Axes, grid: np.ndarray, curves: Curves, quantity: str, each_seed: bool = False, **style: Any
) -> None:
    """Line and band; or line and seeds, if they are few. Dashed lines lie on solid ones, which their gaps show."""
    line, band = line_and_band(curves)
    axes.plot(grid, line, **{"zorder": 2.0 if style.get("linestyle") == "-" else 2.2} | style)
    seeds = curve_of_each_seed(curves)
    if each_seed and 1 < len(seeds) <= FEW_SEEDS:
        for curve in seeds.values():
            axes.plot(grid, curve, **style | {"label": None, "zorder": 1.9} | SEED)
    elif band is not None:
        low, high = (np.clip(edge, *possible(quantity)) for edge in (line - band, line + band))
        axes.fill_between(grid, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_lines(
    axes: Axes,
    results: Results,
    plot: Plot,
    quantity: str,
    game: str | None = None,
    names: Sequence[str] | None = None,
    **style: Any,
) -> list[str]:
    """`draw_group` for each activation, of one game or of all; returns the activations that have no line.

    Args:
        names: the activations, if not those of `shown_activations`.
    """
    algorithm = plot.runs.algorithm
    names = shown_activations(results, plot) if names is None else names
    groups = {name: results.select_curves(algorithm, name, quantity) for name in names}
    games = {found for curves in groups.values() for found in curves}
    missing = []
    for activation, curves in groups.items():
        drawn = {found: seeds for found, seeds in curves.items() if game in (None, found)}
        if not drawn or np.isnan(line_and_band(drawn)[0]).all():
            missing.append(activation)
            continue
        label = f"{label_of(activation)}, {runs_of(curves, a_game=game is not None and len(games) > 1)}"
        if len(curves) < len(games):
            label += f", {len(curves)} of {len(games)} games"
        look = look_of(activation) | {"label": label} | style
        draw_group(axes, results.grid(algorithm), drawn, quantity, plot.each_seed, **look)
    finish_axes(axes, results.lengths[algorithm], quantity)
    return missing


def finish_axes(axes: Axes, length: int, quantity: str) -> None:
    axes.set(xlim=(0, length), xlabel="agent steps", ylabel=axis_of(quantity).label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.locator_params(axis="x", nbins=5)
    kind = axis_of(quantity).kind
    if kind == SHARE:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif kind == RANK:
        axes.set_ylim(bottom=0)
        share = axes.secondary_yaxis("right", functions=(lambda rank: rank / WIDTH, lambda share: share * WIDTH))
        share.set_ylabel(f"rank / {WIDTH}")
        share.spines["right"].set_visible(True)


def add_legend(figure: Figure | SubFigure, more: Sequence[Line2D] = ()) -> None:
    """Of all panels, below them: in as many columns as the figure's width holds; a figure grows by what needs more than
    two rows."""
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    entries |= {line.get_label(): line for line in more}
    for columns in range(len(entries), 0, -1):
        legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    if isinstance(figure, Figure):
        figure.set_figheight(figure.get_figheight() + max(0.0, legend.get_window_extent().height / figure.dpi - 0.5))


def draw_panels(results: Results, plot: Plot, games: Sequence[str | None] = (None,)) -> Drawing:
    """One panel per quantity, side by side, in a row for each of these games or in one for all, with one legend."""
    rows, panels = len(games), len(plot.quantities)
    width = 2.6 if panels < 4 else 2.3
    figure = Figure((3.4, 2.9) if panels == 1 else (width * panels, 0.5 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, panels, squeeze=False)
    missing: dict[tuple[str | None, str], list[str]] = {}
    shown = shown_activations(results, plot)
    dotted = []
    for (row, game), (column, quantity) in itertools.product(enumerate(games), enumerate(plot.quantities)):
        axes = grid[row, column]
        missing[game, quantity] = draw_lines(axes, results, plot, quantity, game)
        if quantity == "dead_neurons" and "std_dead_neurons" not in plot.quantities:
            draw_lines(axes, results, plot, "std_dead_neurons", game, label=None, **STD_DEAD)
            dotted = [Line2D([], [], color=GREY, label=STD_DEAD_LABEL, **STD_DEAD)]
            axes.set_ylabel(axis_of(quantity).label)
        if game:
            axes.set_title(plain(game))
        if row < rows - 1:
            axes.set_xlabel("")
    if all(len(names) == len(shown) for names in missing.values()):
        return None, [f"no run with a {' or '.join(axis_of(quantity).label for quantity in plot.quantities)}"]
    add_legend(figure, dotted)
    return figure, [
        what + (f" in {game}" if rows > 1 else "")
        for game in games
        for name in shown
        for what in what_is_missing(name, [q for q in plot.quantities if name in missing[game, q]], panels)
    ]


def what_is_missing(activation: str, quantities: Sequence[str], panels: int) -> list[str]:
    """An activation without a line in these of a row's panels: in all of them, or in some."""
    if len(quantities) == panels:
        return [f"no {label_of(activation)}"]
    return [f"no line of {label_of(activation)} for {axis_of(quantity).label}" for quantity in quantities]


def games_of(results: Results, algorithm: str) -> list[str]:
    drawn = results.drawn
    return sorted(set(drawn.loc[drawn["algorithm"] == algorithm, "game"]))


def draw_study(results: Results, plot: Plot) -> Drawing:
    """`draw_panels` of what there is, few seeds each; few games each, with the return as it is, or else their mean."""
    algorithm = plot.runs.algorithm
    games = games_of(results, algorithm)
    few = len(games) <= FEW_GAMES
    quantities = ["score" if few else plot.quantities[0], *plot.quantities[1:]]
    shown = shown_activations(results, plot)
    kept = [name for name in quantities if any(results.select_curves(algorithm, each, name) for each in shown)]
    if not kept:
        return None, [f"no run with a {' or '.join(axis_of(quantity).label for quantity in quantities)}"]
    panels = replace(plot, quantities=tuple(kept), each_seed=True)
    figure, missing = draw_panels(results, panels, games if few else (None,))
    return figure, missing + [f"no {axis_of(quantity).label}" for quantity in quantities if quantity not in kept]


def published_of(results: Results, algorithm: str, game: str) -> list[study.Published]:
    """What to mark in a game's panel: nothing where the axis is not of a full-length training."""
    if not equally_long(results.lengths[algorithm], study.FULL_LENGTH):
        return []
    return [other for other in study.read_published_scores() if (other.algorithm, other.game) == (algorithm, game)]


def mark_published(axes: Axes, results: Results, algorithm: str, game: str) -> list[Line2D]:
    """Published scores of ReLU at the right edge; returns the legend's entries."""
    sources = sorted({other.source_name for other in study.read_published_scores()})
    entries = []
    for other in published_of(results, algorithm, game):
        marker = PUBLISHED_MARKERS[sources.index(other.source_name)]
        look = {"marker": marker, "linestyle": "", "color": GREY, "markersize": 3.5, "clip_on": False, "zorder": 3}
        axes.plot(results.lengths[algorithm], other.mean, **look)
        entries.append(Line2D([], [], **look, label=f"ReLU, {other.source_name}"))
    return entries


def draw_games(results: Results, plot: Plot) -> Drawing:
    """Every game on its own: the score as it is."""
    shown = shown_activations(results, plot)
    games = sorted({game for name in shown for game in results.select_curves(plot.runs.algorithm, name, "score")})
    if not games:
        return None, ["no run with a score"]
    columns = min(len(games), 4)
    rows = -(-len(games) // columns)
    figure = Figure((max(3.4, 1.9 * columns), max(2.9, 1.6 * rows + 0.6)), layout="constrained")
    missing, published = [], []
    for place, game in enumerate(games):
        axes = figure.add_subplot(rows, columns, place + 1)
        missing += [f"no {label_of(name)} in {game}" for name in draw_lines(axes, results, plot, "score", game)]
        axes.set_title(plain(game))
        axes.locator_params(axis="x", nbins=4 if columns > 1 else 5)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("agent steps" if place + columns >= len(games) else "")
        axes.set_ylabel("" if place % columns else "return")
        published += mark_published(axes, results, plot.runs.algorithm, game)
    add_legend(figure, published)
    return figure, missing


def draw_algorithms(results: Results, plot: Plot) -> Drawing:
    """A row for each game that several algorithms have, a panel for each algorithm, all on the same axes; of the
    activations those that several algorithms have."""
    algorithms = list(results.lengths)
    common = sorted(game for game, n in Counter(g for a in algorithms for g in games_of(results, a)).items() if n > 1)
    if not common:
        return None, ["no game of several algorithms"]
    drawn = results.drawn[results.drawn["game"].isin(common)]
    several = drawn.groupby("activation")["algorithm"].nunique() > 1
    shown = in_study_order(several[several].index)
    if not shown:
        return None, ["no activation of several algorithms"]
    size = max(3.4, 2.3 * len(algorithms)), 0.5 + 2.1 * len(common)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(common), len(algorithms), squeeze=False, sharex=True, sharey="row")
    missing = []
    for (row, game), (column, algorithm) in itertools.product(enumerate(common), enumerate(algorithms)):
        axes = grid[row, column]
        of_one = replace(plot, runs=study.Needed(algorithm, tuple(shown)), each_seed=True)
        lacking = draw_lines(axes, results, of_one, "score", game, shown, label=None)
        missing += [f"no {algorithm.upper()} {label_of(name)} in {game}" for name in lacking]
        axes.set(title=plain(f"{algorithm.upper()}, {game}"), xlim=(0, max(results.lengths.values())))
        axes.set_ylabel("" if column else axis_of("score").label)
        axes.set_xlabel("agent steps" if row == len(common) - 1 else "")
    add_legend(figure, [Line2D([], [], **look_of(name), label=label_of(name)) for name in shown])
    return figure, missing


# ------------------------------------------------------------------------------------------------ layers


def draw_layers(results: Results, plot: Plot) -> Drawing:
    """Where networks die: `draw_stack` of each activation, in a row for each game."""
    algorithm = plot.runs.algorithm
    stacks: dict[tuple[str, str], dict[str, dict[int, np.ndarray]]] = {}  # by game and activation: layers of seeds
    shown = shown_activations(results, plot)
    for name in shown:
        for layer in layers_of(results.quantities(algorithm, name)):
            for game, seeds in results.select_curves(algorithm, name, f"{OF_LAYERS}{layer}/constant").items():
                stacks.setdefault((game, name), {})[layer] = seeds
    if not stacks:
        return None, ["no run that measured every layer"]
    games = sorted({game for game, _ in stacks})
    names = [name for name in shown if any((game, name) in stacks for game in games)]
    tallest = max(map(len, stacks.values()))
    width = max(1.95, *(0.065 * len(f"{label_of(name)}, 5 runs") for name in names))
    height = 0.6 + len(games) * (0.6 + 0.27 * tallest)
    figure = Figure((max(3.4, width * len(names)), height), layout="constrained")
    grid = figure.subplots(len(games), len(names), squeeze=False)
    missing = [f"no {label_of(name)}" for name in shown if name not in names]
    for (row, game), (column, name) in itertools.product(enumerate(games), enumerate(names)):
        axes, stack = grid[row, column], stacks.get((game, name))
        if stack is None:
            axes.set_axis_off()
            missing.append(f"no {label_of(name)} in {game}")
            continue
        title = f"{label_of(name)}, {plural(max(map(len, stack.values())))}"
        draw_stack(
            axes, results.grid(algorithm), stack, tallest, f"{plain(game)}\n{title}" if len(games) > 1 else title
        )
        if row < len(games) - 1:
            axes.set_xlabel("")
    add_scale(figure, list(grid.flat))
    return figure, missing


def draw_stack(axes: Axes, steps: np.ndarray, stack: dict[str, dict[int, np.ndarray]], height: int, title: str) -> None:
    """The layers of a network on top of each other, its input below, and in each a strip for each seed, whose colour is
    the share of constant units.

    Args:
        steps: (points,) agent steps, equally far apart.
        stack: by layer, in network order, and seed: (points,), NaN where there is no value.
        height: in layers, of the axes.
    """
    for place, seeds in enumerate(stack.values()):
        strips = np.stack([seeds[seed] for seed in sorted(seeds, reverse=True)])
        extent = (steps[0], steps[-1], place + 0.06, place + 0.94)
        look = {"cmap": LAYER_COLOURS, "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
        axes.imshow(strips, extent=extent, origin="lower", **look)
        edges = np.linspace(*extent[2:], len(strips) + 1)[1:-1]
        axes.hlines(edges, *extent[:2], color="white", linewidth=0.6)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, height), xlabel="agent steps")
    axes.set_title(title, y=len(stack) / height)
    axes.set_yticks(np.arange(len(stack)) + 0.5, [LAYERS.get(layer, plain(layer)) for layer in stack])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.locator_params(axis="x", nbins=3)


def add_scale(figure: Figure | SubFigure, panels: Sequence[Axes]) -> None:
    """The colours of `draw_stack`, beside the panels."""
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), LAYER_COLOURS)
    two_inches = {"shrink": min(1.0, 2 * figure.dpi / figure.bbox.height), "anchor": (0.0, 1.0), "aspect": 20}
    bar = figure.colorbar(colours, ax=panels, format=PercentFormatter(1, decimals=0), pad=0.01, **two_inches)
    bar.set_label("constant units")
    bar.outline.set_visible(False)


# ---------------------------------------------------------------------------------------------- controls


def draw_controls(results: Results, plot: Plot) -> Drawing:
    """The end of the training: a row for each activation, the controls below the others, with its number of parameters
    and a panel for each quantity."""
    algorithm, panels = plot.runs.algorithm, len(plot.quantities)
    found = set(results.drawn.loc[results.drawn["algorithm"] == algorithm, "activation"])
    known = shown_activations(results, plot)
    known += sorted(name for name in found - set(known) if name.partition("+conv-")[0] in known)
    rows = sorted((name for name in known if name in found), key=is_control)
    if not any(map(is_control, rows)):
        return None, [NO_CONTROL]
    missing = [f"no {label_of(name)}" for name in plot.runs.activations if name not in found]
    figure = Figure((1.5 * panels + 3.2, 0.8 + 0.2 * len(rows)), layout="constrained")
    counts, *others = figure.subplots(1, 1 + panels, sharey=True, width_ratios=[0.6] + [1] * panels)
    for place, name in enumerate(rows):
        parameters = parameters_of(results, algorithm, name)
        counts.barh(place, parameters, height=0.6, color="#DDDDDD")
        counts.text(0.0, place, f" {parameters / 1e6:.2f} M" if parameters else " ?", va="center", fontsize=6)
        for axes, quantity in zip(others, plot.quantities, strict=True):
            values = results.final_values(algorithm, name, quantity)
            if values:
                draw_row(axes, place, name, quantity, values)
            else:
                missing.append(f"no {axis_of(quantity).label} of {label_of(name)}")
    counts.set_yticks(
        range(len(rows)), [f"{label_of(name)}, {runs_at_the_end(results, algorithm, name)}" for name in rows]
    )
    counts.set(xlabel="parameters", xticks=[], ylim=(len(rows) - 0.5, -0.5))
    for axes, quantity in zip(others, plot.quantities, strict=True):
        axes.set_xlabel(axis_of(quantity).label)
        if axis_of(quantity).kind == SHARE:
            axes.set_xlim(-0.04, 1.04)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_xlim(left=0)
    counts.grid(False)
    for axes in (counts, *others):
        axes.tick_params(axis="y", length=0)
        axes.axhline(sum(not is_control(name) for name in rows) - 0.5, color=GREY, linewidth=0.8)
    return figure, missing


def draw_row(axes: Axes, place: int, name: str, quantity: str, values: ByGame) -> None:
    """A dot for each seed, the mean over its games, and a line at the mean of all; of a rank, the layer's width."""
    color = look_of(name)["color"]
    if axis_of(quantity).kind == RANK:
        width = study.style(name).width
        axes.plot([0, width], [place, place], color=LIGHT, linewidth=0.8, zorder=1)
        axes.plot(width, place, "|", color=GREY, markersize=6, zorder=1)
    seeds = list(curve_of_each_seed(values).values())
    axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=3.5, alpha=0.6, markeredgewidth=0)
    mean = line_and_band(values)[0]
    axes.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=1.6)


def is_control(group: str) -> bool:
    """Whether its activation is one, or its convolutions are no ReLUs."""
    return study.split_group(group)[0] in study.CONTROLS or "+conv-" in group


def runs_at_the_end(results: Results, algorithm: str, name: str) -> str:
    drawn = results.drawn
    return plural(int(((drawn["algorithm"] == algorithm) & (drawn["activation"] == name)).sum()))


def parameters_of(results: Results, algorithm: str, name: str) -> float:
    """Of the network, mean over runs: games differ in their number of actions. 0 where no run says it."""
    drawn = results.drawn
    runs = drawn.loc[(drawn["algorithm"] == algorithm) & (drawn["activation"] == name), "run"]
    counts = [files.read_json(results.folders[algorithm, run] / "config.json").get("parameters") for run in runs]
    return float(np.mean([count for count in counts if isinstance(count, int)] or [0]))


# --------------------------------------------------------------------------------------------- densities


def density(activations: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A neuron's kernel density estimate (paper, Appendix B.1): jitter of variance 1e-5, Scott's rule.

    Args:
        activations: (n,), finite.

    Returns:
        Activations, ascending, and the density there.
    """
    samples = activations + np.sqrt(1e-5) * rng.standard_normal(len(activations))
    kde = stats.gaussian_kde(samples)  # its default bandwidth is Scott's rule
    reach = 3 * np.sqrt(kde.covariance[0, 0])
    even = np.linspace(samples.min() - reach, samples.max() + reach, 150)
    # Quantiles find a peak that is narrower than the steps of any even grid.
    x = np.union1d(even, np.quantile(samples, np.linspace(0, 1, 75)))
    return x, kde(x)


FACTOR_STYLES = {"z_enc": ("#7A3500", "-"), "z_star": ("#F2A366", (0, (4, 1)))}


def read_sample(folder: Path, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """{layer: (n, neurons) float64} of a run's activations.npz.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or another program's.
    """
    file = folder / "activations.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            sample = {layer: arrays[layer].astype(float) for layer in layers}
    except OSError:
        raise
    except Exception as error:  # zip files fail in many ways
        raise ValueError(f"{file.name} cannot be read ({str(error).split(chr(10))[0]})") from None
    for layer, values in sample.items():
        if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
            raise ValueError(f"{file.name}: {layer} is no matrix of activations")
    return sample


def read_activations(
    results: Results, runs: study.Needed, activation: str, layers: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """{layer: (n, neurons)} of the lowest seed's run that has a whole activations.npz, {} without one; and what was
    wrong with the others'."""
    drawn = results.drawn
    wanted = (drawn["algorithm"] == runs.algorithm) & (drawn["activation"] == activation)
    wanted &= drawn["game"].isin(runs.games)
    problems = []
    for name in drawn[wanted].sort_values("seed")["run"]:
        try:
            sample = read_sample(results.folders[runs.algorithm, name], layers)
            return {layer: values[:, :KDE_NEURONS] for layer, values in sample.items()}, problems
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {getattr(error, 'strerror', None) or error}")
    return {}, problems


def draw_densities(results: Results, plot: Plot) -> Drawing:
    """Blocks of 4 x 4 neurons; a quantity names the activation and the layers of a block."""
    blocks, missing = [], []
    for activation, *layers in map(str.split, plot.quantities):
        sample, problems = read_activations(results, plot.runs, activation, layers)
        if sample:
            blocks.append((activation, sample))
        else:
            missing.append(f"no {label_of(activation)} run on {plot.runs.games[0]} with a whole activations.npz")
        missing += problems
    missing = list(dict.fromkeys(missing))
    if not blocks:
        return None, missing
    columns = 2 if len(blocks) == 4 else len(blocks)
    rows = -(-len(blocks) // columns)
    figure = Figure((2.4 * columns, 2.7 * rows))
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    for part, (activation, sample) in zip(parts, blocks, strict=True):
        draw_block(part, activation, sample)
    return figure, missing


def draw_block(part: SubFigure, activation: str, sample: dict[str, np.ndarray]) -> None:
    """4 x 4 cells, drawn into one pair of axes: sixteen of them would be slow."""
    everything = np.concatenate([layer.ravel() for layer in sample.values()])
    low, high, ticks = {"tanh": (-1.25, 1.25, (-1, 0, 1)), "sigmoid": (-0.15, 1.15, (0, 1))}.get(
        activation.split("-")[0], (everything.min() - 0.1, everything.max() + 0.1, (0,))
    )
    pitch, height = 1.12, 0.72  # of the cells, which are 1 x 1; of a peak
    axes = part.add_axes((0.04, 0.1, 0.92, 0.82))
    axes.set(xlim=(-0.05, 3 * pitch + 1.05), ylim=(-0.15, 3 * pitch + 1.05))
    axes.set_axis_off()
    for neuron in range(KDE_NEURONS):
        left, bottom = pitch * (neuron % 4), pitch * (3 - neuron // 4)
        dead = []
        for layer, values in sample.items():
            if neuron >= values.shape[1]:
                continue
            x, f = density(values[:, neuron], np.random.default_rng(neuron))
            dead.append(f.max() >= DEAD_THRESHOLD)
            colour, dashes = FACTOR_STYLES.get(layer, (study.style(activation).color, "-"))
            shown = (low <= x) & (x <= high)
            x, f = left + (x[shown] - low) / (high - low), bottom + height * f[shown] / f.max()
            axes.plot(x, f, color=colour, linestyle=dashes, linewidth=0.9)
            if not dead[-1]:
                axes.fill_between(x, bottom, f, color=colour, alpha=0.18, linewidth=0)
        if dead and all(dead):
            axes.fill_between([left, left + 1], bottom, bottom + 1, color="#F3EAEA", linewidth=0, zorder=0)
        axes.plot([left, left, left + 1], [bottom + 1, bottom, bottom], color=BLACK, linewidth=0.8)
        axes.text(left + 0.04, bottom + 0.97, str(neuron + 1), va="top", fontsize=5, color=GREY)
        if any(dead):
            word = "dead" if all(dead) else "one dead"
            axes.text(left + 0.98, bottom + 0.97, word, va="top", ha="right", fontsize=5, color="#A00000")
        for tick in ticks if bottom == 0 else ():
            place = left + (tick - low) / (high - low)
            axes.plot([place, place], [-0.03, 0], color=BLACK, linewidth=0.8)
            axes.text(place, -0.05, f"{tick}".replace("-", "\u2212"), va="top", ha="center", fontsize=5.5)
    part.suptitle(f"{label_of(activation)}: {' and '.join(LAYERS[layer] for layer in sample)}", y=0.98)
    if len(sample) > 1:
        styles = {LAYERS[layer]: FACTOR_STYLES[layer] for layer in sample}
        handles = [Line2D([], [], color=style[0], linestyle=style[1], label=label) for label, style in styles.items()]
        part.legend(handles=handles, loc="lower center", ncols=2, borderaxespad=0)


def draw_dying(results: Results, plot: Plot) -> Drawing:
    """For each f: dead neurons over training without and with a LaN, and below it the law of Table 1."""
    groups = {name: results.select_curves(plot.runs.algorithm, name, "dead_neurons") for name in plot.runs.activations}
    missing = [f"no {label_of(name)}" for name, curves in groups.items() if not curves]
    if len(missing) == len(groups):
        return None, ["no run with dead neurons"]
    grid = results.grid(plot.runs.algorithm)
    figure = Figure((6.9, 4.6), layout="constrained")
    handles = []
    for column, (base, (formula, law)) in enumerate(LAN_LAWS.items()):
        lan = f"{base}-lan"
        factors = results.select_curves(plot.runs.algorithm, lan, "dead_factors")
        top, bottom = figure.add_subplot(2, 3, column + 1), figure.add_subplot(2, 3, column + 4)
        for activation in (base, lan):
            look = look_of(activation)
            if curves := groups[activation]:
                draw_group(top, grid, curves, "dead_neurons", **look)
                label = f"{label_of(activation)}, {runs_of(curves)}"
                handles.append(Line2D([], [], **look, label=label))
            if curves := results.select_curves(plot.runs.algorithm, activation, "std_dead_neurons"):
                draw_group(top, grid, curves, "std_dead_neurons", color=look["color"], **STD_DEAD)
        if factors:
            draw_group(top, grid, factors, "dead_factors", color=LIGHT, linestyle="-", zorder=1, linewidth=2.4)
        finish_axes(top, results.lengths[plot.runs.algorithm], "dead_neurons")
        top.set_title(f"{label_of(base)} without and with a LaN")

        p = np.linspace(0, 1, 101)
        bottom.plot(p, p, color=LIGHT, linewidth=0.8, linestyle="--")
        bottom.plot(p, law(p), color=BLACK, linewidth=1.0)
        bottom.set_title(f"predicted: {formula}")
        colour = study.style(lan).color
        if not factors:
            bottom.text(0.97, 0.04, f"no run of {label_of(lan)}", ha="right", color=GREY, fontsize=7)
        for game, seeds in factors.items():
            for seed, factor in seeds.items():
                z = groups[lan].get(game, {}).get(seed)
                measured = np.flatnonzero(np.isfinite(factor + z)) if z is not None else []
                if len(measured):
                    last = measured[-1]
                    bottom.plot(factor[measured[::25]], z[measured[::25]], ".", markersize=1.5, color=colour, alpha=0.3)
                    dot = {"color": colour, "markersize": 3.5, "markeredgewidth": 0.5}
                    bottom.plot(factor[last], z[last], "o", markeredgecolor="white", **dot)
                    single = groups[base].get(game, {}).get(seed)
                    if single is not None:
                        bottom.plot(single[last], z[last], "s", fillstyle="none", **dot)
        bottom.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="dead without product, $p$", ylabel="dead neurons of $z$"
        )
        for axis in (bottom.xaxis, bottom.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_major_locator(MultipleLocator(0.25))
        if column:
            top.set_ylabel("")
            bottom.set_ylabel("")
    handles += [
        Line2D([], [], color=GREY, label=STD_DEAD_LABEL, **STD_DEAD),
        Line2D([], [], color=LIGHT, linewidth=2.4, label="the LaN's factors, mean"),
        Line2D([], [], color=BLACK, linewidth=1.0, label="predicted (Table 1)"),
        Line2D([], [], color=GREY, marker="o", linestyle="", markersize=3.5, label="$p$ of the LaN's factors"),
        Line2D(
            [], [], color=GREY, marker="s", linestyle="", markersize=3.5, fillstyle="none", label="$p$ without a LaN"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure, missing


BAND = (
    "Line: mean over games and seeds; band: standard deviation, over the seeds that every game has, of the mean over "
    "games."
)
EXTREMES = (
    "0 and 1 are the lowest and highest value of ReLU's seed-mean curve from the agent step on at which every seed has "
    f"ended {LAST_GAMES} games"
)
SCORE = f"Scores are the mean of the last {LAST_GAMES} games; {EXTREMES}."
RANKS = "Effective rank (99 % of the singular values' sum) of z; right-hand axis: as a share of the 512 neurons."
CENTRED = "Left: of z as it is, as in the paper; right: of z minus each neuron's mean."
GAME_SCORE = f"Mean return of the last {LAST_GAMES} games. Line and band: mean and standard deviation over seeds."
DENSITY = (
    f"Kernel densities of neurons 1 to {KDE_NEURONS} after training DQN on {RUNS_OF_FIGURES['4'].games[0]} (lowest "
    f"seed), each scaled to its own peak; dead: the peak reaches {DEAD_THRESHOLD:.0f}."
)
STUDY = (
    f"A row for each game; of more than {FEW_GAMES} one row of all, with the return normalised by ReLU's. "
    f"From left to right: mean return of the last {LAST_GAMES} games; dead neurons of z by the paper's kernel density, "
    "which mistakes small activations for dead neurons; constant neurons, by a standard deviation below 0.001; "
    "effective rank of z minus each neuron's mean, and as a share of 512 (the paper's, of z as it is: "
    "Figures 6b and 8b). "
    f"Up to {FEW_SEEDS} seeds are a thin line each, without a band. {BAND}"
)
STUDY_QUANTITIES = ("normalized_score", "dead_neurons", "std_dead_neurons", "effective_rank_centred")
WHERE = (
    "Where networks die: the share of each layer's units that are constant (standard deviation over the observations "
    "below 0.001; of a channel, at every position). The network's input is below, its representation z on top; the "
    "factors of a LaN stand below their product. A layer has a strip for each seed, the lowest seed on top; grey: not "
    "measured. A layer above a dark one can only be constant too. Observations that hardly differ, as those of random "
    "play, make a z constant that nobody has trained yet."
)
CONTROLS = (
    "Is it the product, the activation or the parameters? At the end of the training; the controls are below the line. "
    "From left to right: parameters of the network, mean over runs; effective rank (99 % of the singular values' sum) "
    "of z as it is and of z minus each neuron's mean, grey up to the layer's width; dead neurons of z by the paper's "
    "kernel density, which mistakes small activations for dead neurons, and by a standard deviation below 0.001. A dot "
    "is a seed that every game has, the mean over its games; a line is the mean over games of the mean over seeds."
)
ALGORITHMS = (
    f"The algorithms side by side, on the same axes: mean return of the last {LAST_GAMES} games over the agent steps, "
    "of the activations that several of them have. "
    f"Each axis is as long as the longest training. Up to {FEW_SEEDS} seeds are a thin line each, without a band."
)
NO_CONTROL = "no run of a control"
CONTROL_QUANTITIES = ("effective_rank", "effective_rank_centred", "dead_neurons", "std_dead_neurons")
RANK_QUANTITIES = ("effective_rank", "effective_rank_centred")
NORMALIZED = ("normalized_score",)

# One entry adds a figure; its name is its file's. `study.RUNS_OF_FIGURES` says of which runs.
FIGURES = {
    "study_dqn": Plot(draw_study, f"DQN: return, dead neurons, rank. {STUDY}", RUNS_OF_FIGURES["5a"], STUDY_QUANTITIES),
    "study_ppo": Plot(draw_study, f"PPO: return, dead neurons, rank. {STUDY}", RUNS_OF_FIGURES["8"], STUDY_QUANTITIES),
    "layers_dqn": Plot(draw_layers, f"DQN. {WHERE}", RUNS_OF_FIGURES["5a"]),
    "layers_ppo": Plot(draw_layers, f"PPO. {WHERE}", RUNS_OF_FIGURES["8"]),
    "fig01_dqn_relu_tanh": Plot(
        draw_panels,
        f"DQN with a ReLU or a tanh representation. {SCORE} {BAND}",
        RUNS_OF_FIGURES["1"],
        NORMALIZED,
    ),
    "fig04_dqn_densities": Plot(
        draw_densities,
        f"Representation z without and with a LaN. {DENSITY}",
        RUNS_OF_FIGURES["4"],
        ("tanh z", "tanh-lan z"),
    ),
    "fig05a_dqn_normalized": Plot(draw_panels, f"DQN. {SCORE} {BAND}", RUNS_OF_FIGURES["5a"], NORMALIZED),
    "fig05b_dqn_ablations": Plot(
        draw_panels,
        f"DQN against layer normalisation and twice the width. {SCORE} {BAND}",
        RUNS_OF_FIGURES["5b"],
        NORMALIZED,
    ),
    "fig06a_dqn_dead_neurons": Plot(
        draw_panels,
        "Dead neurons of z while DQN trains: by the paper's kernel density (left), which depends on the activation's "
        "scale; by a standard deviation below 0.001 (middle); and by the kernel density after dividing z by the "
        "layer's typical standard deviation (right). That last count has no value where more than "
        f"{100 * MOSTLY_CONSTANT:.0f} % of a run's z is constant; where one run has none, nor has the line. {BAND}",
        RUNS_OF_FIGURES["6"],
        ("dead_neurons", "std_dead_neurons", "dead_neurons_scaled"),
    ),
    "fig06b_dqn_effective_rank": Plot(
        draw_panels, f"DQN. {RANKS} {CENTRED} {BAND}", RUNS_OF_FIGURES["6"], RANK_QUANTITIES
    ),
    "fig07_dqn_variants": Plot(
        draw_panels,
        f"DQN with SELU, a sum of two tanh layers (+LaN) and a product of three (2×LaN). {SCORE} {BAND}",  # noqa: RUF001
        RUNS_OF_FIGURES["7"],
        NORMALIZED,
    ),
    "fig08a_ppo_normalized": Plot(draw_panels, f"PPO. {SCORE} {BAND}", RUNS_OF_FIGURES["8"], NORMALIZED),
    "fig08b_ppo_effective_rank": Plot(
        draw_panels, f"PPO. {RANKS} {CENTRED} {BAND}", RUNS_OF_FIGURES["8"], RANK_QUANTITIES
    ),
    "fig10_dqn_factor_densities": Plot(
        draw_densities,
        f"The factors of a LaN, their product, and tanh without a LaN. {DENSITY}",
        RUNS_OF_FIGURES["10"],
        ("tanh-lan z_enc z_star", "tanh-lan z", "tanh z"),
    ),
    "fig11_dqn_sigmoid_densities": Plot(
        draw_densities,
        f"Representation z of tanh and sigmoid, without and with a LaN. {DENSITY}",
        RUNS_OF_FIGURES["11"],
        ("tanh z", "tanh-lan z", "sigmoid z", "sigmoid-lan z"),
    ),
    "fig13_dqn_dying_probability": Plot(
        draw_dying,
        "What a LaN does to dying neurons in trained networks (kernel density). Top: dead neurons while DQN trains, "
        "of a single layer, of a LaN and of its factors (dotted: by standard deviation). Bottom: dead neurons of the "
        "LaN against those of its factors (small dots: during training, large dots: after it) and of the same seed's "
        "single layer after training (squares); line: Table 1, of independent neurons; dashed: no change. A product of "
        "two small numbers is smaller still, and this count takes small activations for dead ones: what lies above the "
        "line need not have died.",
        RUNS_OF_FIGURES["13"],
    ),
    "fig14_dqn_relu_lan": Plot(
        draw_panels,
        f"DQN with ReLU, without and with a LaN: score, dead neurons, effective rank. {SCORE} {BAND}",
        RUNS_OF_FIGURES["14"],
        ("normalized_score", "dead_neurons", "effective_rank"),
    ),
    "fig15_dqn_human_normalized": Plot(
        draw_panels,
        f"DQN; 0 and 1 are a random and a human player's score in each game. {BAND}",
        RUNS_OF_FIGURES["15"],
        ("human_normalized_score",),
    ),
    "fig16_dqn_games": Plot(draw_games, f"DQN in every game. {GAME_SCORE}", RUNS_OF_FIGURES["16"]),
    "fig17_ppo_games": Plot(draw_games, f"PPO in every game. {GAME_SCORE}", RUNS_OF_FIGURES["17"]),
    "controls_dqn": Plot(draw_controls, f"DQN. {CONTROLS}", RUNS_OF_FIGURES["controls-dqn"], CONTROL_QUANTITIES),
    "controls_ppo": Plot(draw_controls, f"PPO. {CONTROLS}", RUNS_OF_FIGURES["controls-ppo"], CONTROL_QUANTITIES),
}


def figures_of(algorithms: Sequence[str]) -> dict[str, Plot]:
    """FIGURES, four of every algorithm that has none there, and one of several algorithms."""
    figures = dict(FIGURES)
    if len(algorithms) > 1:
        figures["algorithms"] = Plot(draw_algorithms, ALGORITHMS, study.Needed(""))
    for algorithm in algorithms:
        if activations_of_study(algorithm):
            continue
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", algorithm)[:60]
        while f"study_{name}" in figures:  # of another algorithm, whose name differs in what no file's name may hold
            name += "-"
        runs, shown = study.Needed(algorithm), algorithm.upper()
        figures[f"study_{name}"] = Plot(
            draw_study, f"{shown}: return, dead neurons, rank. {STUDY}", runs, STUDY_QUANTITIES
        )
        figures[f"layers_{name}"] = Plot(draw_layers, f"{shown}. {WHERE}", runs)
        figures[f"games_{name}"] = Plot(draw_games, f"{shown} in every game. {GAME_SCORE}", runs)
        runs = study.Needed(algorithm, RUNS_OF_FIGURES["controls-dqn"].activations)
        figures[f"controls_{name}"] = Plot(draw_controls, f"{shown}. {CONTROLS}", runs, CONTROL_QUANTITIES)
    return figures


def about_normalization(results: Results, plot: Plot) -> list[str]:
    """Sentences for the caption of a figure that shows normalised scores: what a random player's would be, and where
    the whole of ReLU's curve made the scale."""
    algorithm = plot.runs.algorithm
    few = plot.draw is draw_study and len(games_of(results, algorithm)) <= FEW_GAMES  # shows returns
    if "normalized_score" not in plot.quantities or few:
        return []
    found = {
        game
        for name in shown_activations(results, plot)
        for game in results.select_curves(algorithm, name, "normalized_score")
    }
    scales = {game: results.scales[algorithm, game] for game in sorted(found)}
    random = {game: low for game, (low, _) in study.read_atari_scores().items()}
    scores = [
        f"{normalized(random[game], scale[:2]):.2f} in {game}" for game, scale in scales.items() if game in random
    ]
    early = [game for game, scale in scales.items() if scale.since is None]
    sentences = [f"Of the normalised return {EXTREMES}."] if plot.draw is draw_study else []
    sentences += [f"A random player would score {' and '.join(scores)}."] if scores else []
    if early:
        sentences.append(f"In {', '.join(early)} no such agent step was reached: 0 and 1 are of ReLU's whole curve.")
    return sentences


def about_published(results: Results, plot: Plot) -> list[str]:
    """A sentence for the caption of a figure of games that marks published scores."""
    algorithm = plot.runs.algorithm
    if plot.draw is not draw_games or not any(
        published_of(results, algorithm, game) for game in games_of(results, algorithm)
    ):
        return []
    return [f"Marks at the right edge: scores that others report for ReLU ({study.PUBLISHED_SCORES.name})."]


def about_unfinished(results: Results, plot: Plot) -> list[str]:
    """A sentence for the caption of a figure that shows runs which have not finished."""
    drawn = results.drawn
    if plot.draw is draw_densities:  # of one run of each activation
        return []
    if plot.draw is not draw_algorithms:
        of_algorithm = drawn["algorithm"] == plot.runs.algorithm
        shown = shown_activations(results, plot)
        if plot.draw is draw_layers:
            shown = [name for name in shown if layers_of(results.quantities(plot.runs.algorithm, name))]
        drawn = drawn[of_algorithm & drawn["activation"].isin(shown)]
    unfinished = int((~drawn["finished"]).sum())
    return [f"Of {plural(len(drawn))} {unfinished} unfinished."] if unfinished else []


def draw(results: Results, name: str, plot: Plot, out_dir: Path) -> Drawn:
    """Write a figure as <name>.png and <name>.pdf.

    Raises:
        OSError: a file cannot be written.
    """
    if plot.draw is not draw_algorithms and plot.runs.algorithm not in results.lengths:
        return Drawn(b"", "", f"not drawn, no {plot.runs.algorithm.upper()} run")
    with matplotlib.style.context(LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a game's name in a script that the font lacks
        figure, missing = plot.draw(results, plot)
        if figure is None:
            return Drawn(b"", "", f"not drawn, {', '.join(missing)}")
        if engine := figure.get_layout_engine():
            engine.execute(figure)
            figure.set_layout_engine("none")  # laid out once, for both files
        for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata)
            files.replace(out_dir / f"{name}.{suffix}", lambda file, picture=buffer: file.write(picture.getbuffer()))
    caption = [plot.caption, *about_normalization(results, plot), *about_published(results, plot)]
    caption += about_unfinished(results, plot)
    if not missing:
        return Drawn(buffer.getvalue(), " ".join(caption), "")
    caption.append(f"Missing here: {'; '.join(what.removeprefix('no ') for what in missing)}.")
    return Drawn(buffer.getvalue(), " ".join(caption), f"drawn in part, {', '.join(missing)}")
