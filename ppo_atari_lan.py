"""PPO with a Latent assistance Network on Atari (paper, Sections 3 and 4.2).

python ppo_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

On a laptop, in some three minutes:

python ppo_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 40000 --metrics-frequency 4000

The same command continues a run that was stopped or killed. Every line with `run.` in it logs, measures or saves:
without them this is plain PPO.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn

from lan_utils.atari import AleGames, VectorGames, WholeGames, play_games
from lan_utils.checkpoint import Variables
from lan_utils.checks import check_common_flags, check_memory, refuse_unless, require
from lan_utils.cli import launch
from lan_utils.machine import usable_cores
from lan_utils.run import Run, RunArgs, set_up


@dataclass(kw_only=True)
class Args(RunArgs):
    """Train PPO on an Atari game. "Table 4" marks the paper's hyperparameters."""

    exp_name: str = "ppo_atari_lan"
    """second part of the run folder's name"""
    learning_rate: float = 2.5e-4
    """learning rate of Adam (Table 4)"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 (Table 4)"""
    adam_eps: float = 1e-5
    """epsilon of Adam (Table 4)"""
    gamma: float = 0.99
    """discount factor (Table 4)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (Table 4)"""
    num_envs: int = 8
    """games played at once (the paper's baseline)"""
    num_steps: int = 128
    """agent steps per environment and rollout (Table 4)"""
    num_minibatches: int = 4
    """parts of a rollout, one gradient step each (Table 4)"""
    update_epochs: int = 4
    """passes over a rollout (Table 4)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch (Table 4)"""
    clip_coef: float = 0.1
    """clipping of the probability ratio, and of the value (Table 4)"""
    clip_vloss: bool = True
    """clip the value loss (Table 4)"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (Table 4)"""
    vf_coef: float = 0.5
    """weight of the value loss (Table 4)"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient (Table 4)"""
    target_kl: float | None = None
    """end an update's passes once the policy has moved this far (Table 4)"""
    env_backend: Literal["gymnasium", "ale"] = "gymnasium"
    """ale: ale-py's games in C++, faster, with a few differences (docs/runs.md) and no checkpoints"""
    async_envs: bool = field(default_factory=lambda: usable_cores() > 2)
    """step the environments in worker processes; by default where there are more than two CPU cores"""


def memory_needed(args: Args) -> int:
    """Bytes of resident memory, an upper estimate: the process, its games, observations, and a minibatch on its way."""
    rollout_steps = args.num_envs * args.num_steps
    frames = 2 * 4 * 84 * 84 * (rollout_steps + args.metrics_samples)
    return 1_000_000_000 + frames + 150_000_000 * args.num_envs + 300_000 * rollout_steps // args.num_minibatches


def check_flags(args: Args) -> None:
    """Refuse what cannot work, before anything is written.

    Raises:
        BadInput
    """
    check_common_flags(args, width=REPRESENTATIONS[args.activation].width)
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "max_grad_norm"):
        require(getattr(args, name) > 0, args, name, "be positive")
    for name in ("clip_coef", "ent_coef", "vf_coef"):
        require(getattr(args, name) >= 0, args, name, "not be negative")
    require(0 <= args.gae_lambda <= 1, args, "gae_lambda", "lie in [0, 1]")
    require(args.target_kl is None or args.target_kl > 0, args, "target_kl", "be positive, or None")
    rollout, parts = args.num_envs * args.num_steps, f"--num-envs {args.num_envs} times --num-steps {args.num_steps}"
    require(rollout % args.num_minibatches == 0, args, "num_minibatches", f"divide {parts} = {rollout}")
    # One transition alone has no standard deviation to be normalised by.
    require(rollout > args.num_minibatches, args, "num_minibatches", f"be below {parts} = {rollout}")
    require(args.total_timesteps >= rollout, args, "total_timesteps", f"be at least {parts} = {rollout}")
    if args.env_backend == "ale":
        refuse_unless(
            args.checkpoint_frequency == 0,
            "--env-backend ale cannot save its games: a run cannot resume; accept that with --checkpoint-frequency 0",
        )
        require(
            args.seed < 2**31 - args.num_envs, args, "seed", f"be below 2**31 - {args.num_envs} for --env-backend ale"
        )
    largest = f"--num-envs {args.num_envs}, --num-steps {args.num_steps} or --metrics-samples {args.metrics_samples}"
    check_memory(memory_needed(args), f"lower {largest}")


# ------------------------------------------------------------------------------------------ environment


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One game behind the DeepMind preprocessing (SB3's AtariWrapper); observations are (4, 84, 84, 1), oldest first.

    An episode ends with a life; `info["episode"]` tells when a whole game has ended, with its unclipped score. A
    reset fills the stack with four copies of its frame.
    """
    env = RecordEpisodeStatistics(gym.make(env_id, render_mode=render_mode))
    return WholeGames(FrameStackObservation(AtariWrapper(env), 4))


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


class ActorCritic(nn.Module):
    """Policy and value on one representation (paper, Fig. 9).

    Args:
        amp: compute z in bfloat16; the heads and what follows them stay in float32.
    """

    def __init__(self, actions: int, activation: str, amp: bool = False):
        super().__init__()
        self.trunk = nature_cnn()
        self.representation = Representation(3136, activation)
        self.actor = nn.Linear(self.representation.width, actions)
        self.critic = nn.Linear(self.representation.width, 1)
        self.amp = amp
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                gain = {self.actor: 0.01, self.critic: 1.0}.get(layer, np.sqrt(2))
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 4, 84, 84) -> logits (n, actions) and values (n,)."""
        x = observations / 255
        with torch.autocast(x.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            z = self.representation(self.trunk(x))
        z = z.float()
        return self.actor(z), self.critic(z).squeeze(1)


Network = ActorCritic  # by this name scripts/enjoy.py finds it


# ------------------------------------------------------------------------------------------ mathematics


class Batch(NamedTuple):
    """n transitions of a rollout, with what the policy and the value said when they were played."""

    observations: Tensor  # (n, 4, 84, 84) uint8
    actions: Tensor  # (n,) int64
    log_probs: Tensor  # (n,) float32, of the actions
    advantages: Tensor  # (n,) float32
    returns: Tensor  # (n,) float32, what the value is fitted to
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
        next_values: (steps, envs), of the observation that each action led to: of a truncated episode its true last.
        terminated: (steps, envs), 1 where nothing follows: no bootstrap.
        ended: (steps, envs), 1 where the episode terminated or was truncated: no sum across.

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
    """The clipped surrogate (Eq. 5), the value loss and the entropy bonus, and their parts: scalars on the device."""
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
    parts = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean(),  # http://joschu.net/blog/kl-approx.html
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    return loss, {name: part.detach() for name, part in parts.items()}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar: 1 is perfect, 0 no better than a constant, or undefined."""
    variance = returns.var()
    return torch.where(variance > 0, 1 - (returns - values).var() / variance.clamp(min=1e-12), 0.0)


# ------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def act(network: nn.Module, stack: np.ndarray, rng: np.random.Generator) -> int:
    """An action drawn from the policy at the observation (4, 84, 84) uint8."""
    logits, _ = network(torch.from_numpy(stack)[None].to(network.actor.weight.device))
    policy = logits.double().softmax(dim=1)[0].cpu().numpy()
    return int(rng.choice(len(policy), p=policy))


def evaluate(
    network: nn.Module, env_id: str, seed: int, games: int, video_folder: Path | None = None, watch: bool = False
) -> Iterator[float]:
    """Play whole games with the policy and random states of their own; yields each game's unclipped score."""
    env = make_env(env_id, "human" if watch else "rgb_array" if video_folder else None)
    rng = np.random.default_rng((seed, games))
    yield from play_games(env, lambda stack: act(network, stack, rng), seed + 10_000, games, video_folder)


def main(args: Args) -> None:
    check_flags(args)
    device, rng = set_up(args)
    rollout_steps = args.num_envs * args.num_steps
    iterations = args.total_timesteps // rollout_steps
    run = Run("ppo", args, device, rng, memory_needed(args), stride=rollout_steps)

    if args.env_backend == "ale":
        envs = AleGames(args.env_id, args.num_envs, args.num_threads)
    else:
        envs = VectorGames(make_env, args.env_id, args.num_envs, args.async_envs)
    actions_count = envs.single_action_space.n
    network = ActorCritic(actions_count, args.activation, args.amp).to(device, memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    # Nothing that changes is a Python number, so that a CUDA graph may hold the whole update.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(ppo_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)

    shape = (args.num_steps, args.num_envs)
    # Channels last, as the convolutions read them: a minibatch needs no other layout.
    observations = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    log_probs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    staging = torch.zeros((args.num_envs, 84, 84, 4), dtype=torch.uint8, pin_memory=on_cuda).permute(0, 3, 1, 2)
    rewards, terminations, truncations = np.zeros((3, *shape), np.float32)
    # The newest observations, for the metrics; moved within one tensor, a new one would be faulted in page by page.
    recent = torch.zeros((args.metrics_samples, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    stacks, _ = envs.reset(seed=args.seed)
    play = Variables(iteration=0, stacks=stacks, recent=recent)

    # Everything that a resumed run needs, named once.
    run.resume(network=network, optimizer=optimizer, envs=envs, play=play)

    def newest_observations(step: int) -> Tensor | None:
        """What is measured: the most recent observations."""
        return recent if step >= args.metrics_samples else None

    for iteration in range(play.iteration + 1, iterations + 1):
        play.iteration = iteration
        optimizer.param_groups[0]["lr"] = learning_rate  # a resumed optimizer has one of its own
        if args.anneal_lr:
            learning_rate.fill_(linear_schedule(args.learning_rate, 0, iterations, iteration - 1))

        # Play a rollout.
        last_stacks = {}  # of truncated episodes, by (t, environment)
        for t in range(args.num_steps):
            observations[t].copy_(staging.copy_(torch.from_numpy(play.stacks[..., 0])), non_blocking=True)
            with torch.no_grad():
                logits, values[t] = network(observations[t])
            log_policy = logits.log_softmax(dim=1)
            actions[t] = torch.multinomial(log_policy.exp(), 1).squeeze(1)
            log_probs[t] = log_policy.gather(1, actions[t][:, None]).squeeze(1)
            play.stacks, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
            for i in np.flatnonzero(truncations[t] > terminations[t]):
                last_stacks[t, i] = infos["final_obs"][i][..., 0]
            run.log_games((iteration - 1) * rollout_steps + t * args.num_envs + 1, infos)
        step = iteration * rollout_steps
        newest = observations.flatten(0, 1)[-args.metrics_samples :]
        recent[: -len(newest)] = recent[len(newest) :].clone()
        recent[-len(newest) :] = newest

        # Estimate the advantages.
        with torch.no_grad():
            after_last = network(torch.from_numpy(play.stacks[..., 0]).to(device))[1]
            next_values = torch.cat((values[1:], after_last[None]))
            for (t, i), last_stack in last_stacks.items():
                next_values[t, i] = network(torch.from_numpy(last_stack)[None].to(device))[1].squeeze(0)
        reward, terminated, truncated = (torch.from_numpy(a).to(device) for a in (rewards, terminations, truncations))
        ended = torch.maximum(terminated, truncated)
        advantages = compute_gae(reward, values, next_values, terminated, ended, args.gamma, args.gae_lambda)
        rollout = Batch(observations, actions, log_probs, advantages, advantages + values, values)
        rollout = Batch(*(part.flatten(0, 1) for part in rollout))

        # Update the network.
        losses = []
        for _ in range(args.update_epochs):
            order = torch.from_numpy(rng.permutation(rollout_steps)).to(device)
            for chosen in order.chunk(args.num_minibatches):
                batch = Batch(*(part[chosen] for part in rollout))
                loss, parts = loss_function(
                    network, batch, args.clip_coef, args.ent_coef, args.vf_coef, args.norm_adv, args.clip_vloss
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()
                losses.append({name: part.clone() for name, part in parts.items()})  # a CUDA graph reuses its outputs
            if args.target_kl is not None and parts["approx_kl"] > args.target_kl:
                break
        means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        means["explained_variance"] = explained_variance(rollout.values, rollout.returns)

        run.log(step, network, means, learning_rate=learning_rate)
        run.measure(step, network, newest_observations)
        run.save(step)

    run.finish(network, newest_observations, evaluate)
    envs.close()


if __name__ == "__main__":
    launch(main, Args)
