"""What an agent has seen: DQN's replay memory, a million transitions in 1.5 GB, and the observations of rollouts."""

import functools
from typing import Any, NamedTuple

import lz4.block
import numpy as np
import torch
from torch import Tensor

from lan_utils.checkpoint import Part


class Batch(NamedTuple):
    """n transitions. `frames[:, :4]` is the observation, `frames[:, 1:]` the next one."""

    frames: Tensor  # (n, 5, 84, 84) uint8
    actions: Tensor  # (n,) int64
    rewards: Tensor  # (n,) float32
    terminated: Tensor  # (n,) float32, 1 where the target is the reward alone


class ReplayMemory:
    """The last `capacity` transitions, one lz4-compressed frame each, sampled as if full stacks were stored.

    Transitions are numbered from the first ever added; a segment is SEGMENT of them, in memory as on disk. Its frames
    lie end to end: as separate objects they would fragment the heap. It is dropped when no stack can reach it.
    After a termination the next observation is arbitrary: the target ignores it.
    """

    SEGMENT = 10_000

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.added = 0
        self.frames: dict[int, bytearray | bytes] = {}  # by segment
        # One row per transition, segment after segment; the oldest observation reaches three frames further back.
        self.rows = self.SEGMENT * (-(-(capacity + 3) // self.SEGMENT) + 1)
        self.begin = np.zeros(self.rows, np.uint32)  # of its frame in the segment's
        self.end = np.zeros(self.rows, np.uint32)
        self.first = np.zeros(self.rows, bool)  # is this frame an episode's first?
        self.actions = np.zeros(self.rows, np.uint8)
        self.rewards = np.zeros(self.rows, np.float32)
        self.terminated = np.zeros(self.rows, bool)
        self.final_frames: dict[int, bytes] = {}  # of truncated episodes, by transition
        self.newest_frame = np.zeros((84, 84), np.uint8)  # after the newest transition
        self.starts_episode = True

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(
        self, frame: np.ndarray, action: int, reward: float, terminated: bool, truncated: bool, next_frame: np.ndarray
    ) -> None:
        """Store a transition: the newest frame of its observation, and of the one that followed, each 84 x 84 uint8."""
        number, i = self.added // self.SEGMENT, self.added % self.rows
        if number not in self.frames:
            if number - 1 in self.frames:
                self.frames[number - 1] = bytes(self.frames[number - 1])  # drops the growing buffer's spare room
            self.frames[number] = bytearray()
            for old in [n for n in self.frames if (n + 1) * self.SEGMENT <= self.added - self.capacity - 3]:
                del self.frames[old]
        frames = self.frames[number]
        self.begin[i] = len(frames)
        frames += _pack(frame)
        self.end[i] = len(frames)
        self.actions[i], self.rewards[i], self.terminated[i] = action, reward, terminated
        self.first[i] = self.starts_episode
        if truncated and not terminated:
            self.final_frames[self.added] = _pack(next_frame)
        self.final_frames.pop(self.added - self.capacity, None)
        self.newest_frame = np.array(next_frame, np.uint8).reshape(84, 84)
        self.starts_episode = terminated or truncated
        self.added += 1

    def _frame(self, t: int) -> np.ndarray:
        i = t % self.rows
        return _unpack(memoryview(self.frames[t // self.SEGMENT])[self.begin[i] : self.end[i]])

    def _next_frame(self, t: int) -> np.ndarray:
        if t in self.final_frames:
            return _unpack(self.final_frames[t])
        return self.newest_frame.T if t == self.added - 1 else self._frame(t + 1)

    def stacks(self, transitions: np.ndarray, pin_memory: bool = False) -> Tensor:
        """Observations and next observations of the given transitions: (n,) -> uint8 (n, 5, 84, 84).

        Args:
            transitions: numbers in [added - len(self), added).
        """
        t = transitions[:, None]
        starts = self.first[(t - np.arange(3)) % self.rows]
        reach = np.where(starts.any(axis=1), starts.argmax(axis=1), 3)[:, None]  # frames back in the same episode
        sources = t - np.minimum([3, 2, 1, 0], reach)
        stacks = torch.empty((len(t), 5, 84, 84), dtype=torch.uint8, pin_memory=pin_memory)
        for stack, frames, transition in zip(stacks.numpy(), sources.tolist(), transitions.tolist(), strict=True):
            for place, source in enumerate(frames):
                # A reset's copies are decompressed once.
                stack[place] = stack[place - 1] if place and source == frames[place - 1] else self._frame(source)
            stack[4] = self._next_frame(transition)
        return stacks.transpose(2, 3)  # frames are stored column by column

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """`batch_size` transitions, uniformly, with replacement."""
        transitions = rng.integers(self.added - len(self), self.added, batch_size)
        i = transitions % self.rows
        stacks = self.stacks(transitions, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        columns = (self.actions[i].astype(np.int64), self.rewards[i], self.terminated[i].astype(np.float32))
        return Batch(stacks, *(torch.from_numpy(column).to(device, non_blocking=True) for column in columns))

    def observations(self, n: int, seed: Any) -> Tensor | None:
        """`n` observations, uniformly, without replacement: uint8 (n, 4, 84, 84); None while there are fewer.

        Args:
            seed: of a separate numpy generator: measuring must not change the training.
        """
        if len(self) < n:
            return None
        chosen = np.random.default_rng(seed).choice(len(self), n, replace=False)
        return self.stacks(self.added - len(self) + chosen)[:, :4]

    def state_dict(self) -> dict[str, Any]:
        """Every segment as a part of its own, whose name says which transitions it holds."""
        parts = []
        for number in sorted(self.frames):
            start, stop = number * self.SEGMENT, min((number + 1) * self.SEGMENT, self.added)
            parts.append(Part(f"{start:010d}-{stop:010d}", functools.partial(self._segment, start, stop)))
        return {
            "added": self.added,
            "newest_frame": self.newest_frame,
            "starts_episode": self.starts_episode,
            "segments": parts,
        }

    def _segment(self, start: int, stop: int) -> dict[str, Any]:
        i = slice(start % self.rows, start % self.rows + stop - start)
        finals = {t: final for t, final in self.final_frames.items() if start <= t < stop}
        return {
            "start": start,
            "frames": np.frombuffer(bytearray(self.frames[start // self.SEGMENT]), np.uint8),
            "end": self.end[i].astype(np.int64),  # what torch saves of unsigned integers varies with its version
            "first": self.first[i],
            "actions": self.actions[i],
            "rewards": self.rewards[i],
            "terminated": self.terminated[i],
            "final_numbers": list(finals),
            "final_frames": [np.frombuffer(bytearray(final), np.uint8) for final in finals.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refill the memory, one segment at a time."""
        self.frames, self.final_frames = {}, {}
        for part in state["segments"]:
            segment = part.content()
            start, end = segment["start"], np.asarray(segment["end"])
            i = slice(start % self.rows, start % self.rows + len(end))
            frames = np.asarray(segment["frames"]).tobytes()
            self.frames[start // self.SEGMENT] = frames if len(end) == self.SEGMENT else bytearray(frames)
            self.end[i], self.begin[i] = end, np.append(0, end[:-1])
            for column in ("first", "actions", "rewards", "terminated"):
                getattr(self, column)[i] = np.asarray(segment[column])
            for number, final in zip(segment["final_numbers"], segment["final_frames"], strict=True):
                self.final_frames[number] = np.asarray(final).tobytes()
        self.added = state["added"]
        self.newest_frame = np.asarray(state["newest_frame"])
        self.starts_episode = state["starts_episode"]


class RolloutMemory:
    """The observations of the rollout that is being played, and of as many before it as a measurement wants.

    Args:
        num_steps, num_envs: of a rollout.
        measured: observations of a measurement; whole rollouts are kept, at least one.
        device: where the observations are kept, channels last, as the convolutions read them.
    """

    def __init__(self, num_steps: int, num_envs: int, measured: int, device: torch.device):
        self.num_steps, self.num_envs, self.device = num_steps, num_envs, device
        self.steps = num_steps * -(-measured // (num_steps * num_envs))  # of all rollouts kept
        self.added = 0  # vector steps
        shape = (self.steps, num_envs, 84, 84, 4)
        self.frames = torch.zeros(shape, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)

    def add(self, obs: np.ndarray) -> Tensor:
        """Store the observations (num_envs, 4, 84, 84) of a step; returns them on the device."""
        stored = self.frames[self.added % self.steps]
        stored.copy_(torch.from_numpy(obs).to(self.device))  # first to the device, which reorders faster
        self.added += 1
        return stored

    def rollout(self) -> Tensor:
        """The newest whole rollout: (num_steps, num_envs, 4, 84, 84)."""
        start = (self.added - self.num_steps) % self.steps
        return self.frames[start : start + self.num_steps]

    def observations(self, n: int, seed: Any) -> Tensor | None:
        """The `n` most recent observations, oldest first: (n, 4, 84, 84); None while there are fewer.

        Args:
            seed: as for the replay memory; nothing is drawn here.
        """
        if self.added * self.num_envs < n:
            return None
        newest = self.added % self.steps
        in_order = torch.cat((self.frames[newest:], self.frames[:newest]))
        return in_order.flatten(0, 1)[-n:]

    def state_dict(self) -> dict[str, Any]:
        return {"added": self.added, "frames": self.frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = state["added"]
        self.frames.copy_(state["frames"])


def _pack(frame: np.ndarray) -> bytes:
    # Column by column, and with some effort, even Q*bert's frames take less than 1,450 bytes on average.
    return lz4.block.compress(frame.tobytes(order="F"), mode="high_compression", compression=4, store_size=False)


def _unpack(packed: bytes | memoryview) -> np.ndarray:
    """The frame's columns as rows, (84, 84)."""
    return np.frombuffer(lz4.block.decompress(packed, uncompressed_size=84 * 84), np.uint8).reshape(84, 84)
