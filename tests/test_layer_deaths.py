import json

import numpy as np
from conftest import ROOT, run_script
from synthetic_study import write_events

DEATHS = ROOT / "experiments" / "layer_deaths.py"


def make_run(runs_dir, activation, seed, double_q, algorithm="dqn", every=1000, state="finished", flags=None, **points):
    """A run that was measured from step 10,000 on, at every `every` steps, with these values by tag."""
    folder = runs_dir / f"{activation}{seed}{double_q}{algorithm}"
    folder.mkdir(parents=True)
    flags = {
        "env_id": "BreakoutNoFrameskip-v4", "activation": activation, "seed": seed, "double_q": double_q,
        "learning_starts": 10_000, "total_timesteps": 20_000, "exp_name": "any", **(flags or {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"algorithm": algorithm, "args": flags}))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    tags = {
        "conv3": "layers/conv3/constant", "zero": "layers/conv3/zero",
        "conv2": "layers/conv2/constant", "conv1": "layers/conv1/constant",
        "no_gradient": "layers/conv3/no_gradient", "norm3": "layers/conv3/grad_norm", "norm1": "layers/conv1/grad_norm",
        "z": "representation/std_dead_neurons", "rank": "representation/effective_rank_centred",
        "dormant": "representation/dormant_neurons", "dead": "representation/dead_neurons",
        "uncentred": "representation/effective_rank", "entropy": "representation/entropy_rank",
    }  # fmt: skip
    measured = [
        (tags[name], 10_000 + every * i, value) for name, values in points.items() for i, value in enumerate(values)
    ]
    games = [("charts/episodic_return", 100 * n, float(n <= 100) * 50 + 2 * seed) for n in range(1, 201)]
    write_events(folder / "events.out.tfevents.1.host.1.0", [*games, *measured])
    return folder


def tables(text):
    """The cells of each table, by row and column."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("|") else []
        if line.startswith("|  |"):
            found.append(({}, cells))
        elif cells and cells[0] != "---":
            found[-1][0][cells[0]] = dict(zip(found[-1][1], cells[1:], strict=True))
    return [table for table, _ in found]


def test_numbers_and_paired_differences_worked_out_by_hand(tmp_path):
    """Would catch: a measurement before learning taken for the worst one, games of the beginning in the return, seeds
    that are paired crosswise, a share that is written as a fraction."""
    rest = {
        "zero": [0.6, 0.1, 0.3],
        "conv2": [0.9, 0.1, 0.2, 0.1],
        "conv1": [0, 0, 0, 0],
        "no_gradient": [0.5, 0.7, 0.6],
        "norm3": [9, 0.02, 0.04],
        "norm1": [9, 3e-6, 5e-6],
        "dormant": [0.9, 0.3],
        "dead": [0.9, 0.7],
        "uncentred": [2, 40, 30, 80],
        "entropy": [9, 5.25],
    }
    folders = [
        make_run(
            tmp_path, "tanh", 1, True, conv3=[0.95, 0.5, 1, 0.25], z=[1, 1, 1, 0.4], rank=[1, 300, 20, 400], **rest
        ),
        make_run(tmp_path, "tanh", 2, True, conv3=[0.2, 0.7, 0.8, 0.8], z=[1, 1, 1, 1], rank=[5, 200, 10, 10], **rest),
        make_run(
            tmp_path, "tanh", 1, False, conv3=[0.2, 0.3, 0.2, 0.1], z=[1, 0.2, 0, 0], rank=[1, 400, 320, 400], **rest
        ),
        make_run(
            tmp_path, "tanh", 2, False, conv3=[0.2, 0.3, 0.4, 0.2], z=[1, 1, 0.1, 0], rank=[5, 400, 360, 410], **rest
        ),
        make_run(tmp_path, "tanh-lan", 2, False, every=5000, z=[1, 0.25], rank=[1, 330]),
        make_run(tmp_path, "relu", 2, False, every=5000, z=[1, 0.5], rank=[1, 300]),
    ]
    done = run_script(DEATHS, *reversed(folders))
    assert done.stderr == ""
    values, differences = tables(done.stdout)
    assert list(values["return"].items()) == [
        ("relu, plain", "4.0"),
        ("tanh, Double", "2.0, 4.0"),
        ("tanh, plain", "2.0, 4.0"),
        ("tanh-lan, plain", "4.0"),
    ]
    double = {row: cells["tanh, Double"] for row, cells in values.items()}
    assert double == {
        "conv3 constant, before the first update": "95 %, 20 %",
        "conv3 constant, 1,000 steps later": "50 %, 70 %",
        "conv3 constant, most": "100 %, 80 %",
        "conv3 constant, at the end": "25 %, 80 %",
        "conv3 always zero, before the first update": "60 %, 60 %",
        "conv3 always zero, 1,000 steps later": "10 %, 10 %",
        "conv3 always zero, most": "30 %, 30 %",
        "conv2 constant, most": "20 %, 20 %",
        "conv1 constant, most": "0 %, 0 %",
        "z constant, at the end": "40 %, 100 %",
        "z dormant, at the end": "30 %, 30 %",
        "z dead by the paper's count, at the end": "70 %, 70 %",
        "z less than half constant from step": "13,000, -",
        "centred rank, before the first update": "1, 5",
        "centred rank, 1,000 steps later": "300, 200",
        "centred rank, lowest": "20, 10",
        "centred rank, at the end": "400, 10",
        "uncentred rank, lowest": "30, 30",
        "uncentred rank, at the end": "80, 80",
        "entropy rank, at the end": "5.2, 5.2",
        "conv3, channels with hardly a gradient, early": "65 %, 65 %",
        "gradient norm of conv3, 1,000 steps later": "0.02, 0.02",
        "gradient norm of conv3, early": "0.03, 0.03",
        "gradient norm of conv1, 1,000 steps later": "3e-06, 3e-06",
        "gradient norm of conv1, early": "4e-06, 4e-06",
        "return": "2.0, 4.0",
    }  # fmt: skip
    rare = {row: cells["tanh-lan, plain"] for row, cells in values.items()}
    assert (rare["centred rank, lowest"], rare["centred rank, at the end"], rare["conv3 constant, most"]) == (
        "-",
        "330",
        "-",
    )
    plain = ["plain: tanh-lan - tanh", "plain: tanh - relu", "plain: tanh-lan - relu"]
    assert list(differences["return"]) == ["tanh: plain - Double", *plain]
    assert "gradient norm of conv3, early" not in differences
    target = {row: cells["tanh: plain - Double"] for row, cells in differences.items()}
    half = 12.7062 * np.std([300, 350], ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert target["centred rank, lowest"] == f"+325 [{325 - half:.0f}, {325 + half:.0f}]"
    half = 12.7062 * np.std([70, 40], ddof=1) / np.sqrt(2)
    assert target["conv3 constant, most"] == f"-55 [{-55 - half:.0f}, {-55 + half:.0f}]"
    assert [differences["centred rank, at the end"][pair] for pair in plain] == ["-80", "+110", "+30"]
    assert differences["centred rank, lowest"]["plain: tanh-lan - tanh"] == "-"


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    """Would catch: a traceback, a run that silently replaces another of its seed, games or lengths that are mixed."""
    measured = {"z": [1], "rank": [1]}
    run = make_run(tmp_path, "tanh", 1, True, **measured)
    cases = {
        tmp_path / "none": "is no finished run of DQN",
        make_run(tmp_path, "tanh", 1, True, algorithm="ppo", **measured): "is no finished run of DQN",
        make_run(tmp_path, "tanh", 3, True, state="stopped", **measured): "is no finished run of DQN",
        make_run(tmp_path, "relu", 1, True, rank=[1]): "has no representation/std_dead_neurons; leave it out",
        make_run(tmp_path / "again", "tanh", 1, True, **measured): "is a second run of tanh, Double, seed 1",
        make_run(
            tmp_path, "tanh", 4, True, flags={"env_id": "PongNoFrameskip-v4"}, **measured
        ): "runs of several kinds",
        make_run(tmp_path, "tanh", 5, True, flags={"total_timesteps": 9}, **measured): "runs of several kinds",
        make_run(tmp_path, "tanh", 6, True, flags={"learning_starts": 9}, **measured): "runs of several kinds",
    }
    for folder, message in cases.items():
        done = run_script(DEATHS, run, folder)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
