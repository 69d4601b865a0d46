import math

import numpy as np
import pytest
from conftest import ROOT
from plots_common import points
from scipy import stats

from plots import statistics


def test_score_curve_is_the_mean_of_the_last_hundred_games():
    """Against a plain loop; a game counts from the very step in which it ends."""
    rng = np.random.default_rng(2)
    steps = np.sort(rng.choice(np.arange(50, 5000), 350, replace=False))
    games = points(*zip(steps, rng.normal(20, 5, 350), strict=True))
    grid = np.linspace(0, 5000, 101)
    expected = [np.mean([v for s, v in games.tolist() if s <= g][-100:] or [math.nan]) for g in grid]
    np.testing.assert_allclose(statistics.score_curve(games, grid), expected, rtol=1e-6)
    at_its_end = statistics.score_curve(points((10, 3.0)), np.array([9.0, 10.0]))
    np.testing.assert_array_equal(at_its_end, [math.nan, 3.0])


def test_line_and_band_by_hand():
    """The band is over seeds, of the mean over games: neither over games nor over all runs."""
    curves = {"A": {1: np.array([0.0]), 2: np.array([2.0])}, "B": {1: np.array([10.0]), 2: np.array([16.0])}}
    line, band = statistics.line_and_band(curves)
    assert line == pytest.approx(7.0)
    assert band == pytest.approx(np.sqrt(8.0))  # of 5 and 9
    # A seed that lacks a game says nothing about the mean over games, but counts in its own.
    curves["A"][3] = np.array([4.0])
    line, band = statistics.line_and_band(curves)
    assert (line[0], band[0]) == pytest.approx((7.5, np.sqrt(8.0)))
    assert statistics.line_and_band({"A": {1: np.array([1.0])}})[1] is None


def test_aggregates_by_hand():
    games = [np.array([0.0, 1, 2, 3]), np.array([10.0, 10, 10, 14])]
    # Means by game: 1.5 and 11. The middle four of all eight: 2, 3, 10, 10.
    assert statistics.aggregates(*games).tolist() == [6.25, 6.25, 6.25]
    three = [np.array([0.0, 0]), np.array([1.0, 1]), np.array([8.0, 8])]
    # Sorted 0 0 1 1 8 8: a quarter of six, rounded down, is cut at each end.
    assert statistics.aggregates(*three).tolist() == [3.0, 1.0, 2.5]


def test_probability_of_improvement_by_hand_and_by_mann_whitney():
    x, y = [np.array([1.0, 3.0])], [np.array([2.0, 3.0])]
    # 1 loses to both, 3 beats 2 and ties with 3: 1.5 of 4.
    assert statistics.probability_of_improvement(*x, *y) == pytest.approx(0.375)
    rng = np.random.default_rng(3)
    xs, ys = [rng.integers(0, 6, 5).astype(float) for _ in range(3)], [rng.integers(0, 6, 4) * 1.0 for _ in range(3)]
    u = [stats.mannwhitneyu(a, b).statistic / 20 for a, b in zip(xs, ys, strict=True)]
    assert statistics.probability_of_improvement(*xs, *ys) == pytest.approx(np.mean(u))


def test_interval_resamples_within_games():
    """Games that differ much, seeds that do not: an interval that mixed games would be wide."""
    low, high = statistics.interval(statistics.aggregates, [np.full(5, 1.0), np.full(5, 100.0)])
    np.testing.assert_array_equal(low, high)
    assert low[0] == 50.5


def test_no_interval_from_a_single_run():
    low, high = statistics.interval(statistics.aggregates, [np.array([1.0]), np.array([1.0, 2.0])])
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_intervals_cover_the_truth_as_often_as_they_can(monkeypatch):
    """Means of 5 seeds in 6 games: resampling has 4/5 of the variance, so 95 % become 92 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(4)
    centre = np.arange(6.0)
    covered = []
    for _ in range(400):
        low, high = statistics.interval(statistics.aggregates, list(rng.normal(centre[:, None], 1, (6, 5))))
        covered.append((low < 2.5) & (high > 2.5))
    mean, median, iqm = np.mean(covered, axis=0)
    expected = 2 * stats.norm.cdf(1.96 * np.sqrt(4 / 5)) - 1
    assert mean == pytest.approx(expected, abs=0.045)
    assert min(median, iqm) > 0.85


@pytest.mark.parametrize(("games", "seeds", "stated"), [(8, 5, 0.90), (1, 5, 0.83), (2, 3, 0.80)])
def test_few_seeds_have_too_narrow_intervals_as_stated(games, seeds, stated, monkeypatch):
    """How often a mean's interval covers the truth, as docs/figures.md has it.

    Would catch: a bootstrap that became wider or narrower while the page still warns of the old one.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        low, high = statistics.interval(statistics.aggregates, list(rng.normal(size=(games, seeds))))
        covered += low[0] < 0 < high[0]
    assert covered / 300 == pytest.approx(stated, abs=0.05)
    assert f"{stated:.0%}".replace("%", " %") in (ROOT / "docs/figures.md").read_text()


def test_the_interval_of_an_improvement_covers_the_truth(monkeypatch):
    """Normal scores one standard deviation better than ReLU's are better with probability Phi(1 / sqrt(2)) = 0.76.

    Would catch: runs drawn over the games' borders, X and Y in each other's place.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(5)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = []
    for _ in range(300):
        games = list(rng.normal(1 + 3 * np.arange(6.0)[:, None], 1, (6, 5)))
        baseline = list(rng.normal(3 * np.arange(6.0)[:, None], 1, (6, 5)))
        low, high = statistics.interval(statistics.probability_of_improvement, games + baseline)
        covered.append(low < truth < high)
    assert 0.85 < np.mean(covered) < 0.98


# ----------------------------------------------------------------------------------------- paired seeds


def test_paired_difference_of_one_game_is_students_t():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975; 2) = 4.302653: 2 +- 2.484138.

    Would catch: a normal interval, or ddof 0.
    """
    found = statistics.paired_difference({"Pong": {1: 1.0, 2: 2.0, 3: 3.0}})
    assert found == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138, 3, 1), abs=1e-5)
    expected = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval(0.95)
    assert found[1:3] == pytest.approx((expected.low, expected.high))


def test_paired_difference_of_two_games_by_hand():
    """Games of 1, 3 (mean 2, variance 2) and of 10, 16 (mean 13, variance 18), two seeds each: the mean is 7.5, its
    variance (2/2 + 18/2) / 4 = 2.5, its degrees of freedom 10^2 / (1 + 81) = 1.219512.

    Would catch: seeds pooled over games (an interval that holds the games' difference), games weighted by runs.
    """
    found = statistics.paired_difference({"A": {1: 1.0, 2: 3.0}, "B": {1: 10.0, 2: 16.0}})
    half = stats.t.ppf(0.975, 100 / 82) * math.sqrt(2.5)
    assert found == pytest.approx((7.5, 7.5 - half, 7.5 + half, 4, 2))
    # A third seed in one game does not give that game more weight: means 2 and 13.
    assert statistics.paired_difference({"A": {1: 1.0, 2: 3.0, 3: 2.0}, "B": {1: 10.0, 2: 16.0}}).value == 7.5


def test_single_pairs_have_no_interval():
    """Would catch: a verdict from one pair, or a game of one pair counted as certain."""
    alone = statistics.paired_difference({"A": {1: 5.0}})
    assert (alone.value, alone.pairs, alone.games) == (5.0, 1, 1)
    assert math.isnan(alone.low)
    assert statistics.verdict(alone, ">") == "open"
    assert statistics.paired_difference({"A": {1: 1.0, 2: 2.0, 3: 3.0}, "B": {1: 99.0}})[0::3] == (2.0, 3)
    nothing = statistics.paired_difference({"A": {}})
    assert (nothing.pairs, statistics.verdict(nothing, "<")) == (0, "open")


@pytest.mark.parametrize(
    ("low", "high", "greater", "at_least", "less"),
    [
        (0.1, 0.3, "confirmed", "confirmed", "contradicted"),
        (-0.3, -0.1, "contradicted", "contradicted", "confirmed"),
        (-0.1, 0.1, "open", "open", "open"),
        (0.0, 0.2, "open", "confirmed", "open"),
    ],
)
def test_verdicts(low, high, greater, at_least, less):
    """Would catch: a verdict by the mean, or on the wrong side."""
    difference = statistics.Difference((low + high) / 2, low, high, 4, 2)
    assert [statistics.verdict(difference, claim) for claim in (">", ">=", "<")] == [greater, at_least, less]


def test_intervals_of_paired_differences_cover_the_truth():
    """Three seeds in two games, of very different spread: 95 % of intervals hold the true mean, or a few more."""
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(1000):
        games = {"A": rng.normal(1, 1, 3), "B": rng.normal(3, 4, 3)}
        found = statistics.paired_difference({name: dict(enumerate(values)) for name, values in games.items()})
        covered += found.low < 2 < found.high
    assert 0.93 < covered / 1000 < 0.99


def test_zero_and_one_are_set_from_the_hundredth_game_on():
    """Seeds' curves 0 8 2 4 and 0 6 4 2: means 0 7 3 3. The last of them ended its hundredth game at step 20.

    Would catch: a zero that one to five games set; the first seed's hundredth game; nothing at all where no seed has
    played a hundred.
    """
    grid = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    curves = [np.array([0.0, 1.0, 8.0, 2.0, 4.0]), np.array([0.0, 1.0, 6.0, 4.0, 2.0])]
    assert statistics.scale_of(curves, grid, 20) == (3.0, 7.0, 20)
    assert statistics.scale_of(curves, grid, math.inf) == (0.0, 7.0, None)
    assert statistics.scale_of(curves, grid, 50) == (0.0, 7.0, None)
    assert statistics.scale_of([], grid, 20) is None
    games = points(*((10 * i, 0.0) for i in range(1, 121)))
    assert statistics.hundredth_game(games) == 1000
    assert statistics.hundredth_game(games[:99]) == math.inf
