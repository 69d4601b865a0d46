"""Dead neurons, ranks and every layer of a stable-baselines3 DQN, in its own logger.

python examples/sb3_callback.py     # a short DQN on Breakout; then: tensorboard --logdir sb3

In your own script: `model.learn(..., callback=MeasureLayers())`. It does not change the training.
"""

import sys
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics  # in your own project: a copy of metrics.py


class MeasureLayers(BaseCallback):
    """Measures a DQN with "CnnPolicy" on `n` observations of its replay memory, every `frequency` steps."""

    def __init__(self, frequency: int = 10_000, n: int = 2048):
        super().__init__()
        self.frequency, self.n = frequency, n

    def _on_step(self) -> bool:
        memory, num_envs = self.model.replay_buffer, self.training_env.num_envs
        if self.num_timesteps % self.frequency >= num_envs or memory.size() * num_envs < self.n:
            return True
        rng = np.random.default_rng(self.num_timesteps)  # memory.sample would use the training's generator
        rows, envs = rng.integers(memory.size(), size=self.n), rng.integers(num_envs, size=self.n)
        observations = torch.as_tensor(memory.observations[rows, envs], device=self.model.device)
        extractor = self.model.q_net.features_extractor
        conv1, relu1, conv2, relu2, conv3, relu3, _ = extractor.cnn
        outputs = {"conv1": relu1, "conv2": relu2, "conv3": relu3, "z": extractor.linear}
        weights = {"conv1": conv1, "conv2": conv2, "conv3": conv3}  # those of z are in `linear`
        sample, layers = metrics.record_and_measure(self.model.q_net, outputs, observations, chunk=256, keep=["z"])
        generator = torch.Generator(self.model.device).manual_seed(self.num_timesteps)
        for name, value in metrics.representation_metrics(sample["z"], generator=generator).items():
            self.logger.record(f"representation/{name}", value)
        for layer, values in layers.items():
            of_weights = metrics.gradient_metrics(weights[layer]) if layer in weights else {}
            for name, value in (values | of_weights).items():
                self.logger.record(f"layers/{layer}/{name}", value)
        self.logger.dump(self.num_timesteps)
        return True


def main() -> None:
    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=1, seed=1), n_stack=4)
    model = DQN("CnnPolicy", env, buffer_size=10_000, learning_starts=1000, seed=1, tensorboard_log="sb3")
    model.learn(10_000, callback=MeasureLayers(frequency=2500))


if __name__ == "__main__":
    main()
