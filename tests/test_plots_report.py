import json

import numpy as np
import pandas as pd
import pytest
from plots_common import draw, read_study
from synthetic_study import make_run, true_score

from plots import report, results


def test_names_from_folders_are_harmless_on_the_page(tmp_path, runs_dir):
    make_run(runs_dir, "dqn", "Pong", "relu", 1, exp_name="<script>alert(1)<%2Fscript>", games=3, measurements=2)
    runs, _ = results.find_runs(runs_dir, tmp_path)
    table = report.Table("results", "Runs", "", pd.DataFrame({"run": [run.name for run in runs]}))
    report.write_page([table], {}, {}, [f"left out: {runs[0].name}"], "1 run", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") == 2


def make_results(runs):
    """Results of runs with given final values and constant curves.

    Args:
        runs: (algorithm, game, activation, seed, {final value: number}, {quantity: (grid,)})
    """
    table, curves = [], []
    for algorithm, game, activation, seed, finals, found in runs:
        head = {"algorithm": algorithm, "game": game, "activation": activation, "seed": seed}
        table.append(
            dict.fromkeys(results.FINAL_VALUES, np.nan)
            | head
            | {"agent_steps": 100}
            | finals
            | {"drawn": True, "run": "", "note": ""}
        )
        curves += [results.Curve(**head, quantity=quantity, values=values) for quantity, values in found.items()]
    return results.Results(pd.DataFrame(table), curves, {run[0]: 100 for run in runs}, {})


def claim(claims, **wanted):
    for name, value in wanted.items():
        claims = claims[claims[name] == value]
    (row,) = claims.to_dict("records")
    return row


def test_a_claim_by_hand():
    """Dead neurons of ReLU minus tanh: 0.1, 0.2, 0.3 in Pong: mean 0.2, 4.302653 * 0.1 / sqrt(3) = 0.248414 to both
    sides: open; dormant ones 0.4, 0.5, 0.6: confirmed; by standard deviation -0.4, -0.5, -0.6: contradicted.

    Would catch: unpaired differences (tanh's spread is larger than its distance), second minus first, PPO's among them.
    """
    runs = []
    for seed, tanh in ((1, 0.0), (2, 0.3), (3, 0.1)):
        base = {"dead_neurons": tanh, "dormant_neurons": tanh, "std_dead_neurons": tanh}
        runs.append(("dqn", "Pong", "tanh", seed, base, {}))
        relu = {"dead_neurons": tanh + 0.1 * seed, "dormant_neurons": tanh + 0.3 + 0.1 * seed}
        runs.append(("dqn", "Pong", "relu", seed, relu | {"std_dead_neurons": tanh - 0.3 - 0.1 * seed}, {}))
    runs += [("ppo", "Pong", name, 1, {"dead_neurons": 0.5}, {}) for name in ("relu", "tanh")]
    claims = report.make_claims(make_results(runs))
    wanted = {"algorithm": "dqn", "claim": "relu > tanh"}
    found = claim(claims, quantity="dead_neurons", **wanted)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0.2, -0.048414, 0.448414), abs=1e-6)
    assert (found["pairs"], found["games"], found["when"], found["verdict"]) == (3, "Pong", "end", "open")
    found = claim(claims, quantity="dormant_neurons", **wanted)
    assert (found["low"], found["verdict"]) == (pytest.approx(0.251586, abs=1e-6), "confirmed")
    assert claim(claims, quantity="std_dead_neurons", **wanted)["verdict"] == "contradicted"
    single = claim(claims, algorithm="ppo", claim="relu > tanh", quantity="dead_neurons")
    assert (single["difference"], single["pairs"], single["verdict"]) == (0.0, 1, "open")
    nobody = claim(claims, algorithm="dqn", claim="tanh > tanh-lan", quantity="dead_neurons")
    assert (nobody["pairs"], nobody["verdict"]) == (0, "open")


def test_runs_of_unequal_length_are_no_pair_at_their_ends():
    """Drawn unfinished: three ReLUs at 100 steps, three LaNs at 20, and a fourth pair that is within a hundredth.

    Would catch: "confirmed" for what the longer runs learned meanwhile; a pair that is dropped and not counted.
    """
    runs = []
    for seed in (1, 2, 3, 4):
        runs.append(("dqn", "Pong", "relu", seed, {"final_return": 9.0 + seed, "dead_neurons": 0.5}, {}))
        steps = 99.5 if seed == 4 else 20
        found = {"final_return": 1.0, "dead_neurons": 0.1, "agent_steps": steps}
        curve = {"effective_rank": np.array([1.0, 2.0, np.nan])}
        runs.append(("dqn", "Pong", "tanh-lan", seed, found, curve))
    claims = report.make_claims(make_results(runs))
    for name, quantity, difference in (
        ("tanh-lan >= relu", "final_return", -12.0),
        ("relu > tanh-lan", "dead_neurons", 0.4),
    ):
        row = claim(claims, claim=name, quantity=quantity)
        assert (row["pairs"], row["without_value"], row["verdict"]) == (1, 3, "open")
        assert row["difference"] == pytest.approx(difference)


def test_means_over_fewer_games_say_so(tmp_path, runs_dir):
    """Would catch: an activation that was trained on the easy game alone, and stands above the others in a table."""
    for seed in (1, 2):
        for game, activation in (("Pong", "relu"), ("Breakout", "relu"), ("Pong", "tanh")):
            make_run(runs_dir, "dqn", game, activation, seed)
    draw(runs_dir, tmp_path / "out", "tables")
    text = (tmp_path / "out" / "results.md").read_text()
    tables = [part for part in text.split("\n## ") if part.startswith(("Table 2", "Aggregates"))]
    assert len(tables) == 2
    for table in tables:
        (tanh,) = [line for line in table.splitlines() if line.startswith("| DQN | Tanh")]
        (relu,) = [line for line in table.splitlines() if line.startswith("| DQN | ReLU")]
        assert tanh.count("(1 of 2 games)") >= 7
        assert "games)" not in relu


def test_tables_say_which_runs_have_not_finished(tmp_path, runs_dir):
    """Would catch: a LaN that is surely better than a ReLU which was trained for half as long."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1, finished=False, stop=0.5)
    make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1)
    draw(runs_dir, tmp_path / "out", "tables", allow_unfinished=True)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| DQN | ReLU | 1 (1 unfinished) | 0 | 0 |" in text
    assert "| DQN | Tanh (LaN) | 1 | 0 | 0 |" in text
    (lan,) = [line for line in text.split("\n## ")[3].splitlines() if line.startswith("| DQN | Tanh (LaN)")]
    assert lan.split(" | ")[-2:] == ["–", "1 |"]  # noqa: RUF001 (no improvement over ReLU, of 1 run)


def test_the_controls_are_claimed_to_do_better_by_every_count():
    """The bilinear rank is 10 and 20 above the LaN's, its dead neurons 0.1 and 0.2 more: t(1) = 12.7062 makes both
    intervals wide; with a third pair of 30 the rank's is 20 ± 4.302653 * 10 / sqrt(3): open still; returns are above by
    exactly 1: confirmed.

    Would catch: "more dead neurons" taken for better; rows of a control that no run has.
    """
    runs = []
    for seed, more in ((1, 10.0), (2, 20.0), (3, 30.0)):
        lan = {"effective_rank": 100.0 * seed, "dead_neurons": 0.1, "final_return": 5.0 * seed}
        bilinear = {
            "effective_rank": 100.0 * seed + more,
            "dead_neurons": 0.1 + more / 100,
            "final_return": 5.0 * seed + 1,
        }
        runs += [("ppo", "Pong", "tanh-lan", seed, lan, {}), ("ppo", "Pong", "bilinear", seed, bilinear, {})]
    claims = report.make_claims(make_results(runs))
    rank = claim(claims, claim="bilinear > tanh-lan", quantity="effective_rank")
    assert (rank["difference"], rank["low"]) == pytest.approx((20.0, 20 - 24.841377))
    assert (rank["pairs"], rank["verdict"]) == (3, "open")
    dead = claim(claims, claim="bilinear < tanh-lan", quantity="dead_neurons")
    assert (dead["difference"], dead["verdict"]) == (pytest.approx(0.2), "open")
    assert claim(claims, claim="bilinear > tanh-lan", quantity="final_return")["verdict"] == "confirmed"
    assert not claims["claim"].str.contains("glu|1024|layernorm").any()


def test_ranks_of_unequal_widths_are_compared_as_shares():
    """A rank of 300 of 512 neurons against 400 of 1024: 0.586 against 0.391. Would catch: "contradicted" since 300 is
    less than 400."""
    runs = []
    for seed in (1, 2, 3):
        for name, rank, width in (("tanh-lan", 300.0, 512), ("relu-1024", 400.0, 1024)):
            finals = {"effective_rank": rank + seed * (name == "tanh-lan"), "rank_share": (rank + seed) / width}
            runs.append(("ppo", "Pong", name, seed, finals, {}))
    claims = report.make_claims(make_results(runs))
    assert claim(claims, claim="tanh-lan > relu-1024", quantity="rank_share")["verdict"] == "confirmed"
    of_pair = claims[claims["claim"].isin(["tanh-lan > relu-1024", "tanh-lan < relu-1024"])]
    assert not of_pair["quantity"].str.startswith("effective_rank").any()


def test_two_experiments_are_said_to_be_equal_until_an_interval_contradicts_it():
    """Ranks differ by 50, 51 and 49: contradicted; returns by 1, -1 and 0: open. The other experiment's tanh has no
    partner in the first. Would catch: "open" for what plainly differs, an ablation compared with itself."""
    runs = []
    for seed, rank, score in ((1, 50.0, 1.0), (2, 51.0, -1.0), (3, 49.0, 0.0)):
        runs.append(("dqn", "Pong", "relu", seed, {"effective_rank": 100.0, "final_return": 9.0}, {}))
        other = {"effective_rank": 100.0 + rank, "final_return": 9.0 + score}
        runs.append(("dqn", "Pong", "relu@plain", seed, other, {}))
        runs.append(("dqn", "Pong", "tanh@plain", seed, other, {}))
    claims = report.make_claims(make_results(runs))
    found = claim(claims, claim="relu@plain = relu", quantity="effective_rank")
    assert (found["difference"], found["pairs"], found["verdict"]) == (pytest.approx(50.0), 3, "contradicted")
    assert claim(claims, claim="relu@plain = relu", quantity="final_return")["verdict"] == "open"
    assert not claims["claim"].str.contains("tanh@plain =").any()


def full_length_runs(runs_dir):
    """ReLU's three seeds of a full-length DQN in Breakout, one of them with cleanrl's flags; PPO's in Breakout is too
    short; Pong has tanh alone."""
    few = {"games": 120, "measurements": 2, "layers": False}
    like_cleanrl = {"double_q": False, "end_e": 0.01, "adam_eps": 1e-8}
    paper = {"double_q": True, "end_e": 0.1, "adam_eps": 1e-5}
    for seed, flags in ((1, paper), (2, paper), (3, like_cleanrl)):
        folder = make_run(runs_dir, "dqn", "Breakout", "relu", seed, agent_steps=10_000_000, **few)
        config = json.loads((folder / "config.json").read_text())
        config["args"] |= flags
        (folder / "config.json").write_text(json.dumps(config))
    make_run(runs_dir, "dqn", "Pong", "tanh", 1, agent_steps=10_000_000, **few)
    make_run(runs_dir, "ppo", "Breakout", "relu", 1, agent_steps=9_000_000, **few)
    make_run(runs_dir, "pqn", "Breakout", "relu", 1, agent_steps=50_000_000, **few)


def published_rows(runs_dir, out_dir):
    """The rows of results.md's table of published scores."""
    draw(runs_dir, out_dir, "tables", allow_unfinished=True)
    _, _, text = (out_dir / "results.md").read_text().partition("## Beside published scores\n")
    lines = [line[2:-2].split(" | ") for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_published_scores_stand_beside_full_length_relu_runs_only(tmp_path, runs_dir):
    """cleanrl reports 366.928 ± 39.89 over 3 runs of DQN in Breakout. Would catch: tanh beside ReLU's published scores,
    a short run beside long ones, flags that differ left unsaid."""
    full_length_runs(runs_dir)
    rows = published_rows(runs_dir, tmp_path / "out")
    assert [(row["algorithm"], row["game"], row["published"], row["± over"]) for row in rows] == [
        ("DQN", "Breakout", "366.9 ± 39.9", "3 runs"),
        ("DQN", "Breakout", "358.3 ± 62.0", "episodes of 1 run"),
    ]
    assert rows[0]["source"].startswith("cleanrl dqn_atari")
    assert rows[0]["seeds"] == "1 2 3"
    ends = np.linspace(1 / 120, 1, 120)[-100:]
    seeds = [np.mean(true_score("Breakout", "relu", seed, ends)) for seed in (1, 2, 3)]
    mean, deviation = map(float, rows[0]["here"].split(" ± "))
    assert mean == pytest.approx(np.mean(seeds), abs=0.3)
    assert deviation == pytest.approx(1.44, abs=0.3)  # 0.05 of the human's range between neighbouring seeds
    flags = ("--adam-eps 1e-05, not 1e-08", "--double-q True, not False", "--end-e 0.1, not 0.01")
    differs = "; ".join(f"{flag} (2 of 3 runs)" for flag in flags)
    assert {row["differs here"] for row in rows} == {differs}


def test_no_full_length_run_no_table_of_published_scores(tmp_path, runs_dir):
    make_run(runs_dir, "dqn", "Breakout", "relu", 1)
    make_run(runs_dir, "ppo", "Breakout", "relu", 1, agent_steps=10_000_000, finished=False)
    assert published_rows(runs_dir, tmp_path / "out") == []


def test_saturates_more_slowly_is_a_mean_over_training():
    """Tanh rises from 0 to 0.4, its LaN from 0 to 0.2 (seed 1) and 0.3 (seed 2): means 0.2, 0.1 and 0.15, whatever
    their ends; before the first measurement there is nothing to compare.

    Would catch: the end in the mean's place, NaN in the mean, runs compared where only one has a value.
    """
    rise = np.linspace(0, 1, results.GRID_POINTS)
    late = np.where(rise < 0.5, np.nan, rise)
    runs = []
    for seed, end in ((1, 0.2), (2, 0.3)):
        runs.append(("dqn", "Pong", "tanh", seed, {}, {"dead_neurons": 0.4 * rise, "effective_rank": 100 * late}))
        runs.append(("dqn", "Pong", "tanh-lan", seed, {}, {"dead_neurons": end * rise, "effective_rank": 140 * rise}))
    claims = report.make_claims(make_results(runs))
    found = claim(claims, claim="tanh-lan < tanh", quantity="dead_neurons")
    assert found["difference"] == pytest.approx(-0.075)  # of -0.1 and -0.05
    assert (found["low"], found["high"]) == pytest.approx(
        (-0.075 - 12.7062 * 0.025, -0.075 + 12.7062 * 0.025), rel=1e-4
    )
    rank = claim(claims, claim="tanh-lan > tanh", quantity="effective_rank", when="mean over training")
    assert rank["difference"] == pytest.approx(40 * 0.75, rel=1e-3)


def test_a_lan_is_compared_with_relu_too():
    """Its rank is 10 and 20 lower, and 0.2 and 0.3 fewer of its neurons are constant. Would catch: a reader who learns
    of a LaN beside tanh, but not beside what everybody uses."""
    runs = []
    for seed in (1, 2):
        relu = {"effective_rank": 300.0 + seed, "std_dead_neurons": 0.5}
        lan = {"effective_rank": 300.0 - 9 * seed, "std_dead_neurons": 0.4 - 0.1 * seed}
        runs += [("dqn", "Pong", "relu", seed, relu, {}), ("dqn", "Pong", "tanh-lan", seed, lan, {})]
    claims = report.make_claims(make_results(runs))
    rank = claim(claims, claim="tanh-lan > relu", quantity="effective_rank", when="end")
    assert rank["difference"] == pytest.approx(-15)
    constant = claim(claims, claim="relu > tanh-lan", quantity="std_dead_neurons")
    assert (constant["difference"], constant["pairs"]) == (pytest.approx(0.25), 2)


def test_returns_are_claimed_over_all_games_and_in_each():
    """Tanh ends at 0.1 and 0.2, so that its LaN is above it by 0.4 and 0.3; in Qbert's points, times a thousand.

    Would catch: returns of games of another scale averaged as they are; `>=` contradicted by equality.
    """
    runs = []
    for seed in (1, 2):
        for game, scale in (("Pong", 1.0), ("Qbert", 1000.0)):
            for activation, score in (("relu", 0.5), ("tanh", 0.1 * seed), ("tanh-lan", 0.5)):
                finals = {"normalized_score": score, "final_return": scale * score}
                runs.append(("dqn", game, activation, seed, finals, {}))
    claims = report.make_claims(make_results(runs))
    both = {"games": "Pong Qbert", "quantity": "normalized_score"}
    every = claim(claims, claim="tanh-lan > tanh", **both)
    assert (every["difference"], every["pairs"]) == (pytest.approx(0.35), 4)
    assert set(claims[claims["quantity"] == "final_return"]["games"]) == {"Pong", "Qbert"}
    qbert = claim(claims, claim="tanh-lan > tanh", quantity="final_return", games="Qbert")
    assert (qbert["difference"], qbert["pairs"]) == (pytest.approx(350.0), 2)
    assert claim(claims, claim="tanh-lan >= relu", **both)["verdict"] == "confirmed"


def test_each_game_has_claims_of_its_own():
    """Every ReLU in Pong has 0.4 and 0.5 more dead neurons than tanh, in Qbert 0.1 fewer; DemonAttack has no pair.

    Would catch: a mean over games (0.175) that hides two opposite ones; one game's row with the other's pairs; a row of
    a game that has no pair; a row for each game in the table of results.md too.
    """
    runs = [("dqn", "DemonAttack", name, seed, {"dead_neurons": 0.9}, {}) for name, seed in (("relu", 1), ("tanh", 2))]
    for game, differences in (("Pong", (0.4, 0.5)), ("Qbert", (-0.1, -0.1))):
        for seed, difference in enumerate(differences):
            runs.append(("dqn", game, "tanh", seed, {"dead_neurons": 0.2}, {}))
            runs.append(("dqn", game, "relu", seed, {"dead_neurons": 0.2 + difference}, {}))
    claims = report.make_claims(make_results(runs))
    rows = claims[(claims["claim"] == "relu > tanh") & (claims["quantity"] == "dead_neurons")]
    assert list(rows["games"]) == ["Pong Qbert", "Pong", "Qbert"]
    assert list(rows["difference"]) == pytest.approx([0.175, 0.45, -0.1])
    assert list(rows["pairs"]) == [4, 2, 2]
    assert rows.iloc[2]["verdict"] == "contradicted"
    table = report.claims_table(claims)
    assert "Pong Qbert" in set(table.cells["games"])
    assert "Qbert" not in set(table.cells["games"])
    # would catch: lines that say nothing, of a LaN without runs; such claims left out in silence
    assert {claim for claim in table.cells["claim"] if "lan" in claim} == set()
    unpaired = claims[claims["pairs"] + claims["without_value"] == 0]
    assert table.note.endswith(f"There too: {len(unpaired)} claims for which no pair of runs is drawn.")
    assert len(unpaired) > 20


def test_z_is_compared_with_the_mean_of_its_factors(tmp_path, runs_dir):
    """Would catch: factors taken from other runs, or one of them alone. Tanh's law is p^2 at p = 0.39 and 0.40."""
    for seed in (1, 2):
        make_run(runs_dir, "dqn", "Pong", "tanh-lan", seed)
    claims = report.make_claims(read_study(runs_dir, tmp_path))
    found = claim(claims, claim="tanh-lan: z < mean of its factors")
    expected = np.mean([p**2 - p for p in (0.39, 0.40)])
    assert (found["difference"], found["verdict"]) == (pytest.approx(expected, abs=1e-6), "confirmed")


@pytest.mark.slow
def test_claims_and_both_ways_of_counting_stand_in_the_files(tmp_path, runs_dir):
    """Would catch: a table that is made but not shown."""
    for activation in ("relu", "tanh", "tanh-lan"):
        for seed in (1, 2):
            make_run(runs_dir, "dqn", "Pong", activation, seed)
    draw(runs_dir, tmp_path / "out")
    with open(tmp_path / "out" / "claims.csv") as file:
        assert (
            file.readline() == "algorithm,claim,quantity,when,games,difference,low,high,pairs,without_value,verdict\n"
        )
    markdown, page = ((tmp_path / "out" / name).read_text() for name in ("results.md", "index.html"))
    assert "## Claims" in markdown
    assert "| DQN | relu > tanh | dead_neurons | end | Pong | +0.200 [+0.200, +0.200] | 2 | 0 | confirmed |" in markdown
    assert '<table id="claims">' in page
    assert "<td>relu &gt; tanh</td>" in page
    assert "| dead (scaled) | effective rank | centred |" in markdown
    for text in (markdown, page):  # would catch: a caption that promises what is not drawn
        assert "product of three (2×LaN)" in text  # noqa: RUF001
        assert "Missing here: SELU; Tanh (+LaN); Tanh (2×LaN)." in text  # noqa: RUF001
        assert "Missing here: ReLU (LaN); Sigmoid; Sigmoid (LaN)." in text


def test_a_claim_says_which_pairs_have_no_value():
    """Tanh's seeds 1 and 2 in Pong are constant: seed 3 alone is no interval. In Qbert nothing is compared.

    Would catch: a verdict of the one run that lives, with nothing said of the two that died; a game without any value
    left out in silence.
    """
    runs = []
    for game, seed in (("Pong", 1), ("Pong", 2), ("Pong", 3), ("Qbert", 1)):
        lives = {"dead_neurons_scaled": 0.0} if (game, seed) == ("Pong", 3) else {}
        runs.append(("dqn", game, "tanh", seed, lives, {}))
        runs.append(("dqn", game, "relu", seed, {"dead_neurons_scaled": 0.5}, {}))
    claims = report.make_claims(make_results(runs))
    rows = claims[(claims["claim"] == "relu > tanh") & (claims["quantity"] == "dead_neurons_scaled")]
    assert rows[["games", "pairs", "without_value", "verdict"]].values.tolist() == [
        ["Pong", 1, 3, "open"],
        ["Pong", 1, 2, "open"],
        ["Qbert", 0, 1, "open"],
    ]
    shown = report.claims_table(claims).cells
    assert "3" in set(shown["without a value"])
    values = {"Pong": {3: 0.0}}
    assert report.mean_and_deviation(values, ".1f", runs=4) == "0.0 (1 of 4 runs)"
    assert report.mean_and_deviation(values, ".1f", runs=1) == "0.0"
