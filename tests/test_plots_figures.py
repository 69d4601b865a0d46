import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from plots_common import STEPS, draw, make_small_study, read_study, rows  # noqa: F401 (a fixture)
from synthetic_study import make_run, true_layer, true_measurement, write_events

import metrics
from lan_utils import study as facts
from plots import figures, report


def test_allow_unfinished_ends_a_curve_with_its_shortest_seed(runs_dir, tmp_path):
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "relu", 2, finished=False, stop=0.6)
    make_run(runs_dir, "dqn", "Pong", "tanh", 1)
    study = read_study(runs_dir, tmp_path, allow_unfinished=True)
    figure, missing = figures.draw_panels(study, figures.FIGURES["fig01_dqn_relu_tanh"])
    relu, tanh = figure.axes[0].get_lines()
    assert relu.get_xdata()[np.isfinite(relu.get_ydata())].max() == pytest.approx(0.6 * STEPS)
    assert np.isfinite(tanh.get_ydata()[-1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ReLU, 2 runs", "Tanh, 1 run"]
    assert missing == []


def test_dead_by_standard_deviation_stands_beside_dead_by_density(study, tmp_path):
    """Would catch: a figure of dead neurons that shows one count only."""
    read = read_study(study, tmp_path)
    figure, _ = figures.draw_dying(read, figures.FIGURES["fig13_dqn_dying_probability"])
    tops = [axes for axes in figure.axes if "without and with" in axes.get_title()]
    for axes, base in zip(tops, figures.LAN_LAWS, strict=True):
        dotted = [line.get_ydata()[-1] for line in axes.get_lines() if line.get_linewidth() == 1.0]
        true = [
            np.mean([true_measurement("std_dead_neurons", f"{base}{lan}", seed, 1) for seed in (1, 2)])
            for lan in ("", "-lan")
        ]
        assert dotted == pytest.approx(true, abs=1e-6)


def test_activations_differ_for_every_eye():
    """No two share a colour, and those of one figure no dashes either."""
    assert len({style.color for style in facts.ACTIVATIONS.values()}) == len(facts.ACTIVATIONS)
    for name, plot in figures.FIGURES.items():
        if plot.quantities and plot.draw is figures.draw_panels:
            dashes = [facts.style(activation).dashes for activation in plot.runs.activations]
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
    found = [figures.density(neuron, np.random.default_rng(6))[1].max() for neuron in neurons.T]
    np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.mark.slow
def test_a_single_run_without_baseline_still_gives_curves(tmp_path, runs_dir, capsys):
    """As the quickstart's: its game, dead neurons and rank; no normalised score, and the reason."""
    make_run(runs_dir, "dqn", "Breakout", "tanh-lan", 1, exp_name="quickstart", finished=False, games=4)
    draw(runs_dir, tmp_path / "out", allow_unfinished=True)
    for name in ("fig06a_dqn_dead_neurons", "fig06b_dqn_effective_rank", "fig16_dqn_games"):
        assert (tmp_path / "out" / f"{name}.png").exists()
    assert not (tmp_path / "out" / "fig05a_dqn_normalized.png").exists()
    messages = capsys.readouterr().err
    assert "no normalised score, dqn Breakout: no finished ReLU baseline" in messages
    assert "not drawn, no run with a normalised score: fig01_dqn_relu_tanh, fig05a_dqn_normalized" in messages
    of_ppo = "study_ppo, layers_ppo, fig08a_ppo_normalized, fig08b_ppo_effective_rank, fig17_ppo_games, controls_ppo"
    assert f"not drawn, no PPO run: {of_ppo}" in messages
    assert "control" not in messages.replace(of_ppo, "")
    draw(runs_dir, tmp_path / "out", "controls_dqn", allow_unfinished=True)
    assert "not drawn, no run of a control: controls_dqn\n" in capsys.readouterr().err


DAMAGED = {
    "truncated": lambda file: file.write_bytes(b"PK\x03\x04"),
    "without z": lambda file: np.savez(file, y=np.zeros((64, 16))),
    "no matrix": lambda file: np.savez(file, z=np.zeros(64)),
    "NaN": lambda file: np.savez(file, z=np.full((64, 16), np.nan)),
    "objects": lambda file: np.savez(file, z=np.array([{}])),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_activations_are_named_and_do_not_stop_the_others(tmp_path, runs_dir, capsys, damage):
    """Would catch: a traceback, a figure that fails because of one run, a pickle that is loaded."""
    make_run(runs_dir, "dqn", "Breakout", "tanh-lan", 1)
    folder = make_run(runs_dir, "dqn", "Breakout", "tanh", 1)
    DAMAGED[damage](folder / "activations.npz")
    draw(runs_dir, tmp_path / "out", "fig04")
    messages = capsys.readouterr().err
    assert "drawn in part, no Tanh run on Breakout with a whole activations.npz" in messages
    assert messages.count(f"{folder.name}: activations.npz") == 1
    assert messages.count("\n") == 2  # this line, and ReLU's normalised score
    assert (tmp_path / "out" / "fig04_dqn_densities.png").exists()


# ------------------------------------------------------------------------------------------------ layers


def strips_of(axes):
    """{layer: (seeds, points)} of a stack, the lowest seed first, from what is drawn: by its place and its label."""
    labels = {
        round(tick, 3): label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    found = {}
    for image in axes.get_images():
        *_, bottom, top = image.get_extent()
        found[labels[round((bottom + top) / 2, 3)]] = np.ma.filled(image.get_array(), np.nan)[::-1]
    return found


def test_which_layer_died_and_when(tmp_path, runs_dir):
    """Tanh's seed 2 of 3 loses conv3 at 30 % of the training, and z with it.

    Would catch: a mean that hides one of three, the seeds or the layers in another order, another quantity, another
    time; panels of runs that measured nothing.
    """
    for seed in (1, 2, 3):
        make_run(runs_dir, "dqn", "Pong", "tanh", seed, dies="conv3" if seed == 2 else "")
        make_run(runs_dir, "dqn", "Pong", "tanh-lan", seed)
        make_run(runs_dir, "dqn", "Pong", "relu", seed, layers=False)
    figure, missing = figures.draw_layers(read_study(runs_dir, tmp_path), figures.FIGURES["layers_dqn"])
    assert missing == ["no ReLU", "no Sigmoid"]
    tanh, lan, scale = figure.axes
    assert [tanh.get_title(), lan.get_title(), scale.get_ylabel()] == [
        "Tanh, 3 runs",
        "Tanh (LaN), 3 runs",
        "constant units",
    ]
    assert list(strips_of(tanh)) == ["conv1", "conv2", "conv3", "$z$"]
    assert list(strips_of(lan)) == ["conv1", "conv2", "conv3", "$z^{enc}$", "$z^*$", "$z$"]
    time = np.linspace(0, 1, 1001)
    died = {
        name: [time[np.argmax(strip > 0.5)] if (strip > 0.5).any() else None for strip in strips]
        for name, strips in strips_of(tanh).items()
    }
    alive = [None] * 3
    assert {name: seeds for name, seeds in died.items() if name != "conv3" and name != "$z$"} == {
        "conv1": alive,
        "conv2": alive,
    }
    for name in ("conv3", "$z$"):
        assert (died[name][0], died[name][2]) == (None, None)
        assert died[name][1] == pytest.approx(0.3, abs=0.05)  # measured 20 times
    for layer, strips in strips_of(lan).items():
        name = {"$z^{enc}$": "z_enc", "$z^*$": "z_star", "$z$": "z"}.get(layer, layer)
        true = [true_layer(name, "constant", "tanh-lan", seed, 1.0) for seed in (1, 2, 3)]
        assert strips[:, -1] == pytest.approx(np.array(true), abs=1e-6)
        assert np.isnan(strips[:, 0]).all()  # nothing was measured yet


def test_each_game_has_its_own_stacks(tmp_path, runs_dir):
    """Would catch: one game's runs in another's panel; a game that an activation lacks drawn as alive."""
    make_run(runs_dir, "ppo", "Pong", "tanh", 1, dies="conv2")
    make_run(runs_dir, "ppo", "Qbert", "tanh", 1)
    make_run(runs_dir, "ppo", "Qbert", "relu", 1)
    figure, missing = figures.draw_layers(read_study(runs_dir, tmp_path), figures.FIGURES["layers_ppo"])
    ends = {
        axes.get_title(): [strips[0, -1] > 0.5 for strips in strips_of(axes).values()]
        for axes in figure.axes
        if axes.get_images()
    }
    assert ends == {
        "Pong\nTanh, 1 run": [False, True, True, True],
        "Qbert\nTanh, 1 run": [False] * 4,
        "Qbert\nReLU, 1 run": [False] * 4,
    }
    assert "no ReLU in Pong" in missing


def test_every_algorithm_has_its_layers(tmp_path, runs_dir, capsys):
    """Would catch: a later algorithm without the figure; old runs that stop it, or that are drawn as empty stacks."""
    make_run(runs_dir, "pqn", "Pong", "tanh", 1, dies="conv3")
    make_run(runs_dir, "dqn", "Pong", "tanh", 1, layers=False)
    draw(runs_dir, tmp_path / "out", "layers")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["layers_pqn.png"]
    messages = capsys.readouterr().err
    assert "not drawn, no run that measured every layer: layers_dqn" in messages


# -------------------------------------------------------------------------------------------- controls


def test_each_control_stands_beside_its_parameters_rank_and_dead_neurons(tmp_path, runs_dir):
    """Would catch: a row under another's name, the mean of seeds that belong to different games, the width of another
    layer, a control among the paper's, convolutions of other recipes mixed with ReLU's."""
    for game, seed in (("Pong", 1), ("Pong", 2), ("Qbert", 1), ("Qbert", 2)):
        for activation in ("relu", "tanh-lan", "relu-1024", "bilinear"):
            make_run(runs_dir, "dqn", game, activation, seed)
    make_run(runs_dir, "dqn", "Pong", "tanh", 2, conv_activation="tanh-lan")
    figure, missing = figures.draw_controls(read_study(runs_dir, tmp_path), figures.FIGURES["controls_dqn"])
    counts, *panels = figure.axes
    labels = [label.get_text() for label in counts.get_yticklabels()]
    above, below = ["ReLU, 4 runs", "Tanh (LaN), 4 runs"], ["Bilinear, 4 runs", "ReLU (1024), 4 runs"]
    assert labels == [*above, *below, "Tanh, conv Tanh (LaN), 1 run"]
    assert [round(bar.get_width()) for bar in counts.patches] == [1_686_180, 3_292_324, 3_292_324, 3_294_372, 1_686_180]
    assert [text.get_text().strip() for text in counts.texts] == ["1.69 M", "3.29 M", "3.29 M", "3.29 M", "1.69 M"]
    for axes, quantity in zip(panels, figures.CONTROL_QUANTITIES, strict=True):
        dots = {int(line.get_ydata()[0]): line for line in axes.get_lines() if line.get_marker() == "o"}
        for place, activation in enumerate(("relu", "tanh-lan", "bilinear", "relu-1024", "tanh")):
            seeds = (2,) if activation == "tanh" else (1, 2)
            true = [true_measurement(quantity, activation, seed, 1.0) for seed in seeds]
            assert dots[place].get_xdata() == pytest.approx(true, rel=1e-5), (quantity, activation)
        if quantity.startswith("effective_rank"):
            widths = [float(line.get_xdata()[0]) for line in axes.get_lines() if line.get_marker() == "|"]
            assert widths == [512, 512, 512, 1024, 512]
    names = [
        "Tanh",
        "Tanh (LayerNorm)",
        "Tanh (1024)",
        "Tanh (GLU)",
        "LaN (LayerNorm)",
        "ReLU (LayerNorm)",
        "CReLU",
        "GELU",
    ]
    assert missing == [f"no {name}" for name in names]


def test_controls_are_in_the_projects_figures_and_not_in_the_papers(tmp_path, runs_dir):
    """Would catch: the paper's figures crowded by what it does not have; a control whose return nobody can see; of PPO,
    the paper's other activations hidden since the controls' figure needs them."""
    for activation in ("relu", "layernorm", "gelu"):
        make_run(runs_dir, "ppo", "Pong", activation, 1)
    make_run(runs_dir, "ppo", "Pong", "gelu", 1, conv_activation="tanh")
    read = read_study(runs_dir, tmp_path)
    more = {name: figures.shown_activations(read, plot)[4:] for name, plot in figures.FIGURES.items() if "ppo" in name}
    assert more["study_ppo"] == more["layers_ppo"] == ["layernorm", "gelu", "gelu+conv-tanh"]
    assert more["fig08a_ppo_normalized"] == more["fig17_ppo_games"] == ["layernorm", "gelu+conv-tanh"]
    assert "gelu+conv-tanh" not in figures.activations_of_study("ppo")


def test_runs_that_differ_in_their_convolutions_are_groups_of_their_own(tmp_path, runs_dir, capsys):
    """Also beside runs of before the flag. Would catch: two networks averaged, a warning of mixed flags, the width of
    512 for one of 1024."""
    make_run(runs_dir, "dqn", "Pong", "wide-1024", 1)
    make_run(runs_dir, "dqn", "Pong", "wide-1024", 2, conv_activation="relu").rename(runs_dir / "relu")
    make_run(runs_dir, "dqn", "Pong", "wide-1024", 1, conv_activation="tanh-lan")
    draw(runs_dir, tmp_path / "out", "tables")
    found = {row["activation"]: row for row in rows(tmp_path / "out").values()}
    assert found.keys() == {"wide-1024", "wide-1024+conv-tanh-lan"}
    for row in found.values():
        assert float(row["rank_share"]) == pytest.approx(float(row["effective_rank"]) / 1024)
    messages = capsys.readouterr().err
    assert "mixed" not in messages
    assert "left out" not in messages
    label = "Tanh (1024), conv Tanh (LaN)"
    assert facts.style("wide-1024+conv-tanh-lan").label == label
    assert facts.style("wide-1024+conv-tanh-lan@B").label == f"{label}, B"


# ---------------------------------------------------------------------------------------- what is shown


def test_a_dollar_sign_begins_no_formula(tmp_path, runs_dir):
    """Would catch: a game's name parsed as mathematics, which fails while the figure is saved."""
    for game in ("$\\frac{$", "Pong"):
        make_run(runs_dir, "dqn", game, "relu", 1, exp_name="x")
    read = read_study(runs_dir, tmp_path)
    png, _, _ = figures.draw(read, "fig16_dqn_games", figures.FIGURES["fig16_dqn_games"], tmp_path)
    assert png[:4] == b"\x89PNG"
    assert figures.plain("a$b") == r"a\$b"


def test_an_unknown_activation_is_a_line_of_its_own(tmp_path, runs_dir):
    """Would catch: an activation that study.py does not know missing from the figures of the main set, or drawn in
    the colour of another."""
    for activation in ("relu", "gelu-lan"):
        make_run(runs_dir, "dqn", "Pong", activation, 1)
    figure, missing = figures.draw_panels(read_study(runs_dir, tmp_path), figures.FIGURES["fig06a_dqn_dead_neurons"])
    labels = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert set(labels) == {"ReLU, 1 run", "gelu-lan, 1 run"}
    assert labels["gelu-lan, 1 run"] not in {style.color for style in facts.ACTIVATIONS.values()}
    assert missing == ["no Tanh", "no Sigmoid", "no Tanh (LaN)"]
    special, _ = figures.draw_panels(read_study(runs_dir, tmp_path), figures.FIGURES["fig01_dqn_relu_tanh"])
    assert len(special.axes[0].get_lines()) == 1


@pytest.mark.parametrize("name", ["swish", "_mine", "a$b$", "ψ-lan", "My Act_2", "x" * 80, "swish-1024", "wide-2xlan"])
def test_a_script_may_invent_any_name(tmp_path, runs_dir, name):
    """Would catch: a formula, a line that no legend names, a name that stops a figure, another width."""
    make_run(runs_dir, "dqn", "Pong", name, 1)
    read = read_study(runs_dir, tmp_path)
    for plot in ("fig06b_dqn_effective_rank", "layers_dqn"):
        png, caption, _ = figures.draw(read, plot, figures.FIGURES[plot], tmp_path)
        assert png[:4] == b"\x89PNG"
        assert "no " + name not in caption
    figure, _ = figures.draw_panels(read, figures.FIGURES["fig06b_dqn_effective_rank"])
    assert len(figure.legends[0].get_texts()) == 1
    assert facts.style(name).color not in {style.color for style in facts.ACTIVATIONS.values()}
    width = 1024 if name == "swish-1024" else 512
    assert read.runs["rank_share"].item() == pytest.approx(read.runs["effective_rank"].item() / width)


FEW_AND_MANY = {
    "one": ({"Pong": 1}, ["Pong"]),
    "two, of which one has more seeds": ({"Pong": 1, "Qbert": 3}, ["Pong", "Qbert"]),
    "four": (dict.fromkeys(("Boxing", "Pong", "Qbert", "Tennis"), 1), [""]),
}


@pytest.mark.parametrize("case", FEW_AND_MANY)
def test_the_studys_picture_shows_return_dead_neurons_and_rank(tmp_path, runs_dir, case):
    """Would catch: a panel lost, another game's runs in a row, a few games' returns normalised where they could be read
    as they are, a legend that tells of one game's runs only."""
    games, titles = FEW_AND_MANY[case]
    for game, seeds in games.items():
        for activation in ("relu", "tanh"):
            for seed in range(1, seeds + 1):
                make_run(runs_dir, "ppo", game, activation, seed)
    figure, missing = figures.draw_study(read_study(runs_dir, tmp_path), figures.FIGURES["study_ppo"])
    first = "normalised score" if titles == [""] else "return (last 100 games)"
    row = [first, "dead neurons (KDE)", "dead neurons (std < 0.001)", "effective rank, centred"]
    assert [axes.get_ylabel() for axes in figure.axes] == row * len(titles)
    assert [axes.get_title() for axes in figure.axes] == [title for title in titles for _ in row]
    names = ("dead_neurons", "std_dead_neurons", "effective_rank_centred")
    for i, seeds in enumerate(games.values() if titles != [""] else [1]):
        for axes, name in zip(figure.axes[4 * i + 1 :], names, strict=False):
            (black,) = [
                line for line in axes.get_lines() if line.get_color() == "#000000" and line.get_linewidth() >= 1
            ]
            true = np.mean([true_measurement(name, "relu", seed, 1.0) for seed in range(1, seeds + 1)])
            assert black.get_ydata()[-1] == pytest.approx(true, abs=1e-4)
    fewest, most = min(games.values()), max(games.values())
    runs = "1 to 3 runs a game" if most > fewest else f"{len(games)} runs" if len(games) > 1 else "1 run"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"ReLU, {runs}", f"Tanh, {runs}"]
    several = " in Pong" if case.startswith("two") else ""
    assert f"no Sigmoid{several}" in missing


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_studys_picture_shows_each_of_a_few_seeds(tmp_path, runs_dir, seeds):
    """Would catch: one collapsed run of three that a mean and a band hide; or so many lines that nothing is seen."""
    for seed in range(1, seeds + 1):
        make_run(runs_dir, "ppo", "Pong", "tanh", seed)
    figure, _ = figures.draw_study(read_study(runs_dir, tmp_path), figures.FIGURES["study_ppo"])
    mean, *thin = figure.axes[3].get_lines()
    true = [true_measurement("effective_rank_centred", "tanh", seed, 1.0) for seed in range(1, seeds + 1)]
    assert mean.get_ydata()[-1] == pytest.approx(np.mean(true))
    assert [line.get_ydata()[-1] for line in thin] == pytest.approx(true if seeds == 3 else [])
    assert len(figure.axes[3].collections) == (0 if seeds == 3 else 1)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"Tanh, {seeds} runs"]


@pytest.mark.parametrize("width", [3.4, 7.8])
def test_a_legend_stays_within_its_figure(width):
    """Would catch: a row of five entries whose ends are cut off; or a column where a row would do."""
    labels = ["ReLU, 3 runs a game", "Tanh, 3 runs a game", "Sigmoid, 2 to 3 runs a game", "Tanh (LaN), 3 runs a game"]
    lines = [figures.Line2D([], [], label=label) for label in (*labels, figures.STD_DEAD_LABEL)]
    with matplotlib.style.context(figures.LOOK):
        figure = figures.Figure((width, 2.6), layout="constrained")
        figures.add_legend(figure, lines)
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width
        more = figure.legend(handles=lines, loc="outside lower center", ncols=legend._ncols + 1)
        assert more.get_window_extent().width > figure.bbox.width


def test_a_long_legend_leaves_the_panel_its_height():
    """Would catch: a panel of half an inch below twelve entries."""
    heights = []
    for entries in (2, 12):
        lines = [figures.Line2D([], [], label=f"Tanh (LaN), experiment {n}, 3 runs") for n in range(entries)]
        with matplotlib.style.context(figures.LOOK):
            figure = figures.Figure((3.4, 2.9), layout="constrained")
            axes = figure.subplots()
            figures.add_legend(figure, lines)
            figure.get_layout_engine().execute(figure)
            heights.append(axes.get_position().height * figure.get_figheight())
    assert heights[1] > 0.8 * heights[0]


def test_captions_count_the_unfinished_runs_that_are_drawn(tmp_path, runs_dir, capsys):
    """Would catch: runs of Qbert, or without layers, in the caption of a figure that does not show them."""
    for game in ("Breakout", "Qbert"):
        make_run(runs_dir, "dqn", game, "relu", 1, finished=False, stop=0.5)
    make_run(runs_dir, "dqn", "Breakout", "tanh", 1, finished=False, stop=0.5, layers=False)
    read = read_study(runs_dir, tmp_path, allow_unfinished=True)
    about = {name: figures.about_unfinished(read, plot) for name, plot in figures.FIGURES.items() if "dqn" in name}
    assert about["study_dqn"] == ["Of 3 runs 3 unfinished."]
    assert about["layers_dqn"] == ["Of 2 runs 2 unfinished."]
    assert about["fig04_dqn_densities"] == []
    assert about["fig13_dqn_dying_probability"] == ["Of 3 runs 3 unfinished."]  # curves of every run


def test_dead_and_rank_are_shown_both_ways(tmp_path, runs_dir):
    """Would catch: a figure with only the counts that depend on where and how large z is."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    read = read_study(runs_dir, tmp_path)
    for name, quantities in (
        ("fig06a_dqn_dead_neurons", ("dead_neurons", "std_dead_neurons", "dead_neurons_scaled")),
        ("fig06b_dqn_effective_rank", ("effective_rank", "effective_rank_centred")),
    ):
        figure, _ = figures.draw_panels(read, figures.FIGURES[name])
        ends = [axes.get_lines()[0].get_ydata()[-1] for axes in figure.axes]
        assert ends == pytest.approx([true_measurement(quantity, "relu", 1, 1.0) for quantity in quantities], abs=1e-4)


def test_looks_are_set_only_while_something_is_drawn(tmp_path, runs_dir):
    """Would catch: an import that changes how the caller's own figures look."""
    code = "import matplotlib; before = dict(matplotlib.rcParams); import plot_results, plots.figures; "
    code += "print(before == dict(matplotlib.rcParams))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_a_band_ends_where_its_quantity_does(tmp_path, runs_dir):
    """Would catch: one run of two that died drawn as up to 121 % of dead neurons, or down to -21 %; a rank below 0."""
    axes = Figure().subplots()
    grid = np.array([0.0, 1.0])
    for quantity, values, (low, high) in (
        ("std_dead_neurons", (0.0, 1.0), (0.0, 1.0)),  # 0.5 +- 0.71
        ("effective_rank_centred", (0.0, 400.0), (0.0, 482.84)),  # 200 +- 282.84
        ("normalized_score", (0.0, 1.0), (-0.2071, 1.2071)),
        ("rank_of_deadlines", (0.0, 1.0), (-0.2071, 1.2071)),  # no entry in AXES, whatever it is called
    ):
        curves = {"Pong": {seed: np.full(2, value) for seed, value in enumerate(values)}}
        figures.draw_group(axes, grid, curves, quantity, color="black")
        edges = axes.collections[-1].get_paths()[0].vertices[:, 1]
        assert (edges.min(), edges.max()) == pytest.approx((low, high), abs=0.01), quantity


def test_a_line_that_has_no_value_is_missing_not_forgotten(tmp_path, runs_dir):
    """Tanh's seed 2 is constant from the start. Would catch: the mean of the seeds that live, or an empty panel without
    a word in the caption."""
    for seed in (1, 2):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
        make_run(runs_dir, "dqn", "Pong", "tanh", seed, constant=seed == 2)
    read = read_study(runs_dir, tmp_path)
    name = "fig06a_dqn_dead_neurons"
    figure, missing = figures.draw_panels(read, figures.FIGURES[name])
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2, 1]
    assert missing == ["no line of Tanh for dead neurons (KDE, scaled)", "no Sigmoid", "no Tanh (LaN)"]
    caption = figures.draw(read, name, figures.FIGURES[name], tmp_path).caption
    assert caption.endswith("Missing here: line of Tanh for dead neurons (KDE, scaled); Sigmoid; Tanh (LaN).")


@pytest.mark.parametrize(("games", "early"), [(300, False), (60, True)])
def test_a_normalised_figure_says_where_its_zero_is(tmp_path, runs_dir, games, early):
    """Pong, random -20.7: ReLU's curve of the last 100 games, by hand below.

    Would catch: a random player's score by the human normalisation (0); a scale of a few games that nobody is told of.
    """
    make_run(runs_dir, "dqn", "Pong", "relu", 1, games=games)
    read = read_study(runs_dir, tmp_path)
    scale = read.scales["dqn", "Pong"]
    assert scale.since == (None if early else 33_333)
    caption = figures.draw(read, "fig01_dqn_relu_tanh", figures.FIGURES["fig01_dqn_relu_tanh"], tmp_path).caption
    expected = (-20.7 - scale.low) / (scale.high - scale.low)
    assert f"A random player would score {expected:.2f} in Pong." in caption
    assert ("In Pong no such agent step was reached" in caption) == early
    shown = figures.draw(read, "study_dqn", figures.FIGURES["study_dqn"], tmp_path).caption
    assert "random player" not in shown  # whose returns are not normalised
    assert figures.EXTREMES not in shown


def test_every_game_has_more_than_two_ticks_of_agent_steps(tmp_path, runs_dir):
    """Would catch: panels side by side with nothing but 0 and 100 k below them."""
    for game in ("Breakout", "Pong"):
        make_run(runs_dir, "ppo", game, "relu", 1, agent_steps=199_680)
    with matplotlib.style.context(figures.LOOK):
        figure, _ = figures.draw_games(read_study(runs_dir, tmp_path), figures.FIGURES["fig17_ppo_games"])
        for axes in figure.axes:
            assert sum(0 <= tick <= 199_680 for tick in axes.get_xticks()) > 2


def test_runs_are_compared_where_one_has_no_scaled_count(tmp_path, runs_dir):
    """Would catch: scripts/compare.py, and the quickstart with it, ended by a run that never logged that count."""
    alive, constant = (make_run(runs_dir, "ppo", "Breakout", name, 1) for name in ("relu", "tanh"))
    (file,) = constant.glob("events*")
    write_events(file, [(f"representation/{name}", 100_000, 1.0) for name in ("std_dead_neurons", "effective_rank")])
    command = [sys.executable, ROOT / "scripts" / "compare.py", alive, constant, "--out", tmp_path / "two.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    row = done.stdout.splitlines()[1]
    assert row.split()[:4] == ["neurons", "dead", "41.3%", "-"]
    assert row.endswith("; none where over 99 % are constant")
    assert (tmp_path / "two.png").stat().st_size > 50_000


def test_published_scores_are_marked_at_the_end_of_a_full_length_axis(tmp_path, runs_dir):
    """cleanrl's DQN in Breakout: 366.928. Would catch: marks on a short run's axis, of another game, without a name."""
    for game in ("Breakout", "Qbert"):
        make_run(runs_dir, "dqn", game, "relu", 1, agent_steps=10_000_000, games=120, measurements=2)
        make_run(runs_dir, "ppo", game, "relu", 1, agent_steps=1_000_000, games=120, measurements=2)
    read = read_study(runs_dir, tmp_path)
    figure, _ = figures.draw_games(read, figures.FIGURES["fig16_dqn_games"])
    marks = [
        {float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() in figures.PUBLISHED_MARKERS}
        for axes in figure.axes
    ]
    assert marks == [{366.928, 358.327}, {9496.774}]
    (line, *_) = (line for line in figure.axes[0].lines if line.get_marker() in figures.PUBLISHED_MARKERS)
    assert line.get_xdata()[0] == 10_000_000
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["ReLU, cleanrl", "ReLU, rl-baselines3-zoo"]
    # Qbert has the second source alone: it keeps its own marker.
    of_zoo = {axes.lines[-1].get_marker() for axes in figure.axes}
    assert of_zoo == {figures.PUBLISHED_MARKERS[2]}
    figure, _ = figures.draw_games(read, figures.FIGURES["fig17_ppo_games"])
    assert not [line for axes in figure.axes for line in axes.lines if line.get_marker() in figures.PUBLISHED_MARKERS]
    assert figures.about_published(read, figures.FIGURES["fig16_dqn_games"])
    assert not figures.about_published(read, figures.FIGURES["fig17_ppo_games"])


def test_algorithms_are_drawn_side_by_side_on_the_same_axes(tmp_path, runs_dir):
    """PQN trains for half as long, and has no tanh; Qbert is PPO's alone. Would catch: an axis of its own for each, a
    game that nothing can be compared in, activations called missing that no algorithm has."""
    for algorithm, steps in (("dqn", 100_000), ("ppo", 100_000), ("pqn", 50_000)):
        make_run(runs_dir, algorithm, "Pong", "relu", 1, agent_steps=steps)
    make_run(runs_dir, "dqn", "Pong", "tanh", 1)
    make_run(runs_dir, "ppo", "Pong", "tanh", 1)
    make_run(runs_dir, "ppo", "Qbert", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "selu", 1)
    read = read_study(runs_dir, tmp_path)
    plot = figures.figures_of(["dqn", "ppo", "pqn"])["algorithms"]
    figure, missing = figures.draw_algorithms(read, plot)
    assert [axes.get_title() for axes in figure.axes] == ["DQN, Pong", "PPO, Pong", "PQN, Pong"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 100_000)}
    assert missing == ["no PQN Tanh in Pong"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ReLU", "Tanh"]  # SELU is DQN's alone
    # Would catch: lines that no legend names, where several have just what the main figures show.
    for activation in figures.study.MAIN:
        for algorithm in ("dqn", "ppo"):
            make_run(runs_dir, algorithm, "Pong", activation, 2)
    make_run(runs_dir, "ppo", "Pong", "swish", 1)
    figure, _ = figures.draw_algorithms(read_study(runs_dir, tmp_path), plot)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ReLU", "Tanh", "Sigmoid", "Tanh (LaN)"]
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert {line.get_color() for axes in figure.axes for line in axes.get_lines()} == set(colors)
    assert "algorithms" not in figures.figures_of(["dqn"])
    assert report.title_of("algorithms") == "Algorithms"
