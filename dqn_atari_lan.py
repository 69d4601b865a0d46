"""DQN with a Latent assistance Network on Atari (paper, Sections 3 and 4.1).

python dqn_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

On a laptop, in some three minutes:

python dqn_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 25000 --learning-starts 2000 \
    --buffer-size 25000 --metrics-frequency 2500

The same command continues a run that was stopped or killed. Losses and charts are logged every 1,000 agent steps.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import lz4.block
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.wrappers import RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import metrics

LOG_FREQUENCY = 1000  # agent steps between two points of losses and charts


# ------------------------------------------------------------------------------------------------ flags


@dataclass
class Experiment:
    env_id: str = "BreakoutNoFrameskip-v4"
    """the game: <Game>NoFrameskip-v4"""
    activation: Literal[
        "relu", "tanh", "sigmoid", "selu", "tanh-lan", "tanh-2xlan", "tanh-addlan", "layernorm", "wide-1024",
        "relu-lan", "sigmoid-lan",
    ] = "tanh-lan"  # fmt: skip
    """activation of the last hidden layer; the convolutions keep ReLU"""
    seed: int = 1
    """seed of everything random"""
    exp_name: str = "dqn_atari_lan"
    """second part of the run folder's name"""
    total_timesteps: int = 10_000_000
    """agent steps, four frames each (10 M in the paper, Section 4.1)"""


@dataclass
class Learning:
    learning_rate: float = 1e-4
    """learning rate of Adam (Table 3)"""
    adam_eps: float = 1e-5
    """epsilon of Adam (Table 3)"""
    gamma: float = 0.99
    """discount factor (Table 3)"""
    buffer_size: int = 1_000_000
    """transitions in the replay memory (Table 3)"""
    batch_size: int = 32
    """transitions per gradient step (Table 3)"""
    target_network_frequency: int = 1000
    """agent steps between two copies to the target network (Table 3)"""
    start_e: float = 1.0
    """initial exploration (Table 3)"""
    end_e: float = 0.1
    """final exploration (Table 3)"""
    exploration_fraction: float = 0.1
    """part of the total steps until exploration is final: 1,000,000 of 10 M (Table 3)"""
    learning_starts: int = 80_000
    """agent steps before the first gradient step (Table 3)"""
    train_frequency: int = 4
    """agent steps between two gradient steps (the paper's baseline)"""
    double_q: bool = True
    """Double DQN target, as Eq. 3 is written; --no-double-q takes the target network's own maximum"""


@dataclass
class Measurement:
    metrics_frequency: int = 10_000
    """agent steps between two measurements of the representation; 0 for none"""
    metrics_samples: int = 2048
    """observations per measurement; at least the representation's width"""
    dead_threshold: float = 20.0
    """omega: from this peak density on a neuron is dead (Appendix B.1)"""
    eval_episodes: int = 0
    """games played after training, with exploration 0.05; their scores are logged"""
    capture_video: bool = False
    """film the evaluation as mp4 into the run folder"""


@dataclass
class Output:
    runs_dir: str = "runs"
    """folder of the run folders"""
    checkpoint_frequency: int = 50_000
    """agent steps between two checkpoints; 0 for none but on a signal and at the end"""
    overwrite: bool = False
    """delete what the run folder holds and start anew"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project_name: str = "latent-assistance-networks"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""


@dataclass
class Machine:
    cuda: bool = True
    """use CUDA where there is one"""
    torch_deterministic: bool = True
    """deterministic kernels: the same seed gives the same weights"""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice"""
    tf32: bool = False
    """TensorFloat-32 on CUDA: faster, rounds differently"""
    amp: bool = False
    """bfloat16 in the forward pass: for hardware that is faster at it (README, Speed), rounds differently"""
    compile: bool = False
    """torch.compile the loss: faster, rounds differently"""


@dataclass
class Args(Experiment, Learning, Measurement, Output, Machine):
    """Train DQN on an Atari game with a chosen last hidden layer. "Table 3" marks the paper's hyperparameters."""


def check_flags(args: Args) -> None:
    """Refuse what cannot work, before anything is written.

    Raises:
        checkpoint.BadInput
    """
    checkpoint.check_common_flags(args, width=REPRESENTATIONS[args.activation][3])
    for name in ("buffer_size", "batch_size", "target_network_frequency", "train_frequency"):
        checkpoint.require(getattr(args, name) > 0, args, name, "be positive")
    for name in ("start_e", "end_e", "exploration_fraction"):
        checkpoint.require(0 <= getattr(args, name) <= 1, args, name, "lie in [0, 1]")
    total, batch = args.total_timesteps, args.batch_size
    checkpoint.require(args.learning_starts <= total, args, "learning_starts", f"not exceed --total-timesteps {total}")
    checkpoint.require(args.learning_starts >= batch, args, "learning_starts", f"be at least --batch-size {batch}")
    checkpoint.require(args.buffer_size >= batch, args, "buffer_size", f"be at least --batch-size {batch}")


# ------------------------------------------------------------------------------------------ environment


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """One game behind the DeepMind preprocessing (SB3's AtariWrapper); observations are single (84, 84, 1) frames.

    An episode ends with a life; `info["episode"]` tells when a whole game has ended, with its unclipped score.
    """
    env = gym.make(env_id, render_mode="rgb_array" if render else None)
    return checkpoint.WholeGames(AtariWrapper(RecordEpisodeStatistics(env)))


def push_frame(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The 4-frame observation after `frame`: (4, 84, 84) and (84, 84, 1) -> (4, 84, 84), oldest frame first."""
    return np.concatenate((stack[1:], frame.transpose(2, 0, 1)))


def first_stack(frame: np.ndarray) -> np.ndarray:
    """The observation after a reset: four copies of its frame, (84, 84, 1) -> (4, 84, 84)."""
    return np.repeat(frame.transpose(2, 0, 1), 4, axis=0)


# --------------------------------------------------------------------------------------- representation

# The last hidden layer z by --activation: f, how many layers run in parallel, what joins them, and their width.
REPRESENTATIONS = {
    "relu": (torch.relu, 1, torch.mul, 512),
    "tanh": (torch.tanh, 1, torch.mul, 512),
    "sigmoid": (torch.sigmoid, 1, torch.mul, 512),
    "selu": (F.selu, 1, torch.mul, 512),
    "tanh-lan": (torch.tanh, 2, torch.mul, 512),
    "tanh-2xlan": (torch.tanh, 3, torch.mul, 512),
    "tanh-addlan": (torch.tanh, 2, torch.add, 512),
    "layernorm": (torch.tanh, 1, torch.mul, 512),
    "wide-1024": (torch.tanh, 1, torch.mul, 1024),
    "relu-lan": (torch.relu, 2, torch.mul, 512),
    "sigmoid-lan": (torch.sigmoid, 2, torch.mul, 512),
}


class Representation(nn.Module):
    """The last hidden layer (paper, Section 3.2): z = f(A1 x + B1), or with a LaN a product of such factors."""

    def __init__(self, features: int, activation: str):
        super().__init__()
        self.f, parallel, self.join, self.width = REPRESENTATIONS[activation]
        names = ("z_enc", "z_star", "z_star2")[:parallel]
        self.layers = nn.ModuleDict({name: nn.Linear(features, self.width) for name in names})
        self.norm = nn.LayerNorm(self.width) if activation == "layernorm" else nn.Identity()

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """(n, features) -> {"z_enc": (n, width)}, and "z_star", "z_star2" with a LaN."""
        return {name: self.f(self.norm(layer(x))) for name, layer in self.layers.items()}

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) -> z (n, width)."""
        z, *others = self.factors(x).values()
        for z_star in others:
            z = self.join(z, z_star)  # Eq. 2: z = z_enc * z_star
        return z


def nature_cnn() -> nn.Sequential:
    """The convolutions of Mnih et al. (2015): (n, 4, 84, 84) -> (n, 3136)."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
        nn.Flatten(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """Q-values of every action (paper, Fig. 3)."""

    def __init__(self, actions: int, activation: str):
        super().__init__()
        self.trunk = nature_cnn()
        self.representation = Representation(3136, activation)
        self.q = nn.Linear(self.representation.width, actions)

    def forward(self, observations: Tensor) -> Tensor:
        """uint8 (n, 4, 84, 84) -> (n, actions)."""
        x = (observations / 255).contiguous(memory_format=torch.channels_last)
        return self.q(self.representation(self.trunk(x)))


# ---------------------------------------------------------------------------------------- replay memory


class Batch(NamedTuple):
    """n transitions. `frames[:, :4]` is the observation, `frames[:, 1:]` the next one."""

    frames: Tensor  # (n, 5, 84, 84) uint8
    actions: Tensor  # (n,) int64
    rewards: Tensor  # (n,) float32
    terminated: Tensor  # (n,) float32, 1 where the target is the reward alone


class ReplayMemory:
    """The last `capacity` transitions, one lz4-compressed frame each, sampled as if full stacks were stored.

    Compressed frames lie end to end in segments of 10,000: as objects of their own they would fragment the heap.
    A segment leaves when no stack can reach it. After a termination the next observation is arbitrary: the target
    ignores it.
    """

    SEGMENT = 10_000
    BYTES_PER_TRANSITION = 1500  # what Q*bert, the largest of the eight games, needs

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kept = capacity + 3  # the oldest observation reaches three frames back
        self.added = 0
        self.segments: dict[int, bytearray | bytes] = {}
        self.begin = np.zeros(self.kept, np.uint32)  # of a frame in its segment
        self.end = np.zeros(self.kept, np.uint32)
        self.first = np.zeros(self.kept, bool)  # is this frame an episode's first?
        self.actions = np.zeros(self.kept, np.uint8)
        self.rewards = np.zeros(self.kept, np.float32)
        self.terminated = np.zeros(self.kept, bool)
        self.final_frames: dict[int, bytes] = {}  # of truncated episodes, by transition
        self.newest_frame = np.zeros((84, 84), np.uint8)  # after the newest transition
        self.starts_episode = True

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(
        self, frame: np.ndarray, action: int, reward: float, terminated: bool, truncated: bool, next_frame: np.ndarray
    ) -> None:
        """Store a transition: the newest frame of its observation, and of the one that followed, each 84 x 84 uint8."""
        final = _pack(next_frame) if truncated and not terminated else b""
        self._append(_pack(frame), action, reward, terminated, self.starts_episode, final)
        self.newest_frame = np.array(next_frame, np.uint8).reshape(84, 84)
        self.starts_episode = terminated or truncated

    def _append(self, packed: bytes, action: int, reward: float, terminated: bool, first: bool, final: bytes) -> None:
        number, i = self.added // self.SEGMENT, self.added % self.kept
        if number not in self.segments:
            if number - 1 in self.segments:
                self.segments[number - 1] = bytes(self.segments[number - 1])  # drops the growing buffer's spare room
            self.segments[number] = bytearray()
            for old in [n for n in self.segments if (n + 1) * self.SEGMENT <= self.added - self.kept]:
                del self.segments[old]
        segment = self.segments[number]
        self.begin[i] = len(segment)
        segment += packed
        self.end[i] = len(segment)
        self.actions[i], self.rewards[i], self.terminated[i], self.first[i] = action, reward, terminated, first
        if final:
            self.final_frames[self.added] = final
        self.final_frames.pop(self.added - self.capacity, None)
        self.added += 1

    def _packed(self, t: int) -> memoryview:
        i = t % self.kept
        return memoryview(self.segments[t // self.SEGMENT])[self.begin[i] : self.end[i]]

    def _next_frame(self, t: int) -> np.ndarray:
        if t in self.final_frames:
            return _unpack(self.final_frames[t])
        return self.newest_frame.T if t == self.added - 1 else _unpack(self._packed(t + 1))

    def frames(self, transitions: np.ndarray, pin_memory: bool = False) -> Tensor:
        """Observations and next observations of the given transitions: (n,) -> uint8 (n, 5, 84, 84).

        Args:
            transitions: numbers counted from the first ever added, in [added - len(self), added).
        """
        t = transitions[:, None]
        starts = self.first[(t - np.arange(3)) % self.kept]
        reach = np.where(starts.any(axis=1), starts.argmax(axis=1), 3)[:, None]  # frames back in the same episode
        sources = t - np.minimum([3, 2, 1, 0], reach)
        stacks = torch.empty((len(t), 5, 84, 84), dtype=torch.uint8, pin_memory=pin_memory)
        for stack, frames, transition in zip(stacks.numpy(), sources.tolist(), transitions.tolist(), strict=True):
            for place, source in enumerate(frames):
                # A reset's copies are decompressed once.
                stack[place] = (
                    stack[place - 1] if place and source == frames[place - 1] else _unpack(self._packed(source))
                )
            stack[4] = self._next_frame(transition)
        return stacks.transpose(2, 3)  # frames are stored column by column

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> Batch:
        """`batch_size` transitions, uniformly, with replacement."""
        transitions = rng.integers(self.added - len(self), self.added, batch_size)
        i = transitions % self.kept
        frames = self.frames(transitions, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        columns = (self.actions[i].astype(np.int64), self.rewards[i], self.terminated[i].astype(np.float32))
        return Batch(frames, *(torch.from_numpy(column).to(device, non_blocking=True) for column in columns))

    def export(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """What transitions [start, stop) added, for a checkpoint's segment."""
        t = np.arange(start, stop)
        i = t % self.kept
        slices = []  # frames that follow each other in a segment are one slice of it
        for begin in (start, *range((start // self.SEGMENT + 1) * self.SEGMENT, stop, self.SEGMENT)):
            last = min((begin // self.SEGMENT + 1) * self.SEGMENT, stop) - 1
            segment = self.segments[begin // self.SEGMENT]
            slices.append(memoryview(segment)[self.begin[begin % self.kept] : self.end[last % self.kept]])
        finals = [self.final_frames.get(n, b"") for n in t.tolist()]
        return {
            "start": start,
            "frames": np.concatenate([np.frombuffer(part, np.uint8) for part in slices]),
            "lengths": (self.end[i] - self.begin[i]).astype(np.int32),
            "finals": np.frombuffer(bytearray(b"".join(finals)), np.uint8),
            "final_lengths": np.array([len(final) for final in finals], np.int32),
            "actions": self.actions[i],
            "rewards": self.rewards[i],
            "terminated": self.terminated[i],
            "first": self.first[i],
        }

    def restore(
        self, added: int, segments: Iterable[dict[str, Tensor]], newest_frame: np.ndarray, starts_episode: bool
    ) -> None:
        """Refill an empty memory from consecutive exports, the last of which ends before transition `added`."""
        for segment in segments:
            columns = {key: np.asarray(value) for key, value in segment.items()}
            if not self.segments:
                self.added = int(columns["start"])
            frames, finals = columns["frames"].tobytes(), columns["finals"].tobytes()
            ends, final_ends = columns["lengths"].cumsum().tolist(), columns["final_lengths"].cumsum().tolist()
            begin = final_begin = 0
            for n, (end, final_end) in enumerate(zip(ends, final_ends, strict=True)):
                row = (columns[key][n] for key in ("actions", "rewards", "terminated", "first"))
                self._append(frames[begin:end], *row, finals[final_begin:final_end])
                begin, final_begin = end, final_end
        assert self.added == added, (self.added, added)
        self.newest_frame, self.starts_episode = newest_frame, starts_episode


def _pack(frame: np.ndarray) -> bytes:
    # Column by column, and with some effort, even Q*bert's frames take less than 1,450 bytes on average.
    return lz4.block.compress(frame.tobytes(order="F"), mode="high_compression", compression=4, store_size=False)


def _unpack(packed: bytes | memoryview) -> np.ndarray:
    """The frame's columns as rows, (84, 84)."""
    return np.frombuffer(lz4.block.decompress(packed, uncompressed_size=84 * 84), np.uint8).reshape(84, 84)


# ------------------------------------------------------------------------------------------ mathematics


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def td_targets(rewards: Tensor, terminated: Tensor, next_q: Tensor, choosing_q: Tensor, gamma: float) -> Tensor:
    """Y of Eq. 3: the reward, and where the episode goes on the discounted value of the chosen next action.

    Args:
        rewards, terminated: (n,); a truncated episode is not terminated.
        next_q: (n, actions), of the target network.
        choosing_q: (n, actions), whose maximum chooses: the online network's, or `next_q` for the plain target.

    Returns:
        (n,)
    """
    chosen = choosing_q.argmax(dim=1, keepdim=True)
    return rewards + gamma * (1 - terminated) * next_q.gather(1, chosen).squeeze(1)


def td_loss(
    q_network: nn.Module, target_network: nn.Module, batch: Batch, gamma: float, double_q: bool
) -> tuple[Tensor, Tensor]:
    """Mean squared TD error (Eq. 4) and the mean Q-value of the actions taken, both scalars on the device."""
    with torch.no_grad():
        next_observations = batch.frames[:, 1:]
        next_q = target_network(next_observations).float()
        choosing_q = q_network(next_observations).float() if double_q else next_q
        targets = td_targets(batch.rewards, batch.terminated, next_q, choosing_q, gamma)
    q_values = q_network(batch.frames[:, :4]).float().gather(1, batch.actions[:, None]).squeeze(1)
    return F.mse_loss(q_values, targets), q_values.detach().mean()


# ------------------------------------------------------------------------------ measuring and evaluating


@torch.no_grad()
def activations(network: nn.Module, observations: Tensor, device: torch.device) -> dict[str, Tensor]:
    """z, and with a LaN its factors too: uint8 (n, 4, 84, 84) on any device -> (n, width) each, on `device`."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in observations.split(256):  # more at once would only need more memory
        x = network.trunk(chunk.to(device) / 255)
        factors = network.representation.factors(x)
        for name, part in ({"z": network.representation(x)} | (factors if len(factors) > 1 else {})).items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(part) for name, part in parts.items()}


def log_representation(
    writer: SummaryWriter | None, sample: dict[str, Tensor], threshold: float, seed: int, step: int
) -> dict[str, float]:
    """Everything that `metrics` says about a sample of activations, logged; its noise depends on (seed, step) alone."""
    z = sample["z"]
    noise_seed = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    generator = torch.Generator(z.device).manual_seed(noise_seed)
    peaks = metrics.kde_peak_density(z, generator=generator)
    factors = {name: factor for name, factor in sample.items() if name != "z"}
    values = metrics.representation_metrics(z, factors, threshold, generator, peaks)
    if writer:
        for name, value in values.items():
            writer.add_scalar(f"representation/{name}", value, step)
        log_peaks = peaks.log10().clamp(-2, 4).cpu()
        writer.add_histogram("representation/kde_peak", log_peaks, step, bins=np.linspace(-2, 4, 61))
    return values


@torch.no_grad()
def evaluate(
    network: nn.Module, env_id: str, seed: int, games: int, device: torch.device, video_folder: Path | None = None
) -> Iterator[float]:
    """Play whole games with exploration 0.05 and random states of their own; yields each game's unclipped score."""
    env = make_env(env_id, render=video_folder is not None)
    rng = np.random.default_rng((seed, games))
    frame, _ = env.reset(seed=seed + 10_000)
    for game in range(games):
        stack, info = first_stack(frame), {}
        with checkpoint.film(video_folder and video_folder / f"game_{game}.mp4", env) as add_picture:
            while "episode" not in info:
                if rng.random() < 0.05:
                    action = int(rng.integers(env.action_space.n))
                else:
                    action = int(network(torch.from_numpy(stack)[None].to(device)).argmax())
                frame, _, terminated, truncated, info = env.step(action)
                stack = push_frame(stack, frame)
                add_picture()
                if terminated or truncated:
                    frame, reset_info = env.reset()
                    stack = first_stack(frame)
                    info |= reset_info
        yield info["episode"]["r"]
    env.close()


# ------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    check_flags(args)
    device = checkpoint.set_up_device(args)
    memory_needed = checkpoint.check_memory(
        800_000_000 + min(args.buffer_size, args.total_timesteps) * ReplayMemory.BYTES_PER_TRANSITION,
        f"most of it is the replay memory: lower --buffer-size {args.buffer_size:,}",
    )

    rng = checkpoint.seed_everything(args.seed, args.torch_deterministic)
    env = make_env(args.env_id)
    q_network = QNetwork(env.action_space.n, args.activation).to(device, memory_format=torch.channels_last)
    target_network = copy.deepcopy(q_network)
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(td_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)
    memory = ReplayMemory(min(args.buffer_size, args.total_timesteps))
    returns: deque[float] = deque(maxlen=100)
    losses = None
    frame, _ = env.reset(seed=args.seed)
    stack = first_stack(frame)
    start = 0

    run = checkpoint.open_run("dqn", args, device, sum(p.numel() for p in q_network.parameters()))
    if run.resumed:
        saved = run.resumed
        start = saved["step"]
        q_network.load_state_dict(saved["q_network"])
        target_network.load_state_dict(saved["target_network"])
        optimizer.load_state_dict(saved["optimizer"])
        memory.restore(start, run.read_segments(), saved["newest_frame"].numpy(), saved["starts_episode"])
        env.snapshot = saved["env"]
        stack = saved["stack"].numpy()
        returns.extend(saved["returns"])
        losses = saved["losses"]
        checkpoint.restore_random_states(saved["random"], rng)
    run.print_header(args, device, start, memory_needed)

    def save(step: int) -> None:
        state = {
            "q_network": q_network.state_dict(),
            "target_network": target_network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "newest_frame": memory.newest_frame,
            "starts_episode": memory.starts_episode,
            "env": env.snapshot,
            "stack": stack,
            "returns": list(returns),
            "losses": losses,
            "random": checkpoint.random_states(rng),
        }
        run.save(step, state, export=memory.export, first_needed=max(0, memory.added - memory.kept))

    def measure(step: int) -> dict[str, Tensor]:
        """The activations of observations drawn from the memory; empty while it holds too few."""
        if len(memory) < args.metrics_samples:
            return {}
        run.require_finite(q_network, step)
        sampler = np.random.default_rng((args.seed, step))
        chosen = memory.added - len(memory) + sampler.choice(len(memory), args.metrics_samples, replace=False)
        return activations(q_network, memory.frames(chosen)[:, :4], device)

    progress = checkpoint.Progress(args.total_timesteps, start)
    for step in range(start + 1, args.total_timesteps + 1):
        exploration_steps = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, step - 1)
        if rng.random() < epsilon:
            action = int(rng.integers(env.action_space.n))
        else:
            with torch.no_grad():
                action = int(q_network(torch.from_numpy(stack)[None].to(device)).argmax())

        next_frame, reward, terminated, truncated, info = env.step(action)
        memory.add(stack[3], action, reward, terminated, truncated, next_frame[..., 0])
        if terminated or truncated:
            next_frame, reset_info = env.reset()
            stack = first_stack(next_frame)
            info |= reset_info
        else:
            stack = push_frame(stack, next_frame)
        if "episode" in info:
            returns.append(info["episode"]["r"])
            run.writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
            run.writer.add_scalar("charts/episodic_length", info["episode"]["l"], step)

        if step > args.learning_starts and step % args.train_frequency == 0:
            batch = memory.sample(args.batch_size, rng, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss, q_values = loss_function(q_network, target_network, batch, args.gamma, args.double_q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses = {"td_loss": loss.detach(), "q_values": q_values}
        if step > args.learning_starts and step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        if step % LOG_FREQUENCY == 0:
            progress.update(step, last_100_games=f"{np.mean(returns):.2f}" if returns else "none yet")
            run.log_losses(losses or {}, step)
            run.writer.add_scalar("charts/epsilon", epsilon, step)
            run.writer.add_scalar("charts/SPS", progress.speed(), step)
        if args.metrics_frequency and step % args.metrics_frequency == 0 and (sample := measure(step)):
            log_representation(run.writer, sample, args.dead_threshold, args.seed, step)
        if run.signum or (args.checkpoint_frequency and step % args.checkpoint_frequency == 0):
            save(step)
            run.leave_if_signalled()

    progress.close()
    total = args.total_timesteps
    run.require_finite(q_network, total)
    if run.saved < total:
        save(total)
    run.stop_at_once()
    sample, representation = measure(total) if args.metrics_frequency else {}, {}
    if sample:
        silent = total % args.metrics_frequency == 0  # it was logged in the loop
        representation = log_representation(
            None if silent else run.writer, sample, args.dead_threshold, args.seed, total
        )
    video_folder = run.folder if args.capture_video else None
    for game, score in enumerate(evaluate(q_network, args.env_id, args.seed, args.eval_episodes, device, video_folder)):
        run.writer.add_scalar("eval/episodic_return", score, game)
        checkpoint.say(f"evaluation game {game}: {score:g}")
    env.close()
    measured = {name: part.cpu().numpy() for name, part in sample.items()}
    run.finish(measured, q_network.state_dict(), total, progress.speed())
    run.print_summary(list(returns), representation)


if __name__ == "__main__":
    checkpoint.launch(main, Args)
