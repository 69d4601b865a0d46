import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from plots_common import STEPS, draw, event_file, points, read_study, rows
from synthetic_study import layers_of, make_run, true_layer, true_measurement, write_events

import metrics
from plots import figures, results


def test_what_is_left_out_is_named_listed_and_counted(tmp_path, runs_dir, capsys):
    for seed in (1, 2, 3):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
        make_run(runs_dir, "dqn", "Pong", "tanh", seed, finished=seed != 2, stop=1 if seed != 2 else 0.5)
    make_run(runs_dir, "dqn", "Pong", "sigmoid", 1, agent_steps=50_000)
    make_run(runs_dir, "dqn", "Pong", "relu", 3, exp_name="again")
    make_run(runs_dir, "dqn", "Breakout", "tanh", 1, learning_rate=3e-4, new_flag=0.0)
    (make_run(runs_dir, "dqn", "Pong", "selu", 4) / "config.json").write_text("{")
    for activation, seed, code in (
        ("relu", 1, {}),
        ("relu", 2, {}),
        ("tanh", 1, {"resumes": [{"code": {"dqn.py": "b2"}}, {}]}),
    ):
        file = runs_dir / f"PongNoFrameskip-v4__dqn_atari_lan__{activation}__{seed}" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"code": {"dqn.py": "a1", "lan_utils": "c3"}} | code))
    (runs_dir / "empty").mkdir()
    (runs_dir / "other_program").mkdir()
    (runs_dir / "other_program" / "config.json").write_text('{"args": 3}')
    (runs_dir / "infinite").mkdir()
    config = '{"algorithm": "dqn", "args": {"env_id": "PongNoFrameskip-v4", "activation": "relu", "seed": Infinity}}'
    (runs_dir / "infinite" / "config.json").write_text(config)
    (runs_dir / "notes.txt").write_text("mine")
    draw(runs_dir, tmp_path / "out", "tables")
    messages = capsys.readouterr().err.splitlines()
    for expected in (
        "3 folders are no runs: empty, infinite, other_program",
        "left out, algorithm unknown selu, 1 run(s), config.json is missing or unreadable: Pong 4",
        "left out, dqn tanh, 1 run(s), unfinished: Pong 2 at 50,000",
        "left out, dqn sigmoid, 1 run(s), other length than the usual 100,000 agent steps: Pong 1 at 50,000",
        "missing, dqn relu, 1 run(s) that others have: Breakout 1",
        "mixed, dqn runs differ in --learning-rate: 0.0001 in 5 run(s); "
        "0.0003 in 1 run(s) (BreakoutNoFrameskip-v4__dqn_atari_lan__tanh__1)",
        "mixed, dqn runs were trained by different code: dqn.py a1 lan_utils c3 in 2 run(s); "
        "dqn.py a1 lan_utils c3, then dqn.py b2 in 1 run(s) (PongNoFrameskip-v4__",
        "mixed, dqn runs differ in --new-flag: not recorded in 5 run(s); 0.0 in 1 run(s) (Breakout",
        "no normalised score, dqn Breakout: no finished ReLU baseline",
    ):
        assert any(line.startswith(expected) for line in messages), (expected, messages)
    assert sum("same seed" in line for line in messages) == 1
    found = rows(tmp_path / "out")
    assert len(found) == 10
    unfinished = found["PongNoFrameskip-v4__dqn_atari_lan__tanh__2"]
    assert (unfinished["finished"], unfinished["agent_steps"]) == ("False", "50000")
    assert (unfinished["drawn"], unfinished["note"]) == ("False", "unfinished")
    assert found["BreakoutNoFrameskip-v4__dqn_atari_lan__tanh__1"]["normalized_score"] == ""
    twins = [found[f"PongNoFrameskip-v4__{name}__relu__3"]["drawn"] for name in ("again", "dqn_atari_lan")]
    assert sorted(twins) == ["False", "True"]
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| DQN | Tanh | 3 | 1 | 0 |" in table
    assert "| DQN | ReLU | 3 | 1 | 1 |" in table


def test_what_is_drawn_unfinished_is_named(tmp_path, runs_dir, capsys):
    """Would catch: prefixes of two runs that stand in tables as if they had finished."""
    for seed, finished in ((1, True), (2, False), (3, False)):
        make_run(runs_dir, "dqn", "Pong", "relu", seed, finished=finished, stop=1.0 if finished else 0.5)
    draw(runs_dir, tmp_path / "out", "study_dqn", "fig01", "tables", allow_unfinished=True)
    line = "drawn unfinished, dqn relu, 2 run(s): Pong 2 at 50,000 of 100,000, 3 at 50,000 of 100,000"
    assert line in capsys.readouterr().err.splitlines()
    tables = (tmp_path / "out" / "results.md").read_text()
    assert f"- {line}\n" in tables
    assert tables.count("Of 3 runs 2 unfinished.") == 2
    notes = {row["seed"]: (row["drawn"], row["note"]) for row in rows(tmp_path / "out").values()}
    assert notes == {"1": ("True", ""), "2": ("True", "unfinished"), "3": ("True", "unfinished")}


@pytest.mark.parametrize("allow_unfinished", [False, True])
def test_a_try_of_another_length_does_not_replace_the_studys_run(tmp_path, runs_dir, allow_unfinished):
    """Would catch: the longer of two experiments chosen, and then left out for its length, or a finished quick try."""
    for activation in ("relu", "tanh", "tanh-lan"):
        make_run(runs_dir, "dqn", "Pong", activation, 1, finished=not allow_unfinished, stop=0.8)
    make_run(runs_dir, "dqn", "Pong", "tanh", 1, agent_steps=200_000, exp_name="longer")
    make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, agent_steps=2_000, games=6, exp_name="quickstart")
    draw(runs_dir, tmp_path / "out", "tables", allow_unfinished=allow_unfinished)
    found = rows(tmp_path / "out")
    drawn = {name.split("__", 1)[1] for name, row in found.items() if row["drawn"] == "True"}
    assert drawn == {"dqn_atari_lan__relu__1", "dqn_atari_lan__tanh__1", "dqn_atari_lan__tanh-lan__1"}
    for name in ("longer__tanh", "quickstart__tanh-lan"):
        note = found[f"PongNoFrameskip-v4__{name}__1"]["note"]
        assert note == f"same seed as PongNoFrameskip-v4__dqn_atari_lan__{name.split('__')[1]}__1"


def test_a_damaged_run_does_not_push_out_its_whole_twin(tmp_path, runs_dir):
    """Would catch: of a seed the run whose event file lost its end, which is then left out for its length."""
    for seed in (1, 2, 3):
        make_run(runs_dir, "dqn", "Pong", "relu", seed, stop=0.4 if seed == 1 else 1.0)
    make_run(runs_dir, "dqn", "Pong", "relu", 1, exp_name="again")
    table = read_study(runs_dir, tmp_path).runs.set_index("run")
    whole, damaged = "PongNoFrameskip-v4__again__relu__1", "PongNoFrameskip-v4__dqn_atari_lan__relu__1"
    assert table["drawn"].sum() == 3
    assert table.loc[whole, "drawn"]
    assert table.loc[damaged, "note"] == f"same seed as {whole}"


def two_experiments(runs_dir, exp_name="a_lr1e-4", **changes):
    """A study of three seeds, and one run of an ablation whose name comes first in the alphabet."""
    for seed in (1, 2, 3):
        for activation in ("relu", "tanh", "tanh-lan"):
            make_run(runs_dir, "dqn", "Pong", activation, seed)
    return make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, exp_name=exp_name, learning_rate=3e-4, **changes)


@pytest.mark.parametrize("case", ["equally long", "a little longer", "the study's is unfinished"])
def test_an_ablation_does_not_replace_the_studys_run(tmp_path, runs_dir, case):
    """Would catch: of two runs of a seed the first in the alphabet, or the one with some more agent steps."""
    two_experiments(runs_dir, agent_steps=100_500 if case == "a little longer" else STEPS)
    name = "PongNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"
    if case == "the study's is unfinished":
        (runs_dir / name / "status.json").write_text('{"state": "running"}')
    read = read_study(runs_dir, tmp_path, allow_unfinished=case == "the study's is unfinished")
    table = read.runs.set_index("run")
    assert table["drawn"].sum() == 9
    assert table.loc["PongNoFrameskip-v4__a_lr1e-4__tanh-lan__1", "note"] == f"same seed as {name}"


def test_two_experiments_are_drawn_side_by_side(tmp_path, runs_dir, capsys):
    """Would catch: an ablation's run taken for a seed of the study, the same look or label for both, its rank divided
    by another width, the study's claims and scores changed by it; or other runs than those asked for."""
    two_experiments(runs_dir)
    for activation in ("relu", "wide-1024"):
        make_run(runs_dir, "dqn", "Pong", activation, 4, exp_name="a_lr1e-4", learning_rate=3e-4)
    make_run(runs_dir, "dqn", "Pong", "tanh", 4, exp_name="third")
    draw(runs_dir, tmp_path / "alone", "tables", exp_name=("dqn_atari_lan",))
    capsys.readouterr()
    draw(runs_dir, tmp_path / "both", "tables", exp_name=("dqn_atari_lan", "a_lr1e-4"))
    assert capsys.readouterr().err.splitlines() == [
        "missing, dqn relu@a_lr1e-4, 1 run(s) that others have: Pong 1",
        "missing, dqn tanh-lan@a_lr1e-4, 1 run(s) that others have: Pong 4",
        "missing, dqn wide-1024@a_lr1e-4, 1 run(s) that others have: Pong 1",
    ]
    alone, both = rows(tmp_path / "alone"), rows(tmp_path / "both")
    assert len(alone) == 9
    assert {name: row for name, row in both.items() if "a_lr1e-4" not in name} == alone
    others = {row["activation"]: row for name, row in both.items() if "a_lr1e-4" in name}
    assert set(others) == {"tanh-lan@a_lr1e-4", "relu@a_lr1e-4", "wide-1024@a_lr1e-4"}
    assert {row["drawn"] for row in both.values()} == {"True"}
    wide = others["wide-1024@a_lr1e-4"]
    assert float(wide["rank_share"]) == pytest.approx(float(wide["effective_rank"]) / 1024)
    # The same seed of the same made-up learning: the study's ReLU is the baseline of both.
    same = both["PongNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"], others["tanh-lan@a_lr1e-4"]
    assert same[0]["normalized_score"] == same[1]["normalized_score"] != ""

    claims = pd.read_csv(tmp_path / "both" / "claims.csv")
    is_other = claims["claim"].str.contains("@")
    assert claims[~is_other].reset_index(drop=True).equals(pd.read_csv(tmp_path / "alone" / "claims.csv"))
    assert set(claims[is_other]["claim"]) == {
        "tanh-lan@a_lr1e-4: z < mean of its factors",
        "tanh-lan@a_lr1e-4 = tanh-lan",
    }
    curves = pd.read_csv(tmp_path / "both" / "curves.csv.gz")
    assert not curves.duplicated(["algorithm", "game", "activation", "seed", "agent_steps", "quantity"]).any()
    tables = (tmp_path / "both" / "results.md").read_text()
    assert "12 found, 12 drawn, 0 unfinished. Experiments: dqn_atari_lan, a_lr1e-4.\n" in tables
    assert "| DQN | Tanh (LaN), a_lr1e-4 | 1 | 0 | 1 |" in tables


def test_every_experiment_has_its_own_line(tmp_path, runs_dir):
    """Would catch: a group that no figure shows, one that a figure of other activations shows, two lines that look
    alike, long names cut where they differ."""
    names = [f"an_ablation_of_the_learning_rate_1e-{n}" for n in (3, 4)]
    two_experiments(runs_dir, names[0])
    for activation in ("tanh-lan", "selu"):
        make_run(runs_dir, "dqn", "Pong", activation, 2, exp_name=names[1])
    read = read_study(runs_dir, tmp_path, exp_names=("dqn_atari_lan", *names))
    shown = figures.shown_activations(read, figures.FIGURES["fig05a_dqn_normalized"])
    assert shown == ["relu", "tanh", "sigmoid", "tanh-lan", *(f"tanh-lan@{name}" for name in names)]
    assert f"selu@{names[1]}" in figures.shown_activations(read, figures.FIGURES["fig07_dqn_variants"])
    figure, _ = figures.draw_panels(read, figures.FIGURES["fig05a_dqn_normalized"])
    lines = figure.axes[0].get_lines()
    assert len({line.get_label() for line in lines}) == len({line.get_color() for line in lines}) == len(lines) == 5


def test_experiments_differ_in_colour_and_dashes(runs_dir):
    """Would catch: looks that depend on names alone, as those of lr3e-3 and lr5e-4 once were the same."""
    names = ("dqn_atari_lan", "lr3e-3", "lr5e-4", "lr2e-3")
    for name in names:
        make_run(runs_dir, "dqn", "Pong", "tanh", 1, exp_name=name)
    runs, _ = results.find_runs(runs_dir, runs_dir)
    styles = [figures.study.style(run.activation) for run in results.choose_experiments(runs, names)]
    assert len({style.color for style in styles}) == len({str(style.dashes) for style in styles}) == 4


def test_a_short_search_does_not_push_out_what_it_is_shown_beside(tmp_path, runs_dir):
    """Would catch: many short runs, named second, whose length becomes the usual one."""
    for seed in (1, 2, 3):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
    for seed in range(1, 6):
        make_run(runs_dir, "dqn", "Pong", "relu", seed, agent_steps=10_000, exp_name="search")
    drawn = read_study(runs_dir, tmp_path, exp_names=("dqn_atari_lan", "search")).drawn
    assert drawn["activation"].tolist() == ["relu"] * 3
    drawn = read_study(runs_dir, tmp_path, exp_names=("search", "dqn_atari_lan")).drawn
    assert drawn["activation"].tolist() == ["relu"] * 5


def test_an_unfinished_relu_does_not_set_the_scale(tmp_path, runs_dir):
    """Would catch: 0 and 1 from a tenth of the training, and a finished ReLU whose normalised score is far above 1."""
    for seed in (1, 2):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
    whole = read_study(runs_dir, tmp_path, allow_unfinished=True).scales
    make_run(runs_dir, "dqn", "Pong", "relu", 3, finished=False, stop=0.1)
    assert read_study(runs_dir, tmp_path, allow_unfinished=True).scales == whole


def test_of_each_algorithm_the_first_experiment_named_is_the_usual_one(runs_dir):
    """Would catch: PPO's runs under a suffix because DQN's experiment was named before."""
    for algorithm in ("dqn", "ppo"):
        make_run(runs_dir, algorithm, "Pong", "tanh", 1)
        make_run(runs_dir, algorithm, "Pong", "tanh", 1, exp_name=f"{algorithm}_other")
    runs, _ = results.find_runs(runs_dir, runs_dir / "figures")
    names = ("dqn_other", "ppo_atari_lan", "dqn_atari_lan", "ppo_other")
    chosen = results.choose_experiments(runs, names)
    assert {(run.exp_name, run.activation) for run in chosen} == {
        ("dqn_other", "tanh"),
        ("dqn_atari_lan", "tanh@dqn_atari_lan"),
        ("ppo_atari_lan", "tanh"),
        ("ppo_other", "tanh@ppo_other"),
    }
    with pytest.raises(
        results.BadInput, match=r"--exp-name typo: no run has it; there are: dqn_atari_lan, dqn_other, ppo_"
    ):
        results.choose_experiments(runs, ("typo",))


def test_another_projects_run_is_not_a_damaged_one_of_ours(tmp_path, runs_dir, capsys):
    """Would catch: `<game>__<exp_name>__<seed>__<time>` taken for a run without its config.json; a folder with nothing
    else taken for a study, exit code 0. A run of ours that lost its config.json still has its lock."""
    foreign = runs_dir / "PongNoFrameskip-v4__dqn_atari__1__1614716469"
    foreign.mkdir(parents=True)
    write_events(foreign / "events.out.tfevents.1614716469.host.1.0", [("charts/episodic_return", 10, 1.0)])
    with pytest.raises(results.BadInput, match=f"holds no run; none of its folders .*: {foreign.name}$"):
        draw(runs_dir, tmp_path / "out", "tables")
    assert not (tmp_path / "out").exists()
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    damaged = make_run(runs_dir, "dqn", "Pong", "relu", 2)
    (damaged / "config.json").unlink()
    (damaged / ".lock").touch()
    draw(runs_dir, tmp_path / "out", "tables")
    messages = capsys.readouterr().err.splitlines()
    assert f"1 folder is no run: {foreign.name}" in messages
    assert "left out, algorithm unknown relu, 1 run(s), config.json is missing or unreadable: Pong 2 at 0" in messages
    assert set(rows(tmp_path / "out")) == {"PongNoFrameskip-v4__dqn_atari_lan__relu__1", damaged.name}


def test_runs_in_folders_of_their_own_are_named(tmp_path, capsys):
    """Would catch: "train first" where runs/machineA/RUN has been trained; runs left out without a word."""
    make_run(tmp_path / "runs" / "machineA", "dqn", "Pong", "relu", 1)
    make_run(tmp_path / "runs" / "machineB", "dqn", "Pong", "relu", 2)
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}")  # not ours
    both = f"{tmp_path}/runs/machineA, {tmp_path}/runs/machineB"
    for folder in (tmp_path / "runs", tmp_path):
        with pytest.raises(
            results.BadInput, match=f"holds no run; it holds folders of runs: name one of them, {both}$"
        ):
            draw(folder, tmp_path / "out", "tables")
    make_run(tmp_path / "runs", "dqn", "Pong", "tanh", 1)
    draw(tmp_path / "runs", tmp_path / "out", "tables")
    assert f"not drawn, in folders of their own: the runs in {both}" in capsys.readouterr().err.splitlines()


def test_many_unfinished_runs_do_not_flood_the_terminal(tmp_path, runs_dir, capsys):
    for seed in range(40):
        make_run(runs_dir, "dqn", "Pong", "relu", seed, games=3, measurements=2, finished=False)
    draw(runs_dir, tmp_path / "out", "tables")
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    assert "--allow-unfinished" in messages[1]


def test_a_truncated_run_is_not_drawn_as_a_whole_one(tmp_path, runs_dir, capsys):
    """It has a model.pt, but its curve ends early."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "relu", 2)
    file = event_file(make_run(runs_dir, "dqn", "Pong", "relu", 3))
    file.write_bytes(file.read_bytes()[:10_000])
    draw(runs_dir, tmp_path / "out", "tables")
    messages = capsys.readouterr().err
    assert "left out, dqn relu, 1 run(s), other length than the usual 100,000 agent steps: Pong 3 at" in messages
    assert re.search(r"damaged, PongNoFrameskip.*relu__3: .* the last \d+ bytes are truncated or damaged", messages)


def test_config_of_a_run_is_enough(runs_dir):
    """The folder's name is for people: what a run is stands in config.json."""
    folder = make_run(runs_dir, "ppo", "Pong", "relu", 1)
    folder.rename(runs_dir / "renamed")
    (run,), messages = results.find_runs(runs_dir, runs_dir / "figures")
    assert (run.algorithm, run.game, run.activation, run.seed, run.finished) == ("ppo", "Pong", "relu", 1, True)
    assert messages == []
    assert json.loads((runs_dir / "renamed" / "config.json").read_text())["args"] == run.flags


# ------------------------------------------------------------------------------ finished, unknown, hostile


@pytest.mark.parametrize(
    ("status", "weights", "finished"),
    [
        ('{"state": "finished"}', None, True),  # a folder without weights
        ('{"state": "running"}', b"weights", False),
        (None, b"weights", True),
        (None, b"", False),
        (None, None, False),
        ("{", b"weights", True),
        ("[]", b"weights", True),
        ('"finished"', None, False),
        ('{"state": "FINISHED"}', None, False),
    ],
)
def test_a_run_is_finished_by_its_status_then_by_its_weights(tmp_path, status, weights, finished):
    """Would catch: a run without weights left out, an empty model.pt taken for finished, a crash on an odd status."""
    for name, content in (("status.json", status and status.encode()), ("model.pt", weights)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    assert results.is_finished(tmp_path) is finished


def test_a_finished_run_without_weights_is_drawn(tmp_path, runs_dir):
    """Would catch: results/study, which holds no weights, drawn as nothing."""
    for seed in (1, 2):
        (make_run(runs_dir, "dqn", "Pong", "relu", seed) / "model.pt").unlink()
    assert read_study(runs_dir, tmp_path).runs["drawn"].tolist() == [True, True]


@pytest.mark.slow
def test_unknown_names_are_runs_like_others(tmp_path, runs_dir, capsys):
    """Would catch: a new activation or algorithm called damaged, or left out of every figure and table."""
    for seed in (1, 2):
        for activation in ("relu", "tanh", "gelu-lan"):
            make_run(runs_dir, "dqn", "Pong", activation, seed)
        make_run(runs_dir, "../random", "Pong", "tanh", seed, exp_name="random")
    draw(runs_dir, tmp_path / "out", "tables", "fig05a", "study_", "games_")
    messages = capsys.readouterr().err
    assert "damaged" not in messages
    assert "left out" not in messages
    found = rows(tmp_path / "out")
    assert {row["drawn"] for row in found.values()} == {"True"}
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"fig05a_dqn_normalized.png", "study_dqn.png", "study_-random.png", "games_-random.png"}
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| DQN | gelu-lan | 2 | 0 | 0 |" in table
    assert "| ../RANDOM | Tanh | 2 | 0 | 0 |" in table
    assert "no gelu-lan" not in messages


def hand_made(folder, **changes):
    args = {"env_id": "PongNoFrameskip-v4", "activation": "relu", "seed": 1, "total_timesteps": 100_000}
    config = {"algorithm": "dqn", "args": args | changes.pop("args", {})} | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_one_bad_run_among_good_ones_is_named_and_skipped(tmp_path, runs_dir, capsys):
    """Would catch: a traceback, or no figure at all, because of one folder."""
    for activation in ("relu", "tanh"):
        for seed in (1, 2):
            make_run(runs_dir, "dqn", "Pong", activation, seed)
    name = "PongNoFrameskip-v4__{}__relu__7"
    bad = [runs_dir / name.format(what) for what in ("list", "truncated", "float", "none")]
    for folder, content in zip(bad, ("[1, 2]", '{"args": ', None, None), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(content or "")
    for folder, seed in zip(bad[2:], (1.5, None), strict=True):
        shutil.rmtree(folder)
        hand_made(folder, args={"seed": seed})
    hand_made(runs_dir / "no_events")
    odd = os.fsencode(runs_dir) + b"/Pong\xff\xfeNoFrameskip-v4__x__relu__9"
    os.rename(make_run(runs_dir, "dqn", "Pong", "relu", 9), odd)
    config = make_run(runs_dir, "dqn", "Qbert", "relu", 1, exp_name="surrogate") / "config.json"
    config.write_text(config.read_text().replace("Qbert", "$\\\\frac{$\\ud800\\n"))
    make_run(runs_dir, "dqn", "$x^", "tanh", 1, exp_name="formula")
    draw(runs_dir, tmp_path / "out")
    messages = capsys.readouterr().err
    for folder in bad:
        assert "config.json is missing or unreadable" in rows(tmp_path / "out")[folder.name]["note"]
    assert "left out, dqn relu, 1 run(s), unfinished, no point yet: Pong 1 at 0" in messages
    assert rows(tmp_path / "out")["Pong\\udcff\\udcfeNoFrameskip-v4__x__relu__9"]["drawn"] == "True"
    assert "Error" not in messages
    for figure in ("fig05a_dqn_normalized", "fig16_dqn_games", "study_dqn"):
        assert (tmp_path / "out" / f"{figure}.png").exists()


def test_curves_table_has_the_columns_that_others_read(tmp_path, runs_dir):
    """Would catch: another order or name of the columns, curves that are not those of the figures."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(runs_dir, "dqn", "Pong", "tanh-lan", 2)
    draw(runs_dir, tmp_path / "out", "tables")
    curves = pd.read_csv(tmp_path / "out" / "curves.csv.gz")
    assert list(curves.columns) == ["algorithm", "game", "activation", "seed", "agent_steps", "quantity", "value"]
    dead = curves[(curves["activation"] == "tanh-lan") & (curves["quantity"] == "dead_neurons")]
    at_end = dead[dead["agent_steps"] == STEPS]["value"].item()
    assert at_end == pytest.approx(true_measurement("dead_neurons", "tanh-lan", 2, 1.0), rel=1e-5)
    assert set(curves["quantity"]) >= {"score", "normalized_score", "human_normalized_score", "dead_factors"}


def test_the_scaled_count_of_a_constant_layer_has_no_value(tmp_path, runs_dir):
    """Constant are 100 %, 100 %, 50 % and 100 % at steps 1 to 4; the scaled count says 0.1 to 0.4, or is not logged.

    Would catch: rounding in the tables; a line across the steps at which a run was constant; another bound than the
    one by which runs log it.
    """
    assert results.MOSTLY_CONSTANT == metrics.MOSTLY_CONSTANT
    std, scaled = "representation/std_dead_neurons", "representation/dead_neurons_scaled"
    constant = points((1, 1.0), (2, 1.0), (3, 0.5), (4, 1.0))
    logged = points((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4))
    grid = np.array([0, 1, 2, 2.5, 3, 4])
    for found in (logged, logged[2:3]):
        run = results.RecordedRun(
            tmp_path, "dqn", "Pong", "tanh", 1, {}, True, agent_steps=4, points={std: constant, scaled: found}
        )
        curve = results.curves_of(run, grid)["dead_neurons_scaled"]
        np.testing.assert_allclose(curve, [np.nan, np.nan, np.nan, np.nan, 0.3, np.nan], rtol=1e-6)
        assert "dead_neurons_scaled" not in results.finals_of(run)
        assert results.finals_of(run)["std_dead_neurons"] == 1
    never = {
        std: constant[:2]
    }  # all constant, so that nothing was ever logged: a run without a value, not without a count
    assert np.isnan(results.without_rounding(never)[scaled]["value"]).all()
    assert scaled not in results.without_rounding({std: constant})  # a run of before there was such a count
    alive = {std: points((1, 0.99 - 1e-4)), scaled: points((1, 0.7))}
    assert results.without_rounding(alive)[scaled]["value"].tolist() == pytest.approx([0.7])


@pytest.mark.parametrize("has_layers", [True, False])
def test_every_quantity_of_every_layer_is_in_the_curves(tmp_path, runs_dir, has_layers):
    """Would catch: some layers or quantities only, or under other names; an old run without them left out."""
    make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, layers=has_layers, dies="conv3")
    draw(runs_dir, tmp_path / "out", "tables")
    curves = pd.read_csv(tmp_path / "out" / "curves.csv.gz")
    found = {quantity for quantity in curves["quantity"] if quantity.startswith("layers/")}
    names = layers_of("tanh-lan") if has_layers else ()
    assert found == {f"layers/{layer}/{what}" for layer in names for what in ("constant", "dormant", "grad_norm")}
    assert "dead_neurons" in set(curves["quantity"])
    at_end = curves[curves["agent_steps"] == STEPS].set_index("quantity")["value"]
    for quantity in found:
        _, layer, what = quantity.split("/")
        true = true_layer(layer, what, "tanh-lan", 1, 1.0, "conv3")
        assert at_end[quantity] == pytest.approx(float(true), rel=1e-5), quantity


def test_layers_stand_in_network_order():
    """As they are measured. Would catch: factors above their product; a head below the convolutions, where the figure
    would say that the death begins; a layer that somebody else measures lost."""
    measured = [
        "stem",
        "conv2",
        "lstm",
        "z",
        "conv2_enc",
        "conv2_star",
        "z_enc",
        "z_star",
        "z_star2",
        "critic",
        "actor",
    ]
    order = ["stem", "conv2_enc", "conv2_star", "conv2", "lstm", "z_enc", "z_star", "z_star2", "z", "critic", "actor"]
    assert results.in_network_order(measured) == order
    assert results.layers_of(f"layers/{name}/constant" for name in measured) == order
    assert results.layers_of(["layers/conv1/dormant", "representation/constant", "score"]) == []


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ({"conv2": 0.2, "conv3": 0.9, "z": 0.5}, ("conv3", 0.9)),
        ({"conv3": 0.9, "z": 0.9}, None),  # z has as many: nothing to say
        ({"conv3": 0.9, "z": 1.0}, None),
        ({"conv2": 1.0, "conv3": 1.0, "z": 0.9}, ("conv2", 1.0)),  # of equals the lowest
        ({"conv3": 0.3}, ("conv3", 0.3)),
        ({}, None),
    ],
)
def test_the_layer_with_most_constant_units(shares, found):
    """Would catch: z named, the uppermost of two equal ones, an error on an old run."""
    finals = {f"layers/{layer}/constant": share for layer, share in shares.items()}
    assert results.most_constant(finals | {"layers/z/dormant": 1.0, "final_return": 9.0}) == found


def test_other_experiments_stand_behind_in_the_same_order():
    """Would catch: a LaN before the tanh that it is compared with, since "-" comes before "@"."""
    found = results.in_study_order(["tanh-lan@b", "tanh@b", "zelu", "relu@b", "tanh-lan", "tanh", "relu@a", "tanh"])
    assert found == ["tanh", "tanh-lan", "zelu", "relu@a", "relu@b", "tanh@b", "tanh-lan@b"]
