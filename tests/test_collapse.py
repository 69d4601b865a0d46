import json

import numpy as np
import torch
from conftest import ROOT, run_script

import dqn_atari_lan
import pqn_atari_lan

COLLAPSE = ROOT / "experiments" / "collapse.py"


def make_run(runs_dir, script, activation, bias, layers, **flags):
    """A finished run on Pong whose z has these biases and gave these activations."""
    algorithm = script.__name__.removesuffix("_atari_lan")
    folder = runs_dir / f"Pong__{algorithm}__{activation}__1"
    folder.mkdir(parents=True)
    flags = vars(script.Args(env_id="PongNoFrameskip-v4", activation=activation, **flags))
    (folder / "config.json").write_text(json.dumps({"algorithm": algorithm, "args": flags}))
    (folder / "status.json").write_text('{"state": "finished", "step": 1}')
    arguments = [flags["conv_activation"], False, *([flags["layer_norm"]] if algorithm == "pqn" else [])]
    network = script.QNetwork(6, activation, *arguments)
    for factor in network.encoder.z.factors.values():
        factor[0].bias.data = bias
    torch.save(network.state_dict(), folder / "model.pt")
    np.savez(folder / "activations.npz", **layers)


def test_a_layer_at_its_biases_is_told_from_a_saturated_one(tmp_path):
    """Would catch: weights of another layer than the activations', a count of neurons where one of values is meant,
    a network without its run's convolutions or norm."""
    bias = torch.tensor([0.5, -1.0]).repeat(256)
    at_rest = np.tanh(bias.numpy()) * np.ones((4, 1), np.float32)
    saturated = np.tile(np.array([[0.95, 0.0], [-0.95, 0.0], [0.95, 0.0], [0.5, 0.0]], np.float32), 256)
    make_run(tmp_path, dqn_atari_lan, "tanh", bias, {"z": at_rest}, conv_activation="tanh-lan")
    make_run(tmp_path, dqn_atari_lan, "tanh-lan", bias, {"z": 0, "z_enc": at_rest, "z_star": saturated})
    normalised = np.tanh(np.tile(np.array([[1.0, -1.0]], np.float32), (4, 256)))  # (b - mean) / deviation of 0.75
    make_run(tmp_path, pqn_atari_lan, "tanh", bias, {"z": normalised}, layer_norm="channels")
    make_run(tmp_path, dqn_atari_lan, "relu", bias, {})
    (tmp_path / "Pong__dqn__relu__1" / "activations.npz").unlink()  # too short to be measured
    done = run_script(COLLAPSE, tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == [
        "Pong__dqn__tanh-lan__1, z_enc: 0.762, 0.00%, 100%, 0.00000",
        "Pong__dqn__tanh-lan__1, z_star: 0.950, 37.50%, 50%, 1.41212",  # -0.95 from tanh(0.5) = 0.46212
        "Pong__dqn__tanh__1, z: 0.762, 0.00%, 100%, 0.00000",
        "Pong__pqn__tanh__1, z: 0.762, 0.00%, 100%, 0.00000",
    ]


def test_a_folder_without_a_finished_run_is_refused_in_one_line(tmp_path):
    done = run_script(COLLAPSE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no finished run" in done.stderr
