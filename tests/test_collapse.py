import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT

from dqn_atari_lan import QNetwork


def test_a_layer_at_its_biases_is_told_from_a_saturated_one(tmp_path):
    """Would catch: weights of another layer than the activations', a count of neurons where one of values is meant."""
    bias = torch.tensor([0.5, -1.0]).repeat(256)
    at_rest = np.tanh(bias.numpy()) * np.ones((4, 1), np.float32)
    saturated = np.tile(np.array([[0.95, 0.0], [-0.95, 0.0], [0.95, 0.0], [0.5, 0.0]], np.float32), 256)
    for activation, layers in {
        "tanh": {"z": at_rest},
        "tanh-lan": {"z": 0, "z_enc": at_rest, "z_star": saturated},
    }.items():
        folder = tmp_path / "runs" / f"Pong__dqn__{activation}__1"
        folder.mkdir(parents=True)
        network = QNetwork(6, activation)
        for factor in network.encoder.z.factors.values():
            factor[0].bias.data = bias
        torch.save(network.state_dict(), folder / "model.pt")
        np.savez(folder / "activations.npz", **layers)
    command = [sys.executable, ROOT / "experiments" / "collapse.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [
        "Pong__dqn__tanh-lan__1, z_enc: 0.762, 0.00%, 100%, 0.00000",
        "Pong__dqn__tanh-lan__1, z_star: 0.950, 37.50%, 50%, 1.41212",  # -0.95 from tanh(0.5) = 0.46212
        "Pong__dqn__tanh__1, z: 0.762, 0.00%, 100%, 0.00000",
    ]
