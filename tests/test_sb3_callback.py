"""examples/sb3_callback.py, on a real short training of stable-baselines3."""

import importlib.util

import ale_py
import gymnasium
import pytest
import torch
from conftest import ROOT, read_events
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecFrameStack

import metrics


def example():
    spec = importlib.util.spec_from_file_location("sb3_callback", ROOT / "examples" / "sb3_callback.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folder, callback):
    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=1, seed=1), n_stack=4)
    model = DQN("CnnPolicy", env, buffer_size=1000, learning_starts=500, seed=1)
    model.set_logger(configure(str(folder), ["tensorboard"]))
    return model.learn(700, callback=callback)


@pytest.mark.slow
def test_a_real_dqn_is_measured_and_not_changed(tmp_path):
    """Would catch: names of modules that stable-baselines3 has renamed, draws from the training's generators."""
    plain = train(tmp_path / "plain", None)
    measured = train(tmp_path / "measured", example().MeasureLayers(frequency=300, n=256))
    for name, weight in plain.policy.state_dict().items():
        assert torch.equal(measured.policy.state_dict()[name], weight), name
    events = read_events(tmp_path / "measured")
    for layer in ("conv1", "conv2", "conv3", "z"):
        assert [step for step, _ in events[f"layers/{layer}/constant"]] == [300, 600]
        assert [step for step, _ in events[f"layers/{layer}/weight_norm"]] == [300, 600]
        ((step, norm),) = events[f"layers/{layer}/grad_norm"]  # there was no update before 500
        assert step == 600
        assert norm > 0
    assert {f"representation/{name}" for name in metrics.representation_metrics(torch.randn(9, 2))} <= set(events)
    assert all(0 <= value <= 1 for _, value in events["representation/dead_neurons"])
