"""Where a layer collapsed: is it saturated, or do only its biases act on it?

python experiments/collapse.py > results/study/collapse.txt

It reads every finished run in runs/ that still has its weights and activations.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
from dqn_atari_lan import Encoder

print("run, layer: largest activation, share above 0.9, constant neurons, farthest from f(B)")
for model in sorted(Path("runs").glob("*/model.pt")):
    weights, sample = torch.load(model, map_location="cpu"), np.load(model.with_name("activations.npz"))
    encoder, prefix = Encoder(model.parent.name.split("__")[2]), "encoder."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    encoder.load_state_dict(own)
    factors = {f"z_{name}": factor for name, factor in encoder.z.factors.items()}
    at_rest = metrics.record(encoder.z, factors if len(factors) > 1 else {"z": encoder.z}, torch.zeros(1, 3136))
    for name, rest in at_rest.items():
        layer = sample[name]
        size, large, constant = np.abs(layer).max(), (np.abs(layer) > 0.9).mean(), (layer.std(axis=0) < 1e-3).mean()
        farthest = np.abs(layer - rest.numpy()).max()
        print(f"{model.parent.name}, {name}: {size:.3f}, {large:.2%}, {constant:.0%}, {farthest:.5f}")
