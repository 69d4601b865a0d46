"""What the replay memory costs, with frames of random play.

python benchmark/replay_benchmark.py           each of the eight games: bytes, time to add and to sample
python benchmark/replay_benchmark.py --every   every Atari game: bytes, also with each action held for 20 steps
python benchmark/replay_benchmark.py --full    Q*bert, the largest: 1,000,000 transitions, then half as many again;
                                               resident memory, a checkpoint's stall, its load, the disk
"""

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_atari_lan as dqn
from lan_utils.checkpoint import LoopState
from lan_utils.checks import require
from lan_utils.cli import launch
from lan_utils.replay import ReplayMemory
from lan_utils.run import Run, measure_network, measure_representation, set_up
from lan_utils.study import GAMES


@dataclass
class Args:
    """What the replay memory costs, with frames of random play."""

    full: bool = False
    """fill a memory of 1,000,000 and checkpoint it"""
    every: bool = False
    """measure the bytes of a transition in every game, not only the eight"""
    steps: int = 5000
    """agent steps of random play per game"""


def play(game: str, steps: int, hold: int = 1) -> list[tuple]:
    """Transitions of random play, each action held for `hold` steps, as `ReplayMemory.add` takes them."""
    env = dqn.make_env(f"{game}NoFrameskip-v4")
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    transitions = []
    for step in range(steps):
        if step % hold == 0:
            action = int(rng.integers(env.action_space.n))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        transitions.append((obs[3].copy(), action, reward, terminated, truncated, next_obs[3].copy()))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return transitions


def timed(function, repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def stored_bytes(memory: ReplayMemory) -> float:
    """Of one transition: its frame, and a row of every column."""
    columns = [a for a in vars(memory).values() if isinstance(a, np.ndarray) and len(a) == memory.rows]
    return sum(map(len, memory.frames.values())) / len(memory) + sum(a.itemsize for a in columns)


def fill(game: str, steps: int, hold: int) -> float:
    """Bytes of a transition."""
    memory = ReplayMemory(steps)
    for transition in play(game, steps, hold):
        memory.add(*transition)
    return stored_bytes(memory)


def every_game(steps: int) -> None:
    """Random play that holds its actions sees other parts of a game than one that draws a new action in each step."""
    print(f"{'game':<18}{'random':>8}{'held':>8}   bytes/transition, {steps:,} steps each")
    games = sorted(name.removesuffix("NoFrameskip-v4") for name in gym.registry if name.endswith("NoFrameskip-v4"))
    with ProcessPoolExecutor() as pool:
        sizes = [pool.map(partial(fill, steps=steps, hold=hold), games) for hold in (1, 20)]
        for game, random, held in zip(games, *sizes, strict=True):
            print(f"{game:<18}{random:>8.0f}{held:>8.0f}", flush=True)


def compare_games(steps: int) -> None:
    print(f"{'game':<14}{'bytes/transition':>17}{'GB per 1,000,000':>18}{'us/add':>8}{'ms/sample of 32':>17}")
    rng = np.random.default_rng(0)
    for game in GAMES:
        transitions = play(game, steps)
        memory = ReplayMemory(steps)
        start = time.perf_counter()
        for transition in transitions:
            memory.add(*transition)
        add = (time.perf_counter() - start) / steps
        size = stored_bytes(memory)
        sample = timed(lambda m=memory: m.sample(32, rng, torch.device("cpu")), 200)
        print(f"{game:<14}{size:>17.0f}{size / 1000:>18.2f}{add * 1e6:>8.1f}{sample * 1e3:>17.2f}", flush=True)


def fill_and_checkpoint(steps: int) -> None:
    transitions = play("Qbert", steps)
    process = psutil.Process()
    with tempfile.TemporaryDirectory(dir=".") as runs_dir:
        args = dqn.Args(env_id="QbertNoFrameskip-v4", cuda=False, runs_dir=runs_dir)
        device, rng = set_up(args)
        before = process.memory_info().rss
        memory = ReplayMemory(1_000_000)
        for n in range(1_500_000):
            memory.add(*transitions[n % steps])
        resident = (process.memory_info().rss - before) / 1e9
        print(f"resident memory of 1,000,000 transitions after 1,500,000: {resident:.2f} GB", flush=True)

        network = dqn.QNetwork(18, "tanh-lan").to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        for _ in range(20):
            batch = memory.sample(32, rng, device)
            optimizer.zero_grad()
            dqn.td_loss(network, network, batch, 0.99, True)[0].backward()
            optimizer.step()
        measure_representation(measure_network(network, memory.observations(2048, seed=1))[0], 20.0, seed=(1, 0))
        run = Run("dqn", args, device, rng)
        play_state = LoopState(step=0)
        run.resume(q_network=network, target=network, optimizer=optimizer, memory=memory, play=play_state)
        stalls = []
        for _ in range(5):
            for n in range(50_000):  # the default --checkpoint-frequency
                memory.add(*transitions[n % steps])
            start = time.perf_counter()
            run.save(memory.added)
            stalls.append(time.perf_counter() - start)
        first, *others = stalls
        print(f"the first checkpoint, of all of it: {first:.1f} s")
        print(f"the next ones, 50,000 new and a LaN's weights: {np.median(others):.2f} s, most {max(others):.2f} s")
        print(f"peak resident memory of training, measuring and checkpoints with it: {peak_rss() / 1e9:.2f} GB")
        size = sum(file.stat().st_size for file in Path(runs_dir).rglob("*") if file.is_file())
        print(f"run folder: {size / 1e9:.2f} GB", flush=True)
        start = time.perf_counter()
        state = next(run.checkpoints.load())
        ReplayMemory(1_000_000).load_state_dict(state["things"]["memory"])
        print(f"loading it: {time.perf_counter() - start:.1f} s")
        print(f"peak resident memory of all this: {peak_rss() / 1e9:.2f} GB")
        run.state = "stopped"  # the folder is gone when the process ends
        run.writer.close()


def peak_rss() -> int:
    """Bytes; the kernel's high-water mark of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(args: Args) -> None:
    require(32 <= args.steps <= 1_000_000, args, "steps", "lie in 32, a minibatch, to 1,000,000")
    measure = fill_and_checkpoint if args.full else every_game if args.every else compare_games
    measure(args.steps)


if __name__ == "__main__":
    launch(main, Args)
