"""dqn_atari_lan.py: the network, the replay memory, the mathematics, and training that learns."""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_quadrants, read_events, run_script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer

import dqn_atari_lan as dqn

ACTIVATIONS = list(dqn.REPRESENTATIONS)

# ------------------------------------------------------------------------------------------------ flags

TABLE_3 = {  # the paper's, as printed there; frames are agent steps
    "learning_rate": 1e-4,
    "gamma": 0.99,
    "buffer_size": 1_000_000,
    "batch_size": 32,
    "target_network_frequency": 1000,
    "start_e": 1.0,
    "end_e": 0.1,
    "learning_starts": 80_000,
    "adam_eps": 1e-5,
}


def test_defaults_are_table_3():
    """Would catch: a default that drifts from the paper, in the code or in --help."""
    args = dqn.Args()
    assert {name: getattr(args, name) for name in TABLE_3} == TABLE_3
    assert args.exploration_fraction * args.total_timesteps == 1_000_000
    assert (args.total_timesteps, args.train_frequency, args.double_q) == (10_000_000, 4, True)
    text = " ".join(run_script("dqn_atari_lan.py", "--help").stdout.replace("│", " ").split())
    for name, value in TABLE_3.items():
        flag = text.split(f" --{name.replace('_', '-')} ")[1].split(" --")[0]
        assert f"(Table 3) (default: {value})" in flag, name
    assert all(f" --{f.name.replace('_', '-')}" in text for f in dataclasses.fields(dqn.Args))


# --------------------------------------------------------------------------------------- representation


def numpy_layer(layer, x):
    return x @ layer.weight.detach().numpy().astype(float).T + layer.bias.detach().numpy()


def numpy_representation(activation, r, x):
    """Each activation's formula, as in the README's table; r.layers gives the weights."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    a = [numpy_layer(layer, x) for layer in r.layers.values()]
    match activation:
        case "relu":
            return relu(a[0])
        case "tanh" | "wide-1024":
            return np.tanh(a[0])
        case "sigmoid":
            return sigmoid(a[0])
        case "selu":
            return 1.0507009873554805 * np.where(a[0] > 0, a[0], 1.6732632423543772 * (np.exp(a[0]) - 1))
        case "tanh-lan":
            return np.tanh(a[0]) * np.tanh(a[1])
        case "tanh-2xlan":
            return np.tanh(a[0]) * np.tanh(a[1]) * np.tanh(a[2])
        case "tanh-addlan":
            return np.tanh(a[0]) + np.tanh(a[1])
        case "relu-lan":
            return relu(a[0]) * relu(a[1])
        case "sigmoid-lan":
            return sigmoid(a[0]) * sigmoid(a[1])
        case "layernorm":
            centred = a[0] - a[0].mean(axis=1, keepdims=True)
            return np.tanh(centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_representation_is_its_formula_and_every_factor_learns(activation):
    """Would catch: a factor used twice, a sum for a product, norm after tanh, a factor cut off from the gradient."""
    torch.manual_seed(1)
    r = dqn.Representation(40, activation)
    x = torch.randn(7, 40)
    z = r(x)
    np.testing.assert_allclose(z.detach().numpy(), numpy_representation(activation, r, x.numpy()), atol=1e-5)
    assert z.shape == (7, 1024 if activation == "wide-1024" else 512)
    z.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in r.parameters())
    weights = [layer.weight for layer in r.layers.values()]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_parameter_counts():
    """Worked out by hand for 4 actions. Would catch: a missing bias, a factor too many."""
    counts = {a: sum(p.numel() for p in dqn.QNetwork(4, a).parameters()) for a in ACTIVATIONS}
    expected = {"relu": 1_686_180, "layernorm": 1_687_204, "tanh-lan": 3_292_324, "wide-1024": 3_294_372}
    expected |= {"tanh-2xlan": 4_898_468}
    expected |= dict.fromkeys(("tanh", "sigmoid", "selu"), 1_686_180)
    expected |= dict.fromkeys(("tanh-addlan", "relu-lan", "sigmoid-lan"), 3_292_324)
    assert counts == expected


def test_the_network_divides_by_255_and_its_convolutions_keep_relu():
    """Would catch: frames fed as 0..255, or the chosen activation put into the trunk."""
    network = dqn.QNetwork(4, "sigmoid")
    observations = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    x = observations.double() / 255
    for convolution, stride in ((network.trunk[0], 4), (network.trunk[2], 2), (network.trunk[4], 1)):
        x = torch.nn.functional.conv2d(x, convolution.weight.double(), convolution.bias.double(), stride).clamp(min=0)
    q = network.q(network.representation(x.flatten(1).float()))
    torch.testing.assert_close(network(observations), q, atol=1e-5, rtol=1e-4)


def test_activations_gives_z_and_the_factors_whose_product_it_is():
    network = dqn.QNetwork(4, "tanh-2xlan")
    observations = torch.randint(0, 256, (300, 4, 84, 84), dtype=torch.uint8)  # more than one chunk
    sample = dqn.activations(network, observations, torch.device("cpu"))
    assert list(sample) == ["z", "z_enc", "z_star", "z_star2"]
    torch.testing.assert_close(sample["z"], sample["z_enc"] * sample["z_star"] * sample["z_star2"])
    torch.testing.assert_close(network.q(sample["z"]), network(observations), atol=1e-5, rtol=1e-4)
    assert list(dqn.activations(dqn.QNetwork(4, "relu"), observations[:2], torch.device("cpu"))) == ["z"]


# ---------------------------------------------------------------------------------------- replay memory


def play(memory, stacks, episodes):
    """Feed both memories made-up episodes (length, truncated?); returns which transitions terminated."""
    number, terminations = 0, []
    for length, truncated in episodes:
        observation = np.full((4, 84, 84), number % 251, np.uint8)
        for step in range(length):
            number += 1
            done = step == length - 1
            next_frame = np.full((84, 84), number % 251, np.uint8)
            next_observation = np.concatenate((observation[1:], next_frame[None]))
            action, reward = number % 18, float(number % 3 - 1)
            terminated = done and not truncated
            memory.add(observation[3], action, reward, terminated, done and truncated, next_frame)
            stacks.add(
                observation, next_observation, np.array([action]), np.array([reward]), np.array([terminated]), [{}]
            )
            terminations.append(terminated)
            observation = next_observation
        number += 1  # the next episode begins with a frame of its own
    return terminations


def sb3_memory(capacity):
    return ReplayBuffer(
        capacity,
        gym.spaces.Box(0, 255, (4, 84, 84), np.uint8),
        gym.spaces.Discrete(18),
        handle_timeout_termination=False,
    )


class SmallSegments(dqn.ReplayMemory):
    SEGMENT = 7


def assert_same_memory(memory, oracle, terminations):
    numbers = np.arange(memory.added - len(memory), memory.added)
    assert len(numbers) == oracle.size()
    place, i = numbers % oracle.buffer_size, numbers % memory.kept
    frames = memory.frames(numbers).numpy()
    np.testing.assert_array_equal(frames[:, :4], oracle.observations[place, 0])
    lives = ~np.array(terminations)[numbers]
    np.testing.assert_array_equal(frames[lives, 1:], oracle.next_observations[place, 0][lives])
    np.testing.assert_array_equal(memory.actions[i], oracle.actions[place, 0, 0])
    np.testing.assert_array_equal(memory.rewards[i], oracle.rewards[place, 0])
    np.testing.assert_array_equal(memory.terminated[i], oracle.dones[place, 0].astype(bool))


EPISODES = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=14)


@given(EPISODES, st.integers(1, 30))
@example([(1, True)] * 10, 4)  # only first frames, every one truncated
@example([(40, False)], 5)  # wraps around inside one episode
@example([(15, False)], 7)  # a segment has just begun, the one before is still reached
@settings(max_examples=80, deadline=None)
def test_replay_is_what_a_memory_of_full_stacks_would_be(episodes, capacity):
    """Against SB3's ReplayBuffer. Would catch: stacks over an episode start or the write head, a lost last frame of a
    truncated episode, a segment dropped too early, an off-by-one after the wrap."""
    memory, oracle = SmallSegments(capacity), sb3_memory(capacity)
    terminations = play(memory, oracle, episodes)
    assert_same_memory(memory, oracle, terminations)
    assert len(memory.segments) <= (capacity + 3) // 7 + 2  # old segments do leave
    assert len(memory.final_frames) <= capacity


@given(EPISODES, EPISODES, st.integers(1, 30), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_replay_survives_export_and_restore(before, after, capacity, cut):
    """Exports in two segments, restored into a fresh memory, then both go on. Would catch: any field left behind."""
    memory, oracle = SmallSegments(capacity), sb3_memory(capacity)
    terminations = play(memory, oracle, before)
    oldest = max(0, memory.added - memory.kept)
    cut = min(max(cut, oldest), memory.added)
    spans = [(start, stop) for start, stop in ((oldest, cut), (cut, memory.added)) if start < stop]
    copy = SmallSegments(capacity)
    copy.restore(memory.added, [memory.export(*span) for span in spans], memory.newest_frame, memory.starts_episode)
    assert_same_memory(copy, oracle, terminations)
    first, second = sb3_memory(capacity), sb3_memory(capacity)
    assert play(memory, first, after) == play(copy, second, after)
    numbers = np.arange(memory.added - len(memory), memory.added)
    assert torch.equal(memory.frames(numbers), copy.frames(numbers))


def test_sampling_is_uniform_and_reaches_both_ends():
    """Would catch: the newest or the oldest transition never sampled, rewards of other rows."""
    memory = SmallSegments(10)
    play(memory, sb3_memory(10), [(25, False)])
    rng = np.random.default_rng(0)
    batch = memory.sample(20_000, rng, torch.device("cpu"))
    newest = batch.frames[:, 3, 0, 0]
    counts = torch.bincount(newest.long(), minlength=26)
    assert (counts[:15] == 0).all()
    assert (counts[15:25] > 1700).all()
    assert (batch.actions == (newest.long() + 1) % 18).all()
    assert (batch.rewards == (newest.long() + 1) % 3 - 1).all()
    assert batch.frames.dtype == torch.uint8
    assert (batch.terminated == (newest == 24).float()).all()


# ------------------------------------------------------------------------------------------ mathematics


def test_linear_schedule_at_its_ends_in_the_middle_and_beyond():
    """Would catch: a schedule that ignores its step."""
    values = [dqn.linear_schedule(1.0, 0.1, 1000, step) for step in (0, 500, 1000, 5000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert dqn.linear_schedule(1.0, 0.1, 0, 0) == 0.1


def test_td_targets_by_hand():
    """Online prefers action 1, the target network values it 3 (Double) while its own maximum is 7 (plain). A
    terminated transition is worth its reward alone, a truncated one bootstraps: it is not terminated."""
    rewards, terminated = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 1.0])
    next_q, online = torch.tensor([[7.0, 3.0], [7.0, 3.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    double = dqn.td_targets(rewards, terminated, next_q, online, gamma=0.5)
    plain = dqn.td_targets(rewards, terminated, next_q, next_q, gamma=0.5)
    assert double.tolist() == [1 + 0.5 * 3, -1]
    assert plain.tolist() == [1 + 0.5 * 7, -1]


class LookupNetwork(torch.nn.Module):
    """Q-values by the value of an observation's newest pixel: counts as a network in the mathematics."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))

    def forward(self, observations):
        return self.table[observations[:, 3, 0, 0].long()]


@pytest.mark.parametrize(("double_q", "next_value"), [(True, 3.0), (False, 7.0)])
def test_td_loss_by_hand(double_q, next_value):
    """Would catch: this observation's frames for the next one's, the target network's gradient, Huber for squares."""
    online, target = LookupNetwork([[1.0, 5.0], [0.0, 2.0]]), LookupNetwork([[0.0, 0.0], [7.0, 3.0]])
    frames = torch.zeros(2, 5, 84, 84, dtype=torch.uint8)
    frames[:, 4] = 1  # the next observation's newest frame
    batch = dqn.Batch(frames, torch.tensor([1, 0]), torch.tensor([10.0, 4.0]), torch.tensor([0.0, 1.0]))
    loss, q_values = dqn.td_loss(online, target, batch, 0.5, double_q)
    errors = [5 - (10 + 0.5 * next_value), 1 - 4]
    assert loss.item() == pytest.approx(sum(e**2 for e in errors) / 2)
    assert q_values.item() == 3
    loss.backward()
    assert online.table.grad.tolist() == [[errors[1], errors[0]], [0, 0]]
    assert target.table.grad is None


def random_batch(generator):
    frames = torch.randint(256, (32, 5, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(4, (32,), generator=generator)
    return dqn.Batch(frames, actions, torch.randn(32, generator=generator).sign(), torch.zeros(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "loss_tolerance", "gradient_tolerance"),
    [("amp", 1e-2, 5e-2), ("compile", 1e-5, 1e-5), ("amp compile", 1e-2, 5e-2)],
)
def test_amp_and_compile_only_round_differently(flags, loss_tolerance, gradient_tolerance):
    """The first three updates against float32: losses and the first gradient, relative.

    Would catch: a target or a loss computed in bfloat16, a compiled graph that holds an old batch or old weights.
    """

    def first_updates(amp, compiled):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        network = dqn.QNetwork(4, "tanh-lan").to(memory_format=torch.channels_last)
        target_network = copy.deepcopy(network)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, eps=1e-5, fused=True)
        loss_function = torch.compile(dqn.td_loss, disable=not compiled)
        batches = [random_batch(generator) for _ in range(3)]
        losses = []
        for update in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss, _ = loss_function(network, target_network, batches[update], 0.99, double_q=True)
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


@pytest.mark.parametrize("double_q", [True, False])
def test_the_update_never_waits_for_the_device(double_q):
    """On torch's meta device any .item(), and any tensor made on the CPU, raises."""
    network = dqn.QNetwork(6, "tanh-lan").to("meta")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    frames = torch.zeros(32, 5, 84, 84, dtype=torch.uint8, device="meta")
    row = torch.zeros(32, device="meta")
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, _ = dqn.td_loss(network, network, dqn.Batch(frames, row.long(), row, row), 0.99, double_q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.device.type == "meta"


# --------------------------------------------------------------------------------- whole training runs


def quadrant_args(runs_dir, **changes):
    flags = {
        "activation": "tanh-lan", "total_timesteps": 3000, "learning_starts": 200, "buffer_size": 2500,
        "learning_rate": 5e-4, "target_network_frequency": 100, "exploration_fraction": 0.5, "gamma": 0.5,
        "metrics_frequency": 1000, "metrics_samples": 512, "checkpoint_frequency": 0, "runs_dir": str(runs_dir),
    }  # fmt: skip
    return dqn.Args(**(flags | changes))


def train_quadrants(monkeypatch, runs_dir, **changes):
    """Returns the run's weights and its events without the wall-clock ones."""
    monkeypatch.setattr(dqn, "make_env", make_quadrants)
    args = quadrant_args(runs_dir, **changes)
    dqn.main(args)
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    events.pop("charts/SPS")
    return torch.load(folder / "model.pt", weights_only=True), events


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh-lan"])
def test_training_learns(monkeypatch, runs_dir, activation):
    """2.5 is random, 10 is perfect. Would catch: rewards of other rows, a frozen network, a target that never moves."""
    _, events = train_quadrants(monkeypatch, runs_dir, activation=activation)
    last = [score for _, score in events["charts/episodic_return"][-20:]]
    assert np.mean(last) > 7.5, last  # exploration alone costs 0.75


@pytest.mark.slow
def test_same_seed_same_run_other_seed_other_run_and_measuring_changes_nothing(monkeypatch, tmp_path):
    """Would catch: an unseeded draw, and metrics that draw from the training's generators or leave gradients."""
    short = {"total_timesteps": 1100, "exploration_fraction": 0.2}
    weights, events = train_quadrants(monkeypatch, tmp_path / "a", **short)
    same_weights, same_events = train_quadrants(monkeypatch, tmp_path / "b", **short)
    other_weights, other_events = train_quadrants(monkeypatch, tmp_path / "c", **short, seed=2)
    unmeasured_weights, unmeasured_events = train_quadrants(monkeypatch, tmp_path / "d", **short, metrics_frequency=0)
    assert events == same_events
    assert other_events["charts/episodic_return"] != events["charts/episodic_return"]
    assert not any(tag.startswith("representation/") for tag in unmeasured_events)
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name])
        assert torch.equal(weight, unmeasured_weights[name])
    assert any(not torch.equal(weight, other_weights[name]) for name, weight in weights.items())


@pytest.mark.slow
def test_tags_steps_and_files_of_a_run(monkeypatch, runs_dir):
    """The README's promise: every tag, at agent steps; the last measurement is not logged twice; the sample is kept."""
    _, events = train_quadrants(monkeypatch, runs_dir, total_timesteps=2100, checkpoint_frequency=0)
    (folder,) = runs_dir.iterdir()
    assert folder.name == "BreakoutNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"
    every_thousand = {"losses/td_loss", "losses/q_values", "charts/epsilon"}
    representation = {
        f"representation/{name}"
        for name in (
            *("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons"),
            *("feature_norm", "dead_neurons_z_enc", "dead_neurons_z_star", "kde_peak"),
        )
    }
    assert set(events) == every_thousand | representation | {"charts/episodic_return", "charts/episodic_length"}
    assert all([step for step, _ in events[tag]] == [1000, 2000] for tag in every_thousand)
    assert all([step for step, _ in events[tag]] == [1000, 2000, 2100] for tag in representation)
    assert events["charts/episodic_length"] == [(10 * n, 10.0) for n in range(1, 211)]
    epsilons = [value for _, value in events["charts/epsilon"]]
    assert epsilons == pytest.approx([1 - 0.9 * 999 / 1050, 0.1])
    sample = np.load(folder / "activations.npz")
    assert {name: sample[name].shape for name in sample} == dict.fromkeys(("z", "z_enc", "z_star"), (512, 512))
    np.testing.assert_allclose(sample["z"], sample["z_enc"] * sample["z_star"], atol=1e-6)
    assert sorted(file.name for file in folder.iterdir() if "tfevents" not in file.name) == [
        *(".lock", "activations.npz", "config.json", "model.pt")
    ]


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(monkeypatch, runs_dir):
    """Would catch: training on for days after divergence. Exit code and message are tested from the shell."""
    calls = []

    def diverging(*arguments):
        calls.append(arguments)
        loss, q_values = dqn_td_loss(*arguments)
        return (loss * float("nan") if len(calls) > 220 else loss), q_values

    dqn_td_loss = dqn.td_loss
    monkeypatch.setattr(dqn, "td_loss", diverging)
    with pytest.raises(dqn.checkpoint.RunFailed, match=r"before step 2,000: td_loss nan.*last good.*at step 1,000"):
        train_quadrants(monkeypatch, runs_dir, metrics_frequency=0)
    (folder,) = runs_dir.iterdir()
    assert not (folder / "model.pt").exists()
