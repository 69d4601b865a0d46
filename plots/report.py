"""Tables, and the files that hold them: results.csv, curves.csv.gz, claims.csv, results.md, index.html."""

import base64
import gzip
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from lan_utils import study
from lan_utils.files import replace
from plots.results import (
    GRID_POINTS,
    MOSTLY_CONSTANT,
    RecordedRun,
    Results,
    activations_of,
    algorithms_of,
    equally_long,
    missing_runs,
)
from plots.statistics import (
    LAST_GAMES,
    RESAMPLES,
    ByGame,
    aggregates,
    interval,
    line_and_band,
    paired_difference,
    probability_of_improvement,
    verdict,
)

CURVE_STRIDE = 5  # 201 points of a curve are written
CURVE_COLUMNS = ("algorithm", "game", "activation", "seed", "agent_steps", "quantity", "value")
NOTHING = "–"  # noqa: RUF001
TABLES = ("results.csv", "curves.csv.gz", "claims.csv", "results.md")  # files of `--only tables`; index.html needs all


@dataclass
class Table:
    """A table to read."""

    name: str  # on the page
    title: str
    note: str
    cells: pd.DataFrame  # of text; the page sorts by the number that a cell begins with


# ------------------------------------------------------------------------------------------------ claims

# The paper's claims about activations, and the LaN beside ReLU: quantity, first, relation, second, and when.
END, MEAN = "end", "mean over training"
CLAIMS = (
    *(
        (quantity, first, ">", second, END)
        for quantity in ("dead_neurons", "std_dead_neurons", "dead_neurons_scaled", "dormant_neurons")
        for first, second in (("relu", "tanh"), ("tanh", "tanh-lan"), ("relu", "tanh-lan"))
    ),
    *(
        (quantity, first, ">", second, when)
        for quantity in ("effective_rank", "effective_rank_centred")
        for first, second in (("tanh-lan", "tanh"), ("tanh", "relu"), ("tanh-lan", "relu"))
        for when in (END, MEAN)
    ),
    # "Saturates more slowly".
    *((quantity, "tanh-lan", "<", "tanh", MEAN) for quantity in ("dead_neurons", "std_dead_neurons")),
    ("dead_neurons_scaled", "tanh-lan", "<", "tanh", MEAN),
)
RETURN_CLAIMS = (("tanh-lan", ">", "tanh"), ("tanh-lan", ">=", "relu"))
RETURNS = ("normalized_score", "final_return")
# Beyond the paper: is it the product, the activation, the parameters, or the norm? Of each pair the claim is that the
# first does better: a higher rank, fewer dead neurons, a higher return.
CONTROL_PAIRS = (
    *(("bilinear", "tanh-lan"), ("bilinear", "tanh"), ("tanh-glu", "tanh-lan"), ("tanh-glu", "bilinear")),
    *(("tanh-lan", "relu-1024"), ("tanh-lan", "wide-1024")),
    *(("layernorm-lan", "layernorm"), ("layernorm-relu", "relu")),
)
RANKS = ("effective_rank", "effective_rank_centred")
BETTER = {
    **dict.fromkeys(RANKS, ">"),
    **dict.fromkeys(("dead_neurons", "std_dead_neurons", "dead_neurons_scaled", "dormant_neurons"), "<"),
    **dict.fromkeys(RETURNS, ">"),
}
CLAIM_COLUMNS = (
    *("algorithm", "claim", "quantity", "when", "games", "difference", "low", "high", "pairs", "without_value"),
    "verdict",
)


def pair(first: ByGame, second: ByGame) -> dict[str, dict[int, float]]:
    """First minus second where both have the game and the seed."""
    return {
        game: {seed: first[game][seed] - second[game][seed] for seed in seeds}
        for game in sorted(first.keys() & second.keys())
        if (seeds := sorted(first[game].keys() & second[game].keys()))
    }


def pair_of_means(
    results: Results, algorithm: str, quantity: str, first: str, second: str
) -> dict[str, dict[int, float]]:
    """Mean over training of first minus second, over the agent steps at which both runs have a value."""
    curves, others = (results.select_curves(algorithm, name, quantity) for name in (first, second))
    found: dict[str, dict[int, float]] = {}
    for game in sorted(curves.keys() & others.keys()):
        for seed in sorted(curves[game].keys() & others[game].keys()):
            difference = curves[game][seed] - others[game][seed]
            if np.isfinite(difference).any():
                found.setdefault(game, {})[seed] = float(np.nanmean(difference))
    return found


def make_claims(results: Results) -> pd.DataFrame:
    """What the runs say about the paper's claims, for each algorithm apart.

    Returns:
        CLAIM_COLUMNS: `claim` as "first > second"; `difference`, first minus second, with its 95 % interval `low` to
        `high` (`statistics.paired_difference`); `games` whose pairs it is made of: all together, then, where there are
        several, each on its own (returns only so: no two games count in the same points); `pairs` that have a value,
        `without_value` those of which a run has none; `verdict` confirmed, contradicted or open.
    """
    rows = []
    for algorithm in results.lengths:
        drawn = results.drawn
        groups = drawn.loc[drawn["algorithm"] == algorithm, "activation"]
        for exp_name in sorted({"", *(study.split_group(group)[1] for group in groups)}):
            rows += claims_of(results, algorithm, exp_name)
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS))


def claims_of(results: Results, algorithm: str, exp_name: str = "") -> list[list]:
    """Rows of `make_claims` for one algorithm; of an experiment beside the first, those that have a pair of runs."""
    rows = []
    suffix = f"@{exp_name}" if exp_name else ""

    def values(activation: str, quantity: str) -> ByGame:
        return results.final_values(algorithm, activation, quantity)

    def at_the_end(first: str, second: str, quantity: str) -> ByGame:
        """Of pairs of equally long runs: what a longer one gained is not what its activation gained."""
        ends = values(first, "agent_steps"), values(second, "agent_steps")
        return {
            game: {
                seed: value for seed, value in seeds.items() if equally_long(ends[0][game][seed], ends[1][game][seed])
            }
            for game, seeds in pair(values(first, quantity), values(second, quantity)).items()
        }

    def add(differences: ByGame, claim: str, quantity: str, when: str, relation: str, runs: ByGame) -> None:
        if exp_name and not runs:
            return
        groups = [[game] for game in runs]
        if len(groups) != 1 and quantity != "final_return":
            groups = [list(runs), *groups]
        for group in groups:
            of_group = {game: differences[game] for game in group if differences.get(game)}
            found = paired_difference(of_group)
            repeated = [game for game, seeds in of_group.items() if len(seeds) > 1]
            games = " ".join(repeated or of_group or group)
            lacking = sum(len(runs[game]) - len(of_group.get(game, ())) for game in group)
            row = [algorithm, claim, quantity, when, games, *found[:3], found.pairs, lacking]
            rows.append([*row, verdict(found, relation)])

    def pairs_of_runs(first: str, second: str) -> ByGame:
        return pair(values(first, "seed"), values(second, "seed"))

    for quantity, first, relation, second, when in CLAIMS:
        first, second = first + suffix, second + suffix
        if when == MEAN:
            differences = pair_of_means(results, algorithm, quantity, first, second)
        else:
            differences = at_the_end(first, second, quantity)
        add(differences, f"{first} {relation} {second}", quantity, when, relation, pairs_of_runs(first, second))
    lan = f"tanh-lan{suffix}"
    differences = pair(*(values(lan, quantity) for quantity in ("dead_neurons", "dead_factors")))
    add(differences, f"{lan}: z < mean of its factors", "dead_neurons", END, "<", pairs_of_runs(lan, lan))
    for first, relation, second in RETURN_CLAIMS:
        first, second = first + suffix, second + suffix
        for quantity in RETURNS:
            differences = at_the_end(first, second, quantity)
            add(differences, f"{first} {relation} {second}", quantity, END, relation, pairs_of_runs(first, second))

    pairs = []
    for first, second in CONTROL_PAIRS:
        relations = BETTER
        if study.style(first).width != study.style(second).width:  # ranks of unequal widths do not compare
            relations = {"rank_share": ">"} | {name: BETTER[name] for name in BETTER if name not in RANKS}
        pairs.append((first + suffix, second + suffix, relations))
    if exp_name:  # the same activation in both experiments
        shown = {study.split_group(run)[0] for run in results.drawn["activation"] if run.endswith(suffix)}
        pairs += [(name + suffix, name, dict.fromkeys(BETTER, "=")) for name in sorted(shown)]
    for first, second, relations in pairs:
        runs = pairs_of_runs(first, second)
        for quantity, relation in relations.items() if runs else ():
            differences = at_the_end(first, second, quantity)
            add(differences, f"{first} {relation} {second}", quantity, END, relation, runs)
    return rows


def claims_table(claims: pd.DataFrame) -> Table:
    """Claims with a pair of runs: all games together, and the returns, which are by game only."""

    def with_ends(row: pd.Series) -> str:
        form = "+.1f" if row["quantity"].startswith(("effective_rank", "final_return")) else "+.3f"
        if np.isnan(row["difference"]):
            return NOTHING
        ends = "" if np.isnan(row["low"]) else f" [{row['low']:{form}}, {row['high']:{form}}]"
        return f"{row['difference']:{form}}{ends}"

    of_one_game = claims.duplicated(["algorithm", "claim", "quantity", "when"])
    unpaired = claims["games"] == ""
    claims = claims[~unpaired & (~of_one_game | (claims["quantity"] == "final_return"))]
    cells = claims.drop(columns=["difference", "low", "high"])
    cells.insert(5, "difference [95 %]", [with_ends(row) for _, row in claims.iterrows()])
    cells["algorithm"] = cells["algorithm"].str.upper()
    cells = cells.rename(columns={"without_value": "without a value"})
    return Table(
        "claims",
        "Claims",
        "The paper's, then those about controls, then whether experiments differ. Difference: first minus second of "
        "the claim, over pairs of runs of the same game and seed: at their end, where they are equally long, or as the "
        "mean over the training that both have. Interval: 95 %, Student's t over the paired seeds within each game, "
        "then the mean over games (degrees of freedom after Welch and Satterthwaite); other seeds, not other games. A "
        "game with one pair stays out where others have more. Without a value: further pairs that are not equally "
        "long, or of which a run has none, as `dead_neurons_scaled` where more than "
        f"{100 * MOSTLY_CONSTANT:.0f} % of z is constant (over training: of the agent steps at which both runs have "
        "one). Confirmed: the interval lies wholly on the claim's side of 0; contradicted: wholly on the other; open: "
        "it includes 0, or there are fewer than two pairs. A claim with = is that two experiments do not differ: it "
        "can only be contradicted. No correction for the number of claims. Every game on its own: `claims.csv`."
        + (f" There too: {unpaired.sum()} claims for which no pair of runs is drawn." if unpaired.any() else ""),
        cells.astype(str),
    )


# ------------------------------------------------------------------------------------------------ tables


def mean_and_deviation(values: ByGame, form: str, runs: int | None = None, games: int = 1) -> str:
    """The line and the band of a figure, at its end.

    Args:
        runs, games: that could have a value; says so where fewer have.
    """
    if not values:
        return NOTHING
    found = sum(map(len, values.values()))
    line, band = line_and_band(
        {game: {seed: np.array([v]) for seed, v in seeds.items()} for game, seeds in values.items()}
    )
    text = f"{line[0]:{form}}" + (f" ± {band[0]:{form}}" if band is not None else "")
    return text + fewer(found, runs or found, "runs") + fewer(len(values), games, "games")


def fewer(found: int, all_of_them: int, what: str) -> str:
    return f" ({found} of {all_of_them} {what})" if found < all_of_them else ""


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


SUMMARY = {  # columns of Table 2
    "normalised score": ("normalized_score", ".3f"),
    "dead (KDE)": ("dead_neurons", ".3f"),
    "dead (std)": ("std_dead_neurons", ".3f"),
    "dead (scaled)": ("dead_neurons_scaled", ".3f"),
    "effective rank": ("effective_rank", ".1f"),
    "centred": ("effective_rank_centred", ".1f"),
    "rank / width": ("rank_share", ".3f"),
}


def make_tables(results: Results, runs: Sequence[RecordedRun]) -> list[Table]:
    """Table 2, aggregates, scores by game, and those beside published ones.

    Args:
        runs: all that were found, for what is missing.
    """
    summary, scores, improvement = [], [], []
    missing = missing_runs(runs)
    games = sorted(results.runs["game"].unique())
    for algorithm in algorithms_of(runs):
        baseline = results.final_values(algorithm, "relu", "final_return")
        of_algorithm = results.runs[results.runs["algorithm"] == algorithm]
        played = of_algorithm.loc[of_algorithm["drawn"], "game"].nunique()
        steps = of_algorithm.loc[of_algorithm["drawn"], "agent_steps"]
        are_equally_long = steps.empty or equally_long(steps.min(), steps.max())
        for activation in activations_of([run for run in runs if run.algorithm == algorithm]):
            of_activation = of_algorithm[of_algorithm["activation"] == activation]
            drawn = of_activation["drawn"]
            unfinished = (drawn & ~of_activation["finished"]).sum()
            head = {"algorithm": algorithm.upper(), "activation": study.style(activation).label}
            row = {
                "runs": f"{drawn.sum()}" + (f" ({unfinished} unfinished)" if unfinished else ""),
                "left out": (~drawn).sum(),
                "missing": len(missing.get((algorithm, activation), [])),
            }
            for title, (quantity, form) in SUMMARY.items():
                found = results.final_values(algorithm, activation, quantity)
                row[title] = mean_and_deviation(found, form, int(drawn.sum()), played)
            summary.append(head | row)

            row = {}
            for kind, quantity in (("normalised", "normalized_score"), ("human-norm.", "human_normalized_score")):
                values = results.final_values(algorithm, activation, quantity).values()
                values = [np.array(list(seeds.values())) for seeds in values]
                ends = zip(aggregates(*values), *interval(aggregates, values), strict=True) if values else ()
                lacking = fewer(len(values), played, "games")
                texts = [with_interval(*each) + lacking for each in ends] or [NOTHING] * 3
                row |= dict(zip((f"{kind} mean", f"{kind} median", f"{kind} IQM"), texts, strict=True))
            finals = results.final_values(algorithm, activation, "final_return")
            common = sorted(finals.keys() & baseline.keys())
            row["improvement over ReLU"] = NOTHING
            if common and activation != "relu":
                pairs = [np.array(list(found[game].values())) for found in (finals, baseline) for game in common]
                better, ends = probability_of_improvement(*pairs), interval(probability_of_improvement, pairs)
                text = with_interval(float(better), *ends) + fewer(len(common), played, "games")
                # Of unfinished runs the longer one would win.
                row["improvement over ReLU"] = text if are_equally_long else NOTHING
            improvement.append(head | row | {"runs": sum(map(len, finals.values()))})
            by_game = {
                game: mean_and_deviation({game: finals[game]} if game in finals else {}, ",.1f") for game in games
            }
            scores.append(head | by_game)
    published = published_table(results, runs)
    return [
        Table(
            "table2",
            "Table 2: performance, dead neurons, rank",
            "At each run's own end, wherever an unfinished one is: mean over games and seeds ± standard deviation over "
            "seeds of the mean over games. "
            "Dead: by kernel density as in the paper, by a standard deviation below 0.001, by kernel density after "
            "dividing z by the layer's typical standard deviation (no value where more than "
            f"{100 * MOSTLY_CONSTANT:.0f} % of z is constant). Centred: effective rank of z minus each neuron's "
            "mean. Left out: unfinished, of another length, damaged, or a seed's second run. Missing: others have it.",
            pd.DataFrame(summary).astype(str),
        ),
        Table(
            "aggregates",
            "Aggregates",
            "With 95 % intervals of a stratified bootstrap (runs resampled within games, percentiles, "
            f"{RESAMPLES:,} resamples; with few seeds somewhat too narrow). IQM: mean of the middle half of all runs. "
            "Improvement: probability that a run scores higher than one of ReLU, mean over games. "
            f"{NOTHING} where there is no value; (n of m games): others have more, and such means do not compare; no "
            "interval where a game has a single run. No improvement of runs that are not equally long.",
            pd.DataFrame(improvement).astype(str),
        ),
        Table(
            "scores",
            "Score in every game",
            f"Mean of the last {LAST_GAMES} games, mean ± standard deviation over seeds.",
            pd.DataFrame(scores).astype(str),
        ),
        *([published] if published else []),
    ]


def published_table(results: Results, runs: Sequence[RecordedRun]) -> Table | None:
    """ReLU's scores after a full-length training beside what others report; None where there is no such run."""
    full = [
        run
        for run in runs
        if run.activation == "relu"
        and run.finished
        and not run.left_out
        and equally_long(run.agent_steps, study.FULL_LENGTH)
    ]
    rows = []
    for other in study.read_published_scores():
        finals = results.final_values(other.algorithm, "relu", "final_return").get(other.game, {})
        ours = [run for run in full if (run.algorithm, run.game) == (other.algorithm, other.game)]
        found = [run for run in ours if run.seed in finals]
        if not found:
            continue
        scores = {run.seed: finals[run.seed] for run in found}
        differs = []
        for flag, value in sorted(study.FLAGS_OF_PUBLISHED.get(other.algorithm, {}).items()):
            values = [run.flags[flag] for run in found if flag in run.flags and run.flags[flag] != value]
            if values:
                flags = " or ".join(dict.fromkeys(f"--{flag.replace('_', '-')} {each}" for each in values))
                differs.append(f"{flags}, not {value} ({len(values)} of {len(found)} runs)")
        rows.append(
            {
                "algorithm": other.algorithm.upper(),
                "game": other.game,
                "here": mean_and_deviation({other.game: scores}, ",.1f"),
                "seeds": " ".join(map(str, sorted(scores))),
                "published": f"{other.mean:,.1f} ± {other.deviation:,.1f}",
                "± over": other.deviation_over,
                "source": other.source,
                "differs here": "; ".join(differs) or NOTHING,
            }
        )
    if not rows:
        return None
    return Table(
        "published",
        "Beside published scores",
        f"ReLU after {study.FULL_LENGTH / 1e6:.0f} M agent steps: mean of the last {LAST_GAMES} games, mean "
        "± standard deviation over seeds. Published: as its source reports it, which may evaluate otherwise; its "
        "deviation is over what the next column says. Differs here: flags of our runs that differ from what the "
        "published runs have in common, as far as is known (docs/decisions.md).",
        pd.DataFrame(rows).astype(str),
    )


# ------------------------------------------------------------------------------------------------- files


def write_text(file: Path, text: str) -> None:
    replace(file, lambda opened: opened.write(text.encode()))


def write_csv(table: pd.DataFrame, file: Path) -> None:
    write_text(file, table.to_csv(index=False, lineterminator="\n"))


def write_curves(results: Results, file: Path) -> None:
    """curves.csv.gz: every CURVE_STRIDE-th point of the grid that has a value, agent steps rounded to whole ones."""
    values = [curve.values[::CURVE_STRIDE] for curve in results.curves]
    points = len(range(0, GRID_POINTS, CURVE_STRIDE))
    columns: dict[str, Any] = {}
    for name in ("algorithm", "game", "activation", "seed", "quantity"):
        codes, names = pd.factorize(np.array([getattr(curve, name) for curve in results.curves], object))
        columns[name] = pd.Categorical.from_codes(np.repeat(codes, points), categories=names)
    steps = {name: results.grid(name)[::CURVE_STRIDE].round().astype(np.int64) for name in results.lengths}
    columns["agent_steps"] = np.concatenate([steps[curve.algorithm] for curve in results.curves] or [[]])
    columns["value"] = np.concatenate(values or [[]])
    curves = pd.DataFrame(columns)[list(CURVE_COLUMNS)]
    text = curves[curves["value"].notna()].to_csv(index=False, lineterminator="\n", float_format="%.6g")
    replace(file, lambda opened: opened.write(gzip.compress(text.encode(), compresslevel=1, mtime=0)))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def as_markdown(table: Table) -> str:
    cells = markdown_table(list(table.cells.columns), table.cells.values.tolist())
    return f"## {table.title}\n\n{table.note}\n\n{cells}"


def write_markdown(
    tables: Sequence[Table],
    captions: Mapping[str, str],
    messages: Sequence[str],
    summary: str,
    file: Path,
) -> None:
    """results.md.

    Args:
        captions: of the figures that were drawn, by name.
    """
    parts = ["# Results\n", summary + "\n", *map(as_markdown, tables)]
    parts += ["## Figures\n", *(f"- `{name}` {caption}" for name, caption in captions.items())] if captions else []
    parts += ["\n## Missing or left out\n", *(f"- {line}" for line in messages)] if messages else []
    write_text(file, "\n".join(parts) + "\n")


def every_run(results: Results) -> Table:
    """results.csv, for the page."""
    cells = results.runs.astype(object).where(results.runs.notna(), "").astype(str)
    return Table("results", "Every run", "results.csv.", cells)


def write_page(
    tables: Sequence[Table],
    captions: Mapping[str, str],
    pictures: Mapping[str, bytes],
    messages: Sequence[str],
    summary: str,
    file: Path,
) -> None:
    """Everything on one page that needs no other file; all text in it is escaped.

    Args:
        captions, pictures: of the figures that were drawn, by name; a picture is a PNG.
    """
    shown = []
    for name, picture in pictures.items():
        (width,) = struct.unpack(">I", picture[16:20])  # of a PNG
        data = base64.b64encode(picture).decode()
        shown.append({"name": name, "title": title_of(name), "caption": captions[name], "data": data, "width": width})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html")
    write_text(file, page.render(summary=summary, messages=messages, figures=shown, tables=tables))


def title_of(name: str) -> str:
    """fig05a_dqn_normalized -> Figure 5a; study_dqn -> Study, DQN"""
    if not name.startswith("fig"):
        kind, _, algorithm = name.partition("_")
        return f"{kind.capitalize()}, {algorithm.upper()}" if algorithm else kind.capitalize()
    return "Figure " + name.split("_")[0].removeprefix("fig").lstrip("0")
