"""metrics.record and layer_metrics: against numpy on activations of the tests' own forward pass, and any module."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import metrics
import ppo_atari_lan


def atari_like():
    """Three convolutions and z, each with its activation, in the DQN's order."""
    layers = [
        nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 5, 2), nn.ReLU()),
        nn.Flatten(),
        nn.Sequential(nn.Linear(45, 7), nn.Tanh()),
    ]
    network = nn.Sequential(*layers, nn.Linear(7, 3))
    return network, {"conv1": "0", "conv2": "1", "conv3": "2", "z": "4"}


def by_hand(network, x):
    """The same network's layers by torch's functions in double precision, no module called."""
    outputs = {}
    for name, layer, stride in (("conv1", network[0][0], 2), ("conv2", network[1][0], 1), ("conv3", network[2][0], 1)):
        x = F.conv2d(x.double() if name == "conv1" else x, layer.weight.double(), layer.bias.double(), stride)
        outputs[name] = x = x.clamp(min=0)
    linear = network[4][0]
    outputs["z"] = torch.tanh(x.flatten(1) @ linear.weight.double().T + linear.bias.double())
    return {name: output.detach().numpy() for name, output in outputs.items()}


def numpys(output, bounds=None):
    """`layer_metrics` of (n, units, ...) in numpy, from its definitions in SPEC.md's words."""
    n, units = output.shape[:2]
    positions = output.reshape(n, units, -1)
    size = np.abs(positions).mean(axis=(0, 2))
    values = {
        "constant": np.mean((positions.std(axis=0, ddof=1) < 1e-3).all(axis=1)),
        "zero": np.mean((positions == 0).all(axis=(0, 2))),
        "dormant": np.mean(size <= 0.025 * size.mean()),
    }
    if bounds:
        values["saturated"] = np.mean((output <= bounds[0] + 0.01) | (output >= bounds[1] - 0.01))
    return values


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_every_value_is_numpys(chunk):
    """Would catch: a channel counted by its positions, a deviation with n for n - 1, a mean over a chunk alone."""
    torch.manual_seed(0)
    network, modules = atari_like()
    with torch.no_grad():
        network[0][0].bias[1] = -9  # never fires
        network[1][0].bias[2] = -1.2  # fires rarely
        network[2][0].weight[3] *= 1e-5  # varies too little
        network[2][0].bias[3] = 2.0
        network[4][0].bias[:2] = torch.tensor([9.0, -2.7])  # at a bound
        network[4][0].weight[0] *= 0.1
    x = torch.randn(50, 2, 13, 13)
    measured = metrics.layer_metrics(network, modules, x, chunk)
    outputs = by_hand(network, x)
    for name, output in outputs.items():
        expected = numpys(output, (-1, 1) if name == "z" else None)
        got = {what: value for what, value in measured[name].items() if what in expected}
        assert got == pytest.approx(expected, abs=1e-6), name
        assert ("saturated" in measured[name]) == (name == "z")
        layer = network[int(modules[name])][0]
        weight = layer.weight.detach().double().numpy()
        assert measured[name]["weight_norm"] == pytest.approx(np.linalg.norm(weight.ravel()), rel=1e-5)
        assert "grad_norm" not in measured[name]
        np.testing.assert_allclose(metrics.record(network, {name: modules[name]}, x, chunk)[name], output, atol=1e-5)
    assert measured["conv1"]["zero"] == measured["conv1"]["constant"] == 0.25
    assert measured["conv3"]["constant"] == pytest.approx(0.2)
    assert measured["conv3"]["zero"] == 0
    assert 1 / 7 <= measured["z"]["saturated"] < 0.5


def test_a_network_whose_third_convolution_is_dead_says_so():
    """Would catch: what hid the study's collapse, where every layer but the dead one looks as it should."""
    torch.manual_seed(0)
    network, modules = atari_like()
    with torch.no_grad():
        network[2][0].bias.fill_(-100)
    measured = metrics.layer_metrics(network, modules, torch.randn(64, 2, 13, 13))
    constant = {name: values["constant"] for name, values in measured.items()}
    assert constant == {"conv1": 0, "conv2": 0, "conv3": 1, "z": 1}  # z stays at f(B)
    assert measured["conv3"]["zero"] == 1
    assert measured["z"]["zero"] == 0


class Columns(nn.Module):
    """Hands its observations on to a module, as if a layer had put them out."""

    def __init__(self, module=None):
        super().__init__()
        self.layer = module or nn.Identity()

    def forward(self, x):
        return self.layer(x)


def test_constant_zero_dormant_and_saturated_disagree():
    """Five units by hand: each of the four words has one that it alone is true of, or that it alone misses."""
    column = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    units = {
        "lives": 3 * column,
        "zero": 0 * column,  # constant, zero, dormant
        "stuck": torch.full((4, 1), 5.0),  # constant alone: to Sokar's it is the liveliest
        "whispers": 0.02 * column,  # dormant alone, mean |h| of the layer is 1.604
        "faint": 0.0005 * column,  # constant and dormant, not zero
    }
    x = torch.cat(list(units.values()), dim=1)
    values = metrics.layer_metrics(Columns(), {"h": "layer"}, x)["h"]
    assert values == pytest.approx({"constant": 3 / 5, "zero": 1 / 5, "dormant": 3 / 5})
    tanh = metrics.layer_metrics(Columns(nn.Tanh()), {"h": "layer"}, 2.0 * column.expand(4, 2) * torch.tensor([1, 2]))
    # tanh(2) = 0.964 is no bound, tanh(4) = 0.9993 is; neither is constant.
    assert tanh["h"] == pytest.approx({"constant": 0, "zero": 0, "dormant": 0, "saturated": 0.5})


@pytest.mark.parametrize("activations", [(nn.Identity, nn.Tanh), (nn.Tanh, nn.Identity), (nn.Tanh, nn.Tanh)])
def test_a_product_with_a_tanh_is_no_tanh(activations):
    """Would catch: unbounded values counted near a tanh's bounds, where the last factor happens to be one."""
    for chosen, is_saturable in ((activations, False), ((nn.Tanh,), True)):
        z = ppo_atari_lan.Hidden(ppo_atari_lan.Recipe(chosen), 5, lambda outputs: nn.Linear(3, outputs))
        measured = metrics.layer_metrics(z, {"z": z}, torch.randn(20, 3))["z"]
        assert ("saturated" in measured) == is_saturable


class Gated(nn.Module):
    """A gated linear unit, or a residual block: what is registered last is not what the units are."""

    def __init__(self, is_residual):
        super().__init__()
        self.is_residual = is_residual
        self.value, self.gate = (
            nn.Linear(3, 3),
            nn.Sequential(nn.Linear(3, 3), nn.Tanh() if is_residual else nn.Sigmoid()),
        )

    def forward(self, x):
        return x + self.gate(x) if self.is_residual else self.value(x) * self.gate(x)


def test_only_what_surely_ends_with_a_tanh_is_called_saturated():
    """Would catch: any negative value of a gated unit, counted as a sigmoid near 0."""
    for network, is_bounded in (
        (Gated(False), False),
        (Gated(True), False),
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.LayerNorm(3), nn.Tanh())), True),
        (nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), False),
        (nn.Sigmoid(), True),
    ):
        measured = metrics.layer_metrics(network, {"h": network}, 5 * torch.randn(20, 3))["h"]
        assert ("saturated" in measured) == is_bounded


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chunks_equal_one_pass_and_numpy(data):
    """Any sample, any shape, any chunk. Would catch: a last chunk of another size weighed like the others."""
    n, units = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 6))
    positions = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3).filter(lambda p: len(p) != 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    scales = 10.0 ** rng.integers(-5, 3, size=(units, *[1] * len(positions)))
    x = rng.normal(size=(n, units, *positions)) * scales + rng.integers(-2, 3, size=scales.shape)
    x[:, rng.random(units) < 0.3] = rng.choice([0.0, 0.1, 1e6])
    x = torch.tensor(x, dtype=torch.float32)
    expected = numpys(x.double().numpy())
    for chunk in (None, data.draw(st.integers(1, n))):
        got = metrics.layer_metrics(Columns(), {"h": "layer"}, x, chunk)["h"]
        assert got == pytest.approx(expected)


def test_a_constant_unit_is_constant_at_any_height():
    """Would catch: the rounding of a mean of large equal values, taken for a deviation."""
    x = (1e6 * torch.rand(50, generator=torch.Generator().manual_seed(0))).repeat(2048, 1)
    for chunk in (None, 256, 300):
        assert metrics.layer_metrics(Columns(), {"h": "layer"}, x, chunk)["h"]["constant"] == 1


# ------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_autograds():
    """(h W)^2 by hand: d/dW = 2 y x. Would catch: norms over the wrong axis, a bias counted, a gradient cleared."""
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        layer.bias.zero_()
    x = torch.tensor([[3.0, 4.0]])
    layer(x).square().sum().backward()
    gradient = np.array([[2 * 3 * 3, 2 * 3 * 4], [2 * 8 * 3, 2 * 8 * 4], [0, 0]])
    before = layer.weight.grad.clone()
    values = metrics.layer_metrics(nn.Sequential(layer), {"y": layer}, x.repeat(2, 1))["y"]
    assert values["grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert values["weight_norm"] == pytest.approx(np.sqrt(5))
    assert values["no_gradient"] == pytest.approx(1 / 3)  # norms 30, 80, 0
    assert torch.equal(layer.weight.grad, before)
    assert metrics.gradient_metrics(layer, tau=0.9)["no_gradient"] == pytest.approx(2 / 3)  # 0.9 x 110 / 3 = 33
    layer.zero_grad()
    assert metrics.gradient_metrics(layer) == pytest.approx({"weight_norm": 5**0.5})


class Product(nn.Module):
    """A LaN: two parallel layers."""

    def __init__(self):
        super().__init__()
        self.enc, self.star = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def forward(self, x):
        return self.enc(x) * self.star(x)


def test_which_layers_a_units_incoming_weights_are_in():
    """Both of a product; the last of a stack. Would catch: units of one layer added to those of the next."""
    torch.manual_seed(0)
    product = Product()
    product(torch.randn(8, 4)).square().sum().backward()
    product.enc[0].weight.grad[0] = product.star[0].weight.grad[0] = 0
    product.enc[0].weight.grad[1] = 0  # the other factor still learns
    assert metrics.gradient_metrics(product)["no_gradient"] == pytest.approx(1 / 3)
    squares = [layer[0].weight.grad.square().sum() for layer in (product.enc, product.star)]
    assert metrics.gradient_metrics(product)["grad_norm"] == pytest.approx(float(sum(squares)) ** 0.5)
    stack = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    stack(torch.randn(8, 3)).sum().backward()
    stack[2].weight.grad[:2] = 0
    assert metrics.gradient_metrics(stack)["no_gradient"] == pytest.approx(2 / 3)
    assert metrics.gradient_metrics(nn.ReLU()) == {}
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    expected = float(tied[0].weight.detach().norm())
    assert metrics.gradient_metrics(tied)["weight_norm"] == pytest.approx(expected)  # counted once


class Noisy(nn.Module):
    """A layer of somebody's own, as Rainbow's."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(4, 10))

    def forward(self, x):
        return x @ self.mu.T


@pytest.mark.parametrize(
    "last", [(Noisy(),), (nn.Unflatten(1, (10, 1)), nn.ConvTranspose1d(10, 4, 2)), (nn.RNNCell(10, 4),)]
)
def test_the_gradients_of_an_unknown_last_layer_are_not_those_of_the_one_before(last):
    stack = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), *last, nn.ReLU())
    stack(torch.randn(8, 6)).sum().backward()
    assert set(metrics.gradient_metrics(stack)) == {"weight_norm", "grad_norm"}
    normalised = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.PReLU(10))
    normalised(torch.randn(8, 6)).square().sum().backward()
    assert "no_gradient" in metrics.gradient_metrics(normalised)  # neither of them is a layer


@pytest.mark.parametrize(
    "normalise",
    [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.weight_norm],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_left_alone(normalise):
    """Would catch: power iterations of a spectral norm, done by measuring it."""
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), normalise(nn.Linear(5, 4)), nn.ReLU())
    network(torch.randn(8, 6)).sum().backward()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measured = metrics.layer_metrics(network, {"h": "2", "all": network}, torch.randn(8, 6))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert set(measured["h"]) == {"constant", "zero", "dormant"}
    assert set(measured["all"]) == {"constant", "zero", "dormant", "weight_norm", "grad_norm"}


# --------------------------------------------------------------------------------------------- any network


class TakesADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.ReLU())

    def forward(self, x):
        return self.body(torch.cat(list(x.values() if isinstance(x, dict) else x), dim=1))


def test_dicts_and_tuples_are_passed_on_as_they_are():
    network = TakesADict()
    x = torch.randn(6, 5)
    expected = metrics.record(network, {"h": "body"}, (x,))["h"]
    assert torch.equal(expected, network.body(x).detach())
    for observations in ({"a": x[:, :2], "b": x[:, 2:]}, (x[:, :1], x[:, 1:])):
        assert torch.equal(metrics.record(network, {"h": "body"}, observations)["h"], expected)
        with pytest.raises(ValueError, match=f"chunk splits a tensor, not {type(observations).__name__}"):
            metrics.record(network, {"h": "body"}, observations, chunk=2)


SHAPES = {
    "dense": (nn.Linear(5, 4), (6, 5), 4),
    "dense, sequence": (nn.Linear(5, 4), (6, 3, 5), 4),
    "dense, objects in time": (nn.Linear(5, 4), (6, 3, 2, 5), 4),
    "1-d": (nn.Conv1d(2, 4, 3), (6, 2, 9), 4),
    "2-d": (nn.Conv2d(2, 4, 3), (6, 2, 9, 9), 4),
    "3-d": (nn.Conv3d(2, 4, 3), (6, 2, 5, 5, 5), 4),
    "2-d, transposed": (nn.ConvTranspose2d(2, 4, 3), (6, 2, 5, 5), 4),
    "rnn": (nn.RNN(5, 4, batch_first=True), (6, 3, 5), 4),
    "lstm": (nn.LSTM(5, 4), (3, 6, 5), 4),
    "gru": (nn.GRU(5, 4, bidirectional=True), (3, 6, 5), 8),
    "gru cell": (nn.GRUCell(5, 4), (6, 5), 4),
    "lstm cell": (nn.LSTMCell(5, 4), (6, 5), 4),
    "2-d with a gate": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), (6, 2, 9, 9), 4),
    "activation of a map": (nn.ReLU(), (6, 2, 9, 9), 2),
    "embedding": (nn.Embedding(9, 4), (6, 3), 4),
}


@pytest.mark.parametrize(("module", "shape", "units"), SHAPES.values(), ids=list(SHAPES))
def test_units_of_every_kind_of_layer(module, shape, units):
    """The last unit is dead, and one in `units` is found. Would catch: time or positions taken for units."""
    torch.manual_seed(0)
    x = torch.randint(0, 9, shape) if isinstance(module, nn.Embedding) else torch.randn(shape)

    def kill_last(module, inputs, output):
        h = (output[0] if isinstance(output, tuple) else output).detach()
        if shape[1:2] == (2,):  # channels of a map
            h[:, -1] = 0
        else:
            h[..., -1] = 0
        return (h, *output[1:]) if isinstance(output, tuple) else h

    module.register_forward_hook(kill_last)
    values = metrics.layer_metrics(Columns(module), {"h": "layer"}, x)["h"]
    assert values["zero"] == values["constant"] == pytest.approx(1 / units)


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (Columns(nn.ReLU()), (6, 3, 5), r"\(6, 3, 5\) may be \(n, time, units\) or \(n, channels, length\)"),
        (Columns(nn.Flatten(0)), (6, 3), r"an output of shape \(18,\) has no units"),
        (Columns(nn.Identity()), (2, 2, 2, 2, 2, 2), "has no units"),
        (Columns(nn.Identity()), (0, 3), "has no units"),
        (Columns(nn.Identity()), (1, 3), "at least 2 observations, got 1"),
    ],
)
def test_what_cannot_be_counted_is_refused(network, shape, message):
    with pytest.raises(ValueError, match=message):
        metrics.layer_metrics(network, {"h": "layer"}, torch.ones(shape))


def test_what_is_not_finite_is_refused():
    """Would catch: a layer of NaN, which is neither constant nor zero, reported as healthy."""
    for bad in (float("nan"), float("inf")):
        x = torch.ones(4, 2)
        x[3, 1] = bad
        with pytest.raises(ValueError, match="h: its outputs hold NaN or infinite values"):
            metrics.layer_metrics(Columns(), {"h": "layer"}, x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), nn.MultiheadAttention(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.alias = self.body

    def forward(self, x):
        return self.body(self.dropout(self.body(x)))


@pytest.mark.parametrize(
    ("modules", "observations", "message"),
    [
        ({"h": "head"}, torch.ones(4, 3), "h: 'head' is not a module of the network; it has body, unused, pair"),
        ({"h": nn.Linear(3, 3)}, torch.ones(4, 3), "is not a module of the network"),
        ({"h": "unused"}, torch.ones(4, 3), r"h was not called by network\(observations\)"),
        ({"h": "body"}, torch.ones(4, 3), "h was called more than once"),
        ({"h": "alias"}, torch.ones(4, 3), "h was called more than once"),
    ],
)
def test_after_an_error_nothing_is_left(modules, observations, message):
    """Hooks, training mode, gradients. Would catch: a generator that lives on in the error's traceback."""
    network = Twice()
    network.dropout.eval()  # not as its parent
    modes = [module.training for module in network.modules()]
    for function in (metrics.record, metrics.layer_metrics):
        with pytest.raises(ValueError, match=message) as caught:
            function(network, modules, observations, 2)
        assert caught.tb  # and the frames that it holds
        assert not any(module._forward_hooks for module in network.modules())
        assert [module.training for module in network.modules()] == modes
        assert torch.is_grad_enabled()


def test_the_networks_own_error_is_passed_on_and_nothing_is_left():
    network = nn.Sequential(nn.Linear(3, 3))
    for function in (metrics.record, metrics.layer_metrics):
        with pytest.raises(RuntimeError):
            function(network, {"h": "0"}, torch.ones(4, 5))
        assert not network[0]._forward_hooks
        assert network[0].training


def test_measuring_changes_nothing():
    """Would catch: a batch normalisation that learns from it, dropout that draws, outputs that keep their graph."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU())
    x = torch.randn(8, 3, requires_grad=True)
    network(x).sum().backward()
    gradients = [weight.grad.clone() for weight in network.parameters()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    rng = torch.get_rng_state()
    kept, _ = metrics.record_and_measure(network, {"h": "3"}, x, 3, keep={"h"})
    assert not kept["h"].requires_grad
    torch.testing.assert_close(kept["h"], network.eval()(x).detach())  # as in evaluation
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    after = [weight.grad for weight in network.parameters()]
    assert all(torch.equal(before, now) for before, now in zip(gradients, after, strict=True))


class Policy(nn.Module):
    """Samples its actions in `forward`, as those of stable-baselines3 do."""

    def __init__(self):
        super().__init__()
        self.body, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return torch.distributions.Categorical(logits=self.body(x)).sample()


def test_a_network_that_samples_draws_what_it_would_have_drawn():
    """Would catch: a training that goes another way once it is measured."""
    network, x = Policy(), torch.randn(8, 3)
    before = torch.get_rng_state()
    metrics.layer_metrics(network, {"h": "body"}, x, chunk=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="was not called"):  # after it has sampled
        metrics.record(network, {"h": "unused"}, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_before_stances(monkeypatch):
    """Would catch: an AttributeError with cleanrl's torch 2.4, once an optimizer has imported dynamo."""
    import torch._dynamo

    monkeypatch.delattr(torch.compiler, "set_stance")
    assert metrics.record(nn.Sequential(nn.Linear(3, 4)), {"h": "0"}, torch.ones(2, 3))["h"].shape == (2, 4)


def test_nested_outputs_are_refused():
    """A transformer's fast path packs a padded batch. Would catch: torch's advice to file an issue."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Padded(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 1, **options)

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=torch.arange(5) > 2 + torch.arange(len(x))[:, None])

    x = torch.randn(4, 5, 8)
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        metrics.layer_metrics(Padded(), {"h": "encoder.layers.0"}, x)
    network = Padded(enable_nested_tensor=False)
    assert metrics.layer_metrics(network, {"h": "encoder.layers.0"}, x)["h"]["constant"] == 0


def test_a_layer_that_works_in_place_does_not_change_what_was_recorded():
    """Would catch: the pre-activations of `nn.ReLU(inplace=True)`, recorded as a view of what it overwrites."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(8, 3)
    expected = (x @ network[0].weight.T + network[0].bias).detach()
    assert (expected < 0).any()
    found, layers = metrics.record_and_measure(network, {"a": "0", "h": "1"}, x, keep={"a"})
    torch.testing.assert_close(found["a"], expected)
    torch.testing.assert_close(metrics.record(network, {"a": "0"}, x)["a"], expected)
    size = expected.abs().mean(dim=0)
    assert layers["a"]["dormant"] == float((size <= 0.025 * size.mean()).float().mean())


def test_a_recorded_sample_does_not_keep_the_network():
    """Would catch: hooks or caches that keep an agent's weights alive."""
    network = nn.Sequential(nn.Linear(3, 4))
    kept = metrics.record(network, {"h": "0"}, torch.ones(2, 3))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None
    assert kept["h"].shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype):
    """Would catch: sums in half precision, where 2048 + 1 is 2048, and norms that overflow it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).to(dtype)
    with torch.no_grad():
        network[0].weight[0] = 0
    x = torch.randn(4096, 6).to(dtype)
    network(x).sum().backward()
    network[0].weight.grad *= 100
    found, measured = metrics.record_and_measure(network, {"z": network}, x, 1000, keep={"z"})
    assert found["z"].dtype == torch.float32
    output = network(x).detach().float()
    assert torch.equal(found["z"], output)
    got = measured["z"]
    assert {what: got[what] for what in numpys(output.numpy(), (-1, 1))} == pytest.approx(
        numpys(output.double().numpy(), (-1, 1))
    )
    gradient = network[0].weight.grad.double().numpy()
    assert got["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


def test_nothing_waits_for_the_device_before_the_end():
    """On `meta` there are no values to wait for. Would catch: a count fetched for every chunk, a tensor on the CPU."""
    network, modules = atari_like()
    network.to("meta")
    x = torch.empty(10, 2, 13, 13, device="meta")
    found = metrics.record(network, modules, x, chunk=4)
    assert {name: tuple(output.shape) for name, output in found.items()} == {
        "conv1": (10, 4, 6, 6), "conv2": (10, 6, 4, 4), "conv3": (10, 5, 3, 3), "z": (10, 7),
    }  # fmt: skip
    assert {output.device.type for output in found.values()} == {"meta"}
    units = metrics._Units("z", network[4])
    metrics._watch(network, {"z": "4"}, x, 4, lambda name, output: units.add(output))
    assert units.n == 10
    assert units.near_bounds.device.type == "meta"


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda network: torch.compile(nn.DataParallel(network))]
)
def test_wrapped_networks(wrap):
    """Names as without the wrapper; a graph that was compiled before does not hide the layers."""
    torch.manual_seed(0)
    network, modules = atari_like()
    x = torch.randn(8, 2, 13, 13)
    expected = metrics.layer_metrics(network, modules, x)
    assert metrics.layer_metrics(wrap(network), modules, x) == expected
    assert metrics.layer_metrics(wrap(network), {"z": network[4]}, x)["z"] == expected["z"]


@pytest.mark.slow
def test_networks_that_were_compiled_and_run_before():
    """In place, as a wrapper, as a layer of another network, and with what is traced already."""
    torch.manual_seed(0)
    network, modules = atari_like()
    x = torch.randn(8, 2, 13, 13)
    expected = metrics.layer_metrics(network, modules, x)
    network.compile(backend="eager")
    outer = Columns(torch.compile(network, backend="eager"))
    for compiled, names in ((network, modules), (outer, {name: network[int(i)] for name, i in modules.items()})):
        before = compiled(x)
        assert metrics.layer_metrics(compiled, names, x) == expected
        assert torch.equal(compiled(x), before)


def test_a_shared_module_goes_by_each_of_its_names():
    """As stable-baselines3's feature extractors do. Would catch: only the first name found."""
    network = nn.ModuleDict({"features": nn.Linear(3, 4)})
    network["pi_features"] = network["features"]
    assert metrics._find(network, {"h": "pi_features"}) == {"h": network["features"]}
