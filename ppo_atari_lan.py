"""PPO with a Latent assistance Network on Atari (paper, Sections 3 and 4.2).

python ppo_atari_lan.py --env-id BreakoutNoFrameskip-v4 --activation tanh-lan --seed 1

On a laptop, in some three minutes:

python ppo_atari_lan.py --activation tanh-lan --exp-name laptop --total-timesteps 60000 --metrics-frequency 5000

The same command continues a run that was stopped or killed. Losses and charts are logged every 1,000 agent steps.
"""

import ctypes
import functools
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from ale_py import AtariVectorEnv, roms
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics
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
    exp_name: str = "ppo_atari_lan"
    """second part of the run folder's name"""
    total_timesteps: int = 10_000_000
    """agent steps, four frames each (10 M in the paper, Section 4.2), in whole rollouts"""


@dataclass
class Learning:
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


@dataclass
class Measurement:
    metrics_frequency: int = 10_000
    """agent steps between two measurements of the representation; 0 for none"""
    metrics_samples: int = 2048
    """observations per measurement; at least the representation's width"""
    dead_threshold: float = 20.0
    """omega: from this peak density on a neuron is dead (Appendix B.1)"""
    eval_episodes: int = 0
    """games played after training, with the policy's own sampling; their scores are logged"""
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
    env_backend: Literal["gymnasium", "ale"] = "gymnasium"
    """ale: ale-py's games in C++, faster, with a few differences (README) and no checkpoints"""
    async_envs: bool = field(default_factory=lambda: len(os.sched_getaffinity(0)) > 2)
    """step the environments in worker processes; by default where there are more than two CPU cores"""
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
    """Train PPO on an Atari game with a chosen last hidden layer. "Table 4" marks the paper's hyperparameters."""


def check_flags(args: Args) -> None:
    """Refuse what cannot work, before anything is written.

    Raises:
        checkpoint.BadInput
    """
    checkpoint.check_common_flags(args, width=REPRESENTATIONS[args.activation][3])
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "max_grad_norm"):
        checkpoint.require(getattr(args, name) > 0, args, name, "be positive")
    for name in ("clip_coef", "ent_coef", "vf_coef"):
        checkpoint.require(getattr(args, name) >= 0, args, name, "not be negative")
    checkpoint.require(0 <= args.gae_lambda <= 1, args, "gae_lambda", "lie in [0, 1]")
    checkpoint.require(args.target_kl is None or args.target_kl > 0, args, "target_kl", "be positive, or None")
    rollout, parts = args.num_envs * args.num_steps, f"--num-envs {args.num_envs} times --num-steps {args.num_steps}"
    checkpoint.require(rollout % args.num_minibatches == 0, args, "num_minibatches", f"divide {parts} = {rollout}")
    # One transition alone has no standard deviation to be normalised by.
    checkpoint.require(rollout > args.num_minibatches, args, "num_minibatches", f"be below {parts} = {rollout}")
    checkpoint.require(args.total_timesteps >= rollout, args, "total_timesteps", f"be at least {parts} = {rollout}")
    checkpoint.refuse_unless(
        args.env_backend != "ale" or args.checkpoint_frequency == 0,
        "--env-backend ale cannot save its games, so a run cannot resume; accept that with --checkpoint-frequency 0",
    )


# ------------------------------------------------------------------------------------------ environment


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """One game behind the DeepMind preprocessing (SB3's AtariWrapper); observations are (4, 84, 84, 1), oldest first.

    An episode ends with a life; `info["episode"]` tells when a whole game has ended, with its unclipped score. A
    reset fills the stack with four copies of its frame.
    """
    env = gym.make(env_id, render_mode="rgb_array" if render else None)
    return checkpoint.WholeGames(FrameStackObservation(AtariWrapper(RecordEpisodeStatistics(env)), 4))


def make_worker_env(env_id: str, parent: int) -> gym.Env:
    """In a worker: Ctrl-C reaches the whole group of processes, and the parent decides when to stop."""
    if os.getpid() != parent:  # gymnasium makes one in the parent too, to see its spaces
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # What goes wrong in a game reaches the parent through a queue; this is where a dead pipe's traceback would go.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: workers die with a killed parent
    return make_env(env_id)


class AleGames(VectorWrapper):
    """ale-py's vector environment in the shape of the others: clipped rewards, and whole games in `info["episode"]`.

    Unlike them it presses no FIRE after a lost life, its stacks run on over one, and a reset fills them with zeros.
    """

    def __init__(self, env_id: str, num_envs: int, num_threads: int):
        names = {name.replace("_", ""): name for name in roms.get_all_rom_ids()}
        env = AtariVectorEnv(
            names[env_id.removesuffix("NoFrameskip-v4").lower()],
            num_envs,
            num_threads=num_threads,
            autoreset_mode=AutoresetMode.SAME_STEP,
            life_loss_info=True,
            reward_clipping=False,
        )
        super().__init__(env)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        stacks, info = self.env.reset(**kwargs)
        self.frame_numbers = info["episode_frame_number"]
        self.scores, self.lengths = np.zeros((2, self.num_envs))
        return stacks[..., None], info

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        stacks, rewards, terminations, truncations, info = self.env.step(actions)
        self.scores, self.lengths = self.scores + rewards, self.lengths + 1
        # A lost life terminates like a game over, but lets the game's frames count on.
        over = truncations | (terminations & (info["episode_frame_number"] < self.frame_numbers))
        self.frame_numbers = info["episode_frame_number"]
        info |= {"episode": {"r": self.scores, "l": self.lengths}, "_episode": over}
        if "final_obs" in info:
            info["final_obs"] = info["final_obs"][..., None]
        self.scores, self.lengths = np.where(over, 0, self.scores), np.where(over, 0, self.lengths)
        return stacks[..., None], np.sign(rewards), terminations, truncations, info


def make_vector_env(env_id: str, num_envs: int, async_envs: bool) -> VectorEnv:
    """`num_envs` games. One that ends is reset in the same step; `final_obs` and `final_info` tell of its end."""
    if async_envs:
        makers = [functools.partial(make_worker_env, env_id, parent=os.getpid())] * num_envs
        return AsyncVectorEnv(makers, shared_memory=True, autoreset_mode=AutoresetMode.SAME_STEP)
    return SyncVectorEnv([lambda: make_env(env_id)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def ended_games(infos: dict) -> dict[int, tuple[float, int]]:
    """{environment: (unclipped score, agent steps)} of the games that ended in a vector step or in its resets."""
    games = {}
    for info in (infos.get("final_info", {}), infos):
        for i in np.flatnonzero(info.get("_episode", ())):
            games[int(i)] = (float(info["episode"]["r"][i]), int(info["episode"]["l"][i]))
    return games


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


class ActorCritic(nn.Module):
    """Policy and value on one representation (paper, Fig. 9)."""

    def __init__(self, actions: int, activation: str):
        super().__init__()
        self.trunk = nature_cnn()
        self.representation = Representation(3136, activation)
        self.actor = nn.Linear(self.representation.width, actions)
        self.critic = nn.Linear(self.representation.width, 1)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                gain = {self.actor: 0.01, self.critic: 1.0}.get(layer, np.sqrt(2))
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, 4, 84, 84) -> logits (n, actions) and values (n,)."""
        z = self.representation(self.trunk(observations / 255))
        return self.actor(z), self.critic(z).squeeze(1)


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
    logits, values = (output.float() for output in network(batch.observations))
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
    """Play whole games with the policy and random states of their own; yields each game's unclipped score."""
    env = make_env(env_id, render=video_folder is not None)
    rng = np.random.default_rng((seed, games))
    stack, _ = env.reset(seed=seed + 10_000)
    for game in range(games):
        info = {}
        with checkpoint.film(video_folder and video_folder / f"game_{game}.mp4", env) as add_picture:
            while "episode" not in info:
                logits, _ = network(torch.from_numpy(stack[None, ..., 0]).to(device))
                policy = logits.double().softmax(dim=1)[0].cpu().numpy()
                stack, _, terminated, truncated, info = env.step(int(rng.choice(len(policy), p=policy)))
                add_picture()
                if terminated or truncated:
                    stack, reset_info = env.reset()
                    info |= reset_info
        yield info["episode"]["r"]
    env.close()


# ------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    check_flags(args)
    device = checkpoint.set_up_device(args)
    rollout_steps = args.num_envs * args.num_steps
    memory_needed = checkpoint.check_memory(
        1_000_000_000 + 2 * 4 * 84 * 84 * (rollout_steps + args.metrics_samples) + 150_000_000 * args.num_envs,
        f"lower --num-envs {args.num_envs}, --num-steps {args.num_steps} or --metrics-samples {args.metrics_samples}",
    )

    rng = checkpoint.seed_everything(args.seed, args.torch_deterministic)
    if args.env_backend == "ale":
        envs = AleGames(args.env_id, args.num_envs, args.num_threads)
    else:
        envs = make_vector_env(args.env_id, args.num_envs, args.async_envs)
    try:
        train(args, device, memory_needed, rng, envs)
    except (EOFError, ConnectionError):
        envs.closed = True  # closing would wait for the dead
        raise checkpoint.RunFailed("a worker process died (out of memory?); the same command resumes the run") from None
    envs.close()


def train(args: Args, device: torch.device, memory_needed: str, rng: np.random.Generator, envs: VectorEnv) -> None:
    network = ActorCritic(envs.single_action_space.n, args.activation).to(device, memory_format=torch.channels_last)
    on_cuda = device.type == "cuda"
    # Nothing that changes is a Python number, so that a CUDA graph may hold the whole update.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=learning_rate, eps=args.adam_eps, fused=True, capturable=on_cuda
    )
    loss_function = torch.compile(ppo_loss, disable=not args.compile, mode="reduce-overhead" if on_cuda else None)
    rollout_steps = args.num_envs * args.num_steps
    iterations = args.total_timesteps // rollout_steps
    shape = (args.num_steps, args.num_envs)
    # Channels last, as the convolutions read them: a minibatch needs no other layout.
    observations = torch.zeros((*shape, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    log_probs, values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    staging = torch.zeros((args.num_envs, 84, 84, 4), dtype=torch.uint8, pin_memory=on_cuda).permute(0, 3, 1, 2)
    rewards, terminations, truncations = np.zeros((3, *shape), np.float32)
    # The newest observations, for the metrics; moved within one tensor, a new one would be faulted in page by page.
    recent = torch.zeros((args.metrics_samples, 84, 84, 4), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    returns: deque[float] = deque(maxlen=100)
    stacks, _ = envs.reset(seed=args.seed)
    start = 0

    run = checkpoint.open_run("ppo", args, device, sum(p.numel() for p in network.parameters()))
    if run.resumed:
        saved = run.resumed
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["lr"] = learning_rate
        envs.set_attr("snapshot", checkpoint.arrays(saved["envs"]))
        stacks = saved["stacks"].numpy()
        recent.copy_(saved["recent"])
        returns.extend(saved["returns"])
        checkpoint.restore_random_states(saved["random"], rng)
    run.print_header(args, device, start, memory_needed)

    def save(step: int) -> None:
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "envs": envs.get_attr("snapshot"),
            "stacks": stacks,
            "recent": recent,
            "returns": list(returns),
            "random": checkpoint.random_states(rng),
        }
        run.save(step, state)

    def measure(step: int) -> dict[str, Tensor]:
        """The activations of the most recent observations; empty while there are too few."""
        return activations(network, recent, device) if step >= args.metrics_samples else {}

    def due(frequency: int, step: int) -> bool:
        """Did this iteration, which ends at `step`, pass a multiple of `frequency`?"""
        return frequency > 0 and step // frequency > (step - rollout_steps) // frequency

    progress = checkpoint.Progress(iterations * rollout_steps, start)
    for iteration in range(start // rollout_steps + 1, iterations + 1):
        if args.anneal_lr:
            learning_rate.fill_(linear_schedule(args.learning_rate, 0, iterations, iteration - 1))

        # Rollout.
        last_stacks = {}  # of truncated episodes, by (t, environment)
        for t in range(args.num_steps):
            observations[t].copy_(staging.copy_(torch.from_numpy(stacks[..., 0])), non_blocking=True)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits, values[t] = network(observations[t])
            log_policy = logits.float().log_softmax(dim=1)
            actions[t] = torch.multinomial(log_policy.exp(), 1).squeeze(1)
            log_probs[t] = log_policy.gather(1, actions[t][:, None]).squeeze(1)
            stacks, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t].cpu().numpy())
            for i in np.flatnonzero(truncations[t] > terminations[t]):
                last_stacks[t, i] = infos["final_obs"][i][..., 0]
            first_step = (iteration - 1) * rollout_steps + t * args.num_envs + 1
            for i, (score, length) in ended_games(infos).items():
                returns.append(score)
                run.writer.add_scalar("charts/episodic_return", score, first_step + i)
                run.writer.add_scalar("charts/episodic_length", length, first_step + i)
        step = iteration * rollout_steps
        newest = observations.flatten(0, 1)[-args.metrics_samples :]
        recent[: -len(newest)] = recent[len(newest) :].clone()
        recent[-len(newest) :] = newest

        # Advantages.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            next_values = torch.cat((values[1:], network(torch.from_numpy(stacks[..., 0]).to(device))[1].float()[None]))
            for (t, i), last_stack in last_stacks.items():
                next_values[t, i] = network(torch.from_numpy(last_stack)[None].to(device))[1].float().squeeze(0)
        played = (torch.from_numpy(array).to(device) for array in (rewards, terminations, truncations))
        reward, terminated, truncated = played
        ended = torch.maximum(terminated, truncated)
        advantages = compute_gae(reward, values, next_values, terminated, ended, args.gamma, args.gae_lambda)
        rollout = Batch(observations, actions, log_probs, advantages, advantages + values, values)
        rollout = Batch(*(part.flatten(0, 1) for part in rollout))

        # Update.
        losses = []
        for _ in range(args.update_epochs):
            order = torch.from_numpy(rng.permutation(rollout_steps)).to(device)
            for chosen in order.chunk(args.num_minibatches):
                batch = Batch(*(part[chosen] for part in rollout))
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss, parts = loss_function(
                        network,
                        batch,
                        args.clip_coef,
                        args.ent_coef,
                        args.vf_coef,
                        args.norm_adv,
                        args.clip_vloss,
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                optimizer.step()
                losses.append({name: part.clone() for name, part in parts.items()})  # a CUDA graph reuses its outputs
            if args.target_kl is not None and parts["approx_kl"] > args.target_kl:
                break

        run.require_finite(network, step)
        if due(LOG_FREQUENCY, step):
            progress.update(step, last_100_games=f"{np.mean(returns):.2f}" if returns else "none yet")
            means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
            means["explained_variance"] = explained_variance(rollout.values, rollout.returns)
            run.log_losses(means, step)
            run.writer.add_scalar("charts/learning_rate", learning_rate, step)
            run.writer.add_scalar("charts/SPS", progress.speed(), step)
        if due(args.metrics_frequency, step) and (sample := measure(step)):
            log_representation(run.writer, sample, args.dead_threshold, args.seed, step)
        if run.signum or due(args.checkpoint_frequency, step):
            if args.env_backend == "gymnasium":
                save(step)
            run.leave_if_signalled()

    progress.close()
    total = iterations * rollout_steps
    run.require_finite(network, total)
    if run.saved < total and args.env_backend == "gymnasium":
        save(total)
    run.stop_at_once()
    sample, representation = measure(total) if args.metrics_frequency else {}, {}
    if sample:
        silent = due(args.metrics_frequency, total)  # it was logged in the loop
        representation = log_representation(
            None if silent else run.writer, sample, args.dead_threshold, args.seed, total
        )
    video_folder = run.folder if args.capture_video else None
    for game, score in enumerate(evaluate(network, args.env_id, args.seed, args.eval_episodes, device, video_folder)):
        run.writer.add_scalar("eval/episodic_return", score, game)
        checkpoint.say(f"evaluation game {game}: {score:g}")
    measured = {name: part.cpu().numpy() for name, part in sample.items()}
    run.finish(measured, network.state_dict(), total, progress.speed())
    run.print_summary(list(returns), representation)


if __name__ == "__main__":
    checkpoint.launch(main, Args)
