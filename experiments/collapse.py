"""Where a layer collapsed: is it saturated, or does nothing reach it but its biases?

python experiments/collapse.py > results/study/collapse.txt

Of every finished run in runs/ that still has its weights and activations.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dqn_atari_lan import Representation

print("run, layer: largest activation, share above 0.9, constant neurons, farthest from f(B)")
for model in sorted(Path("runs").glob("*/model.pt")):
    weights, sample = torch.load(model, map_location="cpu"), np.load(model.with_name("activations.npz"))
    representation = Representation(3136, model.parent.name.split("__")[2])
    prefix = "representation."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    representation.load_state_dict(own)
    with torch.no_grad():
        at_rest = representation.factors(torch.zeros(1, 3136))
    for name, rest in at_rest.items() if len(at_rest) > 1 else [("z", at_rest["z_enc"])]:
        layer = sample[name]
        size, large, constant = np.abs(layer).max(), (np.abs(layer) > 0.9).mean(), (layer.std(axis=0) < 1e-3).mean()
        farthest = np.abs(layer - rest.numpy()).max()
        print(f"{model.parent.name}, {name}: {size:.3f}, {large:.2%}, {constant:.0%}, {farthest:.5f}")
