"""Run folders -> every figure and table of the paper that they allow. No training code, no network, no GPU.

python plot_results.py --runs-dir runs --out-dir figures
python plot_results.py --only fig05a fig06          (some of the figures)
python plot_results.py --allow-unfinished           (a look at runs that are still training)
python plot_results.py --exp-name dqn_atari_lan lr1e-4   (two experiments, side by side)
python plot_results.py --runs-dir runs ../other/runs     (runs of several folders)

stderr says what was left out, and why; the rest is in `index.html`, `results.md` and the tables `results.csv`
(a row per run), `curves.csv.gz` (a row per point) and `claims.csv` (the paper's claims and more) of the out folder.
Beyond the paper: interquartile means, bootstrap intervals and the probability of improvement (Agarwal et al. 2021,
"Deep Reinforcement Learning at the Edge of the Statistical Precipice").
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lan_utils.cli import RunFailed, launch
from plots import figures, report
from plots.command import (
    choose_items,
    prepare_out_dir,
    print_lines,
    read_runs,
    workers,
)
from plots.results import (
    Results,
    algorithms_of,
    choose_experiments,
    describe_runs,
    find_runs,
    make_results,
    select_runs,
)


@dataclass
class Args:
    """Draw every figure and table of the paper that the runs found allow."""

    runs_dir: tuple[str, ...] = ("runs",)
    """folders that hold the run folders"""
    out_dir: str = "figures"
    """folder for the figures, the tables and the cache"""
    only: tuple[str, ...] = ()
    """draw only what has a name that starts so, e.g. fig05a fig06; "tables" are the CSV files and results.md"""
    exp_name: tuple[str, ...] = ()
    """draw the runs of these experiments only; those after the first as groups of their own, side by side with it"""
    allow_unfinished: bool = False
    """draw unfinished and shorter runs too; curves end where the shortest seed of a group ends"""


_results: Results  # of the worker processes, which inherit it


def draw(name: str, plot: figures.Plot, out_dir: Path) -> figures.Drawn:
    return figures.draw(_results, name, plot, out_dir)


def main(args: Args) -> None:
    global _results
    out_dir = Path(args.out_dir)
    found, messages = [], []
    for runs_dir in {path.absolute(): path for path in map(Path, args.runs_dir)}.values():
        of_folder, about_it = find_runs(runs_dir, out_dir)
        found += of_folder
        messages += about_it
    runs = choose_experiments(found, args.exp_name)
    plots = figures.figures_of(algorithms_of(runs))
    items = choose_items(args.only, plots)
    cache = prepare_out_dir(out_dir, items)

    read_runs(found, cache)  # all, or the others' cache would be deleted
    lengths = select_runs(runs, args.allow_unfinished)
    messages += describe_runs(runs)
    _results, unnormalised = make_results(runs, lengths)
    messages += unnormalised
    for run in found:
        run.points = {}  # from here on there are curves
    drawn = [run for run in runs if not run.left_out]
    if not drawn and any(run.left_out == "unfinished" for run in runs):
        messages.append("no run has finished: --allow-unfinished draws what there is so far")

    names = [name for name in items if name != "tables"]
    pictures, captions, failed = {}, {}, []
    missing = defaultdict(list)  # names of figures by what they have in common
    with workers() as pool:
        jobs = {name: pool.submit(draw, name, plots[name], out_dir) for name in reversed(names)}  # the longest first
        if "tables" in items:
            writing = pool.submit(report.write_curves, _results, out_dir / "curves.csv.gz")
            making = pool.submit(report.make_tables, _results, runs)
        for name in names:
            try:
                picture, caption, what = jobs[name].result()
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # one figure must not stop the rest
                picture, caption, what = b"", "", f"not drawn, {type(error).__name__}: {' '.join(str(error).split())}"
                failed.append(name)
            if what and (args.only or figures.NO_CONTROL not in what):  # the paper's study has none
                missing[what].append(name)
            if picture:
                pictures[name], captions[name] = picture, caption
        if "tables" in items:
            writing.result()
            made = making.result()
    stale = {file.stem for file in out_dir.glob("*.png") if file.with_suffix(".pdf").exists()} - set(pictures)
    if args.only:
        stale &= set(names)
    if stale:
        missing[f"from an earlier drawing, still in {out_dir}"] = sorted(stale)
    messages += [f"{what}: {', '.join(found)}" for what, found in missing.items()]
    print_lines(messages)

    written = [f"{len(pictures)} figure{'s' * (len(pictures) != 1)}"] if names else []
    if "tables" in items:
        unfinished = sum(not run.finished for run in runs)
        summary = f"Runs in {', '.join(args.runs_dir)}: {len(runs)} found, {len(drawn)} drawn, {unfinished} unfinished."
        summary += f" Experiments: {', '.join(args.exp_name)}." if args.exp_name else ""
        claims = report.make_claims(_results)
        report.write_csv(_results.runs, out_dir / "results.csv")
        report.write_csv(claims, out_dir / "claims.csv")
        tables = [report.claims_table(claims), *made]
        report.write_markdown(tables, captions, messages, summary, out_dir / "results.md")
        written += report.TABLES
        if not args.only:
            tables.append(report.every_run(_results))
            report.write_page(tables, captions, pictures, messages, summary, out_dir / "index.html")
            written.append("index.html")
    print_lines([f"{len(drawn)} of {len(runs)} runs drawn; {out_dir}: {', '.join(written)}"], to_stdout=True)
    if failed:
        raise RunFailed(f"{', '.join(failed)} could not be drawn, the rest is whole; please report the lines above")


if __name__ == "__main__":
    launch(main, Args)
