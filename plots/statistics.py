"""Numbers of runs and of studies: pure functions of arrays, each with its source."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from plots.events import Points

LAST_GAMES = 100  # a score is the mean return of this many games
RESAMPLES = 5000  # of the bootstrap
CONFIDENCE = 0.95  # of every interval

Curves = dict[str, dict[int, np.ndarray]]  # by game and seed, (grid,) each
ByGame = Mapping[str, Mapping[int, float]]  # one number per game and seed


# ------------------------------------------------------------------------------------------------- scores


def score_curve(games: Points, grid: np.ndarray) -> np.ndarray:
    """Mean return of the last 100 games that had ended by each agent step; of all so far before the hundredth.

    Args:
        games: steps ascending, returns.
        grid: (grid,) agent steps.

    Returns:
        (grid,), NaN before the first game's end.
    """
    total = np.append(0.0, np.cumsum(games["value"], dtype=float))
    stop = np.searchsorted(games["step"], grid, side="right")
    start = np.maximum(stop - LAST_GAMES, 0)
    return np.where(stop > 0, (total[stop] - total[start]) / np.maximum(stop - start, 1), np.nan)


def normalized(score: Any, extremes: tuple[float, float] | None) -> Any:
    """A score between two others, paper's Eq. 6 and 7: 0 at the first, 1 at the second.

    Args:
        score: float or array of any shape.
        extremes: (0's score, 1's score).

    Returns:
        As `score`; NaN without extremes, or where they are the same.
    """
    if extremes is None or extremes[0] == extremes[1]:
        return np.full_like(score, np.nan) if isinstance(score, np.ndarray) else np.nan
    return (score - extremes[0]) / (extremes[1] - extremes[0])


class Scale(NamedTuple):
    """What 0 and 1 of a normalised score are."""

    low: float
    high: float
    since: int | None  # agent step from which on ReLU's curve was looked at; None: all of it


def hundredth_game(games: Points) -> float:
    """Agent step at which the hundredth game ended; inf for a run without one."""
    return float(games["step"][LAST_GAMES - 1]) if len(games) >= LAST_GAMES else np.inf


def scale_of(curves: Sequence[np.ndarray], grid: np.ndarray, since: float) -> Scale | None:
    """Min and max of Eq. 6, of the ReLU baseline's seed-mean curve.

    Args:
        curves: (grid,) of each seed.
        grid: agent steps.
        since: agent step at which the last of the seeds ended its hundredth game. Before it a few games make the mean,
            and they would set the zero. Where no point lies behind it, the whole curve counts.

    Returns:
        None where no point has a value in every curve.
    """
    if settled := extremes_of_mean([curve[grid >= since] for curve in curves]):
        return Scale(*settled, int(since))
    whole = extremes_of_mean(curves)
    return Scale(*whole, None) if whole else None


def extremes_of_mean(curves: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Lowest and highest value of the seed-mean curve, the min and max of Eq. 6 ("single values", Appendix D.1).

    Args:
        curves: (grid,) each, NaN where a run has no value.

    Returns:
        None where no point has a value in every curve.
    """
    mean = np.mean(curves, axis=0) if len(curves) else np.empty(0)
    mean = mean[~np.isnan(mean)]
    return (float(mean.min()), float(mean.max())) if len(mean) else None


def curve_of_each_seed(curves: Curves) -> dict[int, np.ndarray]:
    """Mean over games, (grid,), of each seed that every game has.

    Args:
        curves: at least one.
    """
    common = set.intersection(*(set(seeds) for seeds in curves.values()))
    return {seed: np.mean([seeds[seed] for seeds in curves.values()], axis=0) for seed in sorted(common)}


def line_and_band(curves: Curves) -> tuple[np.ndarray, np.ndarray | None]:
    """What a figure shows of a group of runs.

    Args:
        curves: at least one.

    Returns:
        The mean over games of the mean over seeds, (grid,), NaN where a run has no value; and the standard deviation
        (ddof 1) over `curve_of_each_seed`, None for fewer than two.
    """
    line = np.mean([np.mean(list(seeds.values()), axis=0) for seeds in curves.values()], axis=0)
    by_seed = list(curve_of_each_seed(curves).values())
    return line, np.std(by_seed, axis=0, ddof=1) if len(by_seed) > 1 else None


# --------------------------------------------------------------------------------------------- aggregates


def aggregates(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean, median and interquartile mean of a study's scores (Agarwal et al. 2021, Section 4.3).

    Args:
        games: the scores of each game's runs along `axis`.

    Returns:
        (3, ...): mean over games of the mean over runs, median over games of it, mean of the middle half of all runs.
    """
    means = np.stack([game.mean(axis=axis) for game in games])
    iqm = stats.trim_mean(np.concatenate(games, axis=axis), 0.25, axis=axis)
    return np.stack([means.mean(axis=0), np.median(means, axis=0), iqm])


def probability_of_improvement(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over games of P(X > Y) + P(X = Y) / 2, the Mann-Whitney U over n m (Agarwal et al. 2021, Section 4.3).

    Args:
        games: first the scores X of each game's runs along the last axis, then in the same order the scores Y.

    Returns:
        (...), between 0 and 1.
    """
    half = len(games) // 2
    wins = [
        ((x[..., :, None] > y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :])).mean(axis=(-2, -1))
        for x, y in zip(games[:half], games[half:], strict=True)
    ]
    return np.mean(wins, axis=0)


def interval(statistic: Callable, games: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the stratified bootstrap: runs are drawn anew within each game.

    Few runs per game make it too narrow: resampling n runs has (n - 1) / n of their variance.

    Args:
        statistic: of arrays like `games`, e.g. `aggregates`.
        games: (runs,) each.

    Returns:
        Lower and upper ends, shaped as the statistic; NaN where a game has a single run.
    """
    point = statistic(*games)
    if min(map(len, games)) < 2:
        return np.full_like(point, np.nan), np.full_like(point, np.nan)
    found = stats.bootstrap(
        games, statistic, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    )
    return found.confidence_interval.low, found.confidence_interval.high


# ----------------------------------------------------------------------------------------- paired seeds


class Difference(NamedTuple):
    """First minus second, over pairs of runs of the same game and seed."""

    value: float  # mean over games of the mean over the game's pairs; NaN without a pair
    low: float  # ends of the 95 % interval; NaN where no game has two pairs
    high: float
    pairs: int
    games: int


def paired_difference(differences: ByGame) -> Difference:
    """Mean of paired differences with its 95 % interval: Student's t over the paired seeds within each game.

    The mean over games of the games' means has the variance sum_g(s_g^2 / n_g) / games^2, s_g^2 the variance (ddof 1)
    over the n_g seeds of game g; degrees of freedom after Welch and Satterthwaite, n - 1 for a single game. The games
    are taken as they are: the interval speaks of other seeds, not of other games. A game with one pair has no variance
    and stays out where others have two.

    Args:
        differences: by game and seed.
    """
    games = {game: np.array(list(seeds.values()), float) for game, seeds in differences.items() if len(seeds)}
    repeated = {game: values for game, values in games.items() if len(values) > 1}
    used = repeated or games
    if not used:
        return Difference(np.nan, np.nan, np.nan, 0, 0)
    mean = float(np.mean([values.mean() for values in used.values()]))
    pairs = sum(map(len, used.values()))
    if not repeated:
        return Difference(mean, np.nan, np.nan, pairs, len(used))
    variances = np.array([values.var(ddof=1) / len(values) for values in used.values()])
    freedom = np.array([len(values) - 1 for values in used.values()])
    if variances.sum() == 0:
        return Difference(mean, mean, mean, pairs, len(used))
    degrees = variances.sum() ** 2 / np.sum(variances**2 / freedom)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, degrees) * np.sqrt(variances.sum()) / len(used))
    return Difference(mean, mean - half, mean + half, pairs, len(used))


def verdict(difference: Difference, claim: str) -> str:
    """What an interval says of a claim about first minus second.

    Args:
        claim: ">", ">=", "<" or "=".

    Returns:
        "confirmed" if the interval lies wholly on the claim's side of 0, "contradicted" if wholly on the other, "open"
        otherwise, or for fewer than two pairs. No interval confirms that two are equal.
    """
    if claim == "=":
        return "contradicted" if difference.low > 0 or difference.high < 0 else "open"
    low, high = (-difference.high, -difference.low) if claim == "<" else (difference.low, difference.high)
    if low > 0 or (claim == ">=" and low == 0):
        return "confirmed"
    return "contradicted" if high < 0 else "open"
