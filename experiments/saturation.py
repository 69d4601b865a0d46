"""How often is a product of neurons dead, and which weights get a gradient? (Table 1)

python experiments/saturation.py                 all of it, half a minute; replaces results/saturation*

python experiments/saturation.py --out-dir out   the same into another folder

Neurons are saturated by large random biases, with probability p each, and counted by the function that training uses.
Beside the paper's products stand two controls: one with a linear factor (tanh-glu), and one of two (bilinear). The
second figure measures Section 3's argument about derivatives on the representation of the training scripts.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from drawing import launch, plt, save, write_text
from torch import Tensor, nn

import metrics
from dqn_atari_lan import REPRESENTATIONS, Hidden
from lan_utils import study
from plots.report import markdown_table

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}
FACTORS = (1, 2, 3)
CONTROLS = {"tanh-glu": (torch.tanh, nn.Identity()), "bilinear": (nn.Identity(), nn.Identity())}  # beyond the paper
PAPER_CASES = tuple(itertools.product(ACTIVATIONS, FACTORS))
CONTROL_CASES = (("linear", 1), *((activation, len(fs)) for activation, fs in CONTROLS.items()))
CASES = PAPER_CASES + CONTROL_CASES
PROBABILITIES = tuple(i / 20 for i in range(21))
OBSERVATIONS = 2048  # as in training
FEATURES = 32
NEURONS = 1000
SCALE = 2.0  # standard deviation of A x: a neuron of this scale that is not saturated uses its whole range
SATURATING_BIAS = (15.0, 30.0)  # at least 7 standard deviations of A x: f stays within 0.01 of its limit
Cases = tuple[tuple[str, int], ...]  # activation and number of factors
SCALES = tuple(np.geomspace(0.01, 3, 13).round(4).tolist())
LINEAR = "#666666"  # colour of a linear neuron
BIASES = tuple(np.linspace(-10, 10, 41).tolist())


def theory(activation: str, p: float | np.ndarray, factors: int) -> float | np.ndarray:
    """Probability that a product of independent neurons is dead; for two it is the paper's Table 1.

    tanh ends at -1 or 1, so the product is constant only if every factor is: p^k.
    relu ends at 0, and one zero is enough: one minus the probability that none is, 1 - (1 - p)^k.
    sigmoid ends at 0 and at 1, each with p/2. One zero is enough: 1 - (1 - p/2)^k. Without a zero all factors have
    to be constant at 1, which excludes the former: + (p/2)^k. The sum is p for one factor and for two, but
    1.5 p - 0.75 p^2 + 0.25 p^3 for three.

    A linear neuron has no limit: a large bias moves it and leaves it as it varies. A product with a linear factor is
    thus never constant, whatever the other one does: 0. `what_is_left` says what becomes of it instead.

    Args:
        p: that one neuron is saturated, in [0, 1].
        factors: k, at least 1.
    """
    if (activation, factors) in CONTROL_CASES:
        return 0 * p
    if activation == "tanh":
        return p**factors
    if activation == "relu":
        return 1 - (1 - p) ** factors
    return 1 - (1 - p / 2) ** factors + (p / 2) ** factors


def simulate(
    activation: str,
    p: float,
    factors: int,
    generator: torch.Generator,
    neurons: int = NEURONS,
    scale: float = SCALE,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products of layers f(A x + B), in which a neuron's bias is large, and saturates it, with probability p.

    Args:
        x: (OBSERVATIONS, FEATURES); drawn where it is not given.

    Returns:
        z (OBSERVATIONS, neurons), and where each factor saturates, (factors, neurons): -1 at the low end, 1 at the
        high end, 0 not at all; of a linear factor the sign of its large bias, 0 without one.
    """
    x = torch.randn(OBSERVATIONS, FEATURES, generator=generator) if x is None else x
    saturated = torch.rand(factors, neurons, generator=generator) < p
    end = -torch.ones(factors, neurons)
    if activation != "relu":  # which has no high end
        end[torch.rand(factors, neurons, generator=generator) < 0.5] = 1
    weights = torch.randn(factors, FEATURES, neurons, generator=generator) * scale / math.sqrt(FEATURES)
    low, high = SATURATING_BIAS
    bias = saturated * end * (low + (high - low) * torch.rand(factors, neurons, generator=generator))
    fs = CONTROLS.get(activation) or [ACTIVATIONS.get(activation, nn.Identity())] * factors
    y = x @ weights + bias[:, None]
    z = torch.stack([f(of_factor) for f, of_factor in zip(fs, y, strict=True)]).prod(dim=0)
    return z, (saturated * end).to(torch.int8)


def must_be_dead(activation: str, ends: Tensor) -> Tensor:
    """Which products are constant, from where their factors saturate: (factors, neurons) -> bool (neurons,)."""
    if (activation, len(ends)) in CONTROL_CASES:
        return torch.zeros(ends.shape[1], dtype=torch.bool)
    if activation == "tanh":
        return (ends != 0).all(dim=0)
    return (ends < 0).any(dim=0) | (ends > 0).all(dim=0)


def count(generator: torch.Generator, cases: Cases = PAPER_CASES) -> list[dict]:
    """Theory and simulation for every activation, number of factors and p."""
    rows = []
    for (activation, factors), p in itertools.product(cases, PROBABILITIES):
        z, _ = simulate(activation, p, factors, generator)
        dead = metrics.dead_neurons(z, generator=generator).float().mean().item()
        expected = theory(activation, p, factors)
        error = math.sqrt(expected * (1 - expected) / NEURONS)
        rows.append(
            dict(activation=activation, factors=factors, p=p, theory=expected, simulated=dead, standard_error=error)
        )
    return rows


def margins(generator: torch.Generator) -> list[dict]:
    """How far the density peaks of living and of dead products are from omega = 20, at p = 1/2."""
    rows = []
    for activation, factors in PAPER_CASES:
        z, ends = simulate(activation, 0.5, factors, generator)
        peaks, dead = metrics.kde_peak_density(z, generator=generator), must_be_dead(activation, ends)
        rows.append(
            dict(
                activation=activation,
                factors=factors,
                highest_alive=peaks[~dead].max().item(),
                lowest_dead=peaks[dead].min().item(),
            )
        )
    return rows


def count_unsaturated(generator: torch.Generator, cases: Cases = PAPER_CASES) -> list[dict]:
    """What is counted as dead although nothing is saturated, because A x is small."""
    rows = []
    for (activation, factors), scale in itertools.product(cases, SCALES):
        z, _ = simulate(activation, 0.0, factors, generator, neurons=200, scale=scale)
        dead = metrics.dead_neurons(z, generator=generator).float().mean().item()
        rows.append(dict(activation=activation, factors=factors, scale=scale, simulated=dead))
    return rows


def deviation(activation: str, large: tuple[bool, bool]) -> float:
    """Standard deviation of a product u v over the observations, root mean square over neurons.

    Of independent u and v, Var(u v) = E u^2 E v^2 - (E u)^2 (E v)^2. Over neurons a factor has, with s the standard
    deviation of A x and B^2 the mean square of a large bias, the means of E u^2 and of (E u)^2:
    linear: s^2 and 0, with a large bias s^2 + B^2 and B^2; tanh: E tanh^2(A x) and 0, saturated 1 and 1.

    Args:
        activation: tanh, of two factors, or one of CONTROLS.
        large: which factors have a large bias.
    """
    x = np.linspace(-8, 8, 4001)
    normal = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    low, high = SATURATING_BIAS
    bias = (low**2 + low * high + high**2) / 3  # E B^2 of a bias that is uniform between the two
    moments = []
    for f, is_large in zip(CONTROLS.get(activation, (torch.tanh, torch.tanh)), large, strict=True):
        if f is torch.tanh:
            moments.append((1.0, 1.0) if is_large else ((normal * np.tanh(SCALE * x) ** 2).sum(), 0.0))
        else:
            moments.append((SCALE**2 + bias * is_large, bias * is_large))
    (u_square, u_mean), (v_square, v_mean) = moments
    return math.sqrt(u_square * v_square - u_mean * v_mean)


# By which factors have a large bias; a bias that is not large is 0.
LEFT = {
    ("tanh", "neither"): "tanh(A1 x) tanh(A2 x)",
    ("tanh", "one"): "tanh(A2 x), or minus that",
    ("tanh", "both"): "1 or -1",
    ("tanh-glu", "neither"): "tanh(A1 x) (A2 x)",
    ("tanh-glu", "the tanh"): "A2 x, or minus that",
    ("tanh-glu", "the linear one"): "tanh(A1 x) (A2 x + B2)",
    ("tanh-glu", "both"): "A2 x + B2, or minus that",
    ("bilinear", "neither"): "(A1 x) (A2 x)",
    ("bilinear", "one"): "(A1 x) (A2 x) + B1 (A2 x)",
    ("bilinear", "both"): "(A1 x) (A2 x) + B1 (A2 x) + B2 (A1 x) + B1 B2",
}
LARGE = {
    "neither": [(False, False)],
    "one": [(True, False), (False, True)],
    "the tanh": [(True, False)],
    "the linear one": [(False, True)],
    "both": [(True, True)],
}


def what_is_left(generator: torch.Generator) -> list[dict]:
    """What products of two do once some of their factors have a large bias: how much they vary, how dense they are, and
    how much of it is linear in x."""
    rows = []
    for (activation, which), formula in LEFT.items():
        x = torch.randn(OBSERVATIONS, FEATURES, generator=generator)
        z, ends = simulate(activation, 0.5, 2, generator, x=x)
        z = z[:, torch.tensor([tuple(large) in LARGE[which] for large in (ends != 0).T.tolist()])]
        peaks = metrics.kde_peak_density(z, generator=generator)
        rows.append(
            dict(
                activation=activation,
                large=which,
                formula=formula,
                derived=deviation(activation, LARGE[which][0]),
                simulated=z.double().var(dim=0).mean().sqrt().item(),
                lowest_peak=peaks.min().item(),
                highest_peak=peaks.max().item(),
                linear=linear_share(x, z),
            )
        )
    return rows


def linear_share(x: Tensor, z: Tensor) -> float:
    """Share of the variance of z that a linear function of x explains, mean over neurons (adjusted R^2).

    Args:
        x: (n, features).
        z: (n, neurons).
    """
    inputs, z = torch.cat((x, torch.ones(len(x), 1)), dim=1).double(), z.double()
    rest = z - inputs @ torch.linalg.lstsq(inputs, z).solution
    unexplained = rest.square().sum(dim=0) / (len(x) - inputs.shape[1])
    return (1 - unexplained / z.var(dim=0)).mean().item()


def gradient_norms(activation: str, bias: float, observations: int = 512, features: int = 64) -> dict[str, float]:
    """Norms of the loss's gradient when the bias of z_enc is `bias` and that of z_star 0 (paper, Section 3.2).

    The layers are the training scripts' own with PyTorch's initialisation, on standard normal observations that
    have passed through one linear layer "below"; the gradient that arrives at z is standard normal.

    Args:
        activation: of `--activation`.

    Returns:
        Norms by name of the weights: "below", "z_enc" and, with a LaN, "z_star".
    """
    torch.manual_seed(0)
    below = nn.Linear(features, features)
    nn.init.orthogonal_(below.weight)  # so that x has the observations' scale
    recipe = REPRESENTATIONS[activation]
    hidden = Hidden(recipe, recipe.outputs, lambda outputs: nn.Linear(features, outputs))
    layers = {f"z_{name}": factor[0] for name, factor in hidden.factors.items()}
    for name, layer in layers.items():
        nn.init.constant_(layer.bias, bias if name == "z_enc" else 0.0)
    z = hidden(below(torch.randn(observations, features)))
    z.backward(torch.randn(z.shape))
    weights = {"below": below.weight, **{name: layer.weight for name, layer in layers.items()}}
    return {name: weight.grad.norm().item() for name, weight in weights.items()}


def measure_gradients() -> list[dict]:
    """`gradient_norms` over the bias, relative to the single layer's at bias 0."""
    rows = []
    for f in ("tanh", "sigmoid"):
        unit = gradient_norms(f, 0.0)
        for activation, bias in itertools.product((f, f"{f}-lan"), BIASES):
            for name, norm in gradient_norms(activation, bias).items():
                reference = unit["below" if name == "below" else "z_enc"]
                rows.append(dict(activation=activation, bias=bias, weights=name, relative_norm=norm / reference))
    return rows


# ------------------------------------------------------------------------------------------------ report


def select(rows: list[dict], **values: object) -> list[dict]:
    """The rows that hold these values."""
    return [row for row in rows if values.items() <= row.items()]


def write_csv(rows: list[dict], file: Path) -> None:
    pd.DataFrame(rows).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")
    print(f"wrote {file}")


def report(
    counts: list[dict], margin: list[dict], unsaturated: list[dict], left: list[dict], gradients: list[dict]
) -> str:
    """The tables, as markdown."""
    formulas = {
        "tanh": ("p", "p^2", "p^3"),
        "sigmoid": ("p", "p", "1.5p - 0.75p^2 + 0.25p^3"),
        "relu": ("p", "2p - p^2", "1 - (1 - p)^3"),
    } | dict.fromkeys(dict(CONTROL_CASES), ("0", "0"))
    shown = (0.1, 0.25, 0.5, 0.75, 0.9)
    biases = (-10.0, -5.0, 0.0, 5.0, 10.0)
    off = [
        abs(row["simulated"] - row["theory"]) / row["standard_error"] for row in counts if row["standard_error"] > 1e-9
    ]

    def dead(activation: str, factors: int) -> list[str]:
        rows = [row for row in select(counts, activation=activation, factors=factors) if row["p"] in shown]
        cells = [f"{row['simulated']:.3f} / {row['theory']:.3f}" for row in rows]
        return [activation, str(factors), formulas[activation][factors - 1], *cells]

    def remains(row: dict) -> list[str]:
        name = "tanh-lan" if row["activation"] == "tanh" else row["activation"]
        peaks = f"{row['lowest_peak']:.2g} to {row['highest_peak']:.2g}"
        is_constant = row["derived"] == 0
        cells = [name, row["large"], row["formula"], f"{row['derived']:.3g}", f"{row['simulated']:.3g}"]
        return [*cells, *((peaks + ", dead", "") if is_constant else (peaks, f"{row['linear']:.0%}"))]

    def counted(activation: str, factors: int) -> list[str]:
        rows = select(unsaturated, activation=activation, factors=factors)
        return [activation, str(factors), *(f"{row['simulated']:.1%}" for row in rows)]

    def reaches(activation: str, weights: str) -> list[str]:
        rows = [row for row in select(gradients, activation=activation, weights=weights) if row["bias"] in biases]
        return [activation, weights, *(f"{row['relative_norm']:.2g}" for row in rows)]

    return "\n".join(
        [
            "# Dead products of neurons\n",
            f"`python experiments/saturation.py`; {NEURONS:,} products per cell, {OBSERVATIONS:,} observations. Each "
            "cell: simulated / theory. All values of p: `saturation.csv`. Below the paper's products: a linear neuron, "
            "and the controls that have one as a factor. It has no bound: there p is how often its bias is as large as "
            "one that saturates.\n",
            markdown_table(
                ["neuron", "factors", "theory", *(f"p = {p:g}" for p in shown)], [dead(*case) for case in CASES]
            ),
            f"Of {len(off)} cells with 0 < theory < 1, {sum(z <= 1 for z in off) / len(off):.0%} lie within one "
            f"standard error of it, {sum(z <= 2 for z in off) / len(off):.0%} within two; the furthest is "
            f"{max(off):.1f} away.\n",
            "## Is it clear who is dead?\n",
            "Density peaks at p = 1/2; from omega = 20 on a neuron counts as dead.\n",
            markdown_table(
                ["neuron", "factors", "highest of the living", "lowest of the dead"],
                [
                    [row["activation"], str(row["factors"]), f"{row['highest_alive']:.1f}", f"{row['lowest_dead']:.1f}"]
                    for row in margin
                ],
            ),
            "## What is left of a product of two\n",
            f"A x has a standard deviation of {SCALE:g}, a large bias B a size of {SATURATING_BIAS[0]:g} to "
            f"{SATURATING_BIAS[1]:g} and either sign; a bias that is not large is 0. Standard deviations are root mean "
            "squares over neurons. In the last column: the share of the variance that is linear in x.\n",
            markdown_table(
                ["product", "large bias", "what is left", "standard deviation, derived", "simulated"]
                + ["density peaks", "linear"],
                [remains(row) for row in left],
            ),
            "## Counted as dead though nothing saturates (p = 0)\n",
            "By the standard deviation of A x.\n",
            markdown_table(
                ["neuron", "factors", *(f"{scale:.2g}" for scale in SCALES)], [counted(*case) for case in CASES]
            ),
            "## Gradient that reaches the weights when z_enc's bias saturates it\n",
            "1: a single layer of the same activation at bias 0.\n",
            markdown_table(
                ["`--activation`", "weights", *(f"bias {bias:g}" for bias in biases)],
                [reaches(*case) for case in dict.fromkeys((row["activation"], row["weights"]) for row in gradients)],
            ),
        ]
    )


def draw_counts(counts: list[dict], unsaturated: list[dict], out_dir: Path) -> None:
    """Above: Fig. 13's theory with the simulation. Below: what the count says about neurons that are merely small."""
    figure, rows = plt.subplots(2, 4, figsize=(13, 6.4), sharey=True)
    looks = {1: (":", "o", "a single neuron"), 2: ("-", "s", "product of two"), 3: ("--", "^", "product of three")}
    titles = {
        "tanh": "tanh: $p$, $p^2$, $p^3$",
        "sigmoid": "sigmoid: $p$, $p$, $1.5p - 0.75p^2 + 0.25p^3$",
        "relu": "ReLU: $p$, $2p - p^2$, $1 - (1 - p)^3$",
    }
    p = np.linspace(0, 1, 101)
    panels = {title: [(activation, factors) for factors in FACTORS] for activation, title in titles.items()}
    panels["linear, tanh-GLU, bilinear: 0"] = CONTROL_CASES
    for (above, below), (title, cases) in zip(rows.T, panels.items(), strict=True):
        for activation, factors in cases:
            line, marker, _ = looks[factors]
            color = LINEAR if activation == "linear" else study.style(activation).color
            look = dict(color=color, marker=marker, markersize=3.5, markerfacecolor="white")
            above.plot(p, theory(activation, p, factors), line, color=color)
            cells = select(counts, activation=activation, factors=factors)
            bars = [2 * row["standard_error"] for row in cells]
            simulated = [row["simulated"] for row in cells]
            above.errorbar([row["p"] for row in cells], simulated, bars, linestyle="none", linewidth=0.8, **look)
            cells = select(unsaturated, activation=activation, factors=factors)
            below.plot([row["scale"] for row in cells], [row["simulated"] for row in cells], line, **look)
        above.set(title=title, xlabel="probability p that a neuron is saturated")
        below.axvline(SCALE, color="#b0b0b0", linewidth=3, zorder=0)
        below.set(title="nothing saturated (p = 0)", xlabel="standard deviation of A x (grey: as above)", xscale="log")
    above.set_xlabel("probability p that a neuron's bias is large")
    colors = {"linear": LINEAR} | {name: study.style(name).color for name in CONTROLS}
    lines = [plt.Line2D([], [], color=color, linewidth=2, label=name) for name, color in colors.items()]
    above.legend(handles=lines, loc="center")
    for ax in rows[:, 0]:
        ax.set_ylabel("fraction counted as dead")
    handles = [
        plt.Line2D([], [], linestyle=line, marker=marker, color="#666666", markerfacecolor="white", label=label)
        for line, marker, label in looks.values()
    ]
    title = "lines above: theory; marks: simulation with two standard errors"
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title=title)
    save(figure, out_dir, "saturation")


def draw_gradients(gradients: list[dict], out_dir: Path) -> None:
    """Section 3.2: what a saturated factor lets through."""
    figure, rows = plt.subplots(2, 2, figsize=(9, 7.2), sharex=True, sharey=True)
    lines = {
        ("", "z_enc"): ("single layer", "--"),
        ("-lan", "z_enc"): ("product: the saturated factor", "-."),
        ("-lan", "z_star"): ("product: the other factor", "-"),
        ("", "below"): ("single layer", "--"),
        ("-lan", "below"): ("product", "-"),
    }
    for column, f in zip(rows.T, ("tanh", "sigmoid"), strict=True):
        for (lan, weights), (label, style) in lines.items():
            norms = [row["relative_norm"] for row in select(gradients, activation=f + lan, weights=weights)]
            ax = column[int(weights == "below")]
            ax.plot(BIASES, norms, style, color=study.style(f + lan).color, label=label, linewidth=1.8)
        titles = (f"{f}: gradient of the layer's own weights", f"{f}: gradient of the weights below it")
        for ax, title in zip(column, titles, strict=True):
            ax.set(yscale="log", ylim=(1e-5, 5))
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), title=title)
        column[1].set_xlabel("bias of the one factor (0: not saturated)")
    for ax in rows[:, 0]:
        ax.set_ylabel("norm (1: single layer, bias 0)")
    save(figure, out_dir, "saturation_gradients")


def main(out_dir: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    counts, margin, unsaturated = count(generator), margins(generator), count_unsaturated(generator)
    of_controls = torch.Generator().manual_seed(1)
    counts += count(of_controls, CONTROL_CASES)
    unsaturated += count_unsaturated(of_controls, CONTROL_CASES)
    left, gradients = what_is_left(of_controls), measure_gradients()
    text = report(counts, margin, unsaturated, left, gradients)
    write_text(out_dir / "saturation.md", text)
    write_csv(counts, out_dir / "saturation.csv")
    write_csv(gradients, out_dir / "saturation_gradients.csv")
    draw_counts(counts, unsaturated, out_dir)
    draw_gradients(gradients, out_dir)
    print(text)


if __name__ == "__main__":
    launch(main, __doc__)
