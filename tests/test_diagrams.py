"""experiments/diagrams.py: every label is read off the modules."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import diagrams

import dqn_atari_lan as dqn
import ppo_atari_lan as ppo

FRAMES = np.zeros((4, 84, 84), np.uint8)
TIMES = "\N{MULTIPLICATION SIGN}"


def labels(network, activation):
    """All texts of a drawn network."""
    figure, ax = plt.subplots()
    diagrams.draw_network(ax, network, activation, FRAMES)
    texts = [text.get_text() for text in ax.texts] + [ax.get_title(loc="left")]
    plt.close(figure)
    return texts


def test_shapes_and_counts_by_hand():
    """Would catch: a shape with its batch, a weight counted without its bias, a layer left out."""
    found = diagrams.blocks(dqn.QNetwork(6, "tanh-lan"))
    assert [(block.shape, block.parameters) for block in found.values()] == [
        ((32, 20, 20), 32 * (4 * 8 * 8 + 1)),
        ((64, 9, 9), 64 * (32 * 4 * 4 + 1)),
        ((64, 7, 7), 64 * (64 * 3 * 3 + 1)),
        ((3136,), 0),
        ((512,), 512 * (3136 + 1)),
        ((512,), 512 * (3136 + 1)),
        ((512,), 2 * 512 * (3136 + 1)),
        ((6,), 6 * (512 + 1)),
    ]


@pytest.mark.parametrize(
    ("network_class", "activation"),
    [(dqn.QNetwork, activation) for activation in dqn.REPRESENTATIONS]
    + [(ppo.ActorCritic, activation) for activation in ("tanh", "tanh-lan", "wide-1024")],
)
def test_labels_follow_the_modules(network_class, activation):
    """Would catch: a number typed into the drawing, a sum drawn as a product, an activation that cannot be drawn."""
    network = network_class(7, activation)
    texts = labels(network, activation)
    factors = list(network.encoder.z.factors)
    width = 1024 if activation.endswith("-1024") else 512
    assert f"$z$\n{width}" in texts
    outputs = 256 if activation == "crelu" else width
    count = f"{outputs * 3137 + 1024 * activation.startswith('layernorm'):,}"  # with the norm's own
    assert sum(text.startswith("linear\n") and text.endswith(count) for text in texts) == len(factors)
    assert any(text.endswith("\n7") for text in texts)
    assert (TIMES in texts) == (len(factors) > 1 and activation != "tanh-addlan")
    assert ("+" in texts) == (activation == "tanh-addlan")
    assert any("LayerNorm" in text for text in texts) == activation.startswith("layernorm")
    total = sum(p.numel() for p in network.parameters())
    assert f"--activation {activation}: {total:,} parameters" in texts
    assert f"8 {TIMES} 8 conv\nstride 4\nReLU\n8,224" in texts


def test_labels_follow_a_changed_network():
    """Would catch: shapes copied from the paper."""
    network = dqn.QNetwork(4, "tanh")
    network.encoder.conv1.factors["enc"][0] = torch.nn.Conv2d(4, 24, 8, stride=4)
    network.encoder.conv2.factors["enc"][0] = torch.nn.Conv2d(24, 64, 4, stride=2)
    texts = labels(network, "tanh")
    assert f"24 {TIMES} 20 {TIMES} 20" in texts
    assert f"32 {TIMES} 20 {TIMES} 20" not in texts


def test_nothing_is_cut_off():
    """Would catch: a head drawn beyond the picture's edge."""
    for network_class in (dqn.QNetwork, ppo.ActorCritic):
        figure = diagrams.draw(network_class, FRAMES, 18)
        renderer = figure.canvas.get_renderer()
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        for ax in figure.axes:
            inside = ax.get_window_extent(renderer)
            for artist in (*ax.texts, ax.title, *ax.patches):
                box = artist.get_window_extent(renderer)
                assert box.x0 >= 0, artist
                assert box.x1 <= width, artist
                assert box.y0 >= 0, artist
                assert box.y1 <= height, artist
            for patch in ax.patches:
                assert patch.get_window_extent(renderer).x1 <= inside.x1, patch
        plt.close(figure)


def test_frames_are_the_games(tmp_path):
    """Would catch: one frame drawn four times, a black screen."""
    frames = diagrams.game_frames()
    assert frames.shape == (4, 84, 84)
    assert frames.std(axis=(1, 2)).min() > 5
    assert len({frame.tobytes() for frame in frames}) == 4
