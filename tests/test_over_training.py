import json

from conftest import ROOT, run_script
from synthetic_study import write_events

SCRIPT = ROOT / "experiments" / "over_training.py"


def make_run(runs_dir, activation, **points):
    """A run with these points by tag, of step and value."""
    folder = runs_dir / activation
    folder.mkdir(parents=True)
    flags = {"env_id": "BreakoutNoFrameskip-v4", "activation": activation, "seed": 1, "exp_name": "any"}
    (folder / "config.json").write_text(json.dumps({"algorithm": "ppo", "args": flags}))
    (folder / "status.json").write_text(json.dumps({"state": "stopped"}))
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
    """Would catch: games or measurements of after a step, or of long before it, in its column; an unfinished run's
    newest value in a column that it has not reached; rounding where nearly all of z is constant."""
    long = make_run(
        tmp_path,
        "relu",
        games=[(1000 * n, 7.0) for n in range(1, 101)]
        + [(150_000 + 10 * n, 1.0 if n <= 50 else 2.0) for n in range(1, 101)]
        + [(500_000, 101.5)],
        dead=[(100_000, 0.9), (100_001, 0.2), (200_000, 0.4), (200_001, 0.9), (400_500, 0.5), (996_001, 0.25)],
        constant=[(150_000, 0.5), (200_000, 1.0), (500_000, 0.0)],
        scaled=[(150_000, 0.6), (200_000, 0.9), (500_000, 0.1)],
        rank=[(200_000, 300), (990_000, 250), (996_001, 351)],
        conv3=[(200_000, 0.125)],
    )
    short = make_run(tmp_path, "tanh", games=[(210_000, 3.0)], dead=[(199_000, 0.1), (495_904, 0.7)], rank=[])
    done = run_script(SCRIPT, long, short)
    assert done.stderr == ""
    values, header = cells(done.stdout)
    assert header == ["0.2", "0.5", "1"]
    relu = {quantity: row for (quantity, run), row in values.items() if run == "PPO relu 1"}
    assert relu == {
        "return": ["1.5", "2.5", "2.5"],
        "dead, the paper's count": ["30.0%", "50.0%", "25.0%"],
        "dead, z divided by its scale": ["60.0%", "10.0%", "–"],  # noqa: RUF001
        "constant": ["75.0%", "0.0%", "–"],  # noqa: RUF001
        "dormant": ["–", "–", "–"],  # noqa: RUF001
        "effective rank": ["–", "–", "–"],  # noqa: RUF001
        "centred rank": ["300", "–", "300"],  # noqa: RUF001
        "constant, conv1": ["–", "–", "–"],  # noqa: RUF001
        "constant, conv2": ["–", "–", "–"],  # noqa: RUF001
        "constant, conv3": ["12.5%", "–", "–"],  # noqa: RUF001
    }
    assert values["dead, the paper's count", "PPO tanh 1"] == ["10.0%", "–", "–"]  # noqa: RUF001
    assert values["return", "PPO tanh 1"] == ["–", "–", "–"]  # noqa: RUF001


def test_what_is_no_run_is_refused(tmp_path):
    done = run_script(SCRIPT, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("is not a run's folder: its config.json is missing or unreadable; name a run")
