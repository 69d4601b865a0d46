import json

from conftest import ROOT, run_script
from synthetic_study import write_events

from plots.report import NOTHING

SCRIPT = ROOT / "experiments" / "over_training.py"


def make_run(runs_dir, activation, state="stopped", game="Breakout", **points):
    """A run with these points by tag, of step and value."""
    folder = runs_dir / activation
    folder.mkdir(parents=True)
    flags = {"env_id": f"{game}NoFrameskip-v4", "activation": activation, "seed": 1, "total_timesteps": 500_000}
    (folder / "config.json").write_text(json.dumps({"algorithm": "ppo", "args": flags}))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    tags = {
        "games": "charts/episodic_return", "dead": "representation/dead_neurons",
        "constant": "representation/std_dead_neurons", "scaled": "representation/dead_neurons_scaled",
        "rank": "representation/effective_rank_centred", "conv3": "layers/conv3/constant",
    }  # fmt: skip
    written = [(tags[name], step, value) for name, values in points.items() for step, value in values]
    write_events(folder / "events.out.tfevents.1.host.1.0", sorted(written, key=lambda point: point[1]))
    return folder


def cells(text):
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}, rows[0][1:]


def test_means_up_to_each_step_worked_out_by_hand(tmp_path):
    """Would catch: games or measurements from after a step, or from long before it, in its column; an unfinished run's
    newest value in a column that it has not reached; rounding where nearly all of z is constant."""
    long = make_run(
        tmp_path,
        "relu",
        games=[(1000 * n, 7.0) for n in range(1, 101)]
        + [(150_000 + 10 * n, 1.0 if n <= 50 else 2.0) for n in range(1, 101)]
        + [(500_000, 101.5)],
        dead=[(100_000, 0.9), (100_001, 0.2), (200_000, 0.4), (200_001, 0.9), (400_500, 0.5), (1_000_000, 0.25)],
        constant=[(150_000, 0.5), (200_000, 1.0), (500_000, 0.0)],
        scaled=[(150_000, 0.6), (200_000, 0.9), (500_000, 0.1)],
        rank=[(200_000, 300), (990_000, 250), (1_000_000, 351)],
        conv3=[(200_000, 0.125)],
    )
    short = make_run(tmp_path, "tanh", games=[(210_000, 3.0)], dead=[(199_000, 0.1), (499_328, 0.7)])
    whole = make_run(tmp_path, "selu", state="finished", dead=[(499_328, 0.7)])
    done = run_script(SCRIPT, long, short, whole)
    assert done.stderr == ""
    values, header = cells(done.stdout)
    assert header == ["0.2", "0.5", "0.75", "1"]
    relu = {quantity: row for (quantity, run), row in values.items() if run == "PPO relu 1"}
    assert relu == {
        "return": ["1.5", "2.5", "2.5", "2.5"],
        "dead, the paper's count": ["30.0%", "50.0%", NOTHING, "25.0%"],
        "dead, z divided by its scale": ["60.0%", "10.0%", NOTHING, NOTHING],
        "constant": ["75.0%", "0.0%", NOTHING, NOTHING],
        "dormant": [NOTHING, NOTHING, NOTHING, NOTHING],
        "entropy rank": [NOTHING, NOTHING, NOTHING, NOTHING],
        "effective rank": [NOTHING, NOTHING, NOTHING, NOTHING],
        "centred rank": ["300", NOTHING, NOTHING, "300"],
        "constant, conv1": [NOTHING, NOTHING, NOTHING, NOTHING],
        "constant, conv2": [NOTHING, NOTHING, NOTHING, NOTHING],
        "constant, conv3": ["12.5%", NOTHING, NOTHING, NOTHING],
    }
    assert values["dead, the paper's count", "PPO tanh 1"] == ["10.0%", NOTHING, NOTHING, NOTHING]
    assert values["return", "PPO tanh 1"] == [NOTHING] * 4
    assert values["dead, the paper's count", "PPO selu 1"] == [NOTHING, "70.0%", NOTHING, NOTHING]


def test_runs_of_two_games_are_told_apart(tmp_path):
    """Would catch: a second game that is refused as a second run, or that stands there without its name."""
    folders = [make_run(tmp_path / game, "relu", game=game, dead=[(200_000, 0.5)]) for game in ("Pong", "Seaquest")]
    done = run_script(SCRIPT, *folders)
    assert done.returncode == 0, done.stderr
    values, _ = cells(done.stdout)
    assert {run for _, run in values} == {"PPO relu 1, Pong", "PPO relu 1, Seaquest"}


def test_what_has_no_table_is_refused_and_damage_is_named(tmp_path):
    """Would catch: a table without columns, two lines of the same name, a damaged file that is passed over."""
    run = make_run(tmp_path, "relu", dead=[(200_000, 0.5)])
    cases = {
        tmp_path: "is not a run's folder: its config.json is missing or unreadable; name a run in it",
        make_run(tmp_path / "again", "relu", dead=[(200_000, 0.5)]): "is a second run of PPO relu 1, beside",
        run: "is a second run of PPO relu 1, beside",
    }
    for folder, message in cases.items():
        done = run_script(SCRIPT, run, folder)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
    done = run_script(SCRIPT, make_run(tmp_path / "short", "relu", dead=[(199_999, 0.5)]))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no run has reached 200,000 agent steps" in done.stderr
    with next(run.glob("events*")).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"???")
    damaged = run_script(SCRIPT, run, make_run(tmp_path / "other", "tanh", dead=[(200_000, 0.5)]))
    assert (damaged.returncode, damaged.stderr.count("\n")) == (0, 1)
    assert str(run) in damaged.stderr
