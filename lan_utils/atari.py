"""Atari games for every algorithm: whole-game scores, games that can be saved, vectors of them, playing, filming."""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import torch
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv

from lan_utils.cli import STOP_SIGNALS, RunFailed, same_command, warn
from lan_utils.machine import share_of_cores

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner on stderr


# ---------------------------------------------------------------------------------------------- one game


SAVED = {"RecordEpisodeStatistics", "EpisodicLifeEnv", "MaxAndSkipEnv", "FrameStackObservation"}
STATELESS = {
    *("OrderEnforcing", "PassiveEnvChecker", "AtariWrapper", "NoopResetEnv", "FireResetEnv", "WarpFrame"),
    *("ClipRewardEnv", "ReshapeObservation"),
}
_warned: set[str] = set()  # once, not in every game; worker processes inherit it


class WholeGames(gym.Wrapper):
    """Outermost wrapper: reports the end of whole games, and can be saved and restored in mid-game.

    `info["episode"]` of a step or of a reset holds the game that ended in it: `r`, the unclipped score, and `l`,
    its length in agent steps. (A reset can end a game: after a lost life stable-baselines3 plays a step in it.)
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.wrappers: list[gym.Env] = []
        while isinstance(env, gym.Wrapper):
            self.wrappers.append(env)
            env = env.env
        for name in sorted({type(wrapper).__name__ for wrapper in self.wrappers} - SAVED - STATELESS - _warned):
            _warned.add(name)
            warn(
                f"checkpoints do not save the wrapper {name}: if it keeps anything from step to step, a resumed run is "
                "not exact; add it to WholeGames in lan_utils/atari.py, to what is saved or to STATELESS"
            )
        self.statistics = next(wrapper for wrapper in self.wrappers if isinstance(wrapper, RecordEpisodeStatistics))
        self.games = self.agent_steps = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return obs, self._with_game(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.agent_steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), bool(terminated), bool(truncated), self._with_game(info)

    def _with_game(self, info: dict) -> dict:
        info = {key: value for key, value in info.items() if key != "episode"}
        if self.statistics.episode_count > self.games:
            if self.agent_steps:  # 0: the no-ops of a reset reached the game's end
                info["episode"] = {"r": float(self.statistics.return_queue[-1]), "l": self.agent_steps}
            self.games, self.agent_steps = self.statistics.episode_count, 0
        return info

    def state_dict(self) -> dict[str, Any]:
        """The game and the wrappers' own fields."""
        atari = self.env.unwrapped
        state = {
            "ale": np.frombuffer(atari.ale.cloneState(include_rng=True).serialize(), np.uint8).copy(),
            "generator": json.dumps(atari.np_random.bit_generator.state),
            "games": self.games,
            "agent_steps": self.agent_steps,
        }
        for wrapper in self.wrappers:
            if isinstance(wrapper, RecordEpisodeStatistics):
                state["score"] = float(wrapper.episode_returns)
                state["frames"] = wrapper.episode_lengths
            elif isinstance(wrapper, EpisodicLifeEnv):
                state["lives"] = wrapper.lives
                state["was_real_done"] = bool(wrapper.was_real_done)
            elif isinstance(wrapper, MaxAndSkipEnv):
                state["skip_buffer"] = wrapper._obs_buffer.copy()
            elif isinstance(wrapper, FrameStackObservation):
                state["stack"] = np.stack(wrapper.obs_queue)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue another environment's game exactly; this one has to have been reset."""
        atari = self.env.unwrapped
        atari.ale.restoreState(ale_py.ALEState(np.asarray(state["ale"]).tobytes()))
        atari.np_random.bit_generator.state = json.loads(state["generator"])
        self.games, self.agent_steps = state["games"], state["agent_steps"]
        for wrapper in self.wrappers:
            if isinstance(wrapper, RecordEpisodeStatistics):
                wrapper.episode_returns, wrapper.episode_lengths = state["score"], state["frames"]
                wrapper.episode_count = state["games"]
            elif isinstance(wrapper, EpisodicLifeEnv):
                wrapper.lives, wrapper.was_real_done = state["lives"], state["was_real_done"]
            elif isinstance(wrapper, MaxAndSkipEnv):
                wrapper._obs_buffer[:] = np.asarray(state["skip_buffer"])
            elif isinstance(wrapper, FrameStackObservation):
                wrapper.obs_queue.extend(np.asarray(state["stack"]).copy())

    # How a vector environment asks its games, each in a process of its own: by attribute.
    snapshot = property(state_dict, load_state_dict)


# --------------------------------------------------------------------------------------- many games at once


class GamesOfAWorker(gym.Env):
    """Several games in one process, which gymnasium steps as if they were one."""

    def __init__(self, games: list[gym.Env]):
        self.games = games
        self.observation_space = batch_space(games[0].observation_space, len(games))
        self.action_space = batch_space(games[0].action_space, len(games))

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        seeds = [None if seed is None else seed + i for i in range(len(self.games))]
        stacks, infos = zip(
            *(game.reset(seed=seed, options=options) for game, seed in zip(self.games, seeds, strict=True)), strict=True
        )
        return np.stack(stacks), {"games": list(infos)}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, list[float], list[bool], list[bool], dict]:
        stacks, *results, infos = zip(*map(_step_or_reset, self.games, actions), strict=True)
        return np.stack(stacks), *map(list, results), {"games": list(infos)}

    def close(self) -> None:
        for game in self.games:
            game.close()

    @property
    def snapshots(self) -> list[dict]:
        return [game.get_wrapper_attr("snapshot") for game in self.games]

    @snapshots.setter
    def snapshots(self, states: list[dict]) -> None:
        for game, state in zip(self.games, states, strict=True):
            game.set_wrapper_attr("snapshot", state)


def _step_or_reset(game: gym.Env, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
    """A step, and where it ends the episode the reset too."""
    stack, reward, terminated, truncated, info = game.step(action)
    if terminated or truncated:
        ended = {"final_obs": stack, "final_info": info}
        stack, info = game.reset()
        info = ended | info
    return stack, reward, terminated, truncated, info


def even_workers(num_envs: int) -> int:
    """The most worker processes that can have equally many games each, and a CPU core each."""
    return max(n for n in range(1, min(num_envs, share_of_cores()) + 1) if num_envs % n == 0)


class VectorGames(VectorWrapper):
    """Games side by side, each behind `WholeGames`: they can be saved, and a dead worker ends the run with one line.

    A game that ends is reset in the same step; `final_obs` and `final_info` describe its end.

    Args:
        async_envs: in worker processes.
        workers: how many, with equally many games each; None: one for each game.
    """

    def __init__(self, make_game: Callable[[], gym.Env], num_envs: int, async_envs: bool, workers: int | None = None):
        self.games, self.workers = num_envs, (workers or num_envs) if async_envs else 0
        if not async_envs:
            super().__init__(SyncVectorEnv([make_game] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP))
            return
        make = functools.partial(_make_worker_games, make_game, num_envs // self.workers, parent=os.getpid())
        # A worker resets its games by itself.
        env = AsyncVectorEnv([make] * self.workers, shared_memory=True, autoreset_mode=AutoresetMode.DISABLED)
        super().__init__(env)
        self.single_action_space = gym.spaces.Discrete(int(env.single_action_space.nvec[0]))

    num_envs = property(lambda self: self.games)

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        with self._workers():
            if not self.workers:
                return self.env.reset(seed=seed)
            first_of_each = range(0, self.games, self.games // self.workers)
            stacks, infos = self.env.reset(seed=[None if seed is None else seed + i for i in first_of_each])
            return stacks.reshape(self.games, *stacks.shape[2:]), self._side_by_side(infos)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        with self._workers():
            if not self.workers:
                return self.env.step(actions)
            stacks, *results, infos = self.env.step(np.reshape(actions, (self.workers, -1)))
            rewards, terminations, truncations = (part.reshape(self.games) for part in results)
            return (
                stacks.reshape(self.games, *stacks.shape[2:]),
                rewards,
                terminations,
                truncations,
                self._side_by_side(infos),
            )

    def _side_by_side(self, infos: dict) -> dict:
        """The games' infos as a vector environment has them."""
        together: dict = {}
        for i, info in enumerate(itertools.chain.from_iterable(infos["games"])):
            together = self._add_info(together, info, i)
        return together

    def state_dict(self) -> dict[str, Any]:
        with self._workers():
            if not self.workers:
                return {"games": list(self.env.get_attr("snapshot"))}
            return {"games": list(itertools.chain.from_iterable(self.env.get_attr("snapshots")))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        games = [{key: _array(value) for key, value in game.items()} for game in state["games"]]
        with self._workers():
            if not self.workers:
                self.env.set_attr("snapshot", games)
                return
            share = self.games // self.workers
            self.env.set_attr("snapshots", [games[i : i + share] for i in range(0, self.games, share)])

    def close(self, **kwargs: Any) -> None:
        """Even in the middle of a step, or when workers have died: they have nothing to save."""
        for worker in getattr(self.env, "processes", ()):
            worker.kill()
            worker.join()
        if self.workers:
            self.env.closed = self.closed = True
        else:
            super().close(**kwargs)

    def __del__(self) -> None:
        # After an error before the run knows them: gymnasium would end workers by a signal that they ignore.
        if "env" in vars(self):
            self.close()

    @contextlib.contextmanager
    def _workers(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self.env.closed = self.closed = True  # closing would wait for the dead worker
            raise RunFailed(f"a worker process died (out of memory?); resume with {same_command()}") from None


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _make_worker_games(make_game: Callable[[], gym.Env], count: int, parent: int) -> GamesOfAWorker:
    """In a worker, ignore signals: they reach the whole process group, and the parent decides when to stop."""
    if os.getpid() == parent:  # gymnasium calls this in the parent too, to see the spaces: one game has them
        return GamesOfAWorker([make_game()] * count)
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(AttributeError):  # a notebook's stdout
        sys.stdout.reconfigure(line_buffering=True)  # closing kills the worker: write what a game prints at once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: workers die with a killed parent
    return GamesOfAWorker([make_game() for _ in range(count)])


class AleGames(VectorWrapper):
    """ale-py's vector environment made like the others: clipped rewards, and whole games in `info["episode"]`.

    Unlike them it presses no FIRE after a lost life, its stacks continue across it, and a reset fills them with zeros.
    """

    state_dict = None  # ale-py cannot save these games: such a run has no checkpoints

    def __init__(self, env_id: str, repeat_action_probability: float, num_envs: int, num_threads: int):
        names = {name.replace("_", ""): name for name in roms.get_all_rom_ids()}
        env = AtariVectorEnv(
            names[env_id.removesuffix("NoFrameskip-v4").lower()],
            num_envs,
            num_threads=num_threads,
            repeat_action_probability=repeat_action_probability,
            autoreset_mode=AutoresetMode.SAME_STEP,
            life_loss_info=True,
            reward_clipping=False,
        )
        super().__init__(env)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        stacks, info = self.env.reset(**kwargs)
        self.frame_numbers = info["episode_frame_number"]
        self.scores, self.lengths = np.zeros((2, self.num_envs))
        return stacks, info

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        stacks, rewards, terminations, truncations, info = self.env.step(actions)
        self.scores, self.lengths = self.scores + rewards, self.lengths + 1
        # A lost life terminates like a game over, but the game's frame count goes on.
        over = truncations | (terminations & (info["episode_frame_number"] < self.frame_numbers))
        self.frame_numbers = info["episode_frame_number"]
        info |= {"episode": {"r": self.scores, "l": self.lengths}, "_episode": over}
        self.scores, self.lengths = np.where(over, 0, self.scores), np.where(over, 0, self.lengths)
        return stacks, np.sign(rewards), terminations, truncations, info


def ended_games(info: dict) -> dict[int, tuple[float, int]]:
    """{environment: (unclipped score, agent steps)} of the games that ended in a step and in its resets.

    Args:
        info: of one environment, which counts as number 0, or of several side by side.
    """
    games = {}
    for part in (info.get("final_info", {}), info):
        if "episode" in part:
            scores, lengths = np.atleast_1d(part["episode"]["r"]), np.atleast_1d(part["episode"]["l"])
            for i in np.flatnonzero(part.get("_episode", True)):
                games[int(i)] = (float(scores[i]), int(lengths[i]))
    return games


# ------------------------------------------------------------------------------------ playing and filming


@torch.no_grad()
def play_games(
    env: gym.Env, act: Callable[[np.ndarray], int], seed: int, games: int, video_folder: Path | None = None
) -> Iterator[float]:
    """Play whole games and yield each one's unclipped score; closes `env`.

    Args:
        env: one game behind `WholeGames`, whose observations are stacks.
        act: the action for an observation (4, 84, 84) uint8, oldest frame first.
        seed: of the first game.
        video_folder: where `game_<n>.mp4` is filmed; `env` has to render arrays for that.
    """
    stack, _ = env.reset(seed=seed)
    for game in range(games):
        info: dict = {}
        with _film(video_folder and video_folder / f"game_{game}.mp4", env) as add_picture:
            while "episode" not in info:
                stack, _, terminated, truncated, info = env.step(act(stack))
                add_picture()
                if terminated or truncated:
                    stack, reset_info = env.reset()
                    info |= reset_info
        yield info["episode"]["r"]
    env.close()


def film_writer(file: Path, width: int, height: int) -> Generator[None, Any, None]:
    """Begin the mp4 `file`: `send` it pictures, uint8 (height, width, 3), then `close` it."""
    # Absolute: ffmpeg would take what precedes a colon for a protocol.
    writer = imageio_ffmpeg.write_frames(str(file.absolute()), (width, height), fps=15, macro_block_size=2)
    writer.send(None)
    return writer


@contextlib.contextmanager
def _film(file: Path | None, env: gym.Env) -> Iterator[Callable[[], None]]:
    """Yield a function that adds what `env` shows to the mp4 `file`, one picture per agent step; None films nothing."""
    if file is None:
        yield lambda: None
        return
    height, width, _ = env.render().shape
    writer = film_writer(file, width, height)
    try:
        yield lambda: writer.send(np.ascontiguousarray(env.render()))
    finally:
        writer.close()
