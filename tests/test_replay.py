"""replay.py against stable-baselines3's memory of full stacks, and against a list."""

import sys

import gymnasium as gym
import lz4.block
import numpy as np
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer

from lan_utils.checkpoint import Checkpoints, Part
from lan_utils.replay import ReplayMemory, RolloutMemory

sys.path.insert(0, str(ROOT / "benchmark"))
import replay_benchmark


def play(memory, stacks, episodes):
    """Feed both memories made-up episodes (length, truncated?); returns which transitions terminated."""
    number, terminations = 0, []
    for length, truncated in episodes:
        observation = np.full((4, 84, 84), number % 251, np.uint8)
        for step in range(length):
            number += 1
            done = step == length - 1
            next_frame = np.full((84, 84), number % 251, np.uint8)
            next_observation = np.concatenate((observation[1:], next_frame[None]))
            action, reward = number % 18, float(number % 3 - 1)
            terminated = done and not truncated
            memory.add(observation[3], action, reward, terminated, done and truncated, next_frame)
            stacks.add(
                observation, next_observation, np.array([action]), np.array([reward]), np.array([terminated]), [{}]
            )
            terminations.append(terminated)
            observation = next_observation
        number += 1  # the next episode begins with a frame of its own
    return terminations


def sb3_memory(capacity):
    return ReplayBuffer(
        capacity,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(18),
        handle_timeout_termination=False,
    )


class SmallSegments(ReplayMemory):
    SEGMENT = 7


def assert_same_memory(memory, oracle, terminations):
    numbers = np.arange(memory.added - len(memory), memory.added)
    assert len(numbers) == oracle.size()
    place, i = numbers % oracle.buffer_size, numbers % memory.rows
    frames = memory.stacks(numbers).numpy()
    np.testing.assert_array_equal(frames[:, :4], oracle.observations[place, 0])
    lives = ~np.array(terminations)[numbers]
    np.testing.assert_array_equal(frames[lives, 1:], oracle.next_observations[place, 0][lives])
    np.testing.assert_array_equal(memory.actions[i], oracle.actions[place, 0, 0])
    np.testing.assert_array_equal(memory.rewards[i], oracle.rewards[place, 0])
    np.testing.assert_array_equal(memory.terminated[i], oracle.dones[place, 0].astype(bool))


EPISODES = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=14)


@given(EPISODES, st.integers(1, 30))
@example([(1, True)] * 10, 4)  # only first frames, every one truncated
@example([(40, False)], 5)  # wraps around inside one episode
@example([(15, False)], 7)  # a segment has just begun, the one before is still reached
@settings(max_examples=80, deadline=None)
def test_replay_is_what_a_memory_of_full_stacks_would_be(episodes, capacity):
    """Against SB3's ReplayBuffer. Would catch: stacks over an episode start or the write head, a lost last frame of a
    truncated episode, a segment dropped too early, an off-by-one after the wrap."""
    memory, oracle = SmallSegments(capacity), sb3_memory(capacity)
    terminations = play(memory, oracle, episodes)
    assert_same_memory(memory, oracle, terminations)
    assert len(memory.frames) <= (capacity + 3) // 7 + 2  # old segments do leave
    assert len(memory.final_frames) <= capacity


@given(EPISODES, EPISODES, EPISODES, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_replay_survives_its_state(before, between, after, capacity):
    """Saved twice, of which the second is restored into a fresh memory; then both go on. Would catch: any field left
    behind, a part whose content changes under its name."""
    memory, oracle = SmallSegments(capacity), sb3_memory(capacity)
    terminations = play(memory, oracle, before)
    early = {part.name: part.content() for part in memory.state_dict()["segments"]}
    terminations += play(memory, oracle, between)
    copy = SmallSegments(capacity)
    play(copy, sb3_memory(capacity), between)  # what it held before leaves no trace
    state = memory.state_dict()
    state["segments"] = [Part(p.name, lambda p=p: early.get(p.name) or p.content()) for p in state["segments"]]
    copy.load_state_dict(state)
    assert len(copy) == len(memory)
    assert_same_memory(copy, oracle, terminations)
    first, second = sb3_memory(capacity), sb3_memory(capacity)
    assert play(memory, first, after) == play(copy, second, after)
    numbers = np.arange(memory.added - len(memory), memory.added)
    assert torch.equal(memory.stacks(numbers), copy.stacks(numbers))
    for ours, theirs in zip(copy.state_dict()["segments"], memory.state_dict()["segments"], strict=True):
        assert ours.name == theirs.name
        assert ours.content().keys() == theirs.content().keys()


def test_segments_are_parts_that_are_written_once(tmp_path):
    """Would catch: 1.5 GB written with every checkpoint, a part deleted that the older one still needs."""
    memory, checkpoints = SmallSegments(20), Checkpoints(tmp_path / "checkpoints")
    stacks = sb3_memory(20)
    written = {}
    for step in (10, 20, 30, 60):
        play(memory, stacks, [(step - memory.added, False)])
        checkpoints.save(step, {"step": step, "memory": memory.state_dict()})
        now = {file.name: file.stat().st_mtime_ns for file in checkpoints.folder.iterdir()}
        assert all(written[name] == time for name, time in now.items() if name in written)
        written |= now
        spans = {tuple(map(int, name.removesuffix(".part").split("-"))) for name in now if name.endswith(".part")}
        assert all(stop - start <= 7 for start, stop in spans)
    # The last 23 transitions are needed; a segment leaves when the next one begins.
    assert spans == {
        *((0, 7), (7, 14), (14, 21), (21, 28), (28, 30)),
        *((28, 35), (35, 42), (42, 49), (49, 56), (56, 60)),
    }
    newest, older = checkpoints.load()
    assert (newest["step"], older["step"]) == (60, 30)
    copies = {}
    for state in (newest, older):
        copies[state["step"]] = SmallSegments(20)
        copies[state["step"]].load_state_dict(state["memory"])
    assert copies[30].added == 30
    assert torch.equal(memory.stacks(np.arange(40, 60)), copies[60].stacks(np.arange(40, 60)))


def test_sampling_is_uniform_and_reaches_both_ends():
    """Would catch: the newest or the oldest transition never sampled, rewards of other rows."""
    memory = SmallSegments(10)
    play(memory, sb3_memory(10), [(25, False)])
    rng = np.random.default_rng(0)
    batch = memory.sample(20_000, rng, torch.device("cpu"))
    newest = batch.frames[:, 3, 0, 0]
    counts = torch.bincount(newest.long(), minlength=26)
    assert (counts[:15] == 0).all()
    assert (counts[15:25] > 1700).all()
    assert (batch.actions == (newest.long() + 1) % 18).all()
    assert (batch.rewards == (newest.long() + 1) % 3 - 1).all()
    assert batch.frames.dtype == torch.uint8
    assert (batch.terminated == (newest == 24).float()).all()


def test_observations_are_drawn_without_replacement_by_a_generator_of_their_own():
    """Would catch: one observation twice, a draw from the training's generator, too early a sample."""
    memory = SmallSegments(20)
    play(memory, sb3_memory(20), [(19, False)])
    assert memory.observations(20, seed=(1, 19)) is None
    play(memory, sb3_memory(20), [(30, False)])
    state = np.random.get_state()[1].copy()
    drawn = memory.observations(20, seed=(1, 49))
    assert drawn.shape == (20, 4, 84, 84)
    newest = drawn[:, 3, 0, 0].tolist()
    assert len(set(newest)) == 20
    assert torch.equal(drawn, memory.observations(20, seed=(1, 49)))
    assert not torch.equal(drawn, memory.observations(20, seed=(2, 49)))
    assert (np.random.get_state()[1] == state).all()


def test_the_benchmark_holds_its_actions_where_it_says_so():
    """Would catch: the same random play measured twice."""
    actions = [action for _, action, *_ in replay_benchmark.play("Pong", 60, hold=20)]
    assert [actions[i] for i in (0, 20, 40) for _ in range(20)] == actions
    assert len({action for _, action, *_ in replay_benchmark.play("Pong", 20)}) > 3


def test_the_benchmark_counts_what_a_transition_takes():
    """Three frames of one colour: lz4's packet, and 15 bytes in the columns. Would catch: a column or a frame left out,
    the sum of a memory that is not full."""
    memory = ReplayMemory(100)
    frame = np.zeros((84, 84), np.uint8)
    for _ in range(3):
        memory.add(frame, 0, 0.0, False, False, frame)
    packet = len(lz4.block.compress(frame.tobytes(), mode="high_compression", compression=4, store_size=False))
    assert replay_benchmark.stored_bytes(memory) == packet + 4 + 4 + 1 + 1 + 4 + 1


# ------------------------------------------------------------------------------------------------ rollouts


def is_channels_last(observations):
    return observations.is_contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 24))
@example(num_steps=2, num_envs=2, measured=4, rollouts=3, saved_at=5)  # measured is one rollout
@example(num_steps=2, num_envs=2, measured=5, rollouts=4, saved_at=3)  # one more
@settings(max_examples=60, deadline=None)
def test_a_rollout_memory_is_a_list_of_all_observations(num_steps, num_envs, measured, rollouts, saved_at):
    """Would catch: a rollout from the wrong end of the ring, a sample out of order or across its seam, environments
    swapped, a state that forgets where it was, a layout that convolutions have to change."""
    device = torch.device("cpu")
    memory, everything = RolloutMemory(num_steps, num_envs, measured, device), []
    assert memory.observations(measured, seed=0) is None
    for step in range(num_steps * rollouts):
        if step == saved_at:
            state = {key: torch.clone(v) if torch.is_tensor(v) else v for key, v in memory.state_dict().items()}
            memory = RolloutMemory(num_steps, num_envs, measured, device)
            memory.load_state_dict(state)
        obs = np.arange(step * num_envs * 4, (step + 1) * num_envs * 4).reshape(num_envs, 4, 1, 1) % 251
        obs = np.broadcast_to(obs, (num_envs, 4, 84, 84)).astype(np.uint8)
        obs[..., 0, 1] = 255  # which way is up
        stored = memory.add(obs)
        everything.extend(obs.copy())
        assert is_channels_last(stored)
        np.testing.assert_array_equal(stored, obs)
        for n in {1, measured}:
            found = memory.observations(n, seed=step)
            if len(everything) < n:
                assert found is None
            else:
                np.testing.assert_array_equal(found, np.stack(everything[-n:]))
        if (step + 1) % num_steps == 0:
            rollout = memory.rollout()
            assert rollout.shape == (num_steps, num_envs, 4, 84, 84)
            assert is_channels_last(rollout.flatten(0, 1))
            np.testing.assert_array_equal(rollout.flatten(0, 1), np.stack(everything[-num_steps * num_envs :]))
    assert memory.steps * num_envs < measured + num_steps * num_envs  # no more is kept than is asked for
