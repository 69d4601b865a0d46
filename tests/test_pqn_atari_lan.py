"""pqn_atari_lan.py: the network, the mathematics, and training that learns."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYER_TAGS, make_quadrants, module_of, read_events, stacked, without_run
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_atari_lan as dqn
import pqn_atari_lan as pqn
from lan_utils import cli
from lan_utils.cli import RunFailed

# ------------------------------------------------------------------------------------------------ flags

OFFICIAL = {  # as the configuration of purejaxql's pqn_atari gives them
    "total_timesteps": 10_000_000,
    "learning_rate": 2.5e-4,
    "anneal_lr": False,
    "adam_eps": 1e-8,
    "gamma": 0.99,
    "q_lambda": 0.65,
    "num_envs": 128,
    "num_steps": 32,
    "num_minibatches": 32,
    "update_epochs": 2,
    "start_e": 1.0,
    "end_e": 0.001,
    "exploration_fraction": 0.1,
    "max_grad_norm": 10.0,
}


def test_defaults_are_the_official_ones(monkeypatch, capsys):
    """Would catch: a default that drifts from the authors' implementation, in the code or in --help."""
    args = pqn.Args()
    assert {name: getattr(args, name) for name in OFFICIAL} == OFFICIAL
    assert args.layer_norm == "channels"
    monkeypatch.setattr("sys.argv", ["pqn_atari_lan.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(pqn.Args)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, value in OFFICIAL.items():
        flag = text.split(f" --{name.replace('_', '-')}")[1].split("(official)")[1]
        assert flag.startswith(f" (default: {value})"), name
    assert all(f" --{f.name.replace('_', '-')}" in text for f in dataclasses.fields(pqn.Args))
    assert args.exp_name == Path(pqn.__file__).stem  # the script's name: no two scripts share a folder


# ---------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("activation", ["relu", "tanh-2xlan", "layernorm"])
def test_initialisation(activation):
    """Would catch: fan out for fan in, a normal that is not cut at two standard deviations or not scaled up again, a
    bias that is drawn, a factor of a LaN that keeps torch's own initialisation, a head with the gain of ReLU."""
    torch.manual_seed(1)
    network = pqn.QNetwork(6, activation)
    fan_in = {"conv1": 4 * 64, "conv2": 32 * 16, "conv3": 64 * 9, "z": 3136, "q": 512}
    found = 0
    for name, layer in network.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            kind = next(kind for kind in fan_in if kind in name.split("."))
            std = ((1 if kind == "q" else 2) / fan_in[kind]) ** 0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05), name
            assert 0.95 * 2 * std < layer.weight.abs().max().item() * 0.8796 <= 2 * std * 1.0001, name
            assert (layer.bias == 0).all()
            found += 1
    assert found == 4 + (3 if activation == "tanh-2xlan" else 1)


def norms(network):
    return {
        name: type(m).__name__
        for name, m in network.named_modules()
        if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))
    }


@pytest.mark.parametrize("activation", ["relu", "tanh-lan", "layernorm-lan", "layernorm"])
@pytest.mark.parametrize(("layer_norm", "name"), [("channels", "ChannelNorm"), ("map", "MapNorm")])
def test_a_norm_stands_before_every_activation_once(activation, layer_norm, name):
    """Would catch: a factor without its norm, a norm behind the activation, a recipe that is normalised twice, a
    recipe that keeps its own axes."""
    for conv_activation in ("relu", "layernorm-lan"):
        network = pqn.QNetwork(4, activation, conv_activation, layer_norm=layer_norm)
        factors = [
            factor
            for layer in (network.encoder.conv1, network.encoder.conv2, network.encoder.conv3, network.encoder.z)
            for factor in layer.factors.values()
        ]
        assert all(type(factor[1]).__name__ == name and len(factor) == 3 for factor in factors)
        assert len(norms(network)) == len(factors)


def test_without_a_norm_it_is_the_network_of_dqn():
    """Would catch: --layer-norm none that takes away the norm of a recipe that has one."""
    for activation in ("relu", "tanh-2xlan", "layernorm", "crelu"):
        ours, theirs = pqn.QNetwork(4, activation, layer_norm="none"), dqn.QNetwork(4, activation)
        assert [(n, w.shape) for n, w in ours.named_parameters()] == [
            (n, w.shape) for n, w in theirs.named_parameters()
        ]
        ours.load_state_dict(theirs.state_dict())
        observations = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
        assert torch.equal(ours(observations), theirs(observations))
    assert list(norms(pqn.QNetwork(4, "layernorm", layer_norm="none")).values()) == ["ChannelNorm"]


@torch.no_grad()
@pytest.mark.parametrize("layer_norm", ["channels", "map"])
def test_the_axes_of_the_norms(layer_norm):
    """Layer by layer in plain torch. Would catch: statistics over the batch, over a channel's positions alone, over
    the wrong one of the two sets of axes."""
    network = pqn.QNetwork(4, "relu", layer_norm=layer_norm)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    observations = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    x = observations / 255
    for name in ("conv1", "conv2", "conv3", "z"):
        layer, norm, _ = getattr(network.encoder, name).factors["enc"]
        x = layer(x.flatten(1) if name == "z" else x)
        axes = (1,) if layer_norm == "channels" or name == "z" else (1, 2, 3)
        centred = x - x.mean(axes, keepdim=True)
        x = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        shape = (1, -1) + (1,) * (x.dim() - 2)
        x = F.relu(x * norm.weight.reshape(shape) + norm.bias.reshape(shape))
    torch.testing.assert_close(network(observations), network.q(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ mathematics


def returns_of(rewards, next_values, terminated, ended, gamma, lam):
    columns = (
        torch.tensor(column, dtype=torch.float64)[:, None] for column in (rewards, next_values, terminated, ended)
    )
    return pqn.lambda_returns(*columns, gamma, lam)[:, 0].tolist()


def test_lambda_returns_by_hand():
    """gamma = lambda = 0.5, five steps: a termination after the second, a truncation after the fourth.

    From the end: 1 + .5*6 = 4 (the rollout ends); 2 + .5*8 = 6 (truncated: its true last observation is worth 8);
    0 + .5*(.5*4 + .5*6) = 2.5; 3 (terminated); 1 + .5*(.5*2 + .5*3) = 2.25.
    Would catch: a sum across an episode's end, the mistake of a widely copied public implementation, which gives
    3 + .5*.5*2.5 = 3.625 for the second step; a truncation taken for a termination, as in others, which gives 2 for
    the fourth; one that is bootstrapped from the next episode's first observation.
    """
    found = returns_of([1, 3, 0, 2, 1], [2, 99, 4, 8, 6], [0, 1, 0, 0, 0], [0, 1, 0, 1, 0], 0.5, 0.5)
    assert found == [2.25, 3, 2.5, 6, 4]


def test_lambda_returns_where_episodes_end_in_the_last_step_and_in_consecutive_steps():
    """gamma = 0.5, lambda = 1: truncated, terminated, truncated, goes on, terminated in the rollout's last step.

    Would catch: an end that is masked one step late, a bootstrap behind a termination in the last step.
    """
    found = returns_of([1, 2, 3, 4, 5], [10, 99, 20, 7, 99], [0, 1, 0, 0, 1], [1, 1, 1, 0, 1], 0.5, 1.0)
    assert found == [1 + 5, 2, 3 + 10, 4 + 0.5 * 5, 5]
    assert returns_of([5], [8], [0], [1], 0.5, 1.0) == [9]


def brute_force(rewards, next_values, terminated, ended, gamma, lam, t):
    """The weighted sum of all n-step returns from step t on that stay in its episode and in the rollout."""
    n_step, discounted = [], 0.0
    for n in range(len(rewards) - t):
        discounted += gamma**n * rewards[t + n]
        n_step.append(discounted + gamma ** (n + 1) * (1 - terminated[t + n]) * next_values[t + n])
        if ended[t + n]:
            break
    weights = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
    return sum(weight * value for weight, value in zip(weights, n_step, strict=True))


@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([0.0, 0.65, 1.0]), st.sampled_from([0.2, 0.7]))
@settings(max_examples=60, deadline=None)
def test_lambda_returns_agree_with_the_sum_of_all_n_step_returns(seed, steps, lam, ends):
    """Would catch: a weight that is one power of lambda off, an end that only stops the bootstrap, columns mixed."""
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, steps, 3))
    ended = (rng.random((steps, 3)) < ends).astype(float)
    terminated = ended * (rng.random((steps, 3)) < 0.5)
    arrays = (rewards, next_values, terminated, ended)
    found = pqn.lambda_returns(*map(torch.tensor, arrays), 0.9, lam)
    expected = [[brute_force(*(array[:, i] for array in arrays), 0.9, lam, t) for i in range(3)] for t in range(steps)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


class Table(torch.nn.Module):
    """Counts as a network in the mathematics: fixed Q-values."""

    def __init__(self, q):
        super().__init__()
        self.q = torch.nn.Parameter(q)

    def forward(self, observations):
        return self.q


def test_loss_by_hand():
    """Would catch: a lost half, a sum for the mean, a gradient that flows into other actions."""
    network = Table(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    loss, terms = pqn.td_loss(network, pqn.Batch(torch.zeros(2), torch.tensor([1, 0]), torch.tensor([1.0, 5.0])))
    assert loss.item() == terms["td_loss"].item() == 0.5 * (1 + 4) / 2
    assert terms["q_values"].item() == 2.5
    assert not terms["td_loss"].requires_grad
    loss.backward()
    assert network.q.grad.tolist() == [[0, 0.5], [-1, 0]]


def random_batch(generator):
    observations = torch.randint(256, (64, 4, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(4, (64,), generator=generator)
    return pqn.Batch(observations, actions, torch.randn(64, generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "loss_tolerance", "gradient_tolerance"),
    [("amp", 2e-2, 5e-2), ("compile", 1e-5, 1e-5)],
)
def test_amp_and_compile_only_round_differently(flags, loss_tolerance, gradient_tolerance):
    """The first three updates against float32: losses and the first gradient, relative.

    Would catch: a loss computed in bfloat16, a compiled graph that holds an old batch or old weights.
    """

    def first_updates(amp, compiled):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        network = pqn.QNetwork(4, "tanh-lan", amp=amp).to(memory_format=torch.channels_last)
        optimizer = torch.optim.RAdam(network.parameters(), lr=2.5e-4)
        loss_function = torch.compile(pqn.td_loss, disable=not compiled)
        batches = [random_batch(generator) for _ in range(3)]
        losses = []
        for update in range(3):
            loss, _ = loss_function(network, batches[update])
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
def test_amp_does_not_round_q_values():
    """At 20 bfloat16 steps by 1/8: actions would tie. Would catch: a head in bfloat16."""
    network = pqn.QNetwork(4, "tanh-lan", amp=True)
    network.q.bias.fill_(20.0)
    observations = torch.randint(256, (256, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    q_values = network(observations)
    assert q_values.dtype == torch.float32
    assert len(set(q_values.flatten().tolist())) > 1000


def test_the_update_never_waits_for_the_device(monkeypatch):
    """On torch's meta device any .item(), and any tensor made on the CPU, raises."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype: autocast("cpu", dtype))  # there is none for meta
    row = torch.zeros(64, device="meta")
    batch = pqn.Batch(torch.zeros(64, 4, 84, 84, dtype=torch.uint8, device="meta"), row.long(), row)
    for amp, layer_norm in ((False, "channels"), (True, "channels"), (False, "map")):
        network = pqn.QNetwork(6, "tanh-lan", amp=amp, layer_norm=layer_norm).to("meta")
        optimizer = torch.optim.RAdam(network.parameters(), lr=1e-4)
        loss, terms = pqn.td_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10)
        optimizer.step()
    columns = [torch.zeros(8, 2, device="meta")] * 4
    assert pqn.lambda_returns(*columns, 0.99, 0.65).device.type == terms["q_values"].device.type == "meta"


# -------------------------------------------------------------------------------- play, and ends of episodes


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
    """A network whose largest Q-value is the newest pixel, of action 1."""

    def __init__(self, *arguments):
        super().__init__()
        self.q = torch.nn.Linear(1, 2)

    def forward(self, observations):
        newest = observations[:, 3, 0, 0].float()
        return torch.stack((newest - 1, newest), dim=1) + 0 * self.q.bias.sum()


@pytest.mark.parametrize("async_envs", [False, True])
def test_truncation_bootstraps_from_the_true_last_observation(monkeypatch, runs_dir, async_envs):
    """What reaches lambda_returns in a rollout of 13 steps: an episode of 5 that is truncated, one of 7 that
    terminates. Would catch: a transition across the reset (next-step autoreset), its observation as bootstrap."""
    monkeypatch.setattr(pqn, "make_env", lambda *arguments: stacked(Counting()))
    monkeypatch.setattr(pqn, "QNetwork", ValueIsNewestPixel)
    calls = []
    lambda_returns = pqn.lambda_returns
    monkeypatch.setattr(pqn, "lambda_returns", lambda *a: calls.append(a) or lambda_returns(*a))
    changes = {"num_envs": 2, "num_steps": 13, "num_minibatches": 1, "total_timesteps": 26, "metrics_frequency": 0}
    pqn.main(pqn.Args(**changes, async_envs=async_envs, runs_dir=str(runs_dir), checkpoint_frequency=0))
    rewards, next_values, terminated, ended = (column[:, 1].tolist() for column in calls[0][:4])
    assert calls[0][4:] == (0.99, 0.65)
    assert rewards == [1] * 13
    assert next_values[:5] == [101, 102, 103, 104, 105]
    assert next_values[5:11] == [1, 2, 3, 4, 5, 6]
    assert next_values[12] == 101
    assert terminated == [0] * 11 + [1, 0]
    assert ended == [0, 0, 0, 0, 1] + [0] * 6 + [1, 0]
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    # Two games that end in the same vector step are logged at agent steps of their own: 5 * 2 - 1 and 5 * 2.
    assert events["charts/episodic_length"] == [(9, 5), (10, 5), (23, 7), (24, 7)]


def test_exploration_is_each_environments_own_and_falls_with_the_agent_steps(monkeypatch, runs_dir):
    """Greedy is action 1. Over 40 steps of 50 environments epsilon falls from 1 to 0.1 in the first 20 steps.

    Would catch: one draw for all environments, a schedule in iterations, that starts after the first rollout or that
    lasts for another fraction; exploration without the greedy action.
    """
    monkeypatch.setattr(pqn, "make_env", lambda *arguments: stacked(Counting()))
    monkeypatch.setattr(pqn, "QNetwork", ValueIsNewestPixel)
    played, step = [], pqn.VectorGames.step
    monkeypatch.setattr(pqn.VectorGames, "step", lambda games, a: played.append(a.copy()) or step(games, a))
    flags = {"num_envs": 50, "num_steps": 10, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 2000}
    flags |= {"exploration_fraction": 0.5, "end_e": 0.1, "metrics_frequency": 0, "async_envs": False}
    pqn.main(pqn.Args(**flags, runs_dir=str(runs_dir), checkpoint_frequency=0))
    explored = 1 - np.array(played)  # half of epsilon
    epsilon = np.maximum(1 - 0.9 * np.arange(40) / 20, 0.1)
    assert explored.shape == (40, 50)
    for steps in (slice(0, 10), slice(10, 20), slice(20, 40)):
        n = explored[steps].size
        assert explored[steps].mean() == pytest.approx(epsilon[steps].mean() / 2, abs=3 * 0.5 / n**0.5)
    assert 0 < explored[0].sum() < 50
    (folder,) = runs_dir.iterdir()
    assert read_events(folder)["charts/epsilon"] == [
        (1000, pytest.approx(1 - 0.9 * 19 / 20)),
        (2000, pytest.approx(0.1)),
    ]


def test_an_evaluation_does_not_explore(monkeypatch):
    """Would catch: a share of random actions, as DQN's evaluation has one."""
    network = ValueIsNewestPixel()
    taken = []
    monkeypatch.setattr(pqn, "make_env", make_quadrants)
    step = gym.Wrapper.step

    def watched(env, action):
        taken.append(action)
        return step(env, action)

    monkeypatch.setattr(gym.Wrapper, "step", watched)
    assert len(list(pqn.evaluate(network, pqn.Args(), games=5))) == 5
    assert len(taken) >= 50
    assert set(taken) == {1}


# --------------------------------------------------------------------------------- whole training runs


def quadrant_flags(runs_dir, **changes):
    return {
        "activation": "tanh-lan", "total_timesteps": 5120, "num_steps": 64, "num_envs": 8, "gamma": 0.5,
        "num_minibatches": 8, "learning_rate": 1e-3, "async_envs": False, "metrics_frequency": 2000,
        "metrics_samples": 600, "checkpoint_frequency": 0, "exploration_fraction": 0.5, "runs_dir": str(runs_dir),
    } | changes  # fmt: skip


def train_quadrants(monkeypatch, runs_dir, **changes):
    """Returns the run's weights and its events without the wall-clock ones."""
    monkeypatch.setattr(pqn, "make_env", make_quadrants)
    pqn.main(pqn.Args(**quadrant_flags(runs_dir, **changes)))
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    events.pop("charts/SPS", None)
    return torch.load(folder / "model.pt", weights_only=True), events


class Chain(gym.Env):
    """Four states, which the picture shows. Action 0 pays 0.3 and ends the game; action 1 goes on, and pays 1 at the
    end of the chain."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return self._picture(), {}

    def step(self, action):
        if action == 0:
            return self._picture(), 0.3, True, False, {}
        self.state += 1
        return self._picture(), float(self.state == 4), self.state == 4, False, {}

    def _picture(self):
        picture = np.zeros((84, 84, 1), np.uint8)
        picture[:, 21 * self.state : 21 * self.state + 21] = 255
        return picture


@pytest.mark.slow
def test_q_values_converge_to_the_known_optimum(monkeypatch, runs_dir):
    """gamma = 0.7: Q*(s, 0) = 0.3 and Q*(s, 1) = 0.7^(3 - s), in the first state 0.343 against 0.3: the long way is
    just worth it. Would catch: a sum across an episode's end, which adds to every return; a return one step off."""
    monkeypatch.setattr(pqn, "make_env", lambda *arguments: stacked(Chain()))
    flags = {"total_timesteps": 12_800, "num_envs": 16, "num_steps": 16, "num_minibatches": 4, "end_e": 0.05}
    flags |= {"activation": "relu", "gamma": 0.7, "learning_rate": 1e-3, "metrics_frequency": 0, "anneal_lr": True}
    flags |= {"exploration_fraction": 0.5, "async_envs": False, "checkpoint_frequency": 0, "num_threads": 1}
    pqn.main(pqn.Args(**flags, runs_dir=str(runs_dir)))
    (folder,) = runs_dir.iterdir()
    network = pqn.QNetwork(2, "relu")
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    env, found = stacked(Chain()), []
    obs, _ = env.reset()
    for _ in range(4):
        found.append(network(torch.from_numpy(obs)[None])[0].tolist())
        obs, *_ = env.step(1)
    expected = [[0.3, 0.7 ** (3 - state)] for state in range(4)]
    np.testing.assert_allclose(found, expected, atol=0.04)


@pytest.mark.slow
def test_same_seed_same_run_whatever_the_processes_and_plain_pqn_the_same_weights(monkeypatch, tmp_path):
    """Would catch: an unseeded draw, workers that change the order, metrics that use the training's generators, a line
    of the algorithm that is gone when every line with `run.` in it is deleted."""
    short = {"total_timesteps": 1024, "metrics_frequency": 500}
    weights, events = train_quadrants(monkeypatch, tmp_path / "a", **short)
    same_weights, same_events = train_quadrants(monkeypatch, tmp_path / "b", **short, async_envs=True)
    other_weights, other_events = train_quadrants(monkeypatch, tmp_path / "c", total_timesteps=512, seed=2)
    assert events == same_events
    assert other_events["charts/episodic_return"] != events["charts/episodic_return"][:48]
    assert any(not torch.equal(weight, other_weights[name]) for name, weight in weights.items())

    plain, networks = module_of(without_run("pqn_atari_lan.py"), tmp_path / "plain_pqn.py"), []
    monkeypatch.setattr(plain, "make_env", make_quadrants)
    make = plain.QNetwork
    monkeypatch.setattr(plain, "QNetwork", lambda *arguments: networks.append(make(*arguments)) or networks[-1])
    before = sorted(tmp_path.iterdir())
    plain.main(plain.Args(**quadrant_flags(tmp_path / "plain", **short)))
    assert sorted(tmp_path.iterdir()) == before
    plain_weights = networks[0].state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name])
        assert torch.equal(weight, plain_weights[name])


@pytest.mark.slow
def test_tags_and_steps_of_a_run(monkeypatch, runs_dir):
    """Every promised tag and step. Would catch: the last minibatch's loss for the mean over them."""
    calls = []
    td_loss = pqn.td_loss

    def recorded(*arguments):
        loss, terms = td_loss(*arguments)
        calls.append({name: term.item() for name, term in terms.items()})
        return loss, terms

    monkeypatch.setattr(pqn, "td_loss", recorded)
    _, events = train_quadrants(monkeypatch, runs_dir, total_timesteps=2600, anneal_lr=True)  # five rollouts of 512 fit
    assert len(calls) == 5 * 2 * 8
    names = ("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons", "feature_norm")
    names += ("dead_neurons_scaled", "effective_rank_centred", "dead_neurons_z_enc", "dead_neurons_z_star", "kde_peak")
    names += ("effective_rank_z_enc", "effective_rank_z_star")
    representation = {f"representation/{name}" for name in names} | LAYER_TAGS
    losses = {"losses/td_loss", "losses/q_values"}
    charts = {f"charts/{name}" for name in ("episodic_return", "episodic_length", "epsilon", "learning_rate")}
    assert set(events) == losses | representation | charts
    # Rollouts of 512 pass a thousand at 1024, 2048 and 2560 no more; the sample of 600 is full from 1024 on.
    assert all([step for step, _ in events[tag]] == [1024, 2048] for tag in losses)
    assert all([step for step, _ in events[tag]] == [2048, 2560] for tag in representation)
    assert events["charts/learning_rate"] == [(1024, pytest.approx(0.8e-3)), (2048, pytest.approx(0.4e-3))]
    for name in ("td_loss", "q_values"):
        assert events[f"losses/{name}"][0][1] == pytest.approx(np.mean([call[name] for call in calls[16:32]]), rel=1e-5)


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(monkeypatch, runs_dir):
    """Would catch: training on for days after divergence."""
    td_loss = pqn.td_loss

    def diverging(*arguments):
        loss, terms = td_loss(*arguments)
        return loss, terms | {"td_loss": terms["td_loss"] * float("inf")}

    monkeypatch.setattr(pqn, "td_loss", diverging)
    with pytest.raises(RunFailed, match=r"before step 1,024: .*td_loss inf.*none was logged"):
        train_quadrants(monkeypatch, runs_dir, num_steps=32, total_timesteps=1500, metrics_frequency=0)
    (folder,) = runs_dir.iterdir()
    assert not (folder / "model.pt").exists()
