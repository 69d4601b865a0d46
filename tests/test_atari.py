"""atari.py: whole games and their snapshots, vectors of them, films."""

import functools
import importlib
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from ale_py import AtariVectorEnv
from conftest import ROOT, SCRIPTS, make_quadrants, run_script
from stable_baselines3.common.atari_wrappers import AtariWrapper

import dqn_atari_lan as dqn
import ppo_atari_lan as ppo
from lan_utils import atari, checkpoint
from lan_utils.cli import RunFailed
from lan_utils.study import GAMES

# ---------------------------------------------------------------------------------------------- one game


class Recorder(gym.Wrapper):
    """Innermost: the raw rewards between the emulator's true resets."""

    def __init__(self, env):
        super().__init__(env)
        self.finished = []

    def reset(self, **kwargs):
        self.score = 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.score += reward
        if terminated or truncated:
            self.finished.append(self.score)
        return obs, reward, terminated, truncated, info


def test_a_wrapper_that_no_checkpoint_saves_is_named_once(capsys, monkeypatch):
    """Would catch: running statistics that begin anew at every resume, without a word; a warning of the project's own
    wrappers, or one for every game."""
    monkeypatch.setattr(atari, "_warned", set())
    for module in (dqn, ppo):
        module.make_env("BreakoutNoFrameskip-v4", render_mode="rgb_array").close()
    assert capsys.readouterr().err == ""
    for _ in range(2):
        game = gym.make("BreakoutNoFrameskip-v4")
        statistics = gym.wrappers.NormalizeReward(gym.wrappers.RecordEpisodeStatistics(game))
        atari.WholeGames(statistics).close()
    error = capsys.readouterr().err
    assert error.startswith("warning: checkpoints do not save the wrapper NormalizeReward: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("game", ["Breakout", "Seaquest"])
def test_stacks_are_atari_wrappers_frames_and_scores_are_whole_unclipped_games(monkeypatch, game):
    """Stack by stack against the frames of SB3's AtariWrapper, four copies after every reset, a lost life's too; scores
    against raw rewards below it. Would catch: the newest frame first, a stack that reaches over a reset, a clipped or
    a life's return, a game lost at a lost life, a length in emulator frames."""
    env_id = f"{game}NoFrameskip-v4"
    make = gym.make
    recorders = []

    def recorded(*arguments, **kwargs):
        recorders.append(Recorder(make(*arguments, **kwargs)))
        return recorders[-1]

    monkeypatch.setattr(gym, "make", recorded)
    env, oracle = dqn.make_env(env_id), AtariWrapper(make(env_id))
    (stack, _), (frame, _) = env.reset(seed=5), oracle.reset(seed=5)
    frames = deque([frame] * 4, maxlen=4)
    rng = np.random.default_rng(1)
    scores, lost_lives, length = [], 0, 0
    for _ in range(1500):
        np.testing.assert_array_equal(stack, np.concatenate(frames, axis=2).transpose(2, 0, 1))
        action = int(rng.integers(env.action_space.n))
        stack, reward, terminated, truncated, info = env.step(action)
        frame, *others, _ = oracle.step(action)
        frames.append(frame)
        assert [reward, terminated, truncated] == others
        length += 1
        if "episode" in info:
            scores.append(info["episode"]["r"])
            assert info["episode"]["l"] == length
            length = 0
        if terminated or truncated:
            lost_lives += "episode" not in info
            # As they ended, before the reset's four copies take their place.
            np.testing.assert_array_equal(stack, np.concatenate(frames, axis=2).transpose(2, 0, 1))
            (stack, reset_info), (frame, _) = env.reset(), oracle.reset()
            frames.extend([frame] * 4)
            assert "episode" not in reset_info
    assert scores == recorders[0].finished
    assert len(scores) >= 2
    assert max(scores) > 1
    assert lost_lives >= 4


@pytest.mark.slow
def test_a_game_that_is_cut_off_inside_a_reset_is_told_by_the_reset(monkeypatch):
    """After a lost life SB3 plays on inside reset(): a time limit can fall there. Would catch: that game's loss."""
    make = gym.make
    monkeypatch.setattr(gym, "make", lambda *a, **k: make(*a, **k, max_num_frames_per_episode=700))
    env = dqn.make_env("BreakoutNoFrameskip-v4")
    rng = np.random.default_rng(0)
    told = {"step": 0, "reset": 0}
    env.reset(seed=1)
    for _ in range(6000):
        *_, terminated, truncated, info = env.step(int(rng.integers(4)))
        told["step"] += "episode" in info
        if terminated or truncated:
            told["reset"] += "episode" in env.reset()[1]
    assert sum(told.values()) == env.statistics.episode_count
    assert told["step"] > 20
    assert told["reset"] > 0


def play_on(env, actions):
    """Step and reset; everything that comes out."""
    seen = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(int(action))
        seen.append((obs.tobytes(), reward, terminated, truncated, info))
        if terminated or truncated:
            obs, info = env.reset()
            seen.append((obs.tobytes(), info))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES[1::2])  # each takes seconds
def test_a_game_continues_exactly_from_its_snapshot(game, tmp_path):
    """Snapshots at many moments, through a file, into fresh environments in other frame phases. Would catch: any
    wrapper's field left behind, and an emulator that drifts after a restore (Q*bert)."""
    env = ppo.make_env(f"{game}NoFrameskip-v4")
    actions = np.random.default_rng(7).integers(env.action_space.n, size=1600)
    env.reset(seed=3)
    snapshots, seen = {}, []
    for t, action in enumerate(actions):
        if t % 211 == 11:
            checkpoint.write_checked(tmp_path / str(t), {"env": env.state_dict()})
            snapshots[t] = len(seen)
        seen += play_on(env, [action])
    assert len(snapshots) == 8
    for t, position in snapshots.items():
        other = ppo.make_env(f"{game}NoFrameskip-v4")
        other.reset()
        for _ in range(t % 7):
            other.unwrapped.step(0)
        other.load_state_dict(checkpoint.read_checked(tmp_path / str(t))["env"])
        assert play_on(other, actions[t : t + 250])[:250] == seen[position:][:250], t


# --------------------------------------------------------------------------------------- many games at once


ROMS = {
    "BeamRider": "beam_rider", "Breakout": "breakout", "Enduro": "enduro", "Pong": "pong", "Qbert": "qbert",
    "Seaquest": "seaquest", "SpaceInvaders": "space_invaders", "VideoPinball": "video_pinball",
}  # fmt: skip


make_breakout = functools.partial(ppo.make_env, "BreakoutNoFrameskip-v4")


def rollout(async_envs, seed, steps=400, envs=3, workers=None):
    """Random actions on Breakout: everything that the script would store or log."""
    vector = atari.VectorGames(make_breakout, envs, async_envs, workers)
    assert vector.num_envs == envs
    assert vector.single_action_space == gym.spaces.Discrete(4)
    rng = np.random.default_rng(seed)
    stacks, _ = vector.reset(seed=seed)
    seen = [stacks]
    for _ in range(steps):
        stacks, rewards, terminations, truncations, infos = vector.step(rng.integers(4, size=envs))
        finals = [None if final is None else np.asarray(final) for final in infos.get("final_obs", [None] * envs)]
        seen.append((stacks, rewards, terminations, truncations, finals, atari.ended_games(infos)))
    vector.close()
    return seen


def assert_equal_rollouts(first, second):
    np.testing.assert_array_equal(first[0], second[0])
    for ours, theirs in zip(first[1:], second[1:], strict=True):
        for one, other in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(ours[4], theirs[4], strict=True):
            assert (one is None) == (other is None)
            np.testing.assert_array_equal(one, other)
        assert ours[5] == theirs[5]


@pytest.mark.slow
def test_sync_and_async_rollouts_are_identical():
    """Real Breakout. Would catch: shared memory that is overwritten, a seed that depends on the process."""
    synchronous = rollout(False, seed=1)
    assert_equal_rollouts(synchronous, rollout(True, seed=1))
    assert any(step[5] for step in synchronous[1:])  # games did end
    assert any(step[2].any() and not step[5] for step in synchronous[1:])  # and lives without games
    assert not np.array_equal(synchronous[0], rollout(False, seed=9, steps=1)[0])


@pytest.mark.slow
def test_several_games_in_a_worker_play_as_one_in_each():
    """Six games in two workers, and in this process. Would catch: a seed, an action or a game that ended given to
    another game; a reset that a worker leaves to the next step."""
    synchronous = rollout(False, seed=1, steps=250, envs=6)
    assert_equal_rollouts(synchronous, rollout(True, seed=1, steps=250, envs=6, workers=2))
    ended = {i for step in synchronous[1:] for i in step[5]}
    assert len(ended) >= 4  # in both workers


def test_workers_end_in_silence_where_nobody_closes_them():
    """Ctrl-C, or no memory on the GPU, before the run knows its games. Would catch: two tracebacks for each worker
    below the one line that says what happened."""
    code = """
import sys
sys.path[:0] = ["tests", "."]
from conftest import make_quadrants
from lan_utils.atari import VectorGames
from lan_utils.cli import RunFailed, launch
from ppo_atari_lan import Args

def main(args):
    envs = VectorGames(lambda: make_quadrants(""), 2, True)
    envs.reset(seed=1)
    raise RunFailed("no memory")

sys.argv = ["x.py"]
launch(main, Args)
"""
    done = run_script("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no memory\n")


def test_workers_have_equally_many_games(monkeypatch):
    """Would catch: a game that nobody plays, more processes than cores."""
    for cores, expected in ((1, 1), (2, 2), (3, 2), (6, 4), (16, 16), (500, 128)):
        monkeypatch.setattr(atari, "share_of_cores", lambda cores=cores: cores)
        assert atari.even_workers(128) == expected
    assert atari.even_workers(7) == 7


def test_the_parent_makes_one_game_to_see_the_spaces():
    """Would catch: PQN's 128 games made twice, half of them in the training's own process and for nothing."""
    made = []
    games = atari.VectorGames(lambda: made.append(1) or make_quadrants(""), 6, async_envs=True, workers=2)
    assert len(made) == 1
    stacks, _ = games.reset(seed=1)
    assert stacks.shape[0] == games.num_envs == 6
    games.close()


# Where the games that were saved are played, and where those that continue: in how many workers; 0: in this process.
@pytest.mark.parametrize(("workers", "other_workers"), [(0, 0), (4, 4), (2, 0), (4, 2)])
def test_games_side_by_side_continue_from_their_states(tmp_path, workers, other_workers):
    """Through a file, into other processes. Would catch: one game's state given to another, tensors for arrays, a
    checkpoint that only as many workers can read."""

    def play(games, steps):
        rng = np.random.default_rng(1)
        return [games.step(rng.integers(4, size=4))[:4] for _ in range(steps)]

    games = atari.VectorGames(make_breakout, 4, workers > 0, workers or None)
    games.reset(seed=1)
    play(games, 60)
    checkpoint.write_checked(tmp_path / "games", games.state_dict())
    expected = [[part.copy() for part in step] for step in play(games, 60)]
    games.close()
    other = atari.VectorGames(make_breakout, 4, other_workers > 0, other_workers or None)
    other.reset(seed=2)
    other.load_state_dict(checkpoint.read_checked(tmp_path / "games"))
    for step, expected_step in zip(play(other, 60), expected, strict=True):
        for part, expected_part in zip(step, expected_step, strict=True):
            np.testing.assert_array_equal(part, expected_part)
    other.close()


LOUD = """
import sys

import gymnasium as gym
from conftest import make_quadrants
from lan_utils.atari import VectorGames


class Loud(gym.Wrapper):
    def step(self, action):
        print("printed in a step")
        print("complained in a step", file=sys.stderr)
        return self.env.step(action)


games = VectorGames(lambda: Loud(make_quadrants("")), 4, async_envs=True, workers=2)
games.reset(seed=1)
games.step([0, 0, 0, 0])
games.close()
"""


def test_what_a_game_prints_in_a_worker_is_seen(tmp_path):
    """Into files, as under a launcher. Would catch: stderr that goes nowhere, a line that dies with its worker."""
    (tmp_path / "loud.py").write_text(LOUD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, tmp_path / "loud.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "printed in a step\n" * 4
    assert done.stderr == "complained in a step\n" * 4


@pytest.mark.parametrize("workers", [4, 2])
def test_dead_workers_are_one_line_and_closing_needs_none(workers):
    """As the out-of-memory killer does it. Would catch: a parent that waits for ever, a finished run that fails."""
    games = atari.VectorGames(functools.partial(make_quadrants, ""), 4, async_envs=True, workers=workers)
    games.reset(seed=1)
    os.kill(games.env.processes[1].pid, signal.SIGKILL)
    games.env.processes[1].join()
    with pytest.raises(RunFailed, match=r"^a worker process died"):
        games.step(np.zeros(4, int))
    games.close()
    others = atari.VectorGames(functools.partial(make_quadrants, ""), 4, async_envs=True, workers=workers)
    others.reset(seed=1)
    for process in others.env.processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    others.close()


# --------------------------------------------------------------------------------------- ale-py's games


@pytest.mark.slow
@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders"])
def test_ale_games_end_where_ale_says_that_games_end(game):
    """The oracle: the same games without `life_loss_info`, whose terminations are real ends.

    Would catch: a lost life counted as a game, a game over missed, a clipped score, a score carried into the next game.
    """
    seeds = np.array([0, 5, 7])
    ours = atari.AleGames(f"{game}NoFrameskip-v4", 0.0, 3, num_threads=1)
    flags = {"autoreset_mode": "SameStep", "reward_clipping": False, "repeat_action_probability": 0.0}
    oracle = AtariVectorEnv(ROMS[game], 3, num_threads=1, **flags)
    stacks, _ = ours.reset(seed=seeds)
    expected, _ = oracle.reset(seed=seeds)
    rng = np.random.default_rng(0)
    scores, lengths, ends, lost_lives = np.zeros(3), np.zeros(3), 0, 0
    for _ in range(1500):
        np.testing.assert_array_equal(stacks, expected)
        actions = rng.integers(ours.single_action_space.n, size=3)
        stacks, rewards, terminations, _, infos = ours.step(actions)
        expected, raw, over, _, _ = oracle.step(actions)
        np.testing.assert_array_equal(rewards, np.sign(raw))
        scores, lengths = scores + raw, lengths + 1
        games = {int(i): (scores[i], lengths[i]) for i in np.flatnonzero(over)}
        assert atari.ended_games(infos) == games
        scores[over], lengths[over] = 0, 0
        ends, lost_lives = ends + over.sum(), lost_lives + (terminations & ~over).sum()
    assert ends >= 5
    assert lost_lives >= ends


def test_a_truncated_ale_game_shows_its_true_last_observation(monkeypatch):
    """Would catch: a bootstrap from the next game's first observation, a truncated game that is not told."""
    short = functools.partial(AtariVectorEnv, max_num_frames_per_episode=200)
    monkeypatch.setattr(atari, "AtariVectorEnv", short)
    games = atari.AleGames("PongNoFrameskip-v4", 0.0, 2, num_threads=1)
    last, _ = games.reset(seed=1)
    for _ in range(200):
        stacks, _, terminations, truncations, infos = games.step(np.array([2, 3]))
        if truncations.any():
            break
        last = stacks
    assert truncations.all()
    assert not terminations.any()
    assert list(atari.ended_games(infos)) == [0, 1]
    np.testing.assert_array_equal(infos["final_obs"][:, :3], last[:, 1:])
    assert (stacks[:, :3] == 0).all()  # a reset fills the stack with zeros, unlike the default's copies


# ------------------------------------------------------------------------------------------- sticky actions


def stickiness(env):
    return env.unwrapped.ale.getFloat("repeat_action_probability")


@pytest.mark.parametrize("module", [importlib.import_module(script.removesuffix(".py")) for script in SCRIPTS])
def test_sticky_actions_reach_the_emulator(monkeypatch, module):
    """Training and evaluation. Would catch: a flag that changes a run's name for it and not the game, an evaluation on
    other games than the run's."""
    assert stickiness(module.make_env("PongNoFrameskip-v4")) == 0
    assert stickiness(module.make_env("PongNoFrameskip-v4", repeat_action_probability=0.25)) == 0.25
    monkeypatch.setattr(module, "play_games", lambda env, *arguments: iter([env]))
    for probability in (0.0, 0.25):
        args = module.Args(env_id="PongNoFrameskip-v4", repeat_action_probability=probability)
        (env,) = module.evaluate(module.Network(6, "relu"), args, games=1)
        assert stickiness(env) == probability


def test_sticky_actions_reach_ale_games_too():
    """Which cannot be asked: with every action repeated for ever the paddle stays where the first one left it."""

    def frames(probability):
        games = atari.AleGames("PongNoFrameskip-v4", probability, 1, num_threads=1)
        games.reset(seed=1)
        rng = np.random.default_rng(0)
        return np.stack([games.step(rng.integers(2, 4, size=1))[0] for _ in range(120)])

    plain, same, sticky = frames(0.0), frames(0.0), frames(0.25)
    np.testing.assert_array_equal(plain, same)
    assert not np.array_equal(plain, sticky)


def test_every_game_exists_in_ale_too():
    """Would catch: a game whose ale name is not its class name in lower case."""
    for game, rom in ROMS.items():
        env = atari.AleGames(f"{game}NoFrameskip-v4", 0.0, 1, num_threads=1)
        actions = gym.make(f"{game}NoFrameskip-v4").action_space.n
        assert env.single_action_space.n == actions, rom


# ------------------------------------------------------------------------------------ playing and filming


@pytest.mark.parametrize("folder", ["films", "a:b"])
def test_a_film_has_a_picture_per_agent_step(monkeypatch, tmp_path, folder):
    """Under a relative path with a colon too. Would catch: ffmpeg that takes it for a protocol, after the training."""
    monkeypatch.chdir(tmp_path)
    path = Path(folder)
    path.mkdir()
    env = ppo.make_env("PongNoFrameskip-v4", render_mode="rgb_array")
    env.reset(seed=1)
    with atari._film(path / "game_0.mp4", env) as add_picture:
        for _ in range(30):
            env.step(0)
            add_picture()
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str((path / "game_0.mp4").absolute()))
    assert (frames, seconds) == (30, 2.0)


@pytest.mark.slow
def test_games_are_played_to_their_ends_and_filmed(tmp_path):
    """Would catch: a score of one life, a game that ends inside a reset and is played on for ever."""
    env = ppo.make_env("BreakoutNoFrameskip-v4", render_mode="rgb_array")
    rng = np.random.default_rng(0)
    scores = list(atari.play_games(env, lambda stack: int(rng.integers(4)), 3, 2, tmp_path))
    assert len(scores) == env.statistics.episode_count == 2
    assert scores == [float(score) for score in env.statistics.return_queue]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["game_0.mp4", "game_1.mp4"]
