"""The two networks with and without a LaN, as they are (paper, Fig. 3 and 9).

python experiments/diagrams.py                 seconds; replaces results/figures/architecture_*.png

python experiments/diagrams.py --out-dir out   the same into another folder
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from drawing import launch, plt, save
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn

import dqn_atari_lan as dqn
import metrics
import ppo_atari_lan as ppo
from lan_utils import study

GAME = "SpaceInvadersNoFrameskip-v4"  # as in the paper
ACTIVATIONS = ("tanh", "tanh-lan")  # without and with a LaN
CONVOLUTION, VECTOR, HEAD = "#DCE6EE", "#EDEDED", "#F6E7C1"
TIMES = "\N{MULTIPLICATION SIGN}"
HEADS = {"q": "Q-values", "actor": "action logits", "critic": "value"}


class Block(NamedTuple):
    """The output of one layer."""

    name: str  # of the module in its network
    layer: str  # what it computes, for a reader
    shape: tuple[int, ...]  # of its output, without the batch
    parameters: int


def blocks(network: nn.Module) -> dict[str, Block]:
    """The layers of a `QNetwork` or `ActorCritic` by their measured names, starting from the frames."""
    encoder = network.encoder
    factors = {f"z_{name}": factor for name, factor in encoder.z.factors.items()}
    heads = {name: getattr(network, name) for name in HEADS if hasattr(network, name)}
    layers = {name: layer for name, layer in network.measured.items() if name.startswith("conv")} | factors
    layers |= {"z": encoder.z} | heads
    outputs = metrics.record(network, layers, torch.zeros(1, 4, 84, 84, dtype=torch.uint8))
    found = {}
    for name, module in layers.items():
        if name.startswith("conv"):
            convolution, activation = module.factors["enc"]
            kernel, stride = size(convolution.kernel_size), convolution.stride[0]
            layer = f"{kernel} conv\nstride {stride}\n{type(activation).__name__}"
        elif name in factors:
            linear, *others = module
            found.setdefault("flat", Block("flat", "flatten", (linear.in_features,), 0))
            names = ("LayerNorm" if isinstance(each, nn.LayerNorm) else type(each).__name__ for each in others)
            layer = "linear\n" + ", ".join(names)
        else:
            layer = "linear" if name in heads else {torch.mul: TIMES, torch.add: "+"}[module.join]
        count = sum(p.numel() for p in module.parameters())
        found[name] = Block(name, layer, tuple(outputs[name].shape[1:]), count)
    return found


def size(shape: tuple[int, ...]) -> str:
    """(32, 20, 20) -> 32 x 20 x 20, with the multiplication sign."""
    return f" {TIMES} ".join(map(str, shape))


def game_frames() -> np.ndarray:
    """The newest four frames after six seconds of random play, oldest first: (4, 84, 84) uint8."""
    env = dqn.make_env(GAME)
    env.action_space.seed(1)
    frames, _ = env.reset(seed=1)
    for _ in range(90):
        frames, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            frames, _ = env.reset()
    env.close()
    return frames


# ----------------------------------------------------------------------------------------------- drawing


def draw_map(ax: plt.Axes, x: float, shape: tuple[int, ...], frames: np.ndarray | None = None) -> float:
    """Feature maps, or the frames themselves, as a stack centred on y = 0, the last one in front; returns its end."""
    channels, height, _ = shape
    side = 0.22 * np.sqrt(height)
    sheets, step, edge = (channels // 10, 0.07, "#5A7184") if frames is None else (channels, 0.13, "white")
    spread = step * (sheets - 1)
    for i in range(sheets):
        left, bottom = x + i * step, (spread - side) / 2 - i * step
        if frames is not None:
            ax.imshow(frames[i], cmap="gray", extent=(left, left + side, bottom, bottom + side), zorder=2 + 0.1 * i)
        face = CONVOLUTION if frames is None else "none"
        ax.add_patch(Rectangle((left, bottom), side, side, facecolor=face, edgecolor=edge, zorder=2.05 + 0.1 * i))
    label_under(ax, x + (side + spread) / 2, -(side + spread) / 2, size(shape))
    return x + side + spread


def draw_vector(ax: plt.Axes, x: float, y: float, block: Block, label: str, color: str, above: bool = False) -> float:
    """A vector as a bar; returns where it ends."""
    height, width = 0.2 * np.log2(block.shape[-1] + 1), 0.26
    ax.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color,
            edgecolor="#333333",
            lw=0.8,
            zorder=3,
        )
    )
    text = f"{label}\n{size(block.shape)}" if label else size(block.shape)
    if above:
        ax.text(x + width / 2, y + height / 2 + 0.1, text, ha="center", va="bottom", fontsize=8)
    else:
        label_under(ax, x + width / 2, y - height / 2, text)
    return x + width


def label_under(ax: plt.Axes, x: float, y: float, text: str) -> None:
    ax.text(x, y - 0.1, text, ha="center", va="top", fontsize=8, linespacing=1.15)


def draw_arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], block: Block | None = None) -> None:
    """An arrow, labelled with what its layer does and how many parameters it has."""
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=1, color="#444444", shrinkA=2, shrinkB=2)
    )
    if block is not None:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        slope = np.sign(end[1] - start[1])
        ax.text(
            x,
            y + (0.12 if slope >= 0 else -0.12) + 0.22 * slope,
            block.layer + (f"\n{block.parameters:,}" if block.parameters else ""),
            ha="center",
            va="bottom" if slope >= 0 else "top",
            fontsize=7.2,
            color="#444444",
            linespacing=1.15,
        )


def draw_network(ax: plt.Axes, network: nn.Module, activation: str, frames: np.ndarray) -> None:
    """One network from the frames to its heads, left to right."""
    found = blocks(network)
    trunk = [block for name, block in found.items() if name.startswith(("conv", "flat"))]
    factors = [block for name, block in found.items() if name.startswith("z_")]
    z = found["z"]
    heads = [found[name] for name in HEADS if name in found]
    color = study.style(activation).color

    end = draw_map(ax, 0.0, frames.shape, frames)
    for block in trunk:
        gap = 1.25
        draw_arrow(ax, (end, 0), (end + gap, 0), block)
        if len(block.shape) == 3:
            end = draw_map(ax, end + gap, block.shape)
        else:
            end = draw_vector(ax, end + gap, 0, block, "", VECTOR)

    x = end + 2.0
    if len(factors) == 1:
        draw_arrow(ax, (end, 0), (x, 0), factors[0])
        end = draw_vector(ax, x, 0, z, "$z$", color)
    else:
        ys = np.linspace(1.45, -1.45, len(factors))
        joint = x + 1.5
        for block, y in zip(factors, ys, strict=True):
            draw_arrow(ax, (end, 0), (x, y), block)
            tex = {"z_enc": "$z^{enc}$", "z_star": "$z^{*}$", "z_star2": "$z^{**}$"}[block.name]
            right = draw_vector(ax, x, y, block, tex, color + "66", above=y > 0)
            draw_arrow(ax, (right, y), (joint - 0.2, 0.17 * np.sign(y)))
        ax.add_patch(Circle((joint, 0), 0.24, facecolor="white", edgecolor="#333333", lw=1, zorder=3))
        ax.text(joint, -0.01, z.layer, ha="center", va="center_baseline", fontsize=13, zorder=4)
        draw_arrow(ax, (joint + 0.24, 0), (joint + 1.0, 0))
        end = draw_vector(ax, joint + 1.0, 0, z, "$z$", color)

    ys = [0.0] if len(heads) == 1 else [1.1, -1.1]
    for block, y in zip(heads, ys, strict=True):
        draw_arrow(ax, (end, 0), (end + 1.7, y), block)
        draw_vector(ax, end + 1.7, y, block, HEADS[block.name], HEAD, above=y > 0)
    total = sum(p.numel() for p in network.parameters())
    ax.set_title(f"--activation {activation}: {total:,} parameters", loc="left", fontsize=10.5, fontweight="bold")
    ax.set_xlim(-0.1, 18.4)
    reach = 3.1 if len(factors) > 1 else 2.0
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.axis("off")


def draw(network_class: type[nn.Module], frames: np.ndarray, num_actions: int) -> plt.Figure:
    """One figure: the network without a LaN above, with one below."""
    figure, axes = plt.subplots(2, 1, figsize=(12, 7), height_ratios=(2.0, 3.1))
    for ax, activation in zip(axes, ACTIVATIONS, strict=True):
        draw_network(ax, network_class(num_actions, activation), activation, frames)
    game = GAME.removesuffix("NoFrameskip-v4")
    source = f"{network_class.__name__} of {network_class.__module__}.py"
    figure.supxlabel(f"{source} on {game}. The last number at an arrow counts its parameters.", fontsize=8.5)
    return figure


def main(out_dir: Path) -> None:
    frames = game_frames()
    num_actions = 6  # of Space Invaders
    save(draw(dqn.QNetwork, frames, num_actions), out_dir, "architecture_dqn")
    save(draw(ppo.ActorCritic, frames, num_actions), out_dir, "architecture_ppo")


if __name__ == "__main__":
    launch(main, __doc__)
