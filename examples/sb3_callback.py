"""Dead neurons, ranks and every layer of a stable-baselines3 agent, in its own logger.

python examples/sb3_callback.py

trains a short DQN on Atari. In a script of your own: `model.learn(..., callback=MeasureLayers())`.
"""

import sys
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics  # in a project of your own: a copy of metrics.py


class MeasureLayers(BaseCallback):
    """For DQN with "CnnPolicy": measures `n` observations of the replay memory every `frequency` steps.

    The layers are NatureCNN's: modules 1, 3 and 5 are its activations, and `linear` is z.
    """

    LAYERS = {  # noqa: RUF012
        **{f"conv{i + 1}": f"q_net.features_extractor.cnn.{2 * i + 1}" for i in range(3)},
        "z": "q_net.features_extractor.linear",
    }

    def __init__(self, frequency: int = 10_000, n: int = 2048):
        super().__init__()
        self.frequency, self.n = frequency, n

    def _on_step(self) -> bool:
        memory = self.model.replay_buffer
        if self.num_timesteps % self.frequency == 0 and memory.size() >= self.n:
            observations = memory.sample(self.n).observations
            sample, layers = metrics.record_and_measure(self.model.policy, self.LAYERS, observations, 256, keep=["z"])
            for name, value in metrics.representation_metrics(sample["z"]).items():
                self.logger.record(f"representation/{name}", value)
            for layer, values in layers.items():
                for name, value in values.items():
                    self.logger.record(f"layers/{layer}/{name}", value)
        return True
