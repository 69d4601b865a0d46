"""PPO with a Latent assistance Network on Atari (paper, Sections 3 and 4.2).

python ppo_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

About three minutes on a laptop:

python ppo_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 40000 --metrics-frequency 4000

The same command continues a run that was stopped or killed. Every line with `run.` in it logs, measures or saves:
without them this is plain PPO.
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

from lan_utils.atari import AleGames, VectorGames, WholeGames, play_games
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
    """Train PPO on an Atari game. "Table 4" marks the paper's hyperparameters."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """the game: <Game>NoFrameskip-v4"""
    activation: Literal[*REPRESENTATIONS] = "tanh-lan"
    """how the last hidden layer z is made"""
    conv_activation: Literal[*CONVOLUTIONS] = "relu"
    """how each of the three convolutions is made: relu in the paper"""
    seed: Annotated[int, Ge(0)] = 1
    """seed of everything random"""
    exp_name: str = "ppo_atari_lan"
    """second part of the run folder's name"""
    total_timesteps: Annotated[int, Gt(0)] = 10_000_000
    """agent steps, four frames each: 10 M in the paper (Section 4.2)"""
    repeat_action_probability: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """sticky actions: chance that a frame repeats the last action; 0 in the paper, 0.25 in Machado et al. (2018)"""
    learning_rate: Annotated[float, Gt(0)] = 2.5e-4
    """learning rate of Adam (Table 4)"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to 0 (Table 4)"""
    adam_eps: Annotated[float, Ge(0)] = 1e-5
    """epsilon of Adam (Table 4)"""
    gamma: Annotated[float, Interval(ge=0, le=1)] = 0.99
    """discount factor (Table 4)"""
    gae_lambda: Annotated[float, Interval(ge=0, le=1)] = 0.95
    """lambda of generalised advantage estimation (Table 4)"""
    num_envs: Annotated[int, Gt(0)] = 8
    """games played at once (the paper's baseline)"""
    num_steps: Annotated[int, Gt(0)] = 128
    """agent steps per environment and rollout (Table 4)"""
    num_minibatches: Annotated[int, Gt(0)] = 4
    """minibatches of a rollout, one gradient step each (Table 4)"""
    update_epochs: Annotated[int, Gt(0)] = 4
    """passes over a rollout (Table 4)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch (Table 4)"""
    clip_coef: Annotated[float, Ge(0)] = 0.1
    """clip range of the probability ratio, and of the value (Table 4)"""
    clip_vloss: bool = True
    """clip the value loss (Table 4)"""
    ent_coef: Annotated[float, Ge(0)] = 0.01
    """weight of the entropy bonus (Table 4)"""
    vf_coef: Annotated[float, Ge(0)] = 0.5
    """weight of the value loss (Table 4)"""
    max_grad_norm: Annotated[float, Gt(0)] = 0.5
    """norm to which the gradient is clipped (Table 4)"""
    target_kl: Annotated[float, Gt(0)] | None = None
    """stop an update early once its KL divergence exceeds this (Table 4)"""
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


class ActorCritic(nn.Module):
    """Policy and value on one representation (paper, Fig. 9)."""

    def __init__(self, num_actions: int, activation: str, conv_activation: str = "relu", amp: bool = False):
        super().__init__()
        self.encoder = Encoder(activation, conv_activation, amp)
        self.measured = self.encoder.measured
        self.actor = nn.Linear(self.encoder.width, num_actions)
        self.critic = nn.Linear(self.encoder.width, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                gain = {self.actor: 0.01, self.critic: 1.0}.get(layer, np.sqrt(2))
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 4, 84, 84) -> logits (n, num_actions) and values (n,)."""
        z = self.encoder(observations)
        return self.actor(z), self.critic(z).squeeze(1)


Network = ActorCritic  # the name by which scripts/enjoy.py finds it


# ------------------------------------------------------------------------------------------ mathematics


class Batch(NamedTuple):
    """n transitions of a rollout, with what the policy and the critic gave when they were played."""

    observations: Tensor  # (n, 4, 84, 84) uint8
    actions: Tensor  # (n,) int64
    log_probs: Tensor  # (n,) float32, of the actions
    advantages: Tensor  # (n,) float32
    returns: Tensor  # (n,) float32, targets of the value
    values: Tensor  # (n,) float32


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """From `start` at step 0 to `end` at step `duration`, and `end` from there on."""
    return end if step >= duration else start + (end - start) * step / duration


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16) over a rollout.

    Args:
        rewards, values: (steps, envs); values of the observations acted on.
        next_values: (steps, envs), of the observations that the actions led to; at a truncation, of its true last one.
        terminated: (steps, envs), 1 where nothing follows: no bootstrap.
        ended: (steps, envs), 1 where the episode terminated or was truncated: nothing is summed across it.

    Returns:
        Advantages (steps, envs).
    """
    errors = rewards + gamma * (1 - terminated) * next_values - values
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantage = errors[t] + gamma * lam * (1 - ended[t]) * advantage
        advantages[t] = advantage
    return advantages


def ppo_loss(
    network: nn.Module,
    batch: Batch,
    clip_coef: float,
    ent_coef: float,
    vf_coef: float,
    norm_adv: bool,
    clip_vloss: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Eq. 5) with value loss and entropy bonus, and what is logged: scalars on the device."""
    logits, values = network(batch.observations)
    log_policy = logits.log_softmax(dim=1)
    entropy = -(log_policy.exp() * log_policy).sum(dim=1).mean()
    log_ratio = log_policy.gather(1, batch.actions[:, None]).squeeze(1) - batch.log_probs
    ratio = log_ratio.exp()

    advantages = batch.advantages
    if norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()

    squared_error = (values - batch.returns).square()
    if clip_vloss:
        clipped_values = batch.values + (values - batch.values).clamp(-clip_coef, clip_coef)
        squared_error = torch.max(squared_error, (clipped_values - batch.returns).square())
    value_loss = 0.5 * squared_error.mean()

    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy
    terms = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    return loss, {name: term.detach() for name, term in terms.items()}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar: 1 is perfect, 0 no better than a constant, or undefined."""
    variance = returns.var()
    return torch.where(variance > 0, 1 - (returns - values).var() / variance.clamp(min=1e-12), 0.0)


# ------------------------------------------------------------------------------------------------- play


@torch.no_grad()
def act(network: nn.Module, obs: np.ndarray, rng: np.random.Generator) -> int:
    """An action drawn from the policy at the observation (4, 84, 84) uint8."""
    logits, _ = network(torch.from_numpy(obs)[None].to(network.actor.weight.device))
    policy = logits.double().softmax(dim=1)[0].cpu().numpy()
    return int(rng.choice(len(policy), p=policy))


def evaluate(
    network: nn.Module, args: Args, games: int, video_folder: Path | None = None, watch: bool = False
) -> Iterator[float]:
    """Play whole games with the policy and random states of their own; yields each game's unclipped score."""
    render_mode = "human" if watch else "rgb_array" if video_folder else None
    env = make_env(args.env_id, args.repeat_action_probability, render_mode)
    rng = np.random.default_rng((args.seed, games))
    yield from play_games(env, lambda obs: act(network, obs, rng), args.seed + 10_000, games, video_folder)


# ------------------------------------------------------------------------------------------------- main


def memory_needed(args: Args) -> int:
    """Bytes of resident memory, an upper estimate: the process, games, observations, and a minibatch in use."""
    rollout_steps = args.num_envs * args.num_steps
    frames = 2 * 4 * 84 * 84 * (rollout_steps + args.metrics_samples)
    minibatch = 300_000 * rollout_steps // args.num_minibatches
    return 1_000_000_000 + cuda_memory(args) + frames + 150_000_000 * args.num_envs + minibatch


def check_relations(args: Args) -> None:
    """Refuse flags that contradict each other, or that need more memory than is free.

    Raises:
        BadInput
    """
    check_width(args, REPRESENTATIONS[args.activation].width)
    rollout, product = args.num_envs * args.num_steps, f"--num-envs {args.num_envs} times --num-steps {args.num_steps}"
    require(rollout % args.num_minibatches == 0, args, "num_minibatches", f"divide {product} = {rollout}")
    # A single transition has no standard deviation to normalise by.
    require(rollout > args.num_minibatches, args, "num_minibatches", f"be below {product} = {rollout}")
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
    run = Run("ppo", args, device, rng, memory_needed(args), stride=rollout_steps)

    if args.env_backend == "ale":
        envs = AleGames(args.env_id, args.repeat_action_probability, args.num_envs, args.num_threads)
    else:
        make_game = functools.partial(make_env, args.env_id, args.repeat_action_probability)
        envs = VectorGames(make_game, args.num_envs, args.async_envs)
    num_actions = envs.single_action_space.n
    network = ActorCritic(num_actions, args.activation, args.conv_activation, args.amp)
    network.to(device, memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    # A tensor, since a CUDA graph that holds the whole update cannot see a Python number change.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(ppo_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)

    shape = (args.num_steps, args.num_envs)
    memory = RolloutMemory(*shape, args.metrics_samples, device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    log_probs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    rewards, terminations, truncations = np.zeros((3, *shape), np.float32)
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
            with torch.no_grad():
                logits, values[t] = network(memory.add(play.obs))
            log_policy = logits.log_softmax(dim=1)
            actions[t] = torch.multinomial(log_policy.exp(), 1).squeeze(1)
            log_probs[t] = log_policy.gather(1, actions[t][:, None]).squeeze(1)
            play.obs, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
            for i in np.flatnonzero(truncations[t] > terminations[t]):
                last_obs[t, i] = infos["final_obs"][i]
            run.log_games((iteration - 1) * rollout_steps + t * args.num_envs + 1, infos)
        step = iteration * rollout_steps

        # Estimate the advantages.
        with torch.no_grad():
            after_last = network(torch.from_numpy(play.obs).to(device))[1]
            next_values = torch.cat((values[1:], after_last[None]))
            for (t, i), last in last_obs.items():
                next_values[t, i] = network(torch.from_numpy(last)[None].to(device))[1].squeeze(0)
        reward, terminated, truncated = (torch.from_numpy(a).to(device) for a in (rewards, terminations, truncations))
        ended = torch.maximum(terminated, truncated)
        advantages = compute_gae(reward, values, next_values, terminated, ended, args.gamma, args.gae_lambda)
        rollout = Batch(memory.rollout(), actions, log_probs, advantages, advantages + values, values)
        rollout = Batch(*(column.flatten(0, 1) for column in rollout))

        # Update the network.
        losses = [{"explained_variance": explained_variance(rollout.values, rollout.returns)}]
        for _ in range(args.update_epochs):
            order = torch.from_numpy(rng.permutation(rollout_steps)).to(device)
            for chosen in order.chunk(args.num_minibatches):
                batch = Batch(*(column[chosen] for column in rollout))
                loss, terms = loss_function(
                    network, batch, args.clip_coef, args.ent_coef, args.vf_coef, args.norm_adv, args.clip_vloss
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()
                losses.append({name: term.clone() for name, term in terms.items()})  # a CUDA graph reuses its outputs
            if args.target_kl is not None and terms["approx_kl"] > args.target_kl:
                break

        run.log(step, network, losses, learning_rate=learning_rate)
        run.measure(step, network, memory)
        run.save(step)

    run.finish(network, memory, evaluate)
    envs.close()


if __name__ == "__main__":
    launch(main, Args)
