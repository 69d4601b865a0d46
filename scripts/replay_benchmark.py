"""What the replay memory costs, on frames of random play.

python scripts/replay_benchmark.py            each of the eight games: bytes, time to add and to sample
python scripts/replay_benchmark.py --full     Q*bert, the largest: 1,000,000 transitions, wrapped around by half as many
                                              again; resident memory, a checkpoint's stall, its load, the disk
"""

import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
import dqn_atari_lan as dqn

GAMES = ("BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball")


@dataclass
class Args:
    full: bool = False
    """fill a memory of 1,000,000 and checkpoint it"""
    steps: int = 5000
    """agent steps of random play per game"""


def play(game: str, steps: int) -> list[tuple]:
    """Transitions of random play, as `ReplayMemory.add` takes them."""
    env = dqn.make_env(f"{game}NoFrameskip-v4")
    rng = np.random.default_rng(0)
    frame, _ = env.reset(seed=0)
    transitions = []
    for _ in range(steps):
        action = int(rng.integers(env.action_space.n))
        next_frame, reward, terminated, truncated, _ = env.step(action)
        transitions.append((frame[..., 0], action, reward, terminated, truncated, next_frame[..., 0]))
        frame = env.reset()[0] if terminated or truncated else next_frame
    return transitions


def timed(function, repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def compare_games(steps: int) -> None:
    print(f"{'game':<14}{'bytes/transition':>17}{'GB per 1,000,000':>18}{'us/add':>8}{'ms/sample of 32':>17}")
    rng = np.random.default_rng(0)
    for game in GAMES:
        transitions = play(game, steps)
        memory = dqn.ReplayMemory(steps)
        start = time.perf_counter()
        for transition in transitions:
            memory.add(*transition)
        add = (time.perf_counter() - start) / steps
        columns = sum(a.nbytes for a in vars(memory).values() if isinstance(a, np.ndarray) and len(a) == memory.kept)
        size = (sum(map(len, memory.segments.values())) + columns) / steps
        sample = timed(lambda m=memory: m.sample(32, rng, torch.device("cpu")), 200)
        print(f"{game:<14}{size:>17.0f}{size / 1000:>18.2f}{add * 1e6:>8.1f}{sample * 1e3:>17.2f}", flush=True)


def fill_and_checkpoint(steps: int) -> None:
    device = checkpoint.set_up_device(dqn.Args(cuda=False))
    transitions = play("Qbert", steps)
    process = psutil.Process()
    before = process.memory_info().rss
    memory = dqn.ReplayMemory(1_000_000)
    for n in range(1_500_000):
        memory.add(*transitions[n % steps])
    print(
        f"resident memory of 1,000,000 transitions after 1,500,000: {(process.memory_info().rss - before) / 1e9:.2f} GB"
    )

    folder = Path(tempfile.mkdtemp(dir="."))
    try:
        network = dqn.QNetwork(18, "tanh-lan").to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        rng = np.random.default_rng(0)
        for _ in range(20):
            batch = memory.sample(32, rng, device)
            optimizer.zero_grad()
            dqn.td_loss(network, network, batch, 0.99, True)[0].backward()
            optimizer.step()
        sample = dqn.activations(network, memory.frames(rng.integers(500_000, 1_500_000, 2048))[:, :4], device)
        dqn.log_representation(None, sample, 20.0, seed=1, step=0)
        run = checkpoint.Run(folder, "dqn")
        run.writer = checkpoint.SummaryWriter(str(folder))
        state = {"online": network.state_dict(), "target": network.state_dict(), "optimizer": optimizer.state_dict()}
        stalls = []
        oldest = memory.added - memory.kept
        for step in range(oldest + 50_000, memory.added + 1, 50_000):  # the default --checkpoint-frequency
            start = time.perf_counter()
            run.save(step, state, memory.export, oldest)
            stalls.append(time.perf_counter() - start)
        print(
            f"a checkpoint of 50,000 new ones and a LaN's weights: {np.median(stalls):.2f} s, most {max(stalls):.2f} s"
        )
        print(f"peak resident memory of training, measuring and checkpoints with it: {peak_rss() / 1e9:.2f} GB")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"run folder: {size / 1e9:.2f} GB")
        start = time.perf_counter()
        loaded = checkpoint.Run(folder, "dqn")
        loaded.load()
        copy = dqn.ReplayMemory(1_000_000)
        copy.restore(loaded.resumed["step"], loaded.read_segments(), memory.newest_frame, True)
        print(f"loading it: {time.perf_counter() - start:.1f} s")
        print(f"peak resident memory of all this: {peak_rss() / 1e9:.2f} GB")
    finally:
        shutil.rmtree(folder)


def peak_rss() -> int:
    """Bytes; the kernel's high-water mark of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly behind `| head`
    args = tyro.cli(Args, description=__doc__)
    if not 32 <= args.steps <= 1_000_000:
        checkpoint.leave(2, f"error: --steps is {args.steps}; it must lie in 32, a minibatch, to 1,000,000")
    try:
        fill_and_checkpoint(args.steps) if args.full else compare_games(args.steps)
    except KeyboardInterrupt:
        checkpoint.leave(130, "interrupted")
