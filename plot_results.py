"""Run folders -> every figure and table of the paper that they allow. No training code, no network, no GPU.

python plot_results.py --runs-dir runs --out-dir figures
python plot_results.py --only fig05a fig06          (some of the figures)
python plot_results.py --allow-unfinished           (a look at runs that are still training)

What was left out, and why, stands on stderr; the rest in `index.html`, `results.md` and `results.csv` of the out
folder. Beyond the paper: interquartile means, bootstrap intervals and the probability of improvement (Agarwal et al.
2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice").
"""

import base64
import contextlib
import csv
import dataclasses
import hashlib
import html
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from google.protobuf.message import DecodeError
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MultipleLocator, PercentFormatter
from scipy import stats
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE

# Random and human score by game: the table that papers after 2016 share (Wang et al. 2016, "Dueling Network
# Architectures for Deep Reinforcement Learning"); that of Mnih et al. (2015) differs, e.g. in BeamRider.
ATARI_SCORES = Path(__file__).parent / "results" / "atari_scores.csv"

GRID_POINTS = 1001  # of the common grid of agent steps, from 0 to the end of the training
LAST_GAMES = 100  # a score is the mean of this many games
LENGTH_TOLERANCE = 0.01  # runs whose lengths differ by no more are equally long
RESAMPLES = 5000  # of the bootstrap
DEAD_THRESHOLD = 20.0  # omega of Appendix B.1
KDE_GAME, KDE_NEURONS = "Breakout", 16  # of Fig. 4, 10 and 11
WIDTH = 512  # of the representation
WIDER = {"wide-1024": 1024}

# Flags that leave every logged point as it is, or that tell the runs of a study apart.
HARMLESS_FLAGS = {
    *("num_threads", "cuda", "checkpoint_frequency", "runs_dir", "overwrite", "async_envs", "exp_name"),
    *("track", "wandb_project_name", "wandb_entity", "capture_video", "eval_episodes", "env_id", "activation", "seed"),
}

# Name, colour and dashes of every activation, the same everywhere: Okabe and Ito's palette, then Tol's muted one.
STYLES = {
    "relu": ("ReLU", "#000000", "-"),
    "tanh": ("Tanh", "#0072B2", (0, (5, 1.5))),
    "sigmoid": ("Sigmoid", "#009E73", (0, (4, 1.2, 1, 1.2))),
    "tanh-lan": ("Tanh (LaN)", "#D55E00", "-"),
    "layernorm": ("Tanh (LayerNorm)", "#CC79A7", (0, (1, 1))),
    "wide-1024": ("Tanh (1024)", "#56B4E9", (0, (6, 1.2, 1, 1.2, 1, 1.2))),
    "selu": ("SELU", "#882255", (0, (3, 1))),
    "tanh-addlan": ("Tanh (+LaN)", "#999933", (0, (4, 1.2, 1, 1.2))),
    "tanh-2xlan": ("Tanh (2×LaN)", "#E69F00", (0, (5, 1.5))),  # noqa: RUF001
    "relu-lan": ("ReLU (LaN)", "#7F7F7F", (0, (4, 1.2, 1, 1.2))),
    "sigmoid-lan": ("Sigmoid (LaN)", "#332288", (0, (1, 1))),
}
MAIN = ("relu", "tanh", "sigmoid", "tanh-lan")
# Probability that a product of two neurons dies, each of which dies with probability p (paper, Table 1).
LAN_LAWS = {
    "tanh": ("$p^2$", lambda p: p**2),
    "sigmoid": ("$p$", lambda p: p),
    "relu": ("$2p - p^2$", lambda p: 2 * p - p**2),
}
AXES = {
    "score": "score",
    "normalized_score": "normalised score",
    "human_normalized_score": "human-normalised score",
    "dead_neurons": "dead neurons (KDE)",
    "std_dead_neurons": "dead neurons (std < 0.001)",
    "effective_rank": "effective rank",
    "dead_factor": "dead neurons of the factors",
}


class BadInput(Exception):
    """What was asked for cannot be: exit code 2, nothing written."""


@dataclass
class Args:
    """Draw every figure and table of the paper that the runs found allow."""

    runs_dir: str = "runs"
    """folder of the run folders"""
    out_dir: str = "figures"
    """folder of what is drawn, and of the cache"""
    only: tuple[str, ...] = ()
    """beginnings of the names of what to draw, e.g. fig05a fig06; "tables" are results.csv and results.md"""
    allow_unfinished: bool = False
    """draw unfinished and shorter runs too; curves end where the shortest seed of a group ends"""


def tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- event files

Points = np.ndarray  # structured: "step" in agent steps, "value"
POINT = np.dtype([("step", "i8"), ("value", "f4")])


def masked_crc32c(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The check sums of many pieces of `data` at once, as TFRecord files hold them.

    Args:
        data: (bytes,) uint8.
        starts, lengths: (pieces,) int.

    Returns:
        (pieces,) uint32.
    """
    table = np.array(CRC_TABLE, np.uint32)
    order = np.argsort(-lengths, kind="stable")
    starts, falling = starts[order], -lengths[order]
    crc = np.full(len(starts), 0xFFFFFFFF, np.uint32)
    for i in range(-falling[0] if len(falling) else 0):
        longer = np.searchsorted(falling, -i)
        part = crc[:longer]
        crc[:longer] = table[(part ^ data[starts[:longer] + i]) & 0xFF] ^ (part >> 8)
    crc = ~crc
    sums = np.empty_like(crc)
    sums[order] = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    return sums


def read_records(content: bytes) -> tuple[list[bytes], int, int]:
    """The records of a TFRecord file; TensorBoard's own reader takes some four times as long.

    Returns:
        The whole records, the number of damaged ones between them, and the bytes at the end that hold no record.
    """
    starts, lengths = [], []
    position = 0
    while position + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        if position + 16 + length > len(content):
            break
        starts.append(position)
        lengths.append(length)
        position += 16 + length
    data = np.frombuffer(content, np.uint8)
    start, length = np.array(starts, np.int64), np.array(lengths, np.int64)

    def stored(at: np.ndarray) -> np.ndarray:
        return data[at[:, None] + np.arange(4)].view("<u4")[:, 0]

    # A wrong length leaves no way to find the next record.
    broken = np.flatnonzero(masked_crc32c(data, start, np.full_like(length, 8)) != stored(start + 8))
    if len(broken):
        position = int(start[broken[0]])
        start, length = start[: broken[0]], length[: broken[0]]
    whole = masked_crc32c(data, start + 12, length) == stored(start + 12 + length)
    records = [content[s + 12 : s + 12 + n] for s, n in zip(start[whole], length[whole], strict=True)]
    return records, int((~whole).sum()), len(content) - position


def read_events(files: Sequence[Path]) -> tuple[dict[str, Points], int, list[str]]:
    """Every point of a run's event files that the figures need.

    Args:
        files: in the order in which they were written.

    Returns:
        Points by tag (`charts/episodic_return` and `representation/...`), steps ascending; the last agent step of any
        training point; what was wrong, a phrase each.
    """
    found: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    problems = []
    for file in files:
        try:
            records, damaged, lost = read_records(file.read_bytes())
        except OSError as error:
            problems.append(f"{file.name} cannot be read ({error.strerror})")
            continue
        for record in records:
            try:
                event = Event.FromString(record)
            except DecodeError:
                damaged += 1
                continue
            if event.session_log.status == SessionLog.START:  # of a resumed run: what came later is void
                for tag, (steps, values) in found.items():
                    kept = [i for i, step in enumerate(steps) if step < event.step]
                    found[tag] = [steps[i] for i in kept], [values[i] for i in kept]
            for value in event.summary.value:
                if value.HasField("simple_value") and not value.tag.startswith("eval/"):
                    is_wanted = value.tag == "charts/episodic_return" or value.tag.startswith("representation/")
                    steps, values = found[value.tag if is_wanted else ""]
                    steps.append(event.step)
                    values.append(value.simple_value)
        if damaged:
            problems.append(f"{file.name}: {damaged} damaged records were skipped")
        if lost:
            problems.append(f"{file.name}: the last {lost:,} bytes are truncated or damaged")

    last_step = max((max(steps, default=0) for steps, _ in found.values()), default=0)
    found.pop("", None)
    points = {}
    for tag, (steps, values) in sorted(found.items()):
        tagged = np.empty(len(steps), POINT)
        tagged["step"], tagged["value"] = steps, values
        tagged = tagged[np.argsort(tagged["step"], kind="stable")]
        is_latest = np.append(tagged["step"][1:] != tagged["step"][:-1], True) if len(tagged) else []
        is_finite = np.isfinite(tagged["value"])
        if len(tagged) > np.sum(is_latest):
            problems.append(f"{tag}: {len(tagged) - np.sum(is_latest)} steps logged twice, the later value counts")
        if not is_finite.all():
            problems.append(f"{tag}: {np.sum(~is_finite)} NaN or infinite values left out")
        points[tag] = tagged[is_latest & is_finite]
    return {tag: tagged for tag, tagged in points.items() if len(tagged)}, last_step, problems


CACHE_FORMAT = 1


def read_run(folder: Path, cache: Path) -> tuple[dict[str, Points], int, list[str]]:
    """`read_events` of a run's folder, from `cache` where the event files are still those that it was made of."""
    try:
        files = sorted(file for file in folder.glob("events.out.tfevents.*") if file.is_file())
        stats_ = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        return {}, 0, [f"cannot be read ({error.strerror})"]
    key = json.dumps([CACHE_FORMAT, str(folder.absolute()), stats_])
    try:
        with np.load(cache, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            if about["key"] == key:
                points = {tag: content[f"points {i}"] for i, tag in enumerate(about["tags"])}
                return points, about["last_step"], about["problems"]
    except Exception:  # whatever is wrong with a cache, it is made again
        pass
    points, last_step, problems = read_events(files)
    about = json.dumps({"key": key, "tags": list(points), "last_step": last_step, "problems": problems})
    buffer = io.BytesIO()
    np.savez(buffer, about=about, **{f"points {i}": tagged for i, tagged in enumerate(points.values())})
    replace(cache, buffer.getvalue())
    return points, last_step, problems


def replace(path: Path, content: bytes) -> None:
    """Make or replace a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A run's folder, and what was read from it."""

    folder: Path
    algorithm: str  # dqn, ppo, or "" where config.json does not tell
    game: str
    activation: str
    seed: int
    args: dict[str, Any]
    finished: bool  # is there a model.pt?
    left_out: str = ""  # why it is not drawn
    agent_steps: int = 0
    points: dict[str, Points] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    curves: dict[str, np.ndarray] = field(default_factory=dict)  # (grid,) each, NaN where there is no value
    finals: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def planned_steps(self) -> int:
        planned = self.args.get("total_timesteps")
        return planned if type(planned) is int else self.agent_steps


RUN_NAME = re.compile(r"(?P<game>\w+)NoFrameskip-v4__.+__(?P<activation>[a-z0-9-]+)__(?P<seed>\d+)")


def find_runs(runs_dir: Path, out_dir: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, without their points, and a message on what else is there.

    Raises:
        BadInput: there is no such folder, or no run in it.
    """
    try:
        folders = sorted(path for path in runs_dir.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError as error:
        raise BadInput(f"--runs-dir {runs_dir}: {error.strerror}; name the folder that holds the run folders") from None
    runs, strangers = [], []
    for folder in folders:
        if folder.absolute() == out_dir.absolute():
            continue
        has_name = RUN_NAME.fullmatch(folder.name)
        try:
            config = json.loads((folder / "config.json").read_text())
            args = config["args"]
            game, seed = args["env_id"].removesuffix("NoFrameskip-v4"), int(args["seed"])
            algorithm, activation = config["algorithm"], args["activation"]
            if algorithm not in ("dqn", "ppo") or activation not in STYLES:
                raise ValueError
            finished = (folder / "model.pt").is_file()
            runs.append(Run(folder, algorithm, game, activation, seed, args, finished))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            if not has_name or has_name["activation"] not in STYLES:
                strangers.append(folder.name)
                continue
            reason = "config.json is missing or unreadable"
            runs.append(
                Run(folder, "", has_name["game"], has_name["activation"], int(has_name["seed"]), {}, False, reason)
            )
    if not runs:
        hint = "it is a run's folder itself: name its parent" if (runs_dir / "config.json").exists() else "train first"
        raise BadInput(f"--runs-dir {runs_dir} holds no run; {hint}")
    messages = [f"{len(strangers)} folders are no runs: {', '.join(strangers)}"] if strangers else []
    return runs, messages


def equally_long(steps: int, length: int) -> bool:
    return abs(steps - length) <= LENGTH_TOLERANCE * length


def usual_length(all_steps: Sequence[int]) -> int:
    """The most common number of agent steps, up to the tolerance; of equally common ones the largest."""
    lengths = Counter(all_steps)

    def support(length: int) -> int:
        return sum(n for other, n in lengths.items() if equally_long(other, length))

    return max(lengths, key=lambda length: (support(length), length))


def select_runs(runs: Sequence[Run], allow_unfinished: bool) -> dict[str, int]:
    """Say in `left_out` of each run why it is not drawn.

    Returns:
        The usual length in agent steps of each algorithm's runs.
    """
    for run in runs:
        if not run.left_out and not run.points:
            run.left_out = "no point in its event files" if run.finished else "unfinished, no point yet"
        elif not run.left_out and not run.finished and not allow_unfinished:
            run.left_out = "unfinished"
    lengths = {}
    for algorithm in ("dqn", "ppo"):
        candidates = [run for run in runs if run.algorithm == algorithm and not run.left_out]
        planned = usual_length([run.planned_steps for run in candidates]) if candidates else 0
        same = defaultdict(list)
        for run in candidates:
            same[run.game, run.activation, run.seed].append(run)
        for twins in same.values():
            # Two experiments of one seed are not two seeds; a quick try does not replace the study's run.
            best = max(twins, key=lambda run: (equally_long(run.planned_steps, planned), run.finished, run.agent_steps))
            for run in twins:
                if run is not best:
                    run.left_out = f"same seed as {best.name}"
        drawn = [run for run in candidates if not run.left_out]
        if drawn and allow_unfinished:
            lengths[algorithm] = max(run.agent_steps for run in drawn)
        elif drawn:
            length = lengths[algorithm] = usual_length([run.agent_steps for run in drawn])
            for run in drawn:
                if not equally_long(run.agent_steps, length):
                    run.left_out = f"other length than the usual {length:,} agent steps"
            lengths[algorithm] = max(run.agent_steps for run in drawn if not run.left_out)
    return lengths


def describe_runs(runs: Sequence[Run]) -> list[str]:
    """What of the study is left out, missing or mixed: a line each, many runs in one."""
    lines = []
    groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.left_out:
            reason = "same seed as another run" if run.left_out.startswith("same seed") else run.left_out
            entry = f"{run.name} ({run.left_out})" if reason != run.left_out else ""
            groups[run.algorithm, run.activation, reason][run.game].append(
                entry or f"{run.seed} at {run.agent_steps:,}"
            )
    for (algorithm, activation, reason), by_game in sorted(groups.items()):
        total = sum(map(len, by_game.values()))
        which = "; ".join(f"{game} {', '.join(seeds)}" for game, seeds in by_game.items())
        lines.append(f"left out, {algorithm or 'algorithm unknown'} {activation}, {total} run(s), {reason}: {which}")
    for (algorithm, activation), seeds in missing_runs(runs).items():
        by_game = defaultdict(list)
        for game, seed in seeds:
            by_game[game].append(str(seed))
        which = "; ".join(f"{game} {', '.join(found)}" for game, found in by_game.items())
        lines.append(f"missing, {algorithm} {activation}, {len(seeds)} run(s) that others have: {which}")
    for algorithm in ("dqn", "ppo"):
        drawn = [run for run in runs if run.algorithm == algorithm and not run.left_out]
        for flag in sorted({flag for run in drawn for flag in run.args} - HARMLESS_FLAGS):
            values = defaultdict(list)
            for run in drawn:
                values[json.dumps(run.args.get(flag))].append(run.name)
            if len(values) > 1:
                ranked = sorted(values.items(), key=lambda item: -len(item[1]))
                which = "; ".join(
                    f"{value} in {len(names)} run(s)"
                    + (f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if i else "")
                    for i, (value, names) in enumerate(ranked)
                )
                lines.append(f"mixed, {algorithm} runs differ in --{flag.replace('_', '-')}: {which}")
    for run in runs:
        lines += [f"damaged, {run.name}: {', '.join(run.problems)}"] if run.problems else []
    return lines


def missing_runs(runs: Sequence[Run]) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """(game, seed) that other activations of the algorithm have, and not even an unfinished run here."""
    missing = {}
    for algorithm in ("dqn", "ppo"):
        found = [run for run in runs if run.algorithm == algorithm]
        wanted = {(run.game, run.seed) for run in found}
        for activation in STYLES:
            has = {(run.game, run.seed) for run in found if run.activation == activation}
            if has and wanted - has:
                missing[algorithm, activation] = sorted(wanted - has)
    return missing


# ------------------------------------------------------------------------------------------------- scores


def score_curve(games: Points, grid: np.ndarray) -> np.ndarray:
    """Mean return of the last 100 games that had ended by each agent step; NaN before the first.

    Args:
        games: steps ascending, returns.
        grid: (grid,) agent steps.

    Returns:
        (grid,)
    """
    total = np.append(0.0, np.cumsum(games["value"], dtype=float))
    stop = np.searchsorted(games["step"], grid, side="right")
    start = np.maximum(stop - LAST_GAMES, 0)
    return np.where(stop > 0, (total[stop] - total[start]) / np.maximum(stop - start, 1), np.nan)


def normalized(score: Any, extremes: tuple[float, float] | None) -> Any:
    """Eq. 6 and 7: 0 at the first extreme, 1 at the second; NaN without extremes, or where they are the same."""
    if extremes is None or extremes[0] == extremes[1]:
        return np.full_like(score, np.nan) if isinstance(score, np.ndarray) else np.nan
    return (score - extremes[0]) / (extremes[1] - extremes[0])


def read_atari_scores() -> dict[str, tuple[float, float]]:
    """{game: (random, human)}"""
    with open(ATARI_SCORES, newline="") as file:
        rows = csv.DictReader(file)
        return {r["env_id"].removesuffix("NoFrameskip-v4"): (float(r["random"]), float(r["human"])) for r in rows}


def fill_curves(runs: Sequence[Run], lengths: dict[str, int]) -> list[str]:
    """Give each run its curves on the common grid and its final values; what has no score, as messages."""
    for run in runs:
        games = run.points.get("charts/episodic_return")
        if games is not None:
            run.finals["final_return"] = float(np.mean(games["value"][-LAST_GAMES:], dtype=float))
        for tag, points in run.points.items():
            if tag.startswith("representation/"):
                run.finals[tag.removeprefix("representation/")] = float(points["value"][-1])
        if "effective_rank" in run.finals:
            run.finals["rank_share"] = run.finals["effective_rank"] / WIDER.get(run.activation, WIDTH)
        if run.left_out:
            continue
        grid = np.linspace(0, lengths[run.algorithm], GRID_POINTS)
        # Equally long runs may have logged their last point a little earlier.
        end = run.agent_steps + LENGTH_TOLERANCE * lengths[run.algorithm] * run.finished
        after = grid > end
        if games is not None:
            run.curves["score"] = np.where(after, np.nan, score_curve(games, grid))
        for name in ("dead_neurons", "std_dead_neurons", "effective_rank", "z_enc", "z_star", "z_star2"):
            points = run.points.get(f"representation/{'dead_neurons_' * name.startswith('z_')}{name}")
            if points is not None:
                curve = np.interp(grid, points["step"], points["value"], left=np.nan)
                run.curves[name] = np.where(after, np.nan, curve)
        factors = [run.curves[name] for name in ("z_enc", "z_star", "z_star2") if name in run.curves]
        if factors:
            run.curves["dead_factor"] = np.mean(factors, axis=0)

    messages = []
    human = read_atari_scores()
    for algorithm in lengths:
        of_algorithm = [run for run in runs if run.algorithm == algorithm]
        for game in sorted({run.game for run in of_algorithm}):
            of_game = [run for run in of_algorithm if run.game == game]
            relu = [run.curves["score"] for run in of_game if run.activation == "relu" and "score" in run.curves]
            extremes = None
            if relu:
                # "Single values" of the baseline (Appendix D.1): of its seed-mean curve.
                seed_mean = np.mean(relu, axis=0)
                seed_mean = seed_mean[~np.isnan(seed_mean)]
                extremes = (float(seed_mean.min()), float(seed_mean.max())) if len(seed_mean) else None
            others = any(not run.left_out for run in of_game)
            if others and not relu:
                messages.append(f"no normalised score, {algorithm} {game}: no finished ReLU baseline with a score")
            elif others and (extremes is None or extremes[0] == extremes[1]):
                messages.append(f"no normalised score, {algorithm} {game}: the ReLU baseline's score never changes")
            if others and game not in human:
                messages.append(f"no human-normalised score, {game}: not in {ATARI_SCORES.name}")
            for run in of_game:
                for quantity, ends in (("normalized_score", extremes), ("human_normalized_score", human.get(game))):
                    if "final_return" in run.finals:
                        run.finals[quantity] = float(normalized(run.finals["final_return"], ends))
                    if "score" in run.curves and not np.isnan(normalized(0.0, ends)):
                        run.curves[quantity] = normalized(run.curves["score"], ends)
    return messages


Curves = dict[str, dict[int, np.ndarray]]  # by game and seed, (grid,) each


def line_and_band(curves: Curves) -> tuple[np.ndarray, np.ndarray | None]:
    """What a figure shows of a group of runs.

    Args:
        curves: at least one.

    Returns:
        The mean over games of the mean over seeds, (grid,), NaN where a run has no value; and the standard deviation
        (ddof 1) over the seeds that every game has of the mean over games, None for fewer than two.
    """
    line = np.mean([np.mean(list(seeds.values()), axis=0) for seeds in curves.values()], axis=0)
    common = set.intersection(*(set(seeds) for seeds in curves.values()))
    by_seed = [np.mean([seeds[seed] for seeds in curves.values()], axis=0) for seed in sorted(common)]
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

    Returns:
        Lower and upper ends, shaped as the statistic; NaN where a game has a single run.
    """
    point = statistic(*games)
    if min(map(len, games)) < 2:
        return np.full_like(point, np.nan), np.full_like(point, np.nan)
    found = stats.bootstrap(games, statistic, n_resamples=RESAMPLES, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


# ------------------------------------------------------------------------------------------------ figures

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 8},
        **{"legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6},
        **{"lines.linewidth": 1.4, "legend.frameon": False, "legend.handlelength": 2.8, "legend.columnspacing": 1.2},
        **{"pdf.fonttype": 42, "savefig.dpi": 200},  # a PDF's text stays text
    }
)
BLACK, GREY, LIGHT = "#000000", "#666666", "#BBBBBB"


@dataclass
class Study:
    """The runs that are drawn, and the length in agent steps of each algorithm's grid."""

    runs: list[Run]
    lengths: dict[str, int]

    def curves(self, algorithm: str, activation: str, quantity: str, game: str | None = None) -> Curves:
        """Of the runs that have this quantity, in one game or in all."""
        found: Curves = defaultdict(dict)
        for run in self.runs:
            is_wanted = (run.algorithm, run.activation) == (algorithm, activation) and game in (None, run.game)
            if is_wanted and quantity in run.curves:
                found[run.game][run.seed] = run.curves[quantity]
        return dict(found)

    def grid(self, algorithm: str) -> np.ndarray:
        return np.linspace(0, self.lengths[algorithm], GRID_POINTS)


Drawing = tuple[Figure | None, list[str]]  # and what it lacks


@dataclass(frozen=True)
class Plot:
    """A figure: what it shows of which runs."""

    draw: Callable[[Study, "Plot"], Drawing]
    caption: str
    algorithm: str = "dqn"
    activations: tuple[str, ...] = MAIN
    quantities: tuple[str, ...] = ()  # one panel each


def count(curves: Curves) -> int:
    return sum(map(len, curves.values()))


def draw_group(axes: Axes, grid: np.ndarray, curves: Curves, **style: Any) -> None:
    """Line and band."""
    line, band = line_and_band(curves)
    axes.plot(grid, line, **style)
    if band is not None:
        axes.fill_between(grid, line - band, line + band, color=style["color"], alpha=0.15, linewidth=0)


def draw_lines(axes: Axes, study: Study, plot: Plot, quantity: str, game: str | None = None, **style: Any) -> list[str]:
    """A line and a band per activation; returns the activations without runs."""
    groups = {name: study.curves(plot.algorithm, name, quantity, game) for name in plot.activations}
    games = {found for curves in groups.values() for found in curves}
    for activation, curves in groups.items():
        if not curves:
            continue
        name, colour, dashes = STYLES[activation]
        label = f"{name}, {count(curves)} run{'s' * (count(curves) > 1)}"
        if len(curves) < len(games):
            label += f", {len(curves)} of {len(games)} games"
        draw_group(
            axes, study.grid(plot.algorithm), curves, **({"color": colour, "linestyle": dashes, "label": label} | style)
        )
    finish_axes(axes, study.lengths[plot.algorithm], quantity)
    return [activation for activation, curves in groups.items() if not curves]


def finish_axes(axes: Axes, length: int, quantity: str) -> None:
    axes.set(xlim=(0, length), xlabel="agent steps", ylabel=AXES[quantity])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.locator_params(axis="x", nbins=5)
    if "dead" in quantity:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif quantity == "effective_rank":
        axes.set_ylim(bottom=0)
        share = axes.secondary_yaxis("right", functions=(lambda rank: rank / WIDTH, lambda share: share * WIDTH))
        share.set_ylabel("rank / width")
        share.spines["right"].set_visible(True)


STD_DEAD, STD_DEAD_LABEL = {"linestyle": ":", "linewidth": 1.0}, "dead by std < 0.001"


def draw_panels(study: Study, plot: Plot) -> Drawing:
    """One panel per quantity, side by side, with one legend."""
    panels = len(plot.quantities)
    figure = Figure((3.4, 2.9) if panels == 1 else (2.6 * panels, 2.6), layout="constrained")
    legend: dict[str, Any] = {}
    lacking: dict[str, list[str]] = {}
    for axes, quantity in zip(figure.subplots(1, panels, squeeze=False)[0], plot.quantities, strict=True):
        lacking[quantity] = draw_lines(axes, study, plot, quantity)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
        if quantity == "dead_neurons" and "std_dead_neurons" not in plot.quantities:
            draw_lines(axes, study, plot, "std_dead_neurons", label=None, **STD_DEAD)
            legend[STD_DEAD_LABEL] = Line2D([], [], color=GREY, **STD_DEAD)
            axes.set_ylabel(AXES[quantity])
    if all(len(names) == len(plot.activations) for names in lacking.values()):
        return None, [f"no run with a {' or '.join(AXES[quantity] for quantity in plot.quantities)}"]
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2 if panels == 1 else 4)
    return figure, [
        f"no {STYLES[name][0]}" for name in plot.activations if any(name in names for names in lacking.values())
    ]


def draw_games(study: Study, plot: Plot) -> Drawing:
    """Every game on its own: the score as it is."""
    groups = {name: study.curves(plot.algorithm, name, "score") for name in plot.activations}
    games = sorted({game for curves in groups.values() for game in curves})
    if not games:
        return None, ["no run with a score"]
    columns = min(len(games), 4)
    rows = -(-len(games) // columns)
    figure = Figure((max(3.4, 1.9 * columns), max(2.9, 1.6 * rows + 0.6)), layout="constrained")
    lacking = []
    for place, game in enumerate(games):
        axes = figure.add_subplot(rows, columns, place + 1)
        lacking += [f"no {STYLES[name][0]} in {game}" for name in draw_lines(axes, study, plot, "score", game)]
        axes.set_title(game)
        axes.locator_params(axis="x", nbins=3 if columns > 1 else 5)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("agent steps" if place + columns >= len(games) else "")
        axes.set_ylabel("" if place % columns else "score")
    handles = []
    for activation, curves in groups.items():
        if curves:
            name, colour, dashes = STYLES[activation]
            fewest, most = min(map(len, curves.values())), max(map(len, curves.values()))
            each = f"{most} run{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} runs"
            handles.append(Line2D([], [], color=colour, linestyle=dashes, label=f"{name}, {each} a game"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if columns > 2 else 2)
    return figure, lacking


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


LAYERS = {"z": "$z$", "z_enc": "$z^{enc}$", "z_star": "$z^*$"}
FACTOR_STYLES = {"z_enc": ("#7A3500", "-"), "z_star": ("#F2A366", (0, (4, 1)))}


def read_activations(study: Study, algorithm: str, activation: str, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """{layer: (n, neurons)} of the lowest seed's run on KDE_GAME that has a whole activations.npz; {} without one."""
    wanted = (algorithm, KDE_GAME, activation)
    for run in sorted(study.runs, key=lambda run: run.seed):
        if (run.algorithm, run.game, run.activation) == wanted:
            try:
                with np.load(run.folder / "activations.npz", allow_pickle=False) as file:
                    sample = {layer: np.asarray(file[layer], float)[:, :KDE_NEURONS] for layer in layers}
            except Exception:  # missing, truncated, another program's
                continue
            if all(part.ndim == 2 and len(part) > 1 and np.isfinite(part).all() for part in sample.values()):
                return sample
    return {}


def draw_densities(study: Study, plot: Plot) -> Drawing:
    """Blocks of 4 x 4 neurons; a quantity names the activation and the layers of a block."""
    blocks, lacking = [], []
    for activation, *layers in map(str.split, plot.quantities):
        if sample := read_activations(study, plot.algorithm, activation, layers):
            blocks.append((activation, sample))
        else:
            lacking.append(f"no {STYLES[activation][0]} run on {KDE_GAME} with a whole activations.npz")
    lacking = list(dict.fromkeys(lacking))
    if not blocks:
        return None, lacking
    columns = 2 if len(blocks) == 4 else len(blocks)
    rows = -(-len(blocks) // columns)
    figure = Figure((2.4 * columns, 2.7 * rows))
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    for part, (activation, sample) in zip(parts, blocks, strict=True):
        draw_block(part, activation, sample)
    return figure, lacking


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
            colour, dashes = FACTOR_STYLES.get(layer, (STYLES[activation][1], "-"))
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
            told = "dead" if all(dead) else "one dead"
            axes.text(left + 0.98, bottom + 0.97, told, va="top", ha="right", fontsize=5, color="#A00000")
        for tick in ticks if bottom == 0 else ():
            place = left + (tick - low) / (high - low)
            axes.plot([place, place], [-0.03, 0], color=BLACK, linewidth=0.8)
            axes.text(place, -0.05, f"{tick}".replace("-", "\u2212"), va="top", ha="center", fontsize=5.5)
    part.suptitle(f"{STYLES[activation][0]}: {' and '.join(LAYERS[layer] for layer in sample)}", y=0.98)
    if len(sample) > 1:
        styles = {LAYERS[layer]: FACTOR_STYLES[layer] for layer in sample}
        handles = [Line2D([], [], color=style[0], linestyle=style[1], label=label) for label, style in styles.items()]
        part.legend(handles=handles, loc="lower center", ncols=2, borderaxespad=0)


def draw_dying(study: Study, plot: Plot) -> Drawing:
    """For each f: dead neurons over training without and with a LaN, and below it the law of Table 1."""
    groups = {name: study.curves(plot.algorithm, name, "dead_neurons") for name in plot.activations}
    lacking = [f"no {STYLES[name][0]}" for name, curves in groups.items() if not curves]
    if len(lacking) == len(groups):
        return None, ["no run with dead neurons"]
    grid = study.grid(plot.algorithm)
    figure = Figure((6.9, 4.6), layout="constrained")
    handles = []
    for column, (base, (formula, law)) in enumerate(LAN_LAWS.items()):
        lan = f"{base}-lan"
        factors = study.curves(plot.algorithm, lan, "dead_factor")
        top, bottom = figure.add_subplot(2, 3, column + 1), figure.add_subplot(2, 3, column + 4)
        for activation in (base, lan):
            name, colour, dashes = STYLES[activation]
            if curves := groups[activation]:
                draw_group(top, grid, curves, color=colour, linestyle=dashes)
                label = f"{name}, {count(curves)} run{'s' * (count(curves) > 1)}"
                handles.append(Line2D([], [], color=colour, linestyle=dashes, label=label))
            if curves := study.curves(plot.algorithm, activation, "std_dead_neurons"):
                draw_group(top, grid, curves, color=colour, **STD_DEAD)
        if factors:
            draw_group(top, grid, factors, color=LIGHT, linestyle="-", zorder=1, linewidth=2.4)
        finish_axes(top, study.lengths[plot.algorithm], "dead_neurons")
        top.set_title(f"{STYLES[base][0]} without and with a LaN")

        p = np.linspace(0, 1, 101)
        bottom.plot(p, p, color=LIGHT, linewidth=0.8, linestyle="--")
        bottom.plot(p, law(p), color=BLACK, linewidth=1.0)
        bottom.set_title(f"predicted: {formula}")
        colour = STYLES[lan][1]
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
    return figure, lacking


BAND = "Line: mean over games and seeds; band: standard deviation over seeds of the mean over games."
SCORE = f"Scores are the mean of the last {LAST_GAMES} games; 0 and 1 are the lowest and highest point of ReLU's curve."
RANKS = "Effective rank (99 % of the singular values' sum) of z; right-hand axis: as a share of the 512 neurons."
GAME_SCORE = f"Mean score of the last {LAST_GAMES} games. Line and band: mean and standard deviation over seeds."
DENSITY = (
    f"Kernel densities of neurons 1 to {KDE_NEURONS} after training DQN on {KDE_GAME} (lowest seed), each scaled to "
    f"its own peak; dead: the peak reaches {DEAD_THRESHOLD:.0f}."
)
FIGURES = {
    "fig01_dqn_relu_tanh": Plot(
        draw_panels,
        f"DQN with a ReLU or a tanh representation. {SCORE} {BAND}",
        "dqn",
        ("relu", "tanh"),
        ("normalized_score",),
    ),
    "fig04_dqn_densities": Plot(
        draw_densities, f"Representation z without and with a LaN. {DENSITY}", quantities=("tanh z", "tanh-lan z")
    ),
    "fig05a_dqn_normalized": Plot(draw_panels, f"DQN. {SCORE} {BAND}", quantities=("normalized_score",)),
    "fig05b_dqn_ablations": Plot(
        draw_panels,
        f"DQN against layer normalisation and twice the width. {SCORE} {BAND}",
        activations=("relu", "tanh", "tanh-lan", "layernorm", "wide-1024"),
        quantities=("normalized_score",),
    ),
    "fig06a_dqn_dead_neurons": Plot(
        draw_panels,
        "Dead neurons of z while DQN trains: by the paper's kernel density (left), which depends on the activation's "
        f"scale, and by a standard deviation below 0.001 (right). {BAND}",
        quantities=("dead_neurons", "std_dead_neurons"),
    ),
    "fig06b_dqn_effective_rank": Plot(draw_panels, f"DQN. {RANKS} {BAND}", quantities=("effective_rank",)),
    "fig07_dqn_variants": Plot(
        draw_panels,
        f"DQN with SELU, a sum of two tanh layers (+LaN) and a product of three (2×LaN). {SCORE} {BAND}",  # noqa: RUF001
        activations=("relu", "selu", "tanh-lan", "tanh-addlan", "tanh-2xlan"),
        quantities=("normalized_score",),
    ),
    "fig08a_ppo_normalized": Plot(draw_panels, f"PPO. {SCORE} {BAND}", "ppo", quantities=("normalized_score",)),
    "fig08b_ppo_effective_rank": Plot(draw_panels, f"PPO. {RANKS} {BAND}", "ppo", quantities=("effective_rank",)),
    "fig10_dqn_factor_densities": Plot(
        draw_densities,
        f"The factors of a LaN, their product, and tanh without a LaN. {DENSITY}",
        quantities=("tanh-lan z_enc z_star", "tanh-lan z", "tanh z"),
    ),
    "fig11_dqn_sigmoid_densities": Plot(
        draw_densities,
        f"Representation z of tanh and sigmoid, without and with a LaN. {DENSITY}",
        quantities=("tanh z", "tanh-lan z", "sigmoid z", "sigmoid-lan z"),
    ),
    "fig13_dqn_dying_probability": Plot(
        draw_dying,
        "What a LaN does to dying neurons in trained networks (kernel density). Top: dead neurons while DQN trains, "
        "of a single layer, of a LaN and of its factors (dotted: by standard deviation). Bottom: dead neurons of the "
        "LaN against those of its factors (small dots: during training, large dots: after it) and of the same seed's "
        "single layer after training (squares); line: Table 1, of independent neurons; dashed: no change.",
        activations=("tanh", "sigmoid", "relu", "tanh-lan", "sigmoid-lan", "relu-lan"),
    ),
    "fig14_dqn_relu_lan": Plot(
        draw_panels,
        f"DQN with ReLU, without and with a LaN: score, dead neurons, effective rank. {SCORE} {BAND}",
        activations=("relu", "relu-lan"),
        quantities=("normalized_score", "dead_neurons", "effective_rank"),
    ),
    "fig15_dqn_human_normalized": Plot(
        draw_panels,
        f"DQN; 0 and 1 are a random and a human player's score in each game. {BAND}",
        quantities=("human_normalized_score",),
    ),
    "fig16_dqn_games": Plot(
        draw_games,
        f"DQN in every game. {GAME_SCORE}",
    ),
    "fig17_ppo_games": Plot(
        draw_games,
        f"PPO in every game. {GAME_SCORE}",
        "ppo",
    ),
}


def draw(study: Study, name: str, out_dir: Path) -> tuple[bytes, str]:
    """Write a figure as PNG and PDF; the PNG (empty if there is nothing to draw) and what it lacks."""
    plot = FIGURES[name]
    if plot.algorithm not in study.lengths:
        return b"", f"not drawn, no {plot.algorithm.upper()} run"
    figure, lacking = plot.draw(study, plot)
    if figure is None:
        return b"", f"not drawn, {', '.join(lacking)}"
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")  # laid out once, for both files
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=metadata)
        replace(out_dir / f"{name}.{suffix}", buffer.getvalue())
    return buffer.getvalue(), f"drawn in part, {', '.join(lacking)}" if lacking else ""


# ------------------------------------------------------------------------------------------------- tables


@dataclass
class Table:
    """Cells are text; the page sorts by the number that a cell begins with."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


NOTHING = "–"  # noqa: RUF001
COLUMNS = ("algorithm", "game", "activation", "seed", "agent_steps", "finished")
FINALS = (
    "final_return",
    "normalized_score",
    "human_normalized_score",
    "dead_neurons",
    "effective_rank",
    "entropy_rank",
    "dormant_neurons",
)
# After what other programs rely on.
FURTHER = ("std_dead_neurons", "rank_share")


def results_rows(runs: Sequence[Run]) -> list[list[str]]:
    """results.csv, the header first."""
    rows = [[*COLUMNS, *FINALS, *FURTHER, "drawn", "run", "note"]]
    for run in sorted(runs, key=lambda run: (run.algorithm, run.game, run.activation, run.seed, run.name)):
        finals = [run.finals.get(name, np.nan) for name in (*FINALS, *FURTHER)]
        rows.append(
            [run.algorithm, run.game, run.activation, str(run.seed), str(run.agent_steps), str(run.finished)]
            + ["" if np.isnan(value) else repr(value) for value in finals]
            + [str(not run.left_out), run.name, "; ".join(filter(None, [run.left_out, *run.problems]))]
        )
    return rows


def by_game(runs: Iterable[Run], name: str) -> dict[str, dict[int, float]]:
    """{game: {seed: final value}}"""
    found = defaultdict(dict)
    for run in runs:
        if not np.isnan(run.finals.get(name, np.nan)):
            found[run.game][run.seed] = run.finals[name]
    return dict(found)


def mean_and_deviation(values: dict[str, dict[int, float]], form: str) -> str:
    """The line and the band of a figure, at its end."""
    if not values:
        return NOTHING
    line, band = line_and_band(
        {game: {seed: np.array([v]) for seed, v in seeds.items()} for game, seeds in values.items()}
    )
    return f"{line[0]:{form}}" + (f" ± {band[0]:{form}}" if band is not None else "")


def make_tables(runs: Sequence[Run]) -> list[Table]:
    """Every table but results.csv."""
    summary, scores, improvement = [], [], []
    missing = missing_runs(runs)
    games = sorted({run.game for run in runs})
    for algorithm in ("dqn", "ppo"):
        for activation, (name, *_) in STYLES.items():
            group = [run for run in runs if (run.algorithm, run.activation) == (algorithm, activation)]
            drawn = [run for run in group if not run.left_out]
            absent = len(missing.get((algorithm, activation), []))
            if not group:
                continue
            summary.append(
                [algorithm.upper(), name, str(len(drawn)), str(len(group) - len(drawn)), str(absent)]
                + [mean_and_deviation(by_game(drawn, "normalized_score"), ".3f")]
                + [mean_and_deviation(by_game(drawn, key), ".3f") for key in ("dead_neurons", "std_dead_neurons")]
                + [
                    mean_and_deviation(by_game(drawn, "effective_rank"), ".1f"),
                    mean_and_deviation(by_game(drawn, "rank_share"), ".3f"),
                ]
            )
            row = [algorithm.upper(), name]
            for quantity in ("normalized_score", "human_normalized_score"):
                values = [np.array(list(seeds.values())) for seeds in by_game(drawn, quantity).values()]
                if values:
                    ends = zip(aggregates(*values), *interval(aggregates, values), strict=True)
                    row += [with_interval(*each) for each in ends]
                else:
                    row += [NOTHING] * 3
            finals = by_game(drawn, "final_return")
            baseline = by_game(
                (r for r in runs if (r.algorithm, r.activation) == (algorithm, "relu") and not r.left_out),
                "final_return",
            )
            common = sorted(finals.keys() & baseline.keys())
            if common and activation != "relu":
                pairs = [np.array(list(found[game].values())) for found in (finals, baseline) for game in common]
                row.append(
                    with_interval(
                        float(probability_of_improvement(*pairs)), *interval(probability_of_improvement, pairs)
                    )
                )
            else:
                row.append(NOTHING)
            improvement.append([*row, str(sum(map(len, finals.values())))])
            scores.append(
                [algorithm.upper(), name]
                + [mean_and_deviation({g: finals[g]} if g in finals else {}, ",.1f") for g in games]
            )
    return [
        Table(
            "Table 2: performance, dead neurons, rank",
            "After training: mean over games and seeds ± standard deviation over seeds of the mean over games. "
            "Left out: unfinished, of another length, damaged, or a seed's second run. Missing: others have it.",
            [
                "algorithm",
                "activation",
                "runs",
                "left out",
                "missing",
                "normalised score",
                "dead (KDE)",
                "dead (std)",
                "effective rank",
                "rank / width",
            ],
            summary,
        ),
        Table(
            "Aggregates",
            "With 95 % intervals of a stratified bootstrap (runs resampled within games, percentiles, "
            f"{RESAMPLES:,} resamples; with few seeds somewhat too narrow). IQM: mean of the middle half of all runs. "
            "Improvement: probability that a run scores higher than one of ReLU, mean over games. "
            f"{NOTHING} where something is missing; no interval where a game has a single run.",
            [
                "algorithm",
                "activation",
                *(f"{kind} {what}" for kind in ("normalised", "human-norm.") for what in ("mean", "median", "IQM")),
                "improvement over ReLU",
                "runs",
            ],
            improvement,
        ),
        Table(
            "Score in every game",
            f"Mean of the last {LAST_GAMES} games, mean ± standard deviation over seeds.",
            ["algorithm", "activation", *games],
            scores,
        ),
    ]


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def as_markdown(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return f"## {table.title}\n\n{table.note}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


# --------------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Latent Assistance Networks: results</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1b1b1b; --soft: #5d5d5d; --line: #dcdcdc; --paper: #ffffff; --card: #fafafa; --accent: #b34a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --soft: #a5a19c; --line: #3a3a3a; --paper: #161616; --card: #1e1e1e; --accent: #ff9a52; }
  figure img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption { max-width: 60rem; }
a { color: var(--accent); }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem;
  grid-auto-flow: dense; }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; max-width: 100%; margin: 0 auto .75rem; mix-blend-mode: multiply; }
@media (prefers-color-scheme: dark) { figure img { mix-blend-mode: screen; } }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--card); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: var(--card); }
pre { white-space: pre-wrap; font-size: .8125rem; }
</style>
<h1>Latent Assistance Networks: results</h1>
<p class="soft">SUMMARY</p>
MESSAGES
<h2 id="figures">Figures</h2>
<div class="figures">
FIGURES
</div>
TABLES
<script>
// A click on a column's head sorts by it; #sort=<table>:<column> (-<column>: descending) does so from a link.
function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return text === "" || text === "\\u2013" ? null : Number.isNaN(number) ? text : number;
}
function compare(a, b) {
  if (a === null || b === null) return 0;
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b));
}
function sort(table, column, descending) {
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
  // What is missing comes last in both directions.
  rows.sort(([a], [b]) => (a === null) - (b === null) || (descending ? compare(b, a) : compare(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.firstElementChild.addEventListener("click", () => {
      sort(table, column, cell.getAttribute("aria-sort") === "ascending");
    });
  });
}
function sortByHash() {
  const [, id, minus, column] = location.hash.match(/^#sort=([\\w-]+):(-?)(\\d+)$/) ?? [];
  const table = id && document.getElementById(id);
  if (table?.tHead?.rows[0].cells[column]) {
    sort(table, Number(column), minus === "-");
    table.scrollIntoView();
  }
}
addEventListener("hashchange", sortByHash);
sortByHash();
</script>
</html>
"""


def as_html(table: Table, name: str) -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(cell)}</button></th>' for cell in table.header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<p class=soft>{html.escape(table.note)} A click on a head sorts.</p>\n"
        f'<div class="scroll" tabindex="0"><table id="{name}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def make_page(pictures: dict[str, bytes], tables: dict[str, Table], messages: Sequence[str], summary: str) -> str:
    """Everything on one page that needs no other file."""
    figures = []
    for name, picture in pictures.items():
        (width,) = struct.unpack(">I", picture[16:20])  # of a PNG
        wide = ' class="wide"' if width > 900 else ""
        data = base64.b64encode(picture).decode()
        caption = html.escape(FIGURES[name].caption)
        figures.append(
            f'<figure{wide} id="{name}"><img src="data:image/png;base64,{data}" alt="{caption}" '
            f'width="{width * 3 // 5}" style="height: auto">'
            f"<figcaption><b>{title_of(name)}.</b> {caption}</figcaption></figure>"
        )
    told = ""
    if messages:
        lines = html.escape("\n".join(messages))
        notes = f"{len(messages)} notes on what is missing or left out"
        told = f"<details><summary>{notes}</summary><pre>{lines}</pre></details>"
    parts = {
        "SUMMARY": html.escape(summary),
        "MESSAGES": told,
        "FIGURES": "\n".join(figures) or "<p>None could be drawn; the notes say why.</p>",
        "TABLES": "\n".join(as_html(table, name) for name, table in tables.items()),
    }
    return re.sub(
        "|".join(rf"^{name}$|(?<=>){name}(?=<)" for name in parts), lambda found: parts[found[0]], PAGE, flags=re.M
    )


def title_of(name: str) -> str:
    """fig05a_dqn_normalized -> Figure 5a"""
    return "Figure " + name.split("_")[0].removeprefix("fig").lstrip("0")


# --------------------------------------------------------------------------------------------------- main


def chosen_items(only: Sequence[str]) -> list[str]:
    """The names that begin with one of `only`; all without it.

    Raises:
        BadInput
    """
    names = [*FIGURES, "tables"]
    for beginning in only:
        if not beginning or not any(name.startswith(beginning) for name in names):
            raise BadInput(f"--only {beginning!r} is no beginning of any of: {', '.join(names)}")
    return [name for name in names if not only or name.startswith(tuple(only))]


def prepare_out_dir(out_dir: Path) -> Path:
    """Make the out folder and its cache.

    Returns:
        The cache.

    Raises:
        BadInput: it cannot be written, or holds files of these names that this program did not make.
    """
    cache = out_dir / ".cache"
    try:
        if (out_dir / "config.json").exists():
            raise BadInput(f"--out-dir {out_dir} is a run's folder; name another one")
        strangers = [name for name in ("index.html", "results.csv", "results.md") if (out_dir / name).exists()]
        if strangers and not cache.is_dir():
            raise BadInput(
                f"--out-dir {out_dir} holds {strangers[0]}, which this program did not make; name another folder"
            )
        cache.mkdir(parents=True, exist_ok=True)
        replace(cache / "format", str(CACHE_FORMAT).encode())
    except OSError as error:
        raise BadInput(f"--out-dir {out_dir}: {error.strerror}; name a folder that can be written") from None
    return cache


_study: Study  # of the worker processes, which inherit it


def _draw(name: str, out_dir: Path) -> tuple[bytes, str]:
    return draw(_study, name, out_dir)


@contextlib.contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process per CPU core. An error or Ctrl-C ends it with the tasks that have begun, a few seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fork = multiprocessing.get_context("fork")  # no second import of everything
    with ProcessPoolExecutor(cores, fork, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would find the pool half shut down
            pool.shutdown(cancel_futures=True)
            raise


def main(args: Args) -> None:
    global _study
    items = chosen_items(args.only)
    runs_dir, out_dir = Path(args.runs_dir), Path(args.out_dir)
    runs, messages = find_runs(runs_dir, out_dir)
    cache = prepare_out_dir(out_dir)

    readable = [run for run in runs if run.algorithm]
    caches = [cache / f"{hashlib.sha1(str(run.folder.absolute()).encode()).hexdigest()}.npz" for run in readable]
    with workers() as pool:
        folders = [run.folder for run in readable]
        for run, found in zip(readable, pool.map(read_run, folders, caches, chunksize=4), strict=True):
            run.points, run.agent_steps, run.problems = found
    for file in cache.glob("*.npz"):
        if file not in caches:
            file.unlink()

    lengths = select_runs(runs, args.allow_unfinished)
    messages += describe_runs(runs)
    messages += fill_curves(runs, lengths)
    for run in runs:
        run.points = {}  # from here on there are curves
    drawn = [run for run in runs if not run.left_out]
    if not drawn and any(run.left_out == "unfinished" for run in runs):
        messages.append("no run has finished: --allow-unfinished draws what there is so far")
    _study = Study(drawn, lengths)

    names = [name for name in items if name != "tables"]
    pictures = {}
    lacks = defaultdict(list)
    with workers() as pool:
        without_curves = [dataclasses.replace(run, curves={}) for run in runs]
        tables = pool.submit(make_tables, without_curves) if "tables" in items else None
        jobs = {name: pool.submit(_draw, name, out_dir) for name in reversed(names)}  # the longest first
        for name in names:
            picture, told = jobs[name].result()
            if told:
                lacks[told].append(name)
            if picture:
                pictures[name] = picture
            elif (out_dir / f"{name}.png").exists():
                lacks[f"from an earlier drawing, still in {out_dir}"].append(name)
        made = tables.result() if tables else []
    messages += [f"{told}: {', '.join(found)}" for told, found in lacks.items()]
    tell(messages)

    written = [f"{len(pictures)} figure{'s' * (len(pictures) != 1)}"] if names else []
    if tables:
        rows = results_rows(runs)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        replace(out_dir / "results.csv", text.getvalue().encode())
        unfinished = sum(not run.finished for run in runs)
        summary = f"Runs in {runs_dir}: {len(runs)} found, {len(drawn)} drawn, {unfinished} unfinished."
        parts = ["# Results\n", summary + "\n", *map(as_markdown, made)]
        parts += ["## Figures\n", *(f"- `{name}` {FIGURES[name].caption}" for name in pictures)] if pictures else []
        parts += ["\n## Missing or left out\n", *(f"- {line}" for line in messages)] if messages else []
        replace(out_dir / "results.md", ("\n".join(parts) + "\n").encode())
        written.append("results.csv, results.md")
        if not args.only:
            everything = dict(zip(("table2", "aggregates", "scores"), made, strict=True))
            everything["results"] = Table("Every run", "results.csv.", rows[0], rows[1:])
            page = make_page(pictures, everything, messages, summary)
            replace(out_dir / "index.html", page.encode())
            written.append("index.html")
    print(f"{len(drawn)} of {len(runs)} runs drawn; {out_dir}: {', '.join(written)}")


def leave(code: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except BadInput as error:
        leave(2, f"error: {error}")
    except BrokenPipeError:  # --help | head
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        what = error.filename or "where this prints to"
        leave(1, f"error: cannot use {what}: {error.strerror}; mend that, then run this again")
    except (BrokenProcessPool, MemoryError):
        leave(1, "error: a worker process died (out of memory?); free some memory, then run this again")
    except KeyboardInterrupt:
        leave(130, "interrupted; every file is whole, run this again")
