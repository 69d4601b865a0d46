"""Where a layer collapsed: is it saturated, or does nothing reach it but its biases?

python results/study/collapse.py > results/study/collapse.txt

Of every finished run in runs/ that still has its weights and activations.
"""

from pathlib import Path

import numpy as np
import torch

F = {"relu": lambda a: np.maximum(a, 0), "tanh": np.tanh, "sigmoid": lambda a: 1 / (1 + np.exp(-a))}

print("run, layer: largest activation, share above 0.9, constant neurons, farthest from f(B)")
for model in sorted(Path("runs").glob("*/model.pt")):
    f = F[model.parent.name.split("__")[2].removesuffix("-lan")]
    weights, sample = torch.load(model, map_location="cpu"), np.load(model.with_name("activations.npz"))
    for name in sorted(set(sample.files) - {"z"}) or ["z"]:
        layer = sample[name]
        bias = weights[f"representation.layers.{'z_enc' if name == 'z' else name}.bias"].numpy()
        size, large, constant = np.abs(layer).max(), (np.abs(layer) > 0.9).mean(), (layer.std(axis=0) < 1e-3).mean()
        farthest = np.abs(layer - f(bias)).max()
        print(f"{model.parent.name}, {name}: {size:.3f}, {large:.2%}, {constant:.0%}, {farthest:.5f}")
