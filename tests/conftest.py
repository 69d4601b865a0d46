"""What several test files share: a small image game, the shell, and runs of the scripts."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RecordEpisodeStatistics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two test workers share two cores


class Quadrants(gym.Env):
    """The lit quadrant of the picture is the paying action. Ten steps a game: 2.5 at random, 10 at best."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return self._picture(), {}

    def step(self, action):
        reward = float(action == self.lit)
        self.step_count += 1
        return self._picture(), reward, self.step_count == 10, False, {}

    def _picture(self):
        self.lit = int(self.np_random.integers(4))
        picture = np.zeros((84, 84, 1), np.uint8)
        row, column = divmod(self.lit, 2)
        picture[42 * row : 42 * row + 42, 42 * column : 42 * column + 42] = 255
        return picture


class Recorded(RecordEpisodeStatistics):
    """With the place of checkpoint.WholeGames's snapshot: these games are never resumed."""

    snapshot = None


def make_quadrants(env_id, render=False):
    return Recorded(Quadrants())


def run_script(*arguments, **kwargs):
    """Run a script of the project as a user would; one thread, so that two tests at once do not fight."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280, **kwargs)


def read_events(folder):
    """{tag: [(step, value)]} of every scalar of a run, as TensorBoard reads it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    events = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        events[tag] = [(event.step, tuple(event.histogram_value.bucket)) for event in accumulator.Histograms(tag)]
    return events


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"
