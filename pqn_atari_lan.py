"""PQN (Gallici et al. 2024) with a Latent assistance Network on Atari: Q-learning without replay and target network.

python pqn_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

About three minutes on a laptop:

python pqn_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 40000 --metrics-frequency 4000 \
    --num-envs 8 --num-steps 128 --num-minibatches 8

The same command continues a run that was stopped or killed. Every line with `run.` in it logs, measures or saves:
without them this is plain PQN.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics, ReshapeObservation
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn

from lan_utils.atari import AleGames, VectorGames, WholeGames, even_workers, play_games
from lan_utils.checkpoint import LoopState
from lan_utils.checks import check_flags, check_memory, check_width, cuda_memory, refuse_unless, require
from lan_utils.cli import launch
from lan_utils.flags import RunArgs
from lan_utils.machine import share_of_cores
from lan_utils.replay import RolloutMemory
from lan_utils.run import Run, leaves_no_trace, set_up

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
    """Train PQN on an Atari game. "official" marks the values of the authors' own implementation, purejaxql."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """the game: <Game>NoFrameskip-v4"""
    activation: Literal[*REPRESENTATIONS] = "tanh-lan"
    """how the last hidden layer z is made"""
    conv_activation: Literal[*CONVOLUTIONS] = "relu"
    """how each of the three convolutions is made: relu in the paper"""
    seed: Annotated[int, Ge(0)] = 1
    """seed of everything random"""
    exp_name: str = "pqn_atari_lan"
    """second part of the run folder's name"""
    total_timesteps: Annotated[int, Gt(0)] = 10_000_000
    """agent steps, four frames each: 10 M (official)"""
    repeat_action_probability: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """sticky actions: chance that a frame repeats the last action; 0 in the paper, 0.25 in Machado et al. (2018)"""
    learning_rate: Annotated[float, Gt(0)] = 2.5e-4
    """learning rate of RAdam (official)"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0; off (official)"""
    adam_eps: Annotated[float, Ge(0)] = 1e-8
    """epsilon of RAdam (official)"""
    gamma: Annotated[float, Interval(ge=0, le=1)] = 0.99
    """discount factor (official)"""
    q_lambda: Annotated[float, Interval(ge=0, le=1)] = 0.65
    """lambda of the returns that Q is fitted to (official)"""
    layer_norm: Literal["channels", "map", "none"] = "channels"
    """norm before every activation: over a position's channels (official), over channels and positions, or none"""
    num_envs: Annotated[int, Gt(0)] = 128
    """games played at once (official)"""
    num_steps: Annotated[int, Gt(0)] = 32
    """agent steps per environment and rollout (official)"""
    num_minibatches: Annotated[int, Gt(0)] = 32
    """minibatches of a rollout, one gradient step each (official)"""
    update_epochs: Annotated[int, Gt(0)] = 2
    """passes over a rollout (official)"""
    start_e: Annotated[float, Interval(ge=0, le=1)] = 1.0
    """initial exploration (official)"""
    end_e: Annotated[float, Interval(ge=0, le=1)] = 0.001
    """final exploration (official)"""
    exploration_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """fraction of total_timesteps over which epsilon is annealed (official)"""
    max_grad_norm: Annotated[float, Gt(0)] = 10.0
    """norm to which the gradient is clipped (official)"""
    env_backend: Literal["gymnasium", "ale"] = "gymnasium"
    """ale: ale-py's games in C++, faster, with a few differences (docs/runs.md) and no checkpoints"""
    async_envs: bool = field(default_factory=lambda: share_of_cores() > 2)
    """step the environments in worker processes; by default where this run has more than two CPU cores"""


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


class MapNorm(nn.GroupNorm):
    """Layer normalisation over channels and positions together, then a gain and a bias for each channel."""

    def __init__(self, channels: int):
        super().__init__(1, channels)


LAYER_NORMS = {"channels": ChannelNorm, "map": MapNorm, "none": None}


class QNetwork(nn.Module):
    """Q-values of every action, with a norm before each activation."""

    def __init__(
        self,
        num_actions: int,
        activation: str,
        conv_activation: str = "relu",
        amp: bool = False,
        layer_norm: str = "channels",
    ):
        super().__init__()
        self.encoder = Encoder(activation, conv_activation, amp, LAYER_NORMS[layer_norm])
        self.measured = self.encoder.measured
        self.q = nn.Linear(self.encoder.width, num_actions)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                # He's, and LeCun's for the head, as flax makes them: cut at two standard deviations, then scaled up.
                std = ((1 if layer is self.q else 2) / layer.weight[0].numel()) ** 0.5 / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> Tensor:
        """uint8 (n, 4, 84, 84) -> (n, num_actions)."""
        return self.q(self.encoder(observations))


Network = QNetwork  # the name by which scripts/enjoy.py finds it


# ------------------------------------------------------------------------------------------ mathematics


class Batch(NamedTuple):
    """n transitions of a rollout."""

    observations: Tensor  # (n, 4, 84, 84) uint8
    actions: Tensor  # (n,) int64
    returns: Tensor  # (n,) float32, what Q is fitted to


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def lambda_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Lambda-returns of Q-learning (Gallici et al. 2024) over a rollout, at whose end they bootstrap.

    R_t = r_t + gamma (1 - terminated_t) ((1 - lam) max Q(s_t+1) + lam R_t+1), and max Q alone where an episode ended.

    Args:
        rewards: (steps, envs).
        next_values: (steps, envs), max Q where the actions led to; at a truncation, of its true last observation.
        terminated: (steps, envs), 1 where nothing follows: no bootstrap.
        ended: (steps, envs), 1 where the episode terminated or was truncated: nothing is summed across it.

    Returns:
        (steps, envs)
    """
    returns = torch.zeros_like(rewards)
    following = next_values[-1]
    for t in reversed(range(len(rewards))):
        value = next_values[t] + lam * (1 - ended[t]) * (following - next_values[t])
        following = returns[t] = rewards[t] + gamma * (1 - terminated[t]) * value
    return returns


def td_loss(network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the mean squared distance to the returns, and what is logged: scalars on the device."""
    q_values = network(batch.observations).gather(1, batch.actions[:, None]).squeeze(1)
    loss = 0.5 * (q_values - batch.returns).square().mean()
    return loss, {"td_loss": loss.detach(), "q_values": q_values.detach().mean()}


# ------------------------------------------------------------------------------------------------- play


@torch.no_grad()
def act(network: nn.Module, obs: np.ndarray) -> int:
    """The greedy action for the observation (4, 84, 84) uint8."""
    return int(network(torch.from_numpy(obs)[None].to(network.q.weight.device)).argmax())


def evaluate(
    network: nn.Module, args: Args, games: int, video_folder: Path | None = None, watch: bool = False
) -> Iterator[float]:
    """Play whole games without exploration, with random states of their own; yields each game's unclipped score."""
    render_mode = "human" if watch else "rgb_array" if video_folder else None
    env = make_env(args.env_id, args.repeat_action_probability, render_mode)
    yield from play_games(env, lambda obs: act(network, obs), args.seed + 10_000, games, video_folder)


# ------------------------------------------------------------------------------------------------- main


def memory_needed(args: Args) -> int:
    """Bytes of resident memory, an upper estimate: the process, games, observations, and a minibatch in use."""
    rollout_steps = args.num_envs * args.num_steps
    frames = 2 * 4 * 84 * 84 * (rollout_steps + args.metrics_samples)
    workers = even_workers(args.num_envs) if args.async_envs else 0
    games = 40_000_000 * workers + 2_500_000 * args.num_envs
    factors = len(REPRESENTATIONS[args.conv_activation].activations)
    minibatch = 500_000 * factors * rollout_steps // args.num_minibatches
    return 1_000_000_000 + cuda_memory(args) + frames + games + minibatch


def check_relations(args: Args) -> None:
    """Refuse flags that contradict each other, or that need more memory than is free.

    Raises:
        BadInput
    """
    check_width(args, REPRESENTATIONS[args.activation].width)
    rollout, product = args.num_envs * args.num_steps, f"--num-envs {args.num_envs} times --num-steps {args.num_steps}"
    require(rollout % args.num_minibatches == 0, args, "num_minibatches", f"divide {product} = {rollout}")
    require(args.total_timesteps >= rollout, args, "total_timesteps", f"be at least {product} = {rollout}")
    if args.env_backend == "ale":
        refuse_unless(
            args.checkpoint_frequency == 0,
            "--env-backend ale cannot save games, so a run cannot resume; accept that with --checkpoint-frequency 0",
        )
        require(
            args.seed < 2**31 - args.num_envs, args, "seed", f"be below 2**31 - {args.num_envs} for --env-backend ale"
        )
    largest = f"--num-envs {args.num_envs}, --num-steps {args.num_steps} or --metrics-samples {args.metrics_samples}"
    check_memory(memory_needed(args), f"lower {largest}")


@leaves_no_trace
def main(args: Args) -> None:
    check_flags(args)
    check_relations(args)
    device, rng = set_up(args)
    rollout_steps = args.num_envs * args.num_steps
    iterations = args.total_timesteps // rollout_steps
    run = Run("pqn", args, device, rng, memory_needed(args), stride=rollout_steps)

    if args.env_backend == "ale":
        envs = AleGames(args.env_id, args.repeat_action_probability, args.num_envs, args.num_threads)
    else:
        make_game = functools.partial(make_env, args.env_id, args.repeat_action_probability)
        envs = VectorGames(make_game, args.num_envs, args.async_envs, even_workers(args.num_envs))
    num_actions = envs.single_action_space.n
    network = QNetwork(num_actions, args.activation, args.conv_activation, args.amp, args.layer_norm)
    network.to(device, memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    # A tensor, since a CUDA graph that holds the whole update cannot see a Python number change.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.RAdam(network.parameters(), lr=learning_rate, eps=args.adam_eps, capturable=on_cuda)
    loss_function = torch.compile(td_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)

    shape = (args.num_steps, args.num_envs)
    memory = RolloutMemory(*shape, args.metrics_samples, device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    values = torch.zeros(shape, device=device)  # max Q of the observations acted on
    rewards, terminations, truncations = np.zeros((3, *shape), np.float32)
    exploration_steps = args.exploration_fraction * args.total_timesteps
    obs, _ = envs.reset(seed=args.seed)
    play = LoopState(iteration=0, obs=obs)

    # Everything that a resumed run needs, named once.
    run.resume(network=network, optimizer=optimizer, memory=memory, envs=envs, play=play)

    for iteration in range(play.iteration + 1, iterations + 1):
        play.iteration = iteration
        optimizer.param_groups[0]["lr"] = learning_rate  # a resumed optimizer brings a tensor of its own
        if args.anneal_lr:
            learning_rate.fill_(linear_schedule(args.learning_rate, 0, iterations, iteration - 1))

        # Play a rollout.
        last_obs = {}  # of truncated episodes, by (t, environment)
        for t in range(args.num_steps):
            played = (iteration - 1) * rollout_steps + t * args.num_envs
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, played)
            with torch.no_grad():
                values[t], greedy = network(memory.add(play.obs)).max(dim=1)
            explores = torch.rand(args.num_envs, device=device) < epsilon
            actions[t] = torch.where(explores, torch.randint(num_actions, (args.num_envs,), device=device), greedy)
            play.obs, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
            for i in np.flatnonzero(truncations[t] > terminations[t]):
                last_obs[t, i] = infos["final_obs"][i]
            run.log_games(played + 1, infos)
        step = iteration * rollout_steps

        # What Q is fitted to.
        with torch.no_grad():
            after_last = network(torch.from_numpy(play.obs).to(device)).amax(dim=1)
            next_values = torch.cat((values[1:], after_last[None]))
            for (t, i), last in last_obs.items():
                next_values[t, i] = network(torch.from_numpy(last)[None].to(device)).amax()
        reward, terminated, truncated = (torch.from_numpy(a).to(device) for a in (rewards, terminations, truncations))
        ended = torch.maximum(terminated, truncated)
        returns = lambda_returns(reward, next_values, terminated, ended, args.gamma, args.q_lambda)
        rollout = Batch(memory.rollout(), actions, returns)
        rollout = Batch(*(column.flatten(0, 1) for column in rollout))

        # Update the network.
        losses = []
        for _ in range(args.update_epochs):
            order = torch.from_numpy(rng.permutation(rollout_steps)).to(device)
            for chosen in order.chunk(args.num_minibatches):
                batch = Batch(*(column[chosen] for column in rollout))
                loss, terms = loss_function(network, batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()
                losses.append({name: term.clone() for name, term in terms.items()})  # a CUDA graph reuses its outputs

        run.log(step, network, losses, epsilon=epsilon, learning_rate=learning_rate)
        run.measure(step, network, memory)
        run.save(step)

    run.finish(network, memory, evaluate)
    envs.close()


if __name__ == "__main__":
    launch(main, Args)
