"""ppo_atari_lan.py: the network, the mathematics, and training that learns."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import LAYER_TAGS, make_quadrants, module_of, read_events, stacked, without_run
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

import metrics
import ppo_atari_lan as ppo
from lan_utils import cli
from lan_utils.cli import RunFailed

# ------------------------------------------------------------------------------------------------ flags

TABLE_4 = {  # the paper's, as printed there
    "learning_rate": 2.5e-4,
    "gamma": 0.99,
    "num_steps": 128,
    "anneal_lr": True,
    "gae_lambda": 0.95,
    "num_minibatches": 4,
    "update_epochs": 4,
    "norm_adv": True,
    "clip_coef": 0.1,
    "clip_vloss": True,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "adam_eps": 1e-5,
}


def test_defaults_are_table_4(monkeypatch, capsys):
    """Would catch: a default that drifts from the paper, in the code or in --help."""
    args = ppo.Args()
    assert {name: getattr(args, name) for name in TABLE_4} == TABLE_4
    assert (args.total_timesteps, args.num_envs) == (10_000_000, 8)
    assert args.total_timesteps // 1024 * 1024 == 9_999_360
    monkeypatch.setattr("sys.argv", ["ppo_atari_lan.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(ppo.Args)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, value in TABLE_4.items():
        flag = text.split(f" --{name.replace('_', '-')}")[1].split("(Table 4)")[1]
        assert flag.startswith(f" (default: {value})"), name
    assert all(f" --{f.name.replace('_', '-')}" in text for f in dataclasses.fields(ppo.Args))
    assert args.exp_name == Path(ppo.__file__).stem  # the script's name: no two scripts share a folder


# ---------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("activation", "factors", "conv_activation", "conv_factors"),
    [
        ("tanh-2xlan", 3, "relu", 1),
        ("bilinear", 2, "tanh-lan", 2),
        ("tanh-glu", 2, "layernorm-lan", 2),
        ("layernorm-lan", 2, "tanh-2xlan", 3),
        ("layernorm-relu", 1, "bilinear", 2),
        ("relu-1024", 1, "relu", 1),
        ("crelu", 1, "relu", 1),
        ("gelu", 1, "tanh-glu", 2),
    ],
)
def test_initialisation(activation, factors, conv_activation, conv_factors):
    """Orthogonal with gain sqrt(2) and zero bias for every hidden layer, all factors alike, those of a convolution too;
    0.01 actor, 1 critic."""
    network = ppo.ActorCritic(6, activation, conv_activation)
    names = ("enc", "star", "star2")
    expected = {
        **{f"encoder.conv{i}.factors.{name}.0": 2**0.5 for i in (1, 2, 3) for name in names[:conv_factors]},
        **{f"encoder.z.factors.{name}.0": 2**0.5 for name in names[:factors]},
        **{"actor": 0.01, "critic": 1.0},
    }
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            rows = layer.weight.detach().flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)) * expected[name] ** 2, atol=1e-4, rtol=0)
            assert (layer.bias == 0).all()
            found[name] = layer
    assert found.keys() == expected.keys()
    for norm in [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_parameter_counts():
    # The Q-head's 2052 parameters make way for an actor's 6 * 513 and a critic's 513.
    trunk = 1_686_180 - 2052
    assert sum(p.numel() for p in ppo.ActorCritic(6, "relu").parameters()) == trunk + 7 * 513


def test_z_feeds_both_heads():
    """Would catch: a detached critic or actor."""
    network = ppo.ActorCritic(4, "tanh-lan")
    observations = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    for head in (0, 1):
        network.zero_grad()
        network(observations)[head].square().sum().backward()
        assert all(factor[0].weight.grad.abs().sum() > 0 for factor in network.encoder.z.factors.values())


# ------------------------------------------------------------------------------------------ mathematics


def gae(rewards, values, next_values, terminated, ended, gamma, lam):
    columns = (torch.tensor(column, dtype=torch.float64)[:, None] for column in (rewards, values, next_values))
    flags = (torch.tensor(column, dtype=torch.float64)[:, None] for column in (terminated, ended))
    return ppo.compute_gae(*columns, *flags, gamma, lam)[:, 0].tolist()


def test_gae_by_hand():
    """gamma = lambda = 0.5, five steps: a termination after the second, a truncation after the fourth.

    errors: 1 + .5*2 - 1 = 1; 2 - 2 = 0 (terminated); 0 + .5*4 - 3 = -1; 1 + .5*8 - 4 = 1 (bootstraps from its true
    last observation, 8, not from the next episode's 5); 0 + .5*6 - 5 = -2.
    Would catch: a truncation taken for an end, a sum that runs across an end, the next episode's value as bootstrap.
    """
    found = gae([1, 2, 0, 1, 0], [1, 2, 3, 4, 5], [2, 99, 4, 8, 6], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0], 0.5, 0.5)
    assert found == [1 + 0.25 * 0, 0, -1 + 0.25 * 1, 1, -2]


def test_gae_of_a_constant_value_function():
    """Value c everywhere, reward c (1 - gamma): every advantage is 0, but for a termination's, which loses gamma c."""
    c, gamma = 3.0, 0.9
    n = 6
    found = gae([c * (1 - gamma)] * n, [c] * n, [c] * n, [0] * n, [0] * n, gamma, 0.95)
    assert found == pytest.approx([0] * n, abs=1e-12)
    found = gae([c * (1 - gamma)] * n, [c] * n, [c] * n, [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], gamma, 0.95)
    lost = -gamma * c
    assert found == pytest.approx([lost * (gamma * 0.95) ** 2, lost * gamma * 0.95, lost, 0, 0, 0], abs=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_gae_agrees_with_stable_baselines3_where_nothing_is_truncated(seed, steps, envs):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
    ends = (rng.random((steps, envs)) < 0.2).astype(np.float32)
    last = torch.tensor(rng.normal(size=envs), dtype=torch.float32)
    space = gym.spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(steps, space, gym.spaces.Discrete(2), gae_lambda=0.95, gamma=0.99, n_envs=envs)
    starts = np.concatenate((np.zeros((1, envs), np.float32), ends[:-1]))
    for t in range(steps):
        none = torch.zeros(envs)
        buffer.add(np.zeros((envs, 1)), np.zeros((envs, 1)), rewards[t], starts[t], torch.tensor(values[t]), none)
    buffer.compute_returns_and_advantage(last, ends[-1])
    tensors = [torch.tensor(array) for array in (rewards, values)]
    next_values = torch.cat((tensors[1][1:], last[None]))
    ours = ppo.compute_gae(*tensors, next_values, torch.tensor(ends), torch.tensor(ends), 0.99, 0.95)
    np.testing.assert_allclose(ours.numpy(), buffer.advantages, atol=1e-5)


class Heads(torch.nn.Module):
    """Counts as a network in the mathematics: fixed logits and values."""

    def __init__(self, logits, values):
        super().__init__()
        self.logits, self.values = torch.nn.Parameter(logits), torch.nn.Parameter(values)

    def forward(self, observations):
        return self.logits, self.values


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_loss_terms_agree_with_plain_numpy(seed, norm_adv, clip_vloss):
    """Would catch: min for max in either clip, a lost 0.5, the entropy's sign, clipping by the wrong side."""
    rng = np.random.default_rng(seed)
    n, actions = 12, 5
    logits, values = rng.normal(size=(n, actions)), rng.normal(size=n)
    chosen = rng.integers(actions, size=n)
    old_log_probs, advantages, returns, old_values = rng.normal(size=(4, n))
    policy = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    old_log_probs = np.log(policy[np.arange(n), chosen]) + 0.1 * old_log_probs

    ratio = policy[np.arange(n), chosen] / np.exp(old_log_probs)
    used = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8) if norm_adv else advantages
    policy_loss = np.mean([-min(r * a, min(max(r, 0.9), 1.1) * a) for r, a in zip(ratio, used, strict=True)])
    errors = (values - returns) ** 2
    if clip_vloss:
        near = np.minimum(np.maximum(values, old_values - 0.1), old_values + 0.1)
        errors = np.maximum(errors, (near - returns) ** 2)
    expected = {
        "policy_loss": policy_loss,
        "value_loss": 0.5 * errors.mean(),
        "entropy": np.mean([-sum(p * np.log(p) for p in row) for row in policy]),
        "approx_kl": np.mean(ratio - 1 - np.log(ratio)),
        "clipfrac": np.mean(abs(ratio - 1) > 0.1),
    }

    f32 = {"dtype": torch.float32}
    batch = ppo.Batch(
        torch.zeros(n), torch.tensor(chosen),
        *(torch.tensor(x, **f32) for x in (old_log_probs, advantages, returns, old_values)),
    )  # fmt: skip
    network = Heads(torch.tensor(logits, **f32), torch.tensor(values, **f32))
    loss, parts = ppo.ppo_loss(network, batch, 0.1, 0.01, 0.5, norm_adv, clip_vloss)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-3, abs=1e-5), name
    total = policy_loss + 0.5 * expected["value_loss"] - 0.01 * expected["entropy"]
    assert loss.item() == pytest.approx(total, rel=1e-3, abs=1e-5)


def test_explained_variance_by_hand():
    values, returns = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])
    assert ppo.explained_variance(values, returns).item() == pytest.approx(1 - (1 / 3) / (4 / 3))
    assert ppo.explained_variance(returns, returns).item() == 1
    assert ppo.explained_variance(values, torch.ones(4)).item() == 0


def test_learning_rate_schedule():
    """lr (1 - (i - 1) / iterations): the whole rate in the first iteration, 1 / iterations of it in the last."""
    rates = [ppo.linear_schedule(2.5e-4, 0, 10, i - 1) for i in (1, 6, 10)]
    assert rates == pytest.approx([2.5e-4, 1.25e-4, 0.25e-4])


def random_batch(generator):
    observations = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8, generator=generator)
    noise = torch.randn(4, 64, generator=generator)
    actions = torch.randint(4, (64,), generator=generator)
    return ppo.Batch(observations, actions, 0.01 * noise[0] - np.log(4), noise[1], noise[2], noise[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "loss_tolerance", "gradient_tolerance"),
    [("amp", 1e-2, 5e-2), ("amp compile", 1e-2, 5e-2)],
)
def test_amp_and_compile_only_round_differently(flags, loss_tolerance, gradient_tolerance):
    """The first three updates against float32: losses and the first gradient, relative.

    Would catch: a target or a loss computed in bfloat16, a compiled graph that holds an old batch or old weights.
    """

    def first_updates(amp, compiled):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        network = ppo.ActorCritic(4, "tanh-lan", amp=amp).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(network.parameters(), lr=2.5e-4, eps=1e-5, fused=True)
        loss_function = torch.compile(ppo.ppo_loss, disable=not compiled)
        batches = [random_batch(generator) for _ in range(3)]
        losses = []
        for update in range(3):
            loss, _ = loss_function(network, batches[update], 0.1, 0.01, 0.5, True, True)
            optimizer.zero_grad()
            loss.backward()
            if update == 0:
                gradient = torch.cat([weight.grad.flatten() for weight in network.parameters()])
            optimizer.step()
            losses.append(loss.item())
        torch.compiler.reset()
        return np.array(losses), gradient

    losses, gradient = first_updates(amp=False, compiled=False)
    other_losses, other_gradient = first_updates("amp" in flags, "compile" in flags)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(other_losses, losses, rtol=loss_tolerance)
    assert not torch.equal(other_gradient, gradient)
    assert (other_gradient - gradient).norm() < gradient_tolerance * gradient.norm()


@torch.no_grad()
def test_amp_rounds_neither_values_nor_logits():
    """At values around 10 bfloat16 steps by 1/16, from 16 on by more than the value's clip of 0.1. Would catch: heads
    in bfloat16, which the first updates with their values of 0 cannot show."""
    observations = torch.randint(256, (512, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def scaled_network(amp):
        torch.manual_seed(0)
        network = ppo.ActorCritic(4, "tanh-lan", amp=amp)
        network.critic.bias.fill_(20.0)
        network.actor.bias.fill_(10.0)
        return network

    network, rounded = scaled_network(False), scaled_network(True)
    (_, values), (rounded_logits, rounded_values) = network(observations), rounded(observations)
    assert (values.min() > 15, values.std() > 0.05) == (True, True)
    assert rounded_logits.dtype == rounded_values.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # the best that float32 heads can do
        x = (observations / 255).contiguous(memory_format=torch.channels_last)
        encoder = network.encoder
        z = encoder.z(encoder.conv3(encoder.conv2(encoder.conv1(x))).flatten(1))
    assert torch.equal(rounded_values, network.critic(z.float()).squeeze(1))
    assert torch.equal(rounded_logits, network.actor(z.float()))
    assert len(set(rounded_values.tolist())) > 500
    two_best = rounded_logits.topk(2, dim=1).values
    assert (two_best[:, 0] == two_best[:, 1]).sum() == 0
    head_in_bfloat16 = (rounded_values.bfloat16().float() - rounded_values).square().mean().sqrt()
    assert (rounded_values - values).square().mean().sqrt() < head_in_bfloat16


def test_the_update_never_waits_for_the_device(monkeypatch):
    """On torch's meta device any .item(), and any tensor made on the CPU, raises."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype: autocast("cpu", dtype))  # there is none for meta
    row = torch.zeros(64, device="meta")
    batch = ppo.Batch(torch.zeros(64, 4, 84, 84, dtype=torch.uint8, device="meta"), row.long(), row, row, row, row)
    for amp in (False, True):
        network = ppo.ActorCritic(6, "layernorm-lan", "tanh-glu", amp).to("meta")
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        loss, parts = ppo.ppo_loss(network, batch, 0.1, 0.01, 0.5, True, True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    columns = [torch.zeros(8, 2, device="meta")] * 5
    assert ppo.compute_gae(*columns, 0.99, 0.95).device.type == "meta"
    assert ppo.explained_variance(row, row).device.type == parts["clipfrac"].device.type == "meta"


# -------------------------------------------------------------------------------- ends of episodes


class Counting(gym.Env):
    """The picture shows the step's number; truncated after five steps or terminated after seven, alternately."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.episode = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.count = 0
        return np.full((84, 84, 1), 100 * (self.episode % 2), np.uint8), {}

    def step(self, action):
        self.count += 1
        picture = np.full((84, 84, 1), 100 * (self.episode % 2) + self.count, np.uint8)
        terminated = self.episode % 2 == 0 and self.count == 7
        truncated = self.episode % 2 == 1 and self.count == 5
        return picture, 1.0, terminated, truncated, {}


class ValueIsNewestPixel(torch.nn.Module):
    """An actor-critic whose value of an observation is its newest pixel."""

    def __init__(self, actions, activation, conv_activation, amp):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, observations):
        newest = observations[:, 3, 0, 0].float()
        return torch.zeros(len(newest), 2) + self.weight, newest + 0 * self.weight


@pytest.mark.parametrize("async_envs", [False, True])
def test_truncation_bootstraps_from_the_true_last_observation(monkeypatch, runs_dir, async_envs):
    """What reaches compute_gae in a rollout of 13 steps: an episode of 5 that is truncated, one of 7 that terminates.
    Would catch: next-step autoreset (a transition across the reset), the reset's observation as bootstrap."""
    monkeypatch.setattr(ppo, "make_env", lambda *arguments: stacked(Counting()))
    monkeypatch.setattr(ppo, "ActorCritic", ValueIsNewestPixel)
    calls = []
    compute_gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *a: calls.append(a) or compute_gae(*a))
    changes = {"num_envs": 2, "num_steps": 13, "num_minibatches": 1, "total_timesteps": 26, "metrics_frequency": 0}
    ppo.main(ppo.Args(**changes, async_envs=async_envs, runs_dir=str(runs_dir), checkpoint_frequency=0))
    rewards, values, next_values, terminated, ended = (column[:, 1].tolist() for column in calls[0][:5])
    assert rewards == [1] * 13
    assert values == [*range(100, 105), *range(7), 100]
    assert next_values[:5] == [101, 102, 103, 104, 105]
    assert next_values[5:11] == [1, 2, 3, 4, 5, 6]
    assert next_values[12] == 101
    assert terminated == [0] * 11 + [1, 0]
    assert ended == [0, 0, 0, 0, 1] + [0] * 6 + [1, 0]
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    # Two games that end in the same vector step are logged at agent steps of their own: 5 * 2 - 1 and 5 * 2.
    assert events["charts/episodic_length"] == [(9, 5), (10, 5), (23, 7), (24, 7)]
    assert not any(tag.startswith("representation/") for tag in events)


# --------------------------------------------------------------------------------- whole training runs


def quadrant_flags(runs_dir, **changes):
    return {
        "activation": "tanh-lan", "total_timesteps": 4096, "num_steps": 64, "num_envs": 8, "gamma": 0.5,
        "learning_rate": 1e-3, "async_envs": False, "metrics_frequency": 2000, "metrics_samples": 600,
        "checkpoint_frequency": 0, "runs_dir": str(runs_dir),
    } | changes  # fmt: skip


def train_quadrants(monkeypatch, runs_dir, **changes):
    """Returns the run's weights and its events without the wall-clock ones."""
    monkeypatch.setattr(ppo, "make_env", make_quadrants)
    ppo.main(ppo.Args(**quadrant_flags(runs_dir, **changes)))
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    events.pop("charts/SPS", None)
    return torch.load(folder / "model.pt", weights_only=True), events


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh-lan"])
def test_training_learns(monkeypatch, runs_dir, activation):
    """2.5 is random, 10 is perfect. Would catch: advantages of other rows, a sign, a policy that never moves."""
    _, events = train_quadrants(monkeypatch, runs_dir, activation=activation)
    last = [score for _, score in events["charts/episodic_return"][-40:]]
    assert np.mean(last) > 8, last


@pytest.mark.slow
def test_same_seed_same_run_whatever_the_processes_and_plain_ppo_the_same_weights(monkeypatch, tmp_path):
    """Would catch: an unseeded draw, workers that change the order, metrics that use the training's generators, a line
    of the algorithm that is gone when every line with `run.` in it is deleted."""
    short = {"total_timesteps": 1024, "metrics_frequency": 500, "update_epochs": 2}
    weights, events = train_quadrants(monkeypatch, tmp_path / "a", **short)
    same_weights, same_events = train_quadrants(monkeypatch, tmp_path / "b", **short, async_envs=True)
    other_weights, other_events = train_quadrants(monkeypatch, tmp_path / "c", total_timesteps=512, seed=2)
    assert events == same_events
    assert len(other_events["charts/episodic_return"]) == 48
    assert other_events["charts/episodic_return"] != events["charts/episodic_return"][:48]
    assert any(not torch.equal(weight, other_weights[name]) for name, weight in weights.items())

    plain, networks = module_of(without_run("ppo_atari_lan.py"), tmp_path / "plain_ppo.py"), []
    monkeypatch.setattr(plain, "make_env", make_quadrants)
    make = plain.ActorCritic
    monkeypatch.setattr(plain, "ActorCritic", lambda *arguments: networks.append(make(*arguments)) or networks[-1])
    before = sorted(tmp_path.iterdir())
    plain.main(plain.Args(**quadrant_flags(tmp_path / "plain", **short)))
    assert sorted(tmp_path.iterdir()) == before
    plain_weights = networks[0].state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name])
        assert torch.equal(weight, plain_weights[name])


@pytest.mark.slow
def test_tags_steps_and_first_minibatch_of_a_run(monkeypatch, runs_dir):
    """Every promised tag and step. At the first minibatch the policy is the one that played: clip fraction and KL 0."""
    calls = []
    ppo_loss = ppo.ppo_loss

    def recorded(*arguments):
        loss, parts = ppo_loss(*arguments)
        calls.append({name: part.item() for name, part in parts.items()})
        return loss, parts

    monkeypatch.setattr(ppo, "ppo_loss", recorded)
    _, events = train_quadrants(monkeypatch, runs_dir, total_timesteps=2600)  # five rollouts of 512 fit
    for first in calls[::16]:
        assert first["clipfrac"] == 0
        assert first["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert max(call["approx_kl"] for call in calls) > 1e-4
    losses = {f"losses/{name}" for name in (*calls[0], "explained_variance")}
    assert losses == {
        *("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac"),
        "losses/explained_variance",
    }
    names = ("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons", "feature_norm")
    names += ("dead_neurons_scaled", "effective_rank_centred")
    factors = ("dead_neurons_z_enc", "dead_neurons_z_star", "effective_rank_z_enc", "effective_rank_z_star", "kde_peak")
    representation = {f"representation/{name}" for name in (*names, *factors)} | LAYER_TAGS
    games = {"charts/episodic_return", "charts/episodic_length"}
    assert set(events) == losses | representation | games | {"charts/learning_rate"}
    # Rollouts of 512 pass a thousand at 1024, 2048 and 2560 no more; the sample of 600 is full from 1024 on.
    assert all([step for step, _ in events[tag]] == [1024, 2048] for tag in losses)
    assert all([step for step, _ in events[tag]] == [2048, 2560] for tag in representation)
    assert events["charts/learning_rate"] == [(1024, pytest.approx(0.8e-3)), (2048, pytest.approx(0.4e-3))]
    mean_entropy = np.mean([call["entropy"] for call in calls[16:32]])
    assert events["losses/entropy"][0][1] == pytest.approx(mean_entropy, rel=1e-5)
    assert (
        events["charts/episodic_length"] == [(80 * n + i, 10.0) for n in range(4 * 8) for i in range(73, 81)][: 8 * 32]
    )
    (folder,) = runs_dir.iterdir()
    sample = np.load(folder / "activations.npz")
    assert {name: sample[name].shape for name in sample} == dict.fromkeys(("z", "z_enc", "z_star"), (600, 512))
    sequences = {tag: [step for step, _ in points] for tag, points in events.items()}
    assert all(steps == sorted(set(steps)) for steps in sequences.values())


@pytest.mark.slow
@pytest.mark.parametrize("samples", [520, 1300])
def test_the_newest_observations_are_measured(monkeypatch, runs_dir, samples):
    """In the order in which they were played, from one rollout of 512 and part of the last, or of the last two."""
    seen, measured = [], []
    forward, record = ppo.ActorCritic.forward, metrics.record_and_measure

    def watched_forward(network, observations):
        if network.training and not torch.is_grad_enabled():
            seen.append(observations.clone())
        return forward(network, observations)

    def watched_record(network, modules, observations, *more, **keep):
        measured.append((len(seen), observations.clone()))
        return record(network, modules, observations, *more, **keep)

    monkeypatch.setattr(ppo.ActorCritic, "forward", watched_forward)
    monkeypatch.setattr(metrics, "record_and_measure", watched_record)
    train_quadrants(
        monkeypatch, runs_dir, total_timesteps=2048, metrics_frequency=1000, metrics_samples=samples, update_epochs=1
    )
    assert len(measured) == (3 if samples < 1024 else 2)  # at 1024 and 2048, and at the end
    for count, sample in measured:
        assert count % 65 == 0  # 64 steps and the bootstrap
        played = torch.cat([observations for i, observations in enumerate(seen[:count]) if i % 65 != 64])
        assert torch.equal(sample, played[-samples:])


@pytest.mark.filterwarnings("error")
def test_early_stop_ends_an_updates_passes(monkeypatch, runs_dir):
    """A policy that has moved further than any target stops after the first of four passes. Would also catch: a
    complaint of numpy about the mean return of a run in which no game ended."""
    calls = []
    ppo_loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *a: calls.append(0) or ppo_loss(*a))
    changes = {"total_timesteps": 64, "num_steps": 8, "metrics_frequency": 0, "target_kl": 1e-9}
    train_quadrants(monkeypatch, runs_dir, **changes)
    assert len(calls) == 4


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(monkeypatch, runs_dir):
    """Would catch: training on for days after divergence."""
    ppo_loss = ppo.ppo_loss

    def diverging(*arguments):
        loss, parts = ppo_loss(*arguments)
        return loss, parts | {"value_loss": parts["value_loss"] * float("inf")}

    monkeypatch.setattr(ppo, "ppo_loss", diverging)
    with pytest.raises(RunFailed, match=r"before step 1,024: .*value_loss inf.*none was logged"):
        train_quadrants(monkeypatch, runs_dir, num_steps=32, total_timesteps=1500, metrics_frequency=0)
    (folder,) = runs_dir.iterdir()
    assert not (folder / "model.pt").exists()
