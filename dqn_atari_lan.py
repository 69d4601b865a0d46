"""DQN with a Latent assistance Network on Atari (paper, Sections 3 and 4.1).

python dqn_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

About three minutes on a laptop:

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
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics, ReshapeObservation
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn

from lan_utils.atari import WholeGames, play_games
from lan_utils.checkpoint import LoopState
from lan_utils.checks import check_flags, check_memory, check_width, cuda_memory, require
from lan_utils.cli import launch
from lan_utils.flags import RunArgs
from lan_utils.replay import Batch, ReplayMemory
from lan_utils.run import Run, leaves_no_trace, set_up
from lan_utils.study import dqn_memory

# --------------------------------------------------------------------------------------- representation


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels, at each position; of a dense layer over its neurons."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class CReLU(nn.Module):
    """relu of y and of -y beside each other (Abbas et al. 2023): twice as wide as y."""

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat((y, -y), dim=1).relu()


class Recipe(NamedTuple):
    """How a hidden layer is made: parallel layers, an activation on each, and what joins them."""

    activations: tuple[type[nn.Module], ...]  # one for each of the parallel layers
    join: Callable[[Tensor, Tensor], Tensor] = torch.mul
    width: int = 512  # of z
    outputs: int = 512  # of each parallel layer
    norm: type[nn.Module] | None = None  # before each activation


REPRESENTATIONS = {
    "relu": Recipe((nn.ReLU,)),
    "tanh": Recipe((nn.Tanh,)),
    "sigmoid": Recipe((nn.Sigmoid,)),
    "selu": Recipe((nn.SELU,)),
    "tanh-lan": Recipe((nn.Tanh, nn.Tanh)),
    "tanh-2xlan": Recipe((nn.Tanh, nn.Tanh, nn.Tanh)),
    "tanh-addlan": Recipe((nn.Tanh, nn.Tanh), join=torch.add),
    "layernorm": Recipe((nn.Tanh,), norm=ChannelNorm),
    "wide-1024": Recipe((nn.Tanh,), width=1024, outputs=1024),
    "relu-lan": Recipe((nn.ReLU, nn.ReLU)),
    "sigmoid-lan": Recipe((nn.Sigmoid, nn.Sigmoid)),
    # Controls, beyond the paper: what does the product do, and what the activation (docs/decisions.md)?
    "bilinear": Recipe((nn.Identity, nn.Identity)),
    "tanh-glu": Recipe((nn.Tanh, nn.Identity)),
    "layernorm-lan": Recipe((nn.Tanh, nn.Tanh), norm=ChannelNorm),
    "layernorm-relu": Recipe((nn.ReLU,), norm=ChannelNorm),
    "relu-1024": Recipe((nn.ReLU,), width=1024, outputs=1024),
    "crelu": Recipe((CReLU,), outputs=256),
    "gelu": Recipe((nn.GELU,)),
}
# A convolution has a width of its own.
CONVOLUTIONS = [name for name, recipe in REPRESENTATIONS.items() if recipe.width == recipe.outputs == 512]


# ------------------------------------------------------------------------------------------------ flags


@dataclass(kw_only=True)
class Args(RunArgs):
    """Train DQN on an Atari game. "Table 3" marks the paper's hyperparameters."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """the game: <Game>NoFrameskip-v4"""
    activation: Literal[*REPRESENTATIONS] = "tanh-lan"
    """how the last hidden layer z is made"""
    conv_activation: Literal[*CONVOLUTIONS] = "relu"
    """how each of the three convolutions is made: relu in the paper"""
    seed: Annotated[int, Ge(0)] = 1
    """seed of everything random"""
    exp_name: str = "dqn_atari_lan"
    """second part of the run folder's name"""
    total_timesteps: Annotated[int, Gt(0)] = 10_000_000
    """agent steps, four frames each: 10 M in the paper (Section 4.1)"""
    repeat_action_probability: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """sticky actions: chance that a frame repeats the last action; 0 in the paper, 0.25 in Machado et al. (2018)"""
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    """learning rate of Adam (Table 3)"""
    adam_eps: Annotated[float, Ge(0)] = 1e-5
    """epsilon of Adam (Table 3)"""
    gamma: Annotated[float, Interval(ge=0, le=1)] = 0.99
    """discount factor (Table 3)"""
    buffer_size: Annotated[int, Gt(0)] = 1_000_000
    """transitions in the replay memory (Table 3)"""
    batch_size: Annotated[int, Gt(0)] = 32
    """transitions per gradient step (Table 3)"""
    target_network_frequency: Annotated[int, Gt(0)] = 1000
    """agent steps between two copies to the target network (Table 3)"""
    start_e: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """initial exploration (Table 3)"""
    end_e: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """final exploration (Table 3)"""
    exploration_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """fraction of total_timesteps over which epsilon is annealed: 1,000,000 of 10 M (Table 3)"""
    learning_starts: int = 80_000
    """agent steps before the first gradient step (Table 3)"""
    train_frequency: Annotated[int, Gt(0)] = 4
    """agent steps between two gradient steps (the paper's baseline)"""
    double_q: bool = True
    """Double DQN target, as Eq. 3 is written; --no-double-q takes the target network's own maximum"""


# ------------------------------------------------------------------------------------------ environment


def make_env(env_id: str, repeat_action_probability: float = 0.0, render_mode: str | None = None) -> gym.Env:
    """One game behind the DeepMind preprocessing (SB3's AtariWrapper); observations are (4, 84, 84), newest frame last.

    A lost life ends an episode; `info["episode"]` reports the end of a whole game, with its unclipped score. A reset
    fills the stack with four copies of its frame.
    """
    game = gym.make(env_id, repeat_action_probability=repeat_action_probability, render_mode=render_mode)
    stacked = FrameStackObservation(AtariWrapper(RecordEpisodeStatistics(game)), 4)
    return WholeGames(ReshapeObservation(stacked, (4, 84, 84)))


# ---------------------------------------------------------------------------------------------- encoder


class Hidden(nn.Module):
    """A hidden layer made by a recipe (paper, Section 3.2): f(A1 x + B1), or with a LaN a product of such factors.

    Args:
        outputs: neurons or channels of each of the parallel layers.
        make_layer: called once for each parallel layer, so that each has weights of its own.
        norm: before each activation, in place of the recipe's own.
    """

    def __init__(
        self,
        recipe: Recipe,
        outputs: int,
        make_layer: Callable[[int], nn.Module],
        norm: type[nn.Module] | None = None,
    ):
        super().__init__()
        self.join = recipe.join
        self.factors = nn.ModuleDict()
        make_norm = norm or recipe.norm
        for i, activation in enumerate(recipe.activations):
            name = ("enc", "star")[i] if i < 2 else f"star{i}"
            norms = [make_norm(outputs)] if make_norm else []
            self.factors[name] = nn.Sequential(make_layer(outputs), *norms, activation())

    def forward(self, x: Tensor) -> Tensor:
        z, *others = [factor(x) for factor in self.factors.values()]
        for z_star in others:
            z = self.join(z, z_star)  # Eq. 2: z = z_enc * z_star
        return z


class Encoder(nn.Module):
    """From observations to the representation z: the convolutions of Mnih et al. (2015) and the last hidden layer.

    Args:
        amp: compute z in bfloat16; what follows it stays in float32.
        norm: before every activation; None leaves each recipe its own, if it has one.
    """

    def __init__(
        self,
        activation: str,
        conv_activation: str = "relu",
        amp: bool = False,
        norm: type[nn.Module] | None = None,
    ):
        super().__init__()
        recipe, conv = REPRESENTATIONS[activation], REPRESENTATIONS[conv_activation]
        self.conv1 = Hidden(conv, 32, lambda outputs: nn.Conv2d(4, outputs, 8, stride=4), norm)
        self.conv2 = Hidden(conv, 64, lambda outputs: nn.Conv2d(32, outputs, 4, stride=2), norm)
        self.conv3 = Hidden(conv, 64, lambda outputs: nn.Conv2d(64, outputs, 3, stride=1), norm)
        self.z = Hidden(recipe, recipe.outputs, lambda outputs: nn.Linear(3136, outputs), norm)
        self.width, self.amp = recipe.width, amp

    @property
    def measured(self) -> dict[str, nn.Module]:
        """The measured layers, by the names under which they are logged. One more entry measures another layer."""
        layers = {"conv1": self.conv1, "conv2": self.conv2, "conv3": self.conv3, "z": self.z}
        for name, layer in list(layers.items()):
            if len(getattr(layer, "factors", ())) > 1:
                layers |= {f"{name}_{factor}": module for factor, module in layer.factors.items()}
        return layers

    def forward(self, observations: Tensor) -> Tensor:
        """uint8 (n, 4, 84, 84) -> z (n, width) float32."""
        x = (observations / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            x = self.conv3(self.conv2(self.conv1(x)))
            z = self.z(x.flatten(1))
        return z.float()


# ---------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """Q-values of every action (paper, Fig. 3)."""

    def __init__(self, num_actions: int, activation: str, conv_activation: str = "relu", amp: bool = False):
        super().__init__()
        self.encoder = Encoder(activation, conv_activation, amp)
        self.measured = self.encoder.measured
        self.q = nn.Linear(self.encoder.width, num_actions)

    def forward(self, observations: Tensor) -> Tensor:
        """uint8 (n, 4, 84, 84) -> (n, num_actions)."""
        return self.q(self.encoder(observations))


Network = QNetwork  # the name by which scripts/enjoy.py finds it


# ------------------------------------------------------------------------------------------ mathematics


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def td_targets(rewards: Tensor, terminated: Tensor, next_q: Tensor, choosing_q: Tensor, gamma: float) -> Tensor:
    """Y of Eq. 3: the reward and, unless the episode has terminated, the discounted value of the chosen next action.

    Args:
        rewards, terminated: (n,); a truncated episode is not terminated.
        next_q: (n, num_actions), of the target network.
        choosing_q: (n, num_actions); its maximum chooses: the online network's, or `next_q` for the plain target.

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


# ------------------------------------------------------------------------------------------------- play


@torch.no_grad()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, rng: np.random.Generator) -> int:
    """An epsilon-greedy action for the observation (4, 84, 84) uint8."""
    if rng.random() < epsilon:
        return int(rng.integers(q_network.q.out_features))
    device = q_network.q.weight.device
    return int(q_network(torch.from_numpy(obs)[None].to(device)).argmax())


def evaluate(
    q_network: nn.Module, args: Args, games: int, video_folder: Path | None = None, watch: bool = False
) -> Iterator[float]:
    """Play whole games with exploration 0.05 and random states of their own; yields each game's unclipped score."""
    render_mode = "human" if watch else "rgb_array" if video_folder else None
    env = make_env(args.env_id, args.repeat_action_probability, render_mode)
    rng = np.random.default_rng((args.seed, games))
    yield from play_games(env, lambda obs: act(q_network, obs, 0.05, rng), args.seed + 10_000, games, video_folder)


# ------------------------------------------------------------------------------------------------- main


def memory_needed(args: Args) -> int:
    """Bytes of resident memory, an upper estimate."""
    transitions = min(args.buffer_size, args.total_timesteps)
    return dqn_memory(args.env_id, transitions, args.batch_size) + cuda_memory(args)


def check_relations(args: Args) -> None:
    """Refuse flags that contradict each other, or that need more memory than is free.

    Raises:
        BadInput
    """
    total, batch = args.total_timesteps, args.batch_size
    require(args.learning_starts <= total, args, "learning_starts", f"not exceed --total-timesteps {total}")
    require(args.learning_starts >= batch, args, "learning_starts", f"be at least --batch-size {batch}")
    require(args.buffer_size >= batch, args, "buffer_size", f"be at least --batch-size {batch}")
    check_width(args, REPRESENTATIONS[args.activation].width)
    largest = f"--buffer-size {args.buffer_size:,} and --batch-size {batch:,}"
    check_memory(memory_needed(args), f"most of it is set by {largest}: lower them")


@leaves_no_trace
def main(args: Args) -> None:
    check_flags(args)
    check_relations(args)
    device, rng = set_up(args)
    run = Run("dqn", args, device, rng, memory_needed(args))

    env = make_env(args.env_id, args.repeat_action_probability)
    q_network = QNetwork(env.action_space.n, args.activation, args.conv_activation, args.amp)
    q_network.to(device, memory_format=torch.channels_last)
    target_network = copy.deepcopy(q_network)
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(
        q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(td_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)
    memory = ReplayMemory(min(args.buffer_size, args.total_timesteps))
    obs, _ = env.reset(seed=args.seed)
    play = LoopState(step=0, obs=obs, losses=[])

    # Everything that a resumed run needs, named once.
    run.resume(q_network=q_network, target=target_network, optimizer=optimizer, memory=memory, env=env, play=play)

    for step in range(play.step + 1, args.total_timesteps + 1):
        play.step = step

        # Play one step.
        exploration_steps = args.exploration_fraction * args.total_timesteps
        epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, step - 1)
        action = act(q_network, play.obs, epsilon, rng)
        next_obs, reward, terminated, truncated, info = env.step(action)
        memory.add(play.obs[3], action, reward, terminated, truncated, next_obs[3])
        play.obs = next_obs
        if terminated or truncated:
            play.obs, reset_info = env.reset()
            info |= reset_info

        # Learn from a batch.
        if step > args.learning_starts and step % args.train_frequency == 0:
            batch = memory.sample(args.batch_size, rng, device)
            loss, q_values = loss_function(q_network, target_network, batch, args.gamma, args.double_q)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            play.losses = [{"td_loss": loss.detach(), "q_values": q_values}]
        if step > args.learning_starts and step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        run.log_games(step, info)
        run.log(step, q_network, play.losses, epsilon=epsilon)
        run.measure(step, q_network, memory)
        run.save(step)

    run.finish(q_network, memory, evaluate)
    env.close()


if __name__ == "__main__":
    launch(main, Args)
