"""Where a layer collapsed: is it saturated, or do only its biases act on it?

python experiments/collapse.py runs > collapse.txt

Reads every finished run of a folder that still has its weights and activations.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import enjoy

import metrics
from lan_utils.checks import refuse_unless
from lan_utils.cli import launch


@dataclass
class Args:
    """Compare the last activations of each run's z with what its biases alone give."""

    runs_dir: tyro.conf.Positional[Path] = Path("runs")
    """the folder with the runs"""


def at_rest(folder: Path) -> dict[str, np.ndarray]:
    """f(B) of z, or of each of its factors: its output on an input of zeros, (1, width) by the layer's name."""
    script, flags = enjoy.read_run(folder)
    weights, _, file = enjoy.read_weights(folder)
    encoder = enjoy.load_network(script, flags, weights, file).encoder
    layers = {name: module for name, module in encoder.measured.items() if name.startswith("z_")}
    inputs = torch.zeros(1, 3136)
    return {name: rest.numpy() for name, rest in metrics.record(encoder.z, layers or {"z": encoder.z}, inputs).items()}


def main(args: Args) -> None:
    folders = [
        file.parent for file in sorted(args.runs_dir.glob("*/activations.npz")) if file.with_name("model.pt").exists()
    ]
    refuse_unless(
        bool(folders), f"{args.runs_dir} has no finished run with model.pt and activations.npz; name another folder"
    )
    print("run, layer: largest activation, share above 0.9, constant neurons, farthest from f(B)")
    for folder in folders:
        sample = np.load(folder / "activations.npz")
        for name, rest in at_rest(folder).items():
            layer = sample[name]
            size, large, constant = np.abs(layer).max(), (np.abs(layer) > 0.9).mean(), (layer.std(axis=0) < 1e-3).mean()
            farthest = np.abs(layer - rest).max()
            print(f"{folder.name}, {name}: {size:.3f}, {large:.2%}, {constant:.0%}, {farthest:.5f}")


if __name__ == "__main__":
    launch(main, Args)
