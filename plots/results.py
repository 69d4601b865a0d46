"""Run folders -> which runs are drawn, and two tidy tables: one row per run, one row per point of a curve."""

import contextlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lan_utils import study
from lan_utils.cli import BadInput
from plots import statistics
from plots.events import REPRESENTATION, RETURN, Points, open_regular
from plots.statistics import LAST_GAMES, ByGame, Curves

GRID_POINTS = 1001  # of the common grid of agent steps, from 0 to the end of the training
LENGTH_TOLERANCE = 0.01  # runs whose lengths differ by no more are equally long
MAX_JSON = 1_000_000  # bytes of a config.json or status.json
MAX_STEPS = 2**62  # agent steps, seeds: what an int64 holds

STATES = ("running", "stopped", "failed", "finished")  # of status.json
MOSTLY_CONSTANT = 0.99  # as in metrics.py: where more of a layer is constant, the scaled count has no value
FACTORS = ("dead_neurons_z_enc", "dead_neurons_z_star", "dead_neurons_z_star2")
# Final values in results.csv: what other programs rely on first.
FINAL_VALUES = (
    *("final_return", "normalized_score", "human_normalized_score"),
    *("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons"),
    *("std_dead_neurons", "dead_neurons_scaled", "effective_rank_centred", "rank_share"),
    *("feature_norm", "dead_factors"),
)
RUN_COLUMNS = ("algorithm", "game", "activation", "seed", "agent_steps", "finished")
CURVE_COLUMNS = ("algorithm", "game", "activation", "seed", "agent_steps", "quantity", "value")


@dataclass
class Run:
    """A run's folder, and what was read from it."""

    folder: Path
    algorithm: str  # "" where config.json does not say
    game: str
    activation: str  # `<activation>@<exp_name>` where it is drawn beside another experiment
    seed: int
    flags: dict[str, Any]
    finished: bool
    left_out: str = ""  # why it is not drawn
    agent_steps: int = 0
    points: dict[str, Points] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return printable(self.folder.name)

    @property
    def exp_name(self) -> str:
        name = self.flags.get("exp_name")
        return printable(name) if isinstance(name, str) else ""

    @property
    def planned_steps(self) -> int:
        planned = self.flags.get("total_timesteps")
        return planned if type(planned) is int and 0 < planned < MAX_STEPS else self.agent_steps


def printable(text: str) -> str:
    """Text that any terminal, file and page takes: what is no printable character is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# -------------------------------------------------------------------------------------------- find runs

RUN_NAME = re.compile(
    r"(?P<game>\w+)NoFrameskip-v4__(?P<exp_name>.+)__(?P<activation>[a-z0-9-]+)__(?P<seed>[0-9]{1,18})"
)


def read_json(path: Path) -> Any:
    """The content of a small JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is too large, too deeply nested, or no JSON.
    """
    with open_regular(path) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ValueError(f"larger than {MAX_JSON:,} bytes")
    try:
        found = json.loads(content)
        json.dumps(found)  # its parts are compared as JSON later
        return found
    except RecursionError:
        raise ValueError("too deeply nested") from None


def is_finished(folder: Path) -> bool:
    """By status.json; where there is none that can be understood, by a model.pt that is not empty."""
    try:
        state = read_json(folder / "status.json")["state"]
        if state in STATES:
            return state == "finished"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    try:
        with open_regular(folder / "model.pt") as file:
            return file.read(1) != b""
    except OSError:
        return False


def read_config(folder: Path) -> Run:
    """A run without its points.

    Raises:
        OSError, ValueError: config.json is missing, unreadable or not that of a run.
    """
    config = read_json(folder / "config.json")
    flags = config.get("args") if isinstance(config, dict) else None
    if not isinstance(flags, dict):
        raise ValueError("no args")
    names = config.get("algorithm"), flags.get("env_id"), flags.get("activation")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("no algorithm, env_id or activation")
    algorithm, env_id, activation = map(printable, names)
    seed = flags.get("seed")
    if type(seed) is not int or abs(seed) >= MAX_STEPS:
        raise ValueError("no whole seed")
    return Run(folder, algorithm, env_id.removesuffix("NoFrameskip-v4"), activation, seed, flags, is_finished(folder))


def find_runs(runs_dir: Path, out_dir: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, without their points, and a message on what else is there.

    A folder with neither a config.json nor a .lock is no run of ours, whatever its name.

    Raises:
        BadInput: there is no such folder, or no run in it.
    """
    try:
        folders = sorted(path for path in runs_dir.iterdir() if path.is_dir() and path.name[0] != ".")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--runs-dir {runs_dir}: {reason}; name the folder that holds the run folders") from None
    runs, strangers = [], []
    for folder in folders:
        if folder.absolute() == out_dir.absolute():
            continue
        try:
            runs.append(read_config(folder))
        except (OSError, ValueError) as error:
            match = RUN_NAME.fullmatch(folder.name)
            is_foreign = isinstance(error, FileNotFoundError) and not os.path.lexists(folder / ".lock")
            if not match or is_foreign:
                strangers.append(folder)
                continue
            detail = "" if isinstance(error, (OSError, json.JSONDecodeError)) else f" ({error})"
            reason = f"config.json is missing or unreadable{printable(detail)}"
            flags = {"exp_name": match["exp_name"]}
            runs.append(Run(folder, "", match["game"], match["activation"], int(match["seed"]), flags, False, reason))
    holders = sorted({run.parent for folder in strangers for run in runs_below(folder)})
    if not runs:
        hint = "train first"
        if holders:
            hint = f"it holds folders of runs: name one of them, {some_of(map(str, holders))}"
        elif (runs_dir / "config.json").exists():
            hint = "it is a run's folder itself: name its parent"
        elif strangers:
            hint = f"none of its folders has a config.json that a run wrote: {some_of(map(name_of, strangers))}"
        raise BadInput(f"--runs-dir {runs_dir} holds no run; {hint}")
    messages = []
    if strangers:
        what = f"{len(strangers)} folders are no runs" if len(strangers) > 1 else "1 folder is no run"
        messages.append(f"{what}: {', '.join(map(name_of, strangers))}")
    if holders:
        messages.append(f"not drawn, in folders of their own: the runs in {some_of(map(str, holders))}")
    return runs, messages


def name_of(folder: Path) -> str:
    return printable(folder.name)


def some_of(names: Iterable[str]) -> str:
    """The first five."""
    names = list(map(printable, names))
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def runs_below(folder: Path) -> list[Path]:
    """The run folders one and two levels below a folder."""
    found = []
    for config in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        with contextlib.suppress(OSError, ValueError):
            found.append(read_config(config.parent).folder)
    return found


def choose_experiments(runs: Sequence[Run], exp_names: Sequence[str]) -> list[Run]:
    """The runs of these experiments; all of them where none is named.

    Of each algorithm, the runs of the first experiment named stay as they are. Every other experiment's activations
    become groups of their own, `<activation>@<exp_name>`.

    Raises:
        BadInput: no run is of one of these experiments.
    """
    found = {run.exp_name for run in runs}
    for name in exp_names:
        if name not in found:
            raise BadInput(f"--exp-name {name}: no run has it; there are: {', '.join(sorted(filter(None, found)))}")
    chosen = [run for run in runs if not exp_names or run.exp_name in exp_names]
    for algorithm in {run.algorithm for run in chosen} if exp_names else ():
        names = {run.exp_name for run in chosen if run.algorithm == algorithm}
        first = min(names, key=exp_names.index)
        for run in chosen:
            if run.algorithm == algorithm and run.exp_name != first:
                run.activation += f"@{run.exp_name}"
    return chosen


def algorithms_of(runs: Sequence[Run]) -> list[str]:
    """Those of the study first, then what the plots have never heard of."""
    found = {run.algorithm for run in runs if run.algorithm}
    return [name for name in study.ALGORITHMS if name in found] + sorted(found - set(study.ALGORITHMS))


def activations_of(runs: Sequence[Run]) -> list[str]:
    """Those of the study first, then what the plots have never heard of."""
    found = {run.activation for run in runs}
    return [name for name in study.ACTIVATIONS if name in found] + sorted(found - set(study.ACTIVATIONS))


# ------------------------------------------------------------------------------------------ select runs


def equally_long(steps: int, length: int) -> bool:
    return abs(steps - length) <= LENGTH_TOLERANCE * length


def usual_length(all_steps: Sequence[int]) -> int:
    """The most common number of agent steps, up to the tolerance; of equally common ones the largest."""
    lengths = Counter(all_steps)

    def support(length: int) -> int:
        return sum(n for other, n in lengths.items() if equally_long(other, length))

    return max(lengths, key=lambda length: (support(length), length))


def select_runs(runs: Sequence[Run], allow_unfinished: bool) -> dict[str, int]:
    """Write into `left_out` of each run why it is not drawn.

    Returns:
        The usual length in agent steps of each algorithm's runs.
    """
    for run in runs:
        if run.left_out:
            continue
        if not run.points:
            run.left_out = "no point in its event files" if run.finished else "unfinished, no point yet"
        elif not run.finished and not allow_unfinished:
            run.left_out = "unfinished"
        elif not 0 < run.agent_steps < MAX_STEPS:
            run.left_out = "its points are at no agent step of a training"
    lengths = {}
    for algorithm in algorithms_of(runs):
        candidates = [run for run in runs if run.algorithm == algorithm and not run.left_out]
        planned = usual_length([run.planned_steps for run in candidates]) if candidates else 0
        named = Counter(run.exp_name for run in runs if run.algorithm == algorithm)
        same = defaultdict(list)
        for run in candidates:
            same[run.game, run.activation, run.seed].append(run)
        for twins in same.values():
            # Two experiments of one seed are not two seeds; no quick try and no ablation replaces the study's run.
            best = max(
                twins,
                key=lambda run: (
                    equally_long(run.planned_steps, planned),
                    named[run.exp_name],
                    run.finished,
                    run.agent_steps,
                ),
            )
            for run in twins:
                if run is not best:
                    run.left_out = f"same seed as {best.name}"
        drawn = [run for run in candidates if not run.left_out]
        if drawn and allow_unfinished:
            lengths[algorithm] = max(run.agent_steps for run in drawn)
        elif drawn:
            length = usual_length([run.agent_steps for run in drawn])
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
            is_twin = run.left_out.startswith("same seed")
            reason = "same seed as another run" if is_twin else run.left_out
            entry = f"{run.name} ({run.left_out})" if is_twin else f"{run.seed} at {run.agent_steps:,}"
            groups[run.algorithm, run.activation, reason][run.game].append(entry)
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
    harmless = study.NEUTRAL_FLAGS | study.NAMING_FLAGS
    for algorithm, exp_name, found in by_experiment(runs):
        drawn = [run for run in found if not run.left_out]
        whose = f"{algorithm} runs of {exp_name}" if exp_name else f"{algorithm} runs"
        for flag in sorted({flag for run in drawn for flag in run.flags} - harmless):
            values = defaultdict(list)
            for run in drawn:
                values[json.dumps(run.flags.get(flag))].append(run.name)
            if len(values) > 1:
                ranked = sorted(values.items(), key=lambda item: -len(item[1]))
                which = "; ".join(
                    f"{value} in {len(names)} run(s)"
                    + (f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if i else "")
                    for i, (value, names) in enumerate(ranked)
                )
                lines.append(f"mixed, {whose} differ in --{printable(flag).replace('_', '-')}: {which}")
    lines += [f"damaged, {run.name}: {printable(', '.join(run.problems))}" for run in runs if run.problems]
    return lines


def by_experiment(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """(algorithm, exp_name, runs) of each experiment; the first experiment's exp_name is ""."""
    for algorithm in algorithms_of(runs):
        found = defaultdict(list)
        for run in runs:
            if run.algorithm == algorithm:
                found[study.split_group(run.activation)[1]].append(run)
        yield from ((algorithm, exp_name, found[exp_name]) for exp_name in sorted(found))


def missing_runs(runs: Sequence[Run]) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """(game, seed) that other activations of the algorithm have, and not even an unfinished run here."""
    missing = {}
    for algorithm, _, found in by_experiment(runs):
        wanted = {(run.game, run.seed) for run in found}
        for activation in activations_of(found):
            has = {(run.game, run.seed) for run in found if run.activation == activation}
            if wanted - has:
                missing[algorithm, activation] = sorted(wanted - has)
    return missing


# --------------------------------------------------------------------------------------------- tables


@dataclass
class Results:
    """What figures and tables are made of.

    Attributes:
        runs: one row per run found: RUN_COLUMNS, FINAL_VALUES (NaN where a run has none), then `drawn` (bool), `run`
            (the folder's name) and `note` (why it is left out, what is damaged).
        curves: CURVE_COLUMNS; every quantity of every drawn run on the algorithm's grid of GRID_POINTS agent steps,
            NaN where it has no value. Quantities are `score` (mean return of the last 100 games), `normalized_score`
            (Eq. 6), `human_normalized_score` (Eq. 7), the last parts of the `representation/` tags, and `dead_factors`,
            the mean over a LaN's factors of their dead neurons.
        lengths: agent steps at the end of each algorithm's grid.
        folders: of the drawn runs, by `run`.
        scales: of the normalised score, by algorithm and game; none where there is no ReLU baseline.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    lengths: dict[str, int]
    folders: dict[str, Path]
    scales: dict[tuple[str, str], statistics.Scale] = field(default_factory=dict)

    @property
    def drawn(self) -> pd.DataFrame:
        return self.runs[self.runs["drawn"]]

    @cached_property
    def _groups(self) -> dict[tuple[str, str, str], Curves]:
        """The curves by algorithm, activation and quantity."""
        found: dict[tuple[str, str, str], Curves] = defaultdict(lambda: defaultdict(dict))
        keys = ["algorithm", "activation", "quantity", "game", "seed"]
        values = self.curves["value"].to_numpy()
        for (algorithm, activation, quantity, game, seed), at in self.curves.groupby(
            keys, observed=True
        ).indices.items():
            found[algorithm, activation, quantity][game][int(seed)] = values[at]
        return found

    def select_curves(self, algorithm: str, activation: str, quantity: str, game: str | None = None) -> Curves:
        """Of the runs that have this quantity, in one game or in all."""
        found = self._groups.get((algorithm, activation, quantity), {})
        return {name: dict(seeds) for name, seeds in found.items() if game in (None, name)}

    def final_values(self, algorithm: str, activation: str, quantity: str) -> ByGame:
        """{game: {seed: value}} of the drawn runs that have it."""
        runs = self.drawn
        runs = runs[(runs["algorithm"] == algorithm) & (runs["activation"] == activation) & runs[quantity].notna()]
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for game, seed, value in zip(runs["game"], runs["seed"], runs[quantity], strict=True):
            found[game][int(seed)] = float(value)
        return dict(found)

    def grid(self, algorithm: str) -> np.ndarray:
        """(GRID_POINTS,) agent steps."""
        return np.linspace(0, self.lengths[algorithm], GRID_POINTS)


def without_rounding(points: dict[str, Points]) -> dict[str, Points]:
    """A run's points; `dead_neurons_scaled` is NaN wherever more than MOSTLY_CONSTANT of the layer is constant.

    Runs do not log it there. Those of before did, and it measured rounding.
    """
    tag = f"{REPRESENTATION}dead_neurons_scaled"
    constant, scaled = points.get(f"{REPRESENTATION}std_dead_neurons"), points.get(tag)
    if constant is None or (scaled is None and (constant["value"] <= MOSTLY_CONSTANT).any()):
        return points
    known = {} if scaled is None else dict(zip(scaled["step"].tolist(), scaled["value"].tolist(), strict=True))
    found = constant.copy()
    found["value"] = [
        known.get(step, np.nan) if share <= MOSTLY_CONSTANT else np.nan for step, share in constant.tolist()
    ]
    return points | {tag: found}


def curves_of(run: Run, grid: np.ndarray) -> dict[str, np.ndarray]:
    """{quantity: (grid,)} of a run's own points; what needs other runs is not here."""
    # Equally long runs may have logged their last point a little earlier.
    after = grid > run.agent_steps + LENGTH_TOLERANCE * grid[-1] * run.finished
    curves = {}
    for tag, points in without_rounding(run.points).items():
        if tag == RETURN:
            curve = statistics.score_curve(points, grid)
        else:
            curve = np.interp(grid, points["step"], points["value"], left=np.nan)
        curves["score" if tag == RETURN else tag.removeprefix(REPRESENTATION)] = np.where(after, np.nan, curve)
    factors = [curves[name] for name in FACTORS if name in curves]
    if factors:
        curves["dead_factors"] = np.mean(factors, axis=0)
    return curves


def finals_of(run: Run) -> dict[str, float]:
    """Mean return of the last 100 games; the last measurement of everything else, if it has a value."""
    last = {tag: float(points["value"][-1]) for tag, points in without_rounding(run.points).items()}
    finals = {tag.removeprefix(REPRESENTATION): value for tag, value in last.items() if not np.isnan(value)}
    if RETURN in run.points:
        finals["final_return"] = float(np.mean(run.points[RETURN]["value"][-LAST_GAMES:], dtype=float))
    if "effective_rank" in finals:
        finals["rank_share"] = finals["effective_rank"] / study.style(run.activation).width
    factors = [finals[name] for name in FACTORS if name in finals]
    if factors:
        finals["dead_factors"] = float(np.mean(factors))
    return finals


def make_results(runs: Sequence[Run], lengths: dict[str, int]) -> tuple[Results, list[str]]:
    """The tidy tables, and which scores could not be normalised and why."""
    finals = [finals_of(run) for run in runs]
    curves: list[dict[str, np.ndarray]] = []
    for run in runs:
        grid = None if run.left_out else np.linspace(0, lengths[run.algorithm], GRID_POINTS)
        curves.append({} if grid is None else curves_of(run, grid))

    messages, scales = [], {}
    human = study.read_atari_scores()
    by_game = defaultdict(list)
    for i, run in enumerate(runs):
        by_game[run.algorithm, run.game].append(i)
    for (algorithm, game), places in sorted(by_game.items()):
        relu = [i for i in places if runs[i].activation == "relu" and "score" in curves[i]]
        extremes = None
        if relu:
            since = max(statistics.hundredth_game(runs[i].points[RETURN]) for i in relu)
            grid = np.linspace(0, lengths[algorithm], GRID_POINTS)
            scale = statistics.scale_of([curves[i]["score"] for i in relu], grid, since)
            if scale:
                scales[algorithm, game], extremes = scale, scale[:2]
        if any(not runs[i].left_out for i in places):
            if not relu:
                messages.append(f"no normalised score, {algorithm} {game}: no finished ReLU baseline with a score")
            elif extremes is None or extremes[0] == extremes[1]:
                messages.append(f"no normalised score, {algorithm} {game}: the ReLU baseline's score never changes")
            if game not in human:
                messages.append(f"no human-normalised score, {game}: not in {study.ATARI_SCORES.name}")
        for i in places:
            for quantity, ends in (("normalized_score", extremes), ("human_normalized_score", human.get(game))):
                if "final_return" in finals[i]:
                    finals[i][quantity] = float(statistics.normalized(finals[i]["final_return"], ends))
                if "score" in curves[i] and not np.isnan(statistics.normalized(0.0, ends)):
                    curves[i][quantity] = statistics.normalized(curves[i]["score"], ends)
    folders = {run.name: run.folder for run in runs if not run.left_out}
    results = Results(runs_table(runs, finals), curves_table(runs, curves, lengths), lengths, folders, scales)
    return results, list(dict.fromkeys(messages))


def runs_table(runs: Sequence[Run], finals: Sequence[dict[str, float]]) -> pd.DataFrame:
    rows = []
    for run, values in zip(runs, finals, strict=True):
        row = {name: getattr(run, name) for name in RUN_COLUMNS}
        row |= {name: values.get(name, np.nan) for name in FINAL_VALUES}
        note = "; ".join(filter(None, [run.left_out, *run.problems]))
        rows.append(row | {"drawn": not run.left_out, "run": run.name, "note": printable(note)})
    table = pd.DataFrame(rows, columns=[*RUN_COLUMNS, *FINAL_VALUES, "drawn", "run", "note"])
    return table.sort_values(["algorithm", "game", "activation", "seed", "run"], ignore_index=True)


def curves_table(runs: Sequence[Run], curves: Sequence[dict[str, np.ndarray]], lengths: dict[str, int]) -> pd.DataFrame:
    pieces = [
        (run, quantity, curve) for run, found in zip(runs, curves, strict=True) for quantity, curve in found.items()
    ]
    columns: dict[str, Any] = {}
    for name in ("algorithm", "game", "activation"):
        columns[name] = repeated([getattr(run, name) for run, _, _ in pieces])
    columns["seed"] = np.repeat(np.array([run.seed for run, _, _ in pieces], np.int64), GRID_POINTS)
    grids = {name: np.linspace(0, length, GRID_POINTS) for name, length in lengths.items()}
    columns["agent_steps"] = np.concatenate([grids[run.algorithm] for run, _, _ in pieces] or [np.empty(0)])
    columns["quantity"] = repeated([quantity for _, quantity, _ in pieces])
    columns["value"] = np.concatenate([curve for _, _, curve in pieces] or [np.empty(0)])
    return pd.DataFrame(columns)[list(CURVE_COLUMNS)]


def repeated(values: Sequence[str]) -> pd.Categorical:
    """Each value GRID_POINTS times."""
    codes, names = pd.factorize(np.array(values, object), sort=True)
    return pd.Categorical.from_codes(np.repeat(codes, GRID_POINTS), categories=names)
