"""Run folders -> which runs are drawn, a tidy table of them, and their curves."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lan_utils import study
from lan_utils.cli import BadInput, warn
from lan_utils.files import read_json
from plots import statistics
from plots.events import LAYERS, REPRESENTATION, RETURN, Points, read_events
from plots.statistics import LAST_GAMES, ByGame, Curves

GRID_POINTS = 1001  # of the common grid of agent steps, from 0 to the end of the training
LENGTH_TOLERANCE = 0.01  # runs whose lengths differ by no more are equally long

MOSTLY_CONSTANT = 0.99  # as in metrics.py: where more of a layer is constant, the scaled count has no value
FACTORS = "dead_neurons_z_"  # and the factor's name: a quantity of each
# Final values in results.csv: what other programs rely on first.
FINAL_VALUES = (
    *("final_return", "normalized_score", "human_normalized_score"),
    *("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons"),
    *("std_dead_neurons", "dead_neurons_scaled", "effective_rank_centred", "rank_share"),
    *("feature_norm", "dead_factors"),
)
RUN_COLUMNS = ("algorithm", "game", "activation", "seed", "agent_steps", "finished")


@dataclass
class RecordedRun:
    """A run's folder, and what was read from it."""

    folder: Path
    algorithm: str  # "" where config.json does not say
    game: str
    activation: str  # `<activation>@<exp_name>` where it is drawn beside another experiment
    seed: int
    flags: dict[str, Any]
    finished: bool
    code: str = ""  # config.json's, and those of later resumes; "" of older runs
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
        return planned if isinstance(planned, int) and planned > 0 else self.agent_steps


def printable(text: str) -> str:
    """Text that any terminal, file and page takes: what is no printable character is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# -------------------------------------------------------------------------------------------- find runs

RUN_NAME = re.compile(
    r"(?P<game>\w+)NoFrameskip-v4__(?P<exp_name>.+)__(?P<activation>[a-z0-9+-]+)__(?P<seed>[0-9]{1,18})"
)


def is_finished(folder: Path) -> bool:
    """By status.json; where there is none that can be read, by a model.pt that is not empty."""
    state = read_json(folder / "status.json").get("state")
    if isinstance(state, str):
        return state == "finished"
    weights = folder / "model.pt"
    return weights.exists() and weights.stat().st_size > 0


def read_config(folder: Path) -> RecordedRun | None:
    """A run without its points; None where config.json is missing, unreadable or not that of a run."""
    config = read_json(folder / "config.json")
    flags = config.get("args")
    if not isinstance(flags, dict):
        return None
    names, seed = (config.get("algorithm"), flags.get("env_id"), flags.get("activation")), flags.get("seed")
    if not all(isinstance(name, str) and name for name in names) or not isinstance(seed, int):
        return None
    algorithm, env_id, activation = map(printable, (*names[:2], study.group_of(flags)))
    game = env_id.removesuffix("NoFrameskip-v4")
    codes = (" ".join(f"{name} {digest}" for name, digest in code.items()) for code in study.codes_of(config))
    code = printable(", then ".join(codes))
    return RecordedRun(folder, algorithm, game, activation, seed, flags, is_finished(folder), code)


def read_run(folder: Path) -> RecordedRun:
    """A run with its points; what is wrong with its files is named on stderr.

    Raises:
        BadInput: it is no run's folder.
    """
    run = read_config(folder)
    if run is None:
        inside = runs_below(folder)
        hint = f"; name a run in it, e.g. {inside[0]}" if inside else ""
        raise BadInput(f"{folder} is not a run's folder: its config.json is missing or unreadable{hint}")
    points, run.agent_steps, run.problems = read_events(sorted(folder.glob("events.out.tfevents.*")))
    run.points = without_rounding(points)
    for problem in run.problems:
        warn(f"{folder}: {problem}")
    return run


def find_runs(runs_dir: Path, out_dir: Path) -> tuple[list[RecordedRun], list[str]]:
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
        if run := read_config(folder):
            runs.append(run)
            continue
        match = RUN_NAME.fullmatch(folder.name)
        is_ours = (folder / "config.json").exists() or (folder / ".lock").exists()
        if not match or not is_ours:
            strangers.append(folder)
            continue
        named = "", match["game"], match["activation"], int(match["seed"]), {"exp_name": match["exp_name"]}
        runs.append(RecordedRun(folder, *named, False, left_out="config.json is missing or unreadable"))
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
    configs = sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")])
    return [config.parent for config in configs if read_config(config.parent)]


def choose_experiments(runs: Sequence[RecordedRun], exp_names: Sequence[str]) -> list[RecordedRun]:
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
    study.further_experiments[:] = exp_names[1:]
    chosen = [run for run in runs if not exp_names or run.exp_name in exp_names]
    for algorithm in {run.algorithm for run in chosen} if exp_names else ():
        names = {run.exp_name for run in chosen if run.algorithm == algorithm}
        first = min(names, key=exp_names.index)
        for run in chosen:
            if run.algorithm == algorithm and run.exp_name != first:
                run.activation += f"@{run.exp_name}"
    return chosen


def algorithms_of(runs: Sequence[RecordedRun]) -> list[str]:
    """Those of the study first, then what the plots have never heard of."""
    found = {run.algorithm for run in runs if run.algorithm}
    return [name for name in study.ALGORITHMS if name in found] + sorted(found - set(study.ALGORITHMS))


def activations_of(runs: Sequence[RecordedRun]) -> list[str]:
    return in_study_order(run.activation for run in runs)


def in_study_order(activations: Iterable[str]) -> list[str]:
    """Each once: those of the study first, then what the plots have never heard of; then each other experiment's."""
    places = {name: place for place, name in enumerate(study.ACTIVATIONS)}

    def place(group: str) -> tuple[str, int, str]:
        activation, exp_name = study.split_group(group)
        return exp_name, places.get(activation.partition("+conv-")[0], len(places)), activation

    return sorted(set(activations), key=place)


# ------------------------------------------------------------------------------------------ select runs


def equally_long(steps: int, length: int) -> bool:
    return abs(steps - length) <= LENGTH_TOLERANCE * length


def usual_length(all_steps: Sequence[int]) -> int:
    """The most common number of agent steps, up to the tolerance; of equally common ones the largest."""
    lengths = Counter(all_steps)

    def support(length: int) -> int:
        return sum(n for other, n in lengths.items() if equally_long(other, length))

    return max(lengths, key=lambda length: (support(length), length))


def of_first(runs: Sequence[RecordedRun]) -> Sequence[RecordedRun]:
    """Those of the first of several experiments, beside which the others are shown."""
    return [run for run in runs if not study.split_group(run.activation)[1]] or runs


def select_runs(runs: Sequence[RecordedRun], allow_unfinished: bool) -> dict[str, int]:
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
    lengths = {}
    for algorithm in algorithms_of(runs):
        candidates = [run for run in runs if run.algorithm == algorithm and not run.left_out]
        planned = usual_length([run.planned_steps for run in of_first(candidates)]) if candidates else 0
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
                    equally_long(run.agent_steps, planned) or not run.finished,  # not damaged
                    named[run.exp_name],
                    run.finished,
                    run.agent_steps,
                ),
            )
            for run in twins:
                if run is not best:
                    run.left_out = f"same seed as {best.name if best.name != run.name else printable(str(best.folder))}"
        drawn = [run for run in candidates if not run.left_out]
        if drawn and allow_unfinished:
            lengths[algorithm] = max(run.agent_steps for run in drawn)
        elif drawn:
            length = usual_length([run.agent_steps for run in of_first(drawn)])
            for run in drawn:
                if not equally_long(run.agent_steps, length):
                    run.left_out = f"other length than the usual {length:,} agent steps"
            lengths[algorithm] = max(run.agent_steps for run in drawn if not run.left_out)
    return lengths


def describe_runs(runs: Sequence[RecordedRun]) -> list[str]:
    """What of the study is left out, unfinished, missing or mixed: a line each, many runs in one."""
    lines = []
    groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not run.left_out and not run.finished:
            entry = f"{run.seed} at {run.agent_steps:,} of {run.planned_steps:,}"
            groups[run.algorithm, run.activation, ""][run.game].append(entry)
        elif run.left_out:
            is_twin = run.left_out.startswith("same seed")
            reason = "same seed as another run" if is_twin else run.left_out
            entry = f"{run.name} ({run.left_out})" if is_twin else f"{run.seed} at {run.agent_steps:,}"
            groups[run.algorithm, run.activation, reason][run.game].append(entry)
    for (algorithm, activation, reason), by_game in sorted(groups.items()):
        total = sum(map(len, by_game.values()))
        which = "; ".join(f"{game} {', '.join(seeds)}" for game, seeds in by_game.items())
        what = f"{algorithm or 'algorithm unknown'} {activation}, {total} run(s)"
        lines.append(f"left out, {what}, {reason}: {which}" if reason else f"drawn unfinished, {what}: {which}")
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
        sides: dict[str, dict[str, list[str]]] = {}
        for flag in sorted({flag for run in drawn for flag in run.flags} - harmless):
            values = sides[f"differ in --{printable(flag).replace('_', '-')}"] = defaultdict(list)
            for run in drawn:
                value = json.dumps(run.flags[flag]) if flag in run.flags else "not recorded"  # an older script's run
                values[value].append(run.name)
        codes = sides["were trained by different code"] = defaultdict(list)
        for run in drawn:
            if run.code:
                codes[run.code].append(run.name)
        for what, values in sides.items():
            if len(values) > 1:
                ranked = sorted(values.items(), key=lambda item: -len(item[1]))
                which = "; ".join(
                    f"{value} in {len(names)} run(s)"
                    + (f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if i else "")
                    for i, (value, names) in enumerate(ranked)
                )
                lines.append(f"mixed, {whose} {what}: {which}")
    lines += [f"damaged, {run.name}: {printable(', '.join(run.problems))}" for run in runs if run.problems]
    return lines


def by_experiment(runs: Sequence[RecordedRun]) -> Iterator[tuple[str, str, list[RecordedRun]]]:
    """(algorithm, exp_name, runs) of each experiment; the first experiment's exp_name is ""."""
    for algorithm in algorithms_of(runs):
        found = defaultdict(list)
        for run in runs:
            if run.algorithm == algorithm:
                found[study.split_group(run.activation)[1]].append(run)
        yield from ((algorithm, exp_name, found[exp_name]) for exp_name in sorted(found))


def missing_runs(runs: Sequence[RecordedRun]) -> dict[tuple[str, str], list[tuple[str, int]]]:
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


class Curve(NamedTuple):
    """A quantity of a drawn run over its training."""

    algorithm: str
    game: str
    activation: str
    seed: int
    quantity: str
    values: np.ndarray  # (GRID_POINTS,), NaN where the run has no value


@dataclass
class Results:
    """What figures and tables are made of.

    Attributes:
        runs: one row per run found: RUN_COLUMNS, FINAL_VALUES (NaN where a run has none), then `drawn` (bool), `run`
            (the folder's name) and `note` (why it is left out, what is damaged).
        curves: every quantity of every drawn run on the algorithm's grid. Quantities are `score` (mean return of the
            last 100 games), `normalized_score` (Eq. 6), `human_normalized_score` (Eq. 7), the last parts of the
            `representation/` tags, the `layers/` tags whole, and `dead_factors`, the mean over a LaN's factors of their
            dead neurons.
        lengths: agent steps at the end of each algorithm's grid.
        folders: of the drawn runs, by algorithm and `run`.
        scales: of the normalised score, by algorithm and game; none where there is no ReLU baseline.
    """

    runs: pd.DataFrame
    curves: list[Curve]
    lengths: dict[str, int]
    folders: dict[tuple[str, str], Path]
    scales: dict[tuple[str, str], statistics.Scale] = field(default_factory=dict)

    @property
    def drawn(self) -> pd.DataFrame:
        return self.runs[self.runs["drawn"]]

    @cached_property
    def _groups(self) -> dict[tuple[str, str, str], Curves]:
        """The curves by algorithm, activation and quantity."""
        found: dict[tuple[str, str, str], Curves] = defaultdict(lambda: defaultdict(dict))
        for curve in self.curves:
            found[curve.algorithm, curve.activation, curve.quantity][curve.game][curve.seed] = curve.values
        return found

    def select_curves(self, algorithm: str, activation: str, quantity: str, game: str | None = None) -> Curves:
        """Of the runs that have this quantity, in one game or in all."""
        found = self._groups.get((algorithm, activation, quantity), {})
        return {name: dict(seeds) for name, seeds in found.items() if game in (None, name)}

    def quantities(self, algorithm: str, activation: str) -> list[str]:
        """Those of which a run has a curve."""
        return [quantity for *group, quantity in self._groups if group == [algorithm, activation]]

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


def curves_of(run: RecordedRun, grid: np.ndarray) -> dict[str, np.ndarray]:
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
    factors = [curve for name, curve in curves.items() if name.startswith(FACTORS)]
    if factors:
        curves["dead_factors"] = np.mean(factors, axis=0)
    return curves


def finals_of(run: RecordedRun) -> dict[str, float]:
    """Mean return of the last 100 games; the last measurement of everything else, if it has a value."""
    last = {tag: float(points["value"][-1]) for tag, points in without_rounding(run.points).items()}
    finals = {tag.removeprefix(REPRESENTATION): value for tag, value in last.items() if not np.isnan(value)}
    if RETURN in run.points:
        finals["final_return"] = float(np.mean(run.points[RETURN]["value"][-LAST_GAMES:], dtype=float))
    if "effective_rank" in finals:
        finals["rank_share"] = finals["effective_rank"] / study.style(run.activation).width
    factors = [value for name, value in finals.items() if name.startswith(FACTORS)]
    if factors:
        finals["dead_factors"] = float(np.mean(factors))
    return finals


def in_network_order(layers: Iterable[str]) -> list[str]:
    """Names of layers from the network's input up: in the order given, a layer's factors (`z_enc`, ...) before it."""
    names = list(layers)

    def place(name: str) -> tuple[int, bool]:
        whole = next((other for other in names if name.startswith(f"{other}_")), name)
        return names.index(whole), whole == name

    return sorted(names, key=place)


def layers_of(quantities: Iterable[str]) -> list[str]:
    """Of which layers these quantities, or tags, say how many units are constant: from the network's input up.

    Args:
        quantities: in the order in which a run measures its layers.
    """
    found = (name.removeprefix(LAYERS).removesuffix("/constant") for name in quantities if is_of_layers(name))
    return in_network_order(found)


def is_of_layers(quantity: str) -> bool:
    return quantity.startswith(LAYERS) and quantity.endswith("/constant")


def most_constant(finals: dict[str, float]) -> tuple[str, float] | None:
    """The layer with most constant units, of equals the lowest, and their share; None where it is z, or unknown.

    Args:
        finals: of `finals_of`.
    """
    shares = {layer: finals[f"{LAYERS}{layer}/constant"] for layer in layers_of(finals)}
    layer = max(shares, key=shares.__getitem__, default="z")
    return (layer, shares[layer]) if shares.get(layer, 0.0) > shares.get("z", 0.0) else None


def make_results(runs: Sequence[RecordedRun], lengths: dict[str, int]) -> tuple[Results, list[str]]:
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
        relu = [i for i in relu if runs[i].finished] or relu
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
    folders = {(run.algorithm, run.name): run.folder for run in runs if not run.left_out}
    found = [
        Curve(run.algorithm, run.game, run.activation, run.seed, quantity, values)
        for run, quantities in zip(runs, curves, strict=True)
        for quantity, values in quantities.items()
    ]
    results = Results(runs_table(runs, finals), found, lengths, folders, scales)
    return results, list(dict.fromkeys(messages))


def runs_table(runs: Sequence[RecordedRun], finals: Sequence[dict[str, float]]) -> pd.DataFrame:
    rows = []
    for run, values in zip(runs, finals, strict=True):
        row = {name: getattr(run, name) for name in RUN_COLUMNS}
        row |= {name: values.get(name, np.nan) for name in FINAL_VALUES}
        note = "; ".join(filter(None, [run.left_out or "unfinished" * (not run.finished), *run.problems]))
        rows.append(row | {"drawn": not run.left_out, "run": run.name, "note": printable(note)})
    table = pd.DataFrame(rows, columns=[*RUN_COLUMNS, *FINAL_VALUES, "drawn", "run", "note"])
    return table.sort_values(["algorithm", "game", "activation", "seed", "run"], ignore_index=True)
