"""experiments/saturation.py against enumeration, its own formulas, and derivatives worked out by hand."""

import csv
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "experiments"))
import saturation

import metrics
from dqn_atari_lan import REPRESENTATIONS, Hidden

CASES = [*itertools.product(("tanh", "sigmoid", "relu"), (1, 2, 3)), ("linear", 1), ("tanh-glu", 2), ("bilinear", 2)]


def enumerated(activation, p, factors):
    """The probability that a product is constant, summed over every way in which its factors can saturate.

    A state is a factor's limit as a number, or None while it moves: constant are products without a moving factor,
    and those with a zero."""
    tanh, linear = {-1: p / 2, 1: p / 2, None: 1 - p}, {None: 1}
    states = {
        "tanh": [tanh] * factors,
        "sigmoid": [{0: p / 2, 1: p / 2, None: 1 - p}] * factors,
        "relu": [{0: p, None: 1 - p}] * factors,
        "linear": [linear],
        "tanh-glu": [tanh, linear],
        "bilinear": [linear, linear],
    }[activation]
    total = 0.0
    for combination in itertools.product(*states):
        if 0 in combination or None not in combination:
            total += math.prod(of_factor[state] for of_factor, state in zip(states, combination, strict=True))
    return total


@pytest.mark.parametrize(("activation", "factors"), CASES)
def test_formulas_are_the_enumeration(activation, factors):
    """Would catch: a slip in a derivation, most of all in the sigmoid's product of three."""
    for p in saturation.PROBABILITIES:
        assert saturation.theory(activation, p, factors) == pytest.approx(enumerated(activation, p, factors), abs=1e-12)


def test_formulas_of_two_are_table_1():
    """Would catch: a formula under the wrong activation."""
    p = 0.3
    assert saturation.theory("tanh", p, 2) == pytest.approx(0.09)
    assert saturation.theory("sigmoid", p, 2) == pytest.approx(0.3)
    assert saturation.theory("relu", p, 2) == pytest.approx(0.51)
    assert saturation.theory("sigmoid", p, 3) == pytest.approx(1.5 * 0.3 - 0.75 * 0.09 + 0.25 * 0.027)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(("activation", "factors"), CASES)
def test_simulation_agrees_with_the_formula(activation, factors, p):
    """Would catch: a count that depends on the neurons' scale, factors that are not independent, one-sided ends.

    Within four standard errors of a binomial count, and neuron by neuron against where the factors saturate."""
    neurons = 600
    generator = torch.Generator().manual_seed(round(100 * p) + factors)
    z, ends = saturation.simulate(activation, p, factors, generator, neurons=neurons)
    dead = metrics.dead_neurons(z, generator=generator)
    assert torch.equal(dead, saturation.must_be_dead(activation, ends))
    expected = enumerated(activation, p, factors)
    assert abs(dead.float().mean() - expected) <= 4 * math.sqrt(expected * (1 - expected) / neurons)


def test_saturated_neurons_are_constant_and_the_others_are_not():
    """Would catch: a bias that does not saturate, or saturates to the wrong end."""
    generator = torch.Generator().manual_seed(0)
    for activation, limits in {"tanh": (-1, 1), "sigmoid": (0, 1), "relu": (0, None)}.items():
        z, (ends,) = saturation.simulate(activation, 0.5, 1, generator, neurons=300)
        for end, limit in zip((-1, 1), limits, strict=True):
            if limit is None:
                assert not (ends == end).any()
            else:
                torch.testing.assert_close(
                    z[:, ends == end], torch.full_like(z[:, ends == end], limit), atol=0.01, rtol=0
                )
        assert (z[:, ends == 0].std(dim=0) > 0.2).all()


def test_dead_and_living_are_far_from_the_threshold():
    """Would catch: a simulation whose result is an artifact of omega."""
    for row in saturation.margins(torch.Generator().manual_seed(1)):
        assert row["highest_alive"] < 15, row
        assert row["lowest_dead"] > 80, row


def test_what_is_left_of_a_product():
    """Would catch: factors in the wrong order, a large bias taken for a dead neuron, a variance that forgets a mean."""
    rows = {(row["activation"], row["large"]): row for row in saturation.what_is_left(torch.Generator().manual_seed(2))}
    # By hand for the linear factors: A x has a variance of 4, and the square of a large bias has a mean of 525.
    assert rows["bilinear", "neither"]["derived"] == pytest.approx(4)
    assert rows["bilinear", "one"]["derived"] == pytest.approx(math.sqrt(525 * 4 + 16))
    assert rows["bilinear", "both"]["derived"] == pytest.approx(math.sqrt(2 * 525 * 4 + 16))
    assert rows["tanh-glu", "the tanh"]["derived"] == rows["tanh-glu", "both"]["derived"] == pytest.approx(2)
    assert rows["tanh", "both"]["derived"] == 0
    for (activation, large), row in rows.items():
        is_dead = (activation, large) == ("tanh", "both")
        assert (row["lowest_peak"] >= 20, row["highest_peak"] >= 20) == (is_dead, is_dead)
        assert row["simulated"] == pytest.approx(row["derived"], rel=0.05, abs=1e-6), (activation, large)
    # What behind a saturated tanh is left of a GLU is its linear unit; of a bilinear product, all but (A1 x) (A2 x).
    for large in ("the tanh", "both"):
        assert rows["tanh-glu", large]["linear"] > 0.999
    for row, squares in (("one", 525), ("both", 1050)):
        assert rows["bilinear", row]["linear"] == pytest.approx(squares / (squares + 4), abs=0.004)
    assert all(abs(rows[activation, "neither"]["linear"]) < 0.01 for activation in ("tanh", "tanh-glu", "bilinear"))


def by_hand(activation, layers, x, below, upstream):
    """Gradients of Section 3.2's products, from its formulas in numpy's double precision."""
    f = {"tanh": np.tanh, "sigmoid": lambda a: 1 / (1 + np.exp(-a))}[activation]
    slope = {"tanh": lambda a: 1 / np.cosh(a) ** 2, "sigmoid": lambda a: f(a) * (1 - f(a))}[activation]
    h = x @ below[0].T + below[1]
    (a1, b1), (a2, b2) = layers
    first, second = h @ a1.T + b1, h @ a2.T + b2
    to_first = upstream * slope(first) * f(second)  # g'(x) h(x)
    to_second = upstream * f(first) * slope(second)  # g(x) h'(x)
    return {"z_enc": to_first.T @ h, "z_star": to_second.T @ h, "below": (to_first @ a1 + to_second @ a2).T @ x}


@pytest.mark.parametrize("bias", [-3.0, 0.0, 4.0])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_gradients_are_section_3s_formulas(activation, bias):
    """Would catch: a bias set on the wrong factor, gradients of another layer, a loss that weighs differently."""
    norms = saturation.gradient_norms(f"{activation}-lan", bias, observations=40, features=8)
    torch.manual_seed(0)
    below = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(below.weight)
    hidden = Hidden(REPRESENTATIONS[f"{activation}-lan"], 512, lambda outputs: torch.nn.Linear(8, outputs))
    enc, star = (factor[0] for factor in hidden.factors.values())
    enc.bias.data.fill_(bias)
    star.bias.data.zero_()
    x = torch.randn(40, 8)
    upstream = torch.randn(40, 512)
    layers = [(layer.weight, layer.bias) for layer in (below, enc, star)]
    below, *factors = [tuple(p.detach().double().numpy() for p in pair) for pair in layers]
    expected = by_hand(activation, factors, x.double().numpy(), below, upstream.double().numpy())
    for name, gradient in expected.items():
        assert norms[name] == pytest.approx(np.linalg.norm(gradient), rel=1e-4), name


def test_section_3s_argument():
    """Would catch: a product that lets nothing through where the paper says it does, or the other way round."""
    for end in (-10.0, 10.0):
        unsaturated, saturated = saturation.gradient_norms("tanh", 0.0), saturation.gradient_norms("tanh-lan", end)
        assert saturation.gradient_norms("tanh", end)["below"] < 1e-6 * unsaturated["below"]
        assert saturated["z_star"] == pytest.approx(unsaturated["z_enc"], rel=0.1)
        assert saturated["z_enc"] < 1e-6 * unsaturated["z_enc"]
    unsaturated = saturation.gradient_norms("sigmoid", 0.0)
    low, high = (saturation.gradient_norms("sigmoid-lan", end) for end in (-10.0, 10.0))
    assert max(low["z_star"] / unsaturated["z_enc"], low["below"] / unsaturated["below"]) < 1e-3
    assert high["z_star"] == pytest.approx(unsaturated["z_enc"], rel=0.1)


def test_recorded_numbers_are_this_codes():
    """Would catch: a record from other code, a column that is not what it says."""
    with (ROOT / "results" / "saturation.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == len(CASES) * len(saturation.PROBABILITIES)
    off = []
    for row in rows:
        expected = enumerated(row["activation"], float(row["p"]), int(row["factors"]))
        assert float(row["theory"]) == pytest.approx(expected, abs=1e-5)
        if 0 < expected < 1:
            error = math.sqrt(expected * (1 - expected) / saturation.NEURONS)
            assert float(row["standard_error"]) == pytest.approx(error, rel=1e-3)
            off.append(abs(float(row["simulated"]) - expected) / error)
        else:
            assert float(row["simulated"]) == expected
    assert max(off) < 4
    assert 0.55 < np.mean(np.array(off) < 1) < 0.8  # 0.68 of a normal distribution


@pytest.mark.slow
def test_command_line(tmp_path):
    """Would catch: results written elsewhere, a help text without the flag, a traceback for a bad folder."""
    done = run_script("experiments/saturation.py", "--help")
    assert done.returncode == 0
    assert "--out-dir PATH" in done.stdout
    file = tmp_path / "file"
    file.touch()
    done = run_script("experiments/saturation.py", "--out-dir", file / "below")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out-dir")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_report_and_figures(tmp_path, monkeypatch, capsys):
    """Would catch: a table or figure that drops an activation."""
    monkeypatch.setattr(saturation, "OBSERVATIONS", 64)
    (tmp_path / "figures").mkdir()
    saturation.main(tmp_path)
    text = capsys.readouterr().out
    for activation in saturation.ACTIVATIONS:
        assert text.count(f"| {activation} | 3 |") == 3
    assert text.count("| linear | 1 |") == 2
    for activation in saturation.CONTROLS:
        assert text.count(f"| {activation} | 2 |") == 2
    for name in ("saturation", "saturation_gradients"):
        assert (tmp_path / f"{name}.csv").read_text()
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
