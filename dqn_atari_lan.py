"""DQN with a Latent assistance Network on Atari (paper, Sections 3 and 4.1).

python dqn_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

On a laptop, in some three minutes:

python dqn_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 25000 --learning-starts 2000 \
    --buffer-size 25000 --metrics-frequency 2500

The same command continues a run that was stopped or killed. Every line with `run.` in it logs, measures or saves:
without them this is plain DQN.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn

from lan_utils.atari import WholeGames, play_games
from lan_utils.checkpoint import Variables
from lan_utils.checks import check_common_flags, check_memory, require
from lan_utils.cli import launch
from lan_utils.replay import Batch, ReplayMemory
from lan_utils.run import Run, RunArgs, set_up
from lan_utils.study import dqn_memory


@dataclass(kw_only=True)
class Args(RunArgs):
    """Train DQN on an Atari game. "Table 3" marks the paper's hyperparameters."""

    exp_name: str = "dqn_atari_lan"
    """second part of the run folder's name"""
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


def memory_needed(args: Args) -> int:
    """Bytes of resident memory, an upper estimate."""
    return dqn_memory(args.env_id, min(args.buffer_size, args.total_timesteps), args.batch_size)


def check_flags(args: Args) -> None:
    """Refuse what cannot work, before anything is written.

    Raises:
        BadInput
    """
    check_common_flags(args, width=REPRESENTATIONS[args.activation].width)
    for name in ("buffer_size", "batch_size", "target_network_frequency", "train_frequency"):
        require(getattr(args, name) > 0, args, name, "be positive")
    for name in ("start_e", "end_e", "exploration_fraction"):
        require(0 <= getattr(args, name) <= 1, args, name, "lie in [0, 1]")
    total, batch = args.total_timesteps, args.batch_size
    require(args.learning_starts <= total, args, "learning_starts", f"not exceed --total-timesteps {total}")
    require(args.learning_starts >= batch, args, "learning_starts", f"be at least --batch-size {batch}")
    require(args.buffer_size >= batch, args, "buffer_size", f"be at least --batch-size {batch}")
    largest = f"--buffer-size {args.buffer_size:,} and --batch-size {batch:,}"
    check_memory(memory_needed(args), f"most of it is set by {largest}: lower them")


# ------------------------------------------------------------------------------------------ environment


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One game behind the DeepMind preprocessing (SB3's AtariWrapper); observations are single (84, 84, 1) frames.

    An episode ends with a life; `info["episode"]` tells when a whole game has ended, with its unclipped score.
    """
    return WholeGames(AtariWrapper(RecordEpisodeStatistics(gym.make(env_id, render_mode=render_mode))))


def push_frame(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The 4-frame observation after `frame`: (4, 84, 84) and (84, 84, 1) -> (4, 84, 84), oldest frame first."""
    return np.concatenate((stack[1:], frame.transpose(2, 0, 1)))


def first_stack(frame: np.ndarray) -> np.ndarray:
    """The observation after a reset: four copies of its frame, (84, 84, 1) -> (4, 84, 84)."""
    return np.repeat(frame.transpose(2, 0, 1), 4, axis=0)


# --------------------------------------------------------------------------------------- representation


class Layer(NamedTuple):
    """How z is made: `parallel` layers side by side, an activation on each, and what joins them."""

    f: Callable[[Tensor], Tensor]
    parallel: int = 1
    join: Callable[[Tensor, Tensor], Tensor] = torch.mul
    width: int = 512
    norm: type[nn.Module] = nn.Identity


REPRESENTATIONS = {
    "relu": Layer(torch.relu),
    "tanh": Layer(torch.tanh),
    "sigmoid": Layer(torch.sigmoid),
    "selu": Layer(F.selu),
    "tanh-lan": Layer(torch.tanh, parallel=2),
    "tanh-2xlan": Layer(torch.tanh, parallel=3),
    "tanh-addlan": Layer(torch.tanh, parallel=2, join=torch.add),
    "layernorm": Layer(torch.tanh, norm=nn.LayerNorm),
    "wide-1024": Layer(torch.tanh, width=1024),
    "relu-lan": Layer(torch.relu, parallel=2),
    "sigmoid-lan": Layer(torch.sigmoid, parallel=2),
}


class Representation(nn.Module):
    """The last hidden layer (paper, Section 3.2): z = f(A1 x + B1), or with a LaN a product of such factors."""

    def __init__(self, features: int, activation: str):
        super().__init__()
        self.f, parallel, self.join, self.width, norm = REPRESENTATIONS[activation]
        names = ("z_enc", "z_star", "z_star2")[:parallel]
        self.layers = nn.ModuleDict({name: nn.Linear(features, self.width) for name in names})
        self.norm = norm(self.width)

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
    """Q-values of every action (paper, Fig. 3).

    Args:
        amp: compute z in bfloat16; the head and what follows it stay in float32.
    """

    def __init__(self, actions: int, activation: str, amp: bool = False):
        super().__init__()
        self.trunk = nature_cnn()
        self.representation = Representation(3136, activation)
        self.q = nn.Linear(self.representation.width, actions)
        self.amp = amp

    def forward(self, observations: Tensor) -> Tensor:
        """uint8 (n, 4, 84, 84) -> (n, actions)."""
        x = (observations / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            z = self.representation(self.trunk(x))
        return self.q(z.float())


Network = QNetwork  # by this name scripts/enjoy.py finds it


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
        next_q = target_network(next_observations)
        choosing_q = q_network(next_observations) if double_q else next_q
        targets = td_targets(batch.rewards, batch.terminated, next_q, choosing_q, gamma)
    q_values = q_network(batch.frames[:, :4]).gather(1, batch.actions[:, None]).squeeze(1)
    return F.mse_loss(q_values, targets), q_values.detach().mean()


# ------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def act(q_network: nn.Module, stack: np.ndarray, epsilon: float, rng: np.random.Generator) -> int:
    """An epsilon-greedy action for the observation (4, 84, 84) uint8."""
    if rng.random() < epsilon:
        return int(rng.integers(q_network.q.out_features))
    device = q_network.q.weight.device
    return int(q_network(torch.from_numpy(stack)[None].to(device)).argmax())


def evaluate(
    q_network: nn.Module, env_id: str, seed: int, games: int, video_folder: Path | None = None, watch: bool = False
) -> Iterator[float]:
    """Play whole games with exploration 0.05 and random states of their own; yields each game's unclipped score."""
    render_mode = "human" if watch else "rgb_array" if video_folder else None
    env = FrameStackObservation(make_env(env_id, render_mode), 4)
    rng = np.random.default_rng((seed, games))
    yield from play_games(env, lambda stack: act(q_network, stack, 0.05, rng), seed + 10_000, games, video_folder)


def main(args: Args) -> None:
    check_flags(args)
    device, rng = set_up(args)
    run = Run("dqn", args, device, rng, memory_needed(args))

    env = make_env(args.env_id)
    q_network = QNetwork(env.action_space.n, args.activation, args.amp).to(device, memory_format=torch.channels_last)
    target_network = copy.deepcopy(q_network)
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(td_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)
    memory = ReplayMemory(min(args.buffer_size, args.total_timesteps))
    frame, _ = env.reset(seed=args.seed)
    play = Variables(step=0, stack=first_stack(frame), losses={})

    # Everything that a resumed run needs, named once.
    run.resume(q_network=q_network, target=target_network, optimizer=optimizer, memory=memory, env=env, play=play)

    def observations(step: int) -> Tensor | None:
        """What is measured: observations drawn from the memory, by a generator of their own."""
        return memory.observations(args.metrics_samples, seed=(args.seed, step))

    for step in range(play.step + 1, args.total_timesteps + 1):
        play.step = step

        # Play one step.
        exploration_steps = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, step - 1)
        action = act(q_network, play.stack, epsilon, rng)
        next_frame, reward, terminated, truncated, info = env.step(action)
        memory.add(play.stack[3], action, reward, terminated, truncated, next_frame)
        if terminated or truncated:
            next_frame, reset_info = env.reset()
            play.stack = first_stack(next_frame)
            info |= reset_info
        else:
            play.stack = push_frame(play.stack, next_frame)

        # Learn from a batch.
        if step > args.learning_starts and step % args.train_frequency == 0:
            batch = memory.sample(args.batch_size, rng, device)
            loss, q_values = loss_function(q_network, target_network, batch, args.gamma, args.double_q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            play.losses = {"td_loss": loss.detach(), "q_values": q_values}
        if step > args.learning_starts and step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        run.log_games(step, info)
        run.log(step, q_network, play.losses, epsilon=epsilon)
        run.measure(step, q_network, observations)
        run.save(step)

    env.close()
    run.finish(q_network, observations, evaluate)


if __name__ == "__main__":
    launch(main, Args)
