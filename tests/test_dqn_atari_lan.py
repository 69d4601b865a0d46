"""dqn_atari_lan.py: the network, the mathematics, and training that learns."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYER_TAGS, make_quadrants, module_of, read_events, without_run
from torch import nn

import dqn_atari_lan as dqn
from lan_utils import cli, run, study
from lan_utils.cli import RunFailed
from lan_utils.replay import Batch

ACTIVATIONS = list(dqn.REPRESENTATIONS)
CONV_PARAMETERS = {  # more than with ReLU
    **{"tanh": 0, "tanh-lan": 77_984, "tanh-2xlan": 2 * 77_984, "tanh-glu": 77_984},
    **{"layernorm": 320, "layernorm-lan": 77_984 + 2 * 320},
}

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


def test_defaults_are_table_3(monkeypatch, capsys):
    """Would catch: a default that drifts from the paper, in the code or in --help."""
    args = dqn.Args()
    assert {name: getattr(args, name) for name in TABLE_3} == TABLE_3
    assert args.exploration_fraction * args.total_timesteps == 1_000_000
    assert (args.total_timesteps, args.train_frequency, args.double_q) == (10_000_000, 4, True)
    monkeypatch.setattr("sys.argv", ["dqn_atari_lan.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(dqn.Args)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, value in TABLE_3.items():
        flag = text.split(f" --{name.replace('_', '-')} ")[1].split(" --")[0]
        assert f"(Table 3) (default: {value})" in flag, name
    assert all(f" --{f.name.replace('_', '-')}" in text for f in dataclasses.fields(dqn.Args))
    assert args.exp_name == Path(dqn.__file__).stem  # the script's name: no two scripts share a folder


def test_the_study_knows_every_activation_and_its_width():
    """Would catch: an activation that is trained and never drawn, or a rank divided by another layer's width."""
    widths = {name: recipe.width for name, recipe in dqn.REPRESENTATIONS.items()}
    assert widths == {name: style.width for name, style in study.ACTIVATIONS.items()}
    assert all(dqn.QNetwork(4, name).encoder.width == width for name, width in widths.items())


# --------------------------------------------------------------------------------------- representation


def numpy_layer(layer, x):
    return x @ layer.weight.detach().numpy().astype(float).T + layer.bias.detach().numpy()


def numpy_norm(norm, y):
    """Layer normalisation of the rows by its formula, with the scale and shift of its own; y where there is no norm."""
    if not isinstance(norm, torch.nn.LayerNorm):
        return y
    centred = y - y.mean(axis=1, keepdims=True)
    scale, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return scale * centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) + shift


def numpy_representation(activation, hidden, x):
    """Each activation's formula, as in the README's table; `hidden` gives the weights."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    relu = lambda a: np.maximum(a, 0)  # noqa: E731
    a = [numpy_layer(factor[0], x) for factor in hidden.factors.values()]
    normalised = [numpy_norm(factor[1], y) for factor, y in zip(hidden.factors.values(), a, strict=True)]
    match activation:
        case "relu" | "relu-1024":
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
            return np.tanh(normalised[0])
        case "bilinear":
            return a[0] * a[1]
        case "tanh-glu":
            return np.tanh(a[0]) * a[1]
        case "layernorm-lan":
            return np.tanh(normalised[0]) * np.tanh(normalised[1])
        case "layernorm-relu":
            return relu(normalised[0])
        case "crelu":
            return np.concatenate((relu(a[0]), relu(-a[0])), axis=1)
        case "gelu":
            return a[0] * (1 + np.vectorize(math.erf)(a[0] / math.sqrt(2))) / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_representation_is_its_formula_and_every_factor_learns(activation):
    """Would catch: a factor used twice, a sum for a product, norm after tanh, one norm for two factors, the tanh that
    approximates GELU, a factor cut off from the gradient."""
    torch.manual_seed(1)
    recipe = dqn.REPRESENTATIONS[activation]
    hidden = dqn.Hidden(recipe, recipe.outputs, lambda outputs: torch.nn.Linear(40, outputs))
    with torch.no_grad():
        for norm in [module for module in hidden.modules() if isinstance(module, torch.nn.LayerNorm)]:
            norm.weight.normal_()  # as after training: each its own
            norm.bias.normal_()
    x = 2 * torch.randn(7, 40)
    z = hidden(x)
    np.testing.assert_allclose(z.detach().numpy(), numpy_representation(activation, hidden, x.numpy()), atol=1e-5)
    assert z.shape == (7, 1024 if activation.endswith("-1024") else 512)
    z.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in hidden.parameters())
    weights = [factor[0].weight for factor in hidden.factors.values()]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_parameter_counts():
    """Worked out by hand for 4 actions. Would catch: a missing bias, a factor too many."""
    counts = {a: sum(p.numel() for p in dqn.QNetwork(4, a).parameters()) for a in ACTIVATIONS}
    expected = {"relu": 1_686_180, "layernorm": 1_687_204, "tanh-lan": 3_292_324, "wide-1024": 3_294_372}
    expected |= {"tanh-2xlan": 4_898_468}
    expected |= dict.fromkeys(("tanh", "sigmoid", "selu"), 1_686_180)
    expected |= dict.fromkeys(("tanh-addlan", "relu-lan", "sigmoid-lan"), 3_292_324)
    # The convolutions have 77,984, a dense layer 3136 * 512 + 512 = 1,606,144, the head 2,052; a norm has 2 * 512.
    expected |= {"bilinear": 3_292_324, "tanh-glu": 3_292_324, "layernorm-lan": 3_292_324 + 2 * 1024}
    expected |= {"layernorm-relu": 1_686_180 + 1024, "relu-1024": 3_294_372, "gelu": 1_686_180}
    expected |= {"crelu": 77_984 + (3136 * 256 + 256) + 2052}
    assert counts == expected


@pytest.mark.parametrize(("conv_activation", "more"), CONV_PARAMETERS.items())
def test_parameter_counts_of_the_convolutions(conv_activation, more):
    """By hand, beside those of ReLU: the convolutions' 77,984 once more for each further factor, and 2 * (32 + 64 + 64)
    for each norm."""
    network = dqn.QNetwork(4, "tanh-lan", conv_activation)
    assert sum(p.numel() for p in network.parameters()) == 3_292_324 + more


def test_every_recipe_whose_width_is_free_makes_convolutions():
    """Would catch: one that the flag does not take, or one that fixes the number of channels."""
    assert set(dqn.CONVOLUTIONS) == set(ACTIVATIONS) - {"wide-1024", "relu-1024", "crelu"}
    observations = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    for conv_activation in dqn.CONVOLUTIONS:
        assert dqn.QNetwork(4, "crelu", conv_activation)(observations).shape == (2, 4)


def test_convolutions_are_products_of_convolutions():
    """In float64, by torch.nn.functional. Would catch: a factor used twice, an activation on the product, a recipe that
    reaches one of the three alone, or z."""
    torch.manual_seed(2)
    network = dqn.QNetwork(4, "gelu", "tanh-lan")
    observations = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    in_float32 = network.encoder(observations)
    encoder, x = network.encoder.double(), observations.double() / 255
    for layer, stride in ((encoder.conv1, 4), (encoder.conv2, 2), (encoder.conv3, 1)):
        (enc, _), (star, _) = layer.factors.values()
        first, second = (F.conv2d(x, conv.weight, conv.bias, stride) for conv in (enc, star))
        expected = first.tanh() * second.tanh()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)
        x = expected
    z = encoder.z(x.flatten(1))
    assert set(encoder.z.factors) == {"enc"}
    torch.testing.assert_close(in_float32, z.float(), rtol=1e-4, atol=1e-6)


def test_a_convolutions_norm_is_over_the_channels_at_each_position():
    """By numpy. Would catch: a norm over the positions, or over the whole map; another one for dense layers."""
    norm, of_torch = dqn.ChannelNorm(6), torch.nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    of_torch.load_state_dict(norm.state_dict())
    maps = 3 + 2 * torch.randn(5, 6, 4, 3)
    rows = maps.numpy().transpose(0, 2, 3, 1).reshape(-1, 6)  # a position's channels each
    expected = numpy_norm(norm, rows).reshape(5, 4, 3, 6).transpose(0, 3, 1, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = norm(maps.contiguous(memory_format=layout)).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(norm(maps[:, :, 0, 0]), of_torch(maps[:, :, 0, 0]))


@pytest.mark.parametrize("activation", ["relu", "tanh-lan", "layernorm"])
def test_without_the_flag_the_network_is_the_papers_bit_for_bit(activation):
    """Against the trunk as it was before there were recipes for convolutions. Would catch: weights drawn in another
    order, a ReLU that has become something else."""
    torch.manual_seed(7)
    trunk = nn.Sequential(
        nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
        nn.Flatten(),
    )  # fmt: skip
    layers = [nn.Linear(3136, 512) for _ in range(2 if activation == "tanh-lan" else 1)]
    norm, head = nn.LayerNorm(512), nn.Linear(512, 4)
    torch.manual_seed(7)
    network = dqn.QNetwork(4, activation)
    weights = [*trunk.parameters(), *layers[0].parameters()]
    weights += [*norm.parameters()] if activation == "layernorm" else []
    weights += [p for layer in (*layers[1:], head) for p in layer.parameters()]
    for ours, theirs in zip(network.parameters(), weights, strict=True):
        assert torch.equal(ours, theirs)

    observations = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    trunk, network = (module.to(memory_format=torch.channels_last) for module in (trunk, network))
    y = [layer(trunk((observations / 255).contiguous(memory_format=torch.channels_last))) for layer in layers]
    z = {
        "relu": lambda: y[0].relu(),
        "tanh-lan": lambda: y[0].tanh() * y[1].tanh(),
        "layernorm": lambda: norm(y[0]).tanh(),
    }[activation]()
    assert torch.equal(network(observations), head(z))


def test_the_network_divides_by_255_and_its_convolutions_keep_relu():
    """Would catch: frames fed as 0..255, or the chosen activation put into the trunk."""
    network = dqn.QNetwork(4, "sigmoid")
    observations = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    convolutions = [layer.factors["enc"][0] for layer in list(network.measured.values())[:3]]
    x = observations.double() / 255
    for convolution, stride in zip(convolutions, (4, 2, 1), strict=True):
        x = torch.nn.functional.conv2d(x, convolution.weight.double(), convolution.bias.double(), stride).clamp(min=0)
    q = network.q(network.encoder.z(x.flatten(1).float()))
    torch.testing.assert_close(network(observations), q, atol=1e-5, rtol=1e-4)


def test_what_is_measured_is_z_and_the_factors_whose_product_it_is():
    network = dqn.QNetwork(4, "tanh-2xlan")
    observations = torch.randint(0, 256, (300, 4, 84, 84), dtype=torch.uint8)  # more than one chunk
    sample = run.measure_network(network, observations)[0]
    assert list(sample) == ["z", "z_enc", "z_star", "z_star2"]
    torch.testing.assert_close(sample["z"], sample["z_enc"] * sample["z_star"] * sample["z_star2"])
    torch.testing.assert_close(network.q(sample["z"]), network(observations), atol=1e-5, rtol=1e-4)
    assert list(run.measure_network(dqn.QNetwork(4, "relu"), observations[:2])[0]) == ["z"]


def test_a_convolutions_factors_are_measured_as_those_of_z_are():
    """Would catch: a factor that nobody sees, one under another's name, feature maps in activations.npz."""
    network = dqn.QNetwork(4, "tanh-glu", "tanh-lan")
    with torch.no_grad():
        for channel in network.encoder.conv2.factors["star"][0].weight[:16]:
            channel.zero_()  # a quarter of its channels never changes, nor becomes 0
    observations = torch.randint(0, 256, (60, 4, 84, 84), dtype=torch.uint8)
    sample, layers = run.measure_network(network, observations)
    assert list(sample) == ["z", "z_enc", "z_star"]
    factors = {f"{layer}_{factor}" for layer in ("conv1", "conv2", "conv3", "z") for factor in ("enc", "star")}
    assert layers.keys() == {"conv1", "conv2", "conv3", "z"} | factors
    assert layers["conv2_star"]["constant"] == 0.25
    assert layers["conv2_enc"]["constant"] == layers["conv2"]["zero"] == layers["conv2_star"]["zero"] == 0
    # Of a tanh and of nothing else: a product, or a linear factor, has no bound.
    assert {name for name, values in layers.items() if "saturated" in values} == factors - {"z_star"}


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
    batch = Batch(frames, torch.tensor([1, 0]), torch.tensor([10.0, 4.0]), torch.tensor([0.0, 1.0]))
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
    return Batch(frames, actions, torch.randn(32, generator=generator).sign(), torch.zeros(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "loss_tolerance", "gradient_tolerance"),
    [("amp", 1e-2, 5e-2), ("compile", 1e-5, 1e-5)],
)
def test_amp_and_compile_only_round_differently(flags, loss_tolerance, gradient_tolerance):
    """The first three updates against float32: losses and the first gradient, relative.

    Would catch: a target or a loss computed in bfloat16, a compiled graph that holds an old batch or old weights.
    """

    def first_updates(amp, compiled):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        network = dqn.QNetwork(4, "tanh-lan", amp=amp).to(memory_format=torch.channels_last)
        target_network = copy.deepcopy(network)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, eps=1e-5, fused=True)
        loss_function = torch.compile(dqn.td_loss, disable=not compiled)
        batches = [random_batch(generator) for _ in range(3)]
        losses = []
        for update in range(3):
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


def scaled_network(amp):
    """Of `tanh-lan` with Q-values around 10, as a trained one has them."""
    torch.manual_seed(0)
    network = dqn.QNetwork(4, "tanh-lan", amp=amp)
    with torch.no_grad():
        for factor in network.encoder.z.factors.values():
            factor[0].weight *= 40
        network.q.weight *= 5
        network.q.bias.fill_(10.0)
    return network


@torch.no_grad()
def test_amp_rounds_neither_q_values_nor_td_errors():
    """At Q around 10 bfloat16 steps by 1/16. Would catch: a head or a target in bfloat16, which the first updates with
    their Q of 0 cannot show: exact ties at the maximum in 8.5 % of the states, TD errors 0.04 off."""
    observations = torch.randint(256, (512, 5, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    network, rounded = scaled_network(False), scaled_network(True)
    q, rounded_q = network(observations[:, :4]), rounded(observations[:, :4])
    assert (q.min() > 5, q.max() < 15, q.std() > 0.1) == (True, True, True)
    assert rounded_q.dtype == torch.float32
    two_best = rounded_q.topk(2, dim=1).values
    assert (two_best[:, 0] == two_best[:, 1]).sum() == 0
    # The best that a float32 head can do: z in bfloat16, nothing after it.
    with torch.autocast("cpu", torch.bfloat16):
        x = (observations[:, :4] / 255).contiguous(memory_format=torch.channels_last)
        encoder = network.encoder
        z = encoder.z(encoder.conv3(encoder.conv2(encoder.conv1(x))).flatten(1))
    assert torch.equal(rounded_q, network.q(z.float()))
    actions, terminated = torch.arange(512) % 4, torch.zeros(512)
    batch = Batch(observations, actions, torch.zeros(512), terminated)
    loss, mean_q = dqn.td_loss(rounded, rounded, batch, 0.99, double_q=True)
    assert loss.dtype == mean_q.dtype == torch.float32
    next_q = rounded(observations[:, 1:])
    errors = rounded_q.gather(1, actions[:, None])[:, 0].double() - 0.99 * next_q.max(dim=1).values.double()
    assert loss.item() == pytest.approx(errors.square().mean().item(), rel=1e-5)
    exact = q.gather(1, actions[:, None])[:, 0] - 0.99 * network(observations[:, 1:]).max(dim=1).values
    head_in_bfloat16 = [(values.bfloat16().float() - values).square().mean().sqrt() for values in (rounded_q, next_q)]
    assert (errors - exact).square().mean().sqrt() < 0.6 * min(head_in_bfloat16)


@pytest.mark.parametrize("double_q", [True, False])
def test_the_update_never_waits_for_the_device(monkeypatch, double_q):
    """On torch's meta device any .item(), and any tensor made on the CPU, raises."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype: autocast("cpu", dtype))  # there is none for meta
    frames = torch.zeros(32, 5, 84, 84, dtype=torch.uint8, device="meta")
    row = torch.zeros(32, device="meta")
    for amp in (False, True):
        network = dqn.QNetwork(6, "layernorm-lan", "tanh-glu", amp).to("meta")
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        loss, _ = dqn.td_loss(network, network, Batch(frames, row.long(), row, row), 0.99, double_q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.device.type == "meta"


# --------------------------------------------------------------------------------- whole training runs


def quadrant_args(runs_dir, **changes):
    flags = {
        "activation": "tanh-lan", "total_timesteps": 3000, "learning_starts": 200, "buffer_size": 2500,
        "batch_size": 8, "learning_rate": 5e-4, "target_network_frequency": 100, "exploration_fraction": 0.5,
        "gamma": 0.5, "metrics_frequency": 1000, "metrics_samples": 512, "checkpoint_frequency": 0,
        "runs_dir": str(runs_dir),
    }  # fmt: skip
    return dqn.Args(**(flags | changes))


def train_quadrants(monkeypatch, runs_dir, **changes):
    """Returns the run's weights and its events without the wall-clock ones."""
    monkeypatch.setattr(dqn, "make_env", make_quadrants)
    args = quadrant_args(runs_dir, **changes)
    dqn.main(args)
    (folder,) = runs_dir.iterdir()
    events = read_events(folder)
    events.pop("charts/SPS", None)
    return torch.load(folder / "model.pt", weights_only=True), events


@pytest.fixture
def trained(monkeypatch, once):
    """The runs folder and the events of a run of 2,100 steps, trained once."""

    def get(activation):
        make = lambda runs_dir: train_quadrants(monkeypatch, runs_dir, activation=activation, total_timesteps=2100)  # noqa: E731
        runs_dir = once(f"dqn-{activation}", make)
        (folder,) = runs_dir.iterdir()
        events = read_events(folder)
        events.pop("charts/SPS")
        return folder, events

    return get


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh-lan"])
def test_training_learns(trained, activation):
    """2.5 is random, 10 is perfect. Would catch: rewards of other rows, a frozen network, a target that never moves."""
    _, events = trained(activation)
    last = [score for _, score in events["charts/episodic_return"][-20:]]
    assert np.mean(last) > 7.5, last  # exploration alone costs 0.75


@pytest.mark.slow
def test_same_seed_same_run_other_seed_other_run_and_plain_dqn_the_same_weights(monkeypatch, tmp_path):
    """Would catch: an unseeded draw; metrics, logs or checkpoints that draw from the training's generators or leave
    gradients; a line of the algorithm that is gone when every line with `run.` in it is deleted."""
    monkeypatch.setattr(run, "LOG_FREQUENCY", 300)
    short = {"total_timesteps": 500, "exploration_fraction": 220 / 500, "metrics_frequency": 300}
    weights, events = train_quadrants(monkeypatch, tmp_path / "a", **short)
    same_weights, same_events = train_quadrants(monkeypatch, tmp_path / "b", **short)
    # The first 300 steps with the same schedule.
    start = {"total_timesteps": 300, "exploration_fraction": 220 / 300, "metrics_frequency": 0}
    other_weights, other_events = train_quadrants(monkeypatch, tmp_path / "c", **start, seed=2)
    assert events == same_events
    assert len(other_events["charts/episodic_return"]) == 30
    assert other_events["charts/episodic_return"] != events["charts/episodic_return"][:30]
    assert not any(tag.startswith("representation/") for tag in other_events)
    assert any(not torch.equal(weight, other_weights[name]) for name, weight in weights.items())

    plain, networks = module_of(without_run("dqn_atari_lan.py"), tmp_path / "plain_dqn.py"), []
    monkeypatch.setattr(plain, "make_env", make_quadrants)
    make = plain.QNetwork
    monkeypatch.setattr(plain, "QNetwork", lambda *arguments: networks.append(make(*arguments)) or networks[-1])
    before = sorted(tmp_path.iterdir())
    plain.main(plain.Args(**vars(quadrant_args(tmp_path / "plain", **short))))
    assert sorted(tmp_path.iterdir()) == before
    plain_weights = networks[0].state_dict()
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name])
        assert torch.equal(weight, plain_weights[name])


@pytest.mark.slow
def test_tags_steps_and_files_of_a_run(trained):
    """SPEC.md's promise: every tag, at agent steps; the last measurement is not logged twice; the sample is kept."""
    folder, events = trained("tanh-lan")
    assert folder.name == "BreakoutNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"
    every_thousand = {"losses/td_loss", "losses/q_values", "charts/epsilon"}
    representation = {
        f"representation/{name}"
        for name in (
            *("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons"),
            *("dead_neurons_scaled", "effective_rank_centred"),
            *("feature_norm", "dead_neurons_z_enc", "dead_neurons_z_star", "kde_peak"),
            *("effective_rank_z_enc", "effective_rank_z_star"),
        )
    }
    representation |= LAYER_TAGS
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
        *(".lock", "activations.npz", "config.json", "model.pt", "status.json")
    ]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["total_timesteps"]) == ("finished", 2100, 2100)


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(monkeypatch, runs_dir):
    """Would catch: training on for days after divergence. Exit code and message are tested from the shell."""
    calls = []

    def diverging(*arguments):
        calls.append(arguments)
        loss, q_values = dqn_td_loss(*arguments)
        return (loss * float("nan") if len(calls) > 30 else loss), q_values

    dqn_td_loss = dqn.td_loss
    monkeypatch.setattr(dqn, "td_loss", diverging)
    monkeypatch.setattr(run, "LOG_FREQUENCY", 300)
    with pytest.raises(RunFailed, match=r"before step 600: td_loss nan.*last good.*at step 300"):
        train_quadrants(monkeypatch, runs_dir, metrics_frequency=0)
    (folder,) = runs_dir.iterdir()
    assert not (folder / "model.pt").exists()
