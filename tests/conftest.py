"""What several test files share: a small image game, the shell, runs of the scripts, and what is trained only once."""

import dataclasses
import fcntl
import importlib.util
import os
import subprocess
import sys
import tempfile

import forked
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics, ReshapeObservation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = forked.ROOT
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two test workers share two cores
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
    # Matplotlib's list of fonts in the home may miss some, and then every picture of the tests warns on stderr.
    of_matplotlib = tempfile.TemporaryDirectory()
    os.environ["MPLCONFIGDIR"] = of_matplotlib.name

from lan_utils import cli  # noqa: E402

SCRIPTS = tuple(sorted(file.name for file in ROOT.glob("*_atari_lan.py")))


def pytest_collection_modifyitems(items):
    """The slow ones first, so that at the end no worker waits for another's last one."""
    items.sort(key=lambda item: "slow" not in item.keywords)


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
    """Replaces atari.WholeGames: these games are never resumed."""

    snapshot = state_dict = None


def stacked(game):
    """A game as the scripts' `make_env` gives one: observations (4, 84, 84), newest frame last."""
    return Recorded(ReshapeObservation(FrameStackObservation(game, 4), (4, 84, 84)))


def make_quadrants(env_id, repeat_action_probability=0.0, render_mode=None):
    """Replaces a script's `make_env`."""
    return stacked(Quadrants())


def run_script(*arguments):
    """`python <arguments>` in the project's folder, to its end; one thread, so that two tests at once do not fight."""
    if str(arguments[0]).endswith(".py"):
        return forked.run(arguments)
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)


def launch_in_process(monkeypatch, capsys, script, arguments):
    """`python <script> <arguments>` without starting python: (exit code, stderr)."""
    module = __import__(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as stopped:
        cli.launch(module.main, module.Args)
    return stopped.value.code, capsys.readouterr().err


def contents(folder):
    """{path: bytes} of every file below a folder except its lock; for a link, its target."""
    files = [path for path in folder.rglob("*") if path.name != ".lock" and (path.is_symlink() or path.is_file())]
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in files}


def without_run(script):
    """What `grep -v 'run\\.'` leaves of a training script."""
    lines = (ROOT / script).read_text().splitlines(keepends=True)
    kept = [line for line in lines if "run." not in line]
    assert len(lines) - len(kept) <= 8  # one of them the docstring's
    return "".join(kept)


def module_of(source, file):
    """A changed script, written to `file`, as a module."""
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_args(module, runs_dir, **changes):
    """`Args` of any training script, for a run of 1,024 agent steps with two measurements."""
    flags = {
        "total_timesteps": 1024, "activation": "tanh-lan", "metrics_frequency": 512, "metrics_samples": 512,
        "checkpoint_frequency": 0, "num_threads": 1, "runs_dir": str(runs_dir), "learning_starts": 500,
        "buffer_size": 1024, "batch_size": 8, "train_frequency": 32, "num_envs": 4, "num_steps": 32,
        "num_minibatches": 2, "update_epochs": 1, "async_envs": False,
    } | changes  # fmt: skip
    known = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(**{name: value for name, value in flags.items() if name in known})


def read_events(folder):
    """{tag: [(step, value)]} of every scalar of a run, as TensorBoard reads it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    events = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        events[tag] = [(event.step, tuple(event.histogram_value.bucket)) for event in accumulator.Histograms(tag)]
    return events


LAYER_TAGS = {  # of tanh-lan, once it has learned
    f"layers/{layer}/{what}"
    for layer in ("conv1", "conv2", "conv3", "z", "z_enc", "z_star")
    for what in ("constant", "zero", "dormant", "saturated", "weight_norm", "grad_norm", "no_gradient")
    if what != "saturated" or layer in ("z_enc", "z_star")
}


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)` gives the folder that `make(folder)` has filled: once for all test workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name, make):
        folder = base / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(base / "once" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (done := base / "once" / f"{name}.done").exists():
                make(folder)
                done.touch()
        return folder

    return get
