"""metrics.py against scipy, numpy and numbers worked out by hand."""

import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

import metrics

JITTER = math.sqrt(1e-5)


def scipy_peak(samples):
    """The maximum of scipy's density, looked for on the samples and on a fine grid around the best of them."""
    samples = samples.double().numpy()
    density = gaussian_kde(samples)
    bandwidth = density.factor * samples.std(ddof=1)
    coarse = np.concatenate([samples[::8], np.linspace(samples.min(), samples.max(), 400)])
    best = coarse[density(coarse).argmax()]
    return density(np.linspace(best - bandwidth, best + bandwidth, 201)).max()


def adversarial_batch(n, w):
    """Named columns, repeated with fresh samples up to width w."""
    draw = torch.randn
    kinds = {
        "constant zero": lambda: torch.zeros(n),
        "constant one": lambda: torch.ones(n),
        "saturated at +1": lambda: torch.tanh(6 + draw(n)),
        "saturated at -1": lambda: torch.tanh(-6 + draw(n)),
        "both ends": lambda: torch.tanh(30 * draw(n)),
        "one end, rarely the other": lambda: torch.where(torch.rand(n) < 0.02, -1.0, 1.0),
        # Jitter and kernel widen a normal density of deviation s to sqrt((s^2 + JITTER^2) (1 + n^-0.4)).
        "just above the threshold": lambda: 0.97 * borderline(n) * draw(n),
        "just below the threshold": lambda: 1.03 * borderline(n) * draw(n),
        "one outlier": lambda: torch.cat([torch.ones(1), torch.zeros(n - 1)]),
        "one huge outlier": lambda: torch.cat([torch.full((1,), 100.0), 0.01 * draw(n - 1)]),
        "alive": lambda: torch.tanh(draw(n)),
        "sparse": lambda: torch.relu(draw(n) - 1.5),
        "two narrow modes": lambda: torch.where(torch.rand(n) < 0.5, 0.3, 0.35) + 0.002 * draw(n),
        "uniform": lambda: torch.rand(n),
        "heavy tails": lambda: torch.distributions.StudentT(2.0).sample((n,)),
    }
    makers = list(kinds.values())
    return torch.stack([makers[i % len(makers)]() for i in range(w)], dim=1)


def borderline(n):
    """The standard deviation whose expected peak density is 20."""
    return math.sqrt((metrics.K0 / 20) ** 2 / (1 + n**-0.4) - JITTER**2)


@pytest.mark.slow
def test_peaks_and_verdicts_are_scipys():
    """Would catch: another bandwidth rule, a maximum over too coarse a grid, an approximation that flips a verdict."""
    width = 512
    torch.manual_seed(width)
    jittered = adversarial_batch(2048, width)
    jittered = jittered + JITTER * torch.randn(jittered.shape)
    ours = metrics.kde_peak_density(jittered, noise_variance=0).numpy()
    checked = range(0, width, width // 256)
    theirs = np.array([scipy_peak(jittered[:, i]) for i in checked])
    ours = ours[list(checked)]
    np.testing.assert_allclose(ours, theirs, rtol=0.002)  # two modes may be as high but for so much
    verdicts = metrics.dead_neurons(jittered, noise_variance=0).numpy()[list(checked)]
    assert (verdicts == (theirs >= 20)).all()
    assert 0.2 < verdicts.mean() < 0.8  # the batch holds both


@given(st.integers(0, 2**31), st.sampled_from([16, 100, 2048]), st.floats(1e-3, 10), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_random_mixtures_agree_with_scipy(seed, n, scale, modes):
    """Would catch: a grid that misses the highest of several modes, or depends on the activations' scale."""
    rng = np.random.default_rng(seed)
    centres, widths = rng.normal(size=modes) * scale, rng.uniform(0.001, 0.3, modes) * scale
    component = rng.integers(modes, size=n)
    samples = torch.tensor(rng.normal(centres[component], widths[component]), dtype=torch.float32)
    ours = metrics.kde_peak_density(samples[:, None], noise_variance=0).item()
    assert ours == pytest.approx(scipy_peak(samples), rel=0.01)


def test_peak_of_a_normal_density_with_deviation_002_is_the_threshold():
    """The threshold of 20 is the peak of N(0, 0.02). Would catch: a kernel without its 1/sqrt(2 pi)."""
    quantiles = torch.tensor(
        [math.sqrt(2) * torch.erfinv(torch.tensor(2 * (i + 0.5) / 20000 - 1)) for i in range(20000)]
    )
    peak = metrics.kde_peak_density(0.02 * quantiles[:, None], noise_variance=0).item()
    smoothing = math.sqrt(1 + 20000**-0.4)
    assert peak == pytest.approx(metrics.K0 / 0.02 / smoothing, rel=0.002)


def test_jitter_is_normal_with_variance_1e_5_and_follows_its_generator():
    """Would catch: 1e-5 taken for the standard deviation, and a draw from the global generator."""
    constant = torch.full((2048, 512), 0.5)
    before = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, other = (metrics.kde_peak_density(constant, generator=g) for g in generators)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    expected = metrics.K0 / (JITTER * math.sqrt(1 + 2048**-0.4))
    assert first.mean().item() == pytest.approx(expected, rel=0.03)


def test_a_constant_neuron_without_jitter_is_infinitely_dense():
    assert metrics.kde_peak_density(torch.ones(10, 2), noise_variance=0).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("singular_values", "rank"),
    [
        ([1.0], 1),
        ([5, 5, 5, 5], 4),  # 3/4 < 0.99
        ([99, 1], 1),  # exactly 0.99 is enough
        ([98.9, 1.1], 2),
        ([60, 30, 9, 0.9, 0.1], 3),  # 0.99 of 100 is reached by the third
        ([60, 30, 8.9, 1, 0.1], 4),
        ([10, 10, 0.1], 2),  # squares would need 2 as well, but 20/20.1 = 0.995
        ([90, 9.5, 0.5], 2),  # squares: 8100 of 8190.5 is 0.989, 2 as well
        ([95, 5], 2),  # squares: 0.997, which would be 1
    ],
)
def test_effective_rank_by_hand(singular_values, rank):
    """Would catch: squared singular values, > instead of >=, an off-by-one in k."""
    w = len(singular_values)
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, w)))[0] for size in (50, w))
    features = torch.tensor(left @ np.diag(singular_values) @ right.T)
    assert metrics.effective_rank(features) == rank
    p = np.array(singular_values) / sum(singular_values)
    assert metrics.entropy_rank(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_ranks_of_special_matrices():
    """Would catch: centring the features (rank one of equal rows would become 0) and 0/0."""
    ones = torch.ones(2048, 512)
    assert metrics.effective_rank(ones) == 1
    assert metrics.entropy_rank(ones) == pytest.approx(1, abs=1e-3)
    assert metrics.effective_rank(torch.zeros(20, 5)) == 0
    assert metrics.entropy_rank(torch.zeros(20, 5)) == 0
    assert metrics.effective_rank(torch.eye(3, 8)) == 3  # n < w
    assert metrics.entropy_rank(torch.eye(3, 8)) == pytest.approx(3)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_ranks_agree_with_numpys_svd(seed, n, w):
    features = np.random.default_rng(seed).normal(size=(n, w)).astype(np.float32)
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = values.cumsum() / values.sum()
    assert metrics.effective_rank(torch.tensor(features)) == int(np.argmax(share >= 0.99 - 1e-9)) + 1
    p = values / values.sum()
    expected = math.exp(-sum(x * math.log(x) for x in p if x > 0))
    assert metrics.entropy_rank(torch.tensor(features)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_null_directions_add_nothing_to_a_share(rotated):
    """100 equal singular values of 512: 99 of them are exactly 99 %. Would catch: the rounding of 412 null directions,
    1e-8 each after the root, which asks for the hundredth."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 100)))[0] for size in (2048, 512))
    features = left @ right.T if rotated else np.hstack([left, np.zeros((2048, 412))])
    assert metrics.effective_rank(torch.tensor(features)) == 99
    # What is small and no rounding still counts: 50 singular values of 1 and 50 of 1/49 are 98 % and 2 %.
    values = np.repeat([1.0, 1 / 49], 50)
    assert metrics.effective_rank(torch.tensor(left * values @ right.T)) == 75


def test_a_constant_layer_has_no_scaled_count():
    """507 of 512 neurons constant are 99.02 %, 506 are 98.8 %. Would catch: rounding logged as dead neurons."""
    for constant, is_logged in ((506, True), (507, False), (512, False)):
        z = torch.randn(600, 512, generator=torch.Generator().manual_seed(1))
        z[:, :constant] = 1e-7 * z[:, :constant] + 0.5
        values = metrics.representation_metrics(z)
        assert values["std_dead_neurons"] == pytest.approx(constant / 512)
        assert ("dead_neurons_scaled" in values) == is_logged


def test_the_scaled_count_of_half_precision():
    """Would catch: one large constant neuron that overflows float16 once it is divided by the others' deviation."""
    activations = torch.cat([torch.full((64, 1), 1000.0), 0.01 * torch.randn(64, 7)], dim=1).half()
    assert metrics.dead_neurons_scaled(activations).tolist() == [True] + [False] * 7


def test_dormant_neurons_by_hand():
    """Scores 4, 1, 0.1, 0 with mean 1.275; tau 0.1 draws the line at 0.1275. Would catch: no abs, no normalising."""
    activations = torch.tensor([[4.0, -1.0, 0.1, 0.0], [-4.0, 1.0, -0.1, 0.0]])
    assert metrics.dormant_neurons(activations, tau=0.1).tolist() == [False, False, True, True]
    assert metrics.dormant_neurons(activations).tolist() == [False, False, False, True]  # line at 0.0319
    assert metrics.dormant_neurons(torch.zeros(3, 2)).all()


def test_representation_metrics_by_hand():
    """Two constant neurons, two normal ones. Would catch: a percentage, a norm over the wrong axis, swapped keys."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2048, 4, generator=generator)
    z[:, 0], z[:, 1] = 3.0, 0.0
    narrow = torch.zeros(2048, 4)
    narrow[:, 0] = z[:, 2]
    values = metrics.representation_metrics(z, {"z_enc": narrow, "z_star": z}, generator=generator)
    assert values["dead_neurons"] == values["std_dead_neurons"] == values["dead_neurons_z_star"] == 0.5
    assert values["dead_neurons_z_enc"] == 0.75
    assert values["dormant_neurons"] == 0.25
    assert values["dead_neurons_scaled"] == 0.5
    assert values["effective_rank"] == 3
    assert values["effective_rank_centred"] == 2  # without the constant 3
    assert (values["effective_rank_z_enc"], values["effective_rank_z_star"]) == (1, 3)
    assert 2 < values["entropy_rank"] < 3
    assert values["feature_norm"] == pytest.approx(np.linalg.norm(z.numpy(), axis=1).mean(), rel=1e-5)
    assert set(values) == {
        *("dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons", "feature_norm"),
        *("dead_neurons_z_enc", "dead_neurons_z_star", "dead_neurons_scaled", "effective_rank_centred"),
        *("effective_rank_z_enc", "effective_rank_z_star"),
    }
    assert metrics.representation_metrics(z, threshold=1e9, generator=generator)["dead_neurons"] == 0


@given(st.floats(1e-4, 1e3), st.floats(-10, 10), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_scaled_count_and_the_centred_rank_know_neither_scale_nor_place(scale, place, seed):
    """Would catch: jitter before the division, a scale per neuron (it would revive all), a mean left in the scale."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(500, 8))
    z[:, :3] *= 0.002  # deviation 0.0025 of the layer's, far below 0.02
    moved = torch.tensor(z * scale + place * scale)
    assert metrics.dead_neurons_scaled(moved).tolist() == [True] * 3 + [False] * 5
    values = np.linalg.svd(z - z.mean(axis=0), compute_uv=False)
    expected = int(np.argmax(values.cumsum() / values.sum() >= 0.99)) + 1
    assert metrics.effective_rank_centred(moved) == expected


def test_scaled_and_centred_by_hand():
    """Rows +-1 and +-3 around a mean of 5: scale sqrt(5). A constant layer has neither scale nor rank."""
    z = torch.tensor([[6.0, 8.0], [4.0, 2.0]]).repeat(50, 1)
    assert metrics.effective_rank_centred(z) == 1
    assert metrics.effective_rank(z) == 2
    divided = z / math.sqrt(5)
    for threshold in (0.5, 1, 2, 3):
        expected = metrics.dead_neurons(divided, threshold, noise_variance=0)
        assert torch.equal(metrics.dead_neurons_scaled(z, threshold, noise_variance=0), expected)
    constant = torch.tensor([[0.1, 7.0, -3.3]]).repeat(2048, 1)
    assert metrics.dead_neurons_scaled(constant).all()
    assert metrics.effective_rank_centred(constant) == 0  # the mean of 2048 times 0.1 is not quite 0.1


@pytest.mark.parametrize(
    "function",
    [
        metrics.kde_peak_density,
        metrics.dead_neurons_scaled,
        metrics.effective_rank,
        metrics.effective_rank_centred,
        metrics.dormant_neurons,
        metrics.stable_rank,
        metrics.pca_rank,
        metrics.zero_neurons,
    ],
)
def test_bad_activations_are_refused(function):
    for bad in (
        torch.zeros(5),
        torch.zeros(0, 3),
        torch.tensor([[1.0, math.nan], [0, 0]]),
        torch.full((2, 2), math.inf),
    ):
        with pytest.raises(ValueError, match="activations"):
            function(bad)


@pytest.mark.parametrize("function", [metrics.kde_peak_density, metrics.dead_neurons, metrics.representation_metrics])
def test_finite_values_whose_range_is_not_are_refused(function):
    """Would catch: an index error from deep inside the density."""
    for column in ([3e38, -3e38], [1e308, -1e308]):
        activations = torch.tensor([[value, 0.0] for value in column] * 4, dtype=torch.float64)
        with pytest.raises(ValueError, match="the activations' range overflows float32"):
            function(activations)


# ------------------------------------------------------------------------------------- recording a network


class Net(torch.nn.Module):
    """Takes a tensor, a dict or a tuple of two; in training mode its dropout would show."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh())
        self.dropout = torch.nn.Dropout(0.5)
        self.second = torch.nn.Linear(5, 2).double()
        self.pair = Pair()
        self.unused = torch.nn.Linear(1, 1)
        self.seen = []

    def forward(self, observations):
        self.seen.append(observations)
        assert not torch.is_grad_enabled()
        x = observations["x"] if isinstance(observations, dict) else observations
        x = x[0] if isinstance(x, tuple) else x
        x = self.pair(self.dropout(self.first(x)))["halves"][0]
        return self.second(x.double())


class Pair(torch.nn.Module):
    def forward(self, x):
        return {"halves": (x, -x)}


X = torch.linspace(-2, 2, 30).reshape(10, 3)


def test_record_gives_outputs_by_object_and_by_name_without_gradients():
    """Would catch: a module's input for its output, dropout that is on, float64 that stays, a graph that is kept."""
    network = Net()
    found = metrics.record(network, {"h": network.first, "linear": "first.0", "top": "second", "all": network}, X)
    h = torch.tanh(X @ network.first[0].weight.T + network.first[0].bias)
    torch.testing.assert_close(found["h"], h.detach())
    torch.testing.assert_close(found["linear"], torch.atanh(h).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["top"], network.second(h.double()).detach().float())
    assert torch.equal(found["top"], found["all"])
    assert list(found) == ["h", "linear", "top", "all"]
    assert all((value.dtype, value.requires_grad) == (torch.float32, False) for value in found.values())
    assert all(weight.grad is None for weight in network.parameters())


def test_record_in_chunks_is_one_pass_and_of_anything_else_passes_it_on_as_it_is():
    """Would catch: a lost or repeated chunk, chunks in another order, an observation that is taken apart."""
    network = Net()
    whole = metrics.record(network, {"h": "first"}, X)["h"]
    for chunk in (1, 3, 5, 10, 99):
        network.seen.clear()
        torch.testing.assert_close(metrics.record(network, {"h": "first"}, X, chunk)["h"], whole)
        assert [len(piece) for piece in network.seen] == [len(piece) for piece in X.split(chunk)]
    for observations in ({"x": X, "more": None}, (X, "more")):
        network.seen.clear()
        assert torch.equal(metrics.record(network, {"h": "first"}, observations)["h"], whole)
        assert len(network.seen) == 1
        assert network.seen[0] is observations


class Twice(Net):
    def forward(self, observations):
        self.first(observations)
        return super().forward(observations)


class Broken(Net):
    def forward(self, observations):
        self.first(observations)
        raise ZeroDivisionError("in the middle")


def fresh(network):
    """In modes of its own, and with a hook that has to stay."""
    network.train()
    network.dropout.eval()
    network.hook = network.first.register_forward_hook(lambda module, inputs, output: None)
    return network


@pytest.mark.parametrize(
    ("network", "module", "chunk", "error", "message"),
    [
        (Net(), "first", None, None, ""),
        (Net(), "first", 4, None, ""),
        (Net(), "third", None, ValueError, "h: 'third' is not a module of the network; it has first, first.0, "),
        (Net(), torch.nn.Linear(3, 5), None, ValueError, "h: Linear.* is not a module of the network; it has first, "),
        (Net(), "unused", None, ValueError, r"h was not called by network\(observations\)"),
        (Net(), "pair", None, ValueError, "h returns dict, not a tensor: name the module that makes it"),
        (Twice(), "first", 4, ValueError, "g was called more than once in one pass: name a module that is called once"),
        (Broken(), "first", None, ZeroDivisionError, "in the middle"),
    ],
)
def test_record_leaves_the_network_as_it_was(network, module, chunk, error, message):
    """Also after an error. Would catch: a hook left behind, all modules in evaluation mode, or all in training mode."""
    network = fresh(network)
    modes = [each.training for each in network.modules()]
    if error:
        with pytest.raises(error, match=message):
            metrics.record(network, {"g": "first.0", "h": module}, X, chunk)
    else:
        metrics.record(network, {"h": module}, X, chunk)
    assert [each.training for each in network.modules()] == modes
    assert {len(each._forward_hooks) for each in network.modules() if each is not network.first} == {0}
    assert len(network.first._forward_hooks) == 1
    assert torch.is_grad_enabled()


def test_this_file_works_copied_alone_into_an_empty_folder(tmp_path):
    """Would catch: an import of this project, of TensorBoard, of numpy, which torch may or may not have imported."""
    imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / "metrics.py").read_text(), flags=re.MULTILINE)
    assert set(imports) - sys.stdlib_module_names == {"torch"}
    shutil.copy(ROOT / "metrics.py", tmp_path)
    code = f"""
import sys
import torch
before = set(sys.modules)
sys.path = [{str(tmp_path)!r}] + [entry for entry in sys.path if entry != {str(ROOT)!r}]
import metrics
network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
z = metrics.record(network, {{"z": "1"}}, torch.randn(40, 3))["z"]
print(len(metrics.representation_metrics(z)), metrics.__file__, sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"8 {tmp_path / 'metrics.py'} ['metrics']\n", "")


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 30), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_stable_and_pca_rank_are_numpys(seed, n, w, place):
    """Would catch: norms instead of their squares, a PCA of features that are not centred, an off-by-one."""
    features = np.random.default_rng(seed).normal(size=(n, w)) + place
    expected = np.linalg.norm(features) ** 2 / np.linalg.norm(features, 2) ** 2
    assert metrics.stable_rank(torch.tensor(features)) == pytest.approx(expected, rel=1e-6)
    variances = np.linalg.svd(features - features.mean(axis=0), compute_uv=False) ** 2
    share = variances.cumsum() / variances.sum()
    assert metrics.pca_rank(torch.tensor(features)) == int(np.argmax(share >= 0.99 - 1e-9)) + 1


def test_stable_and_pca_rank_by_hand():
    """Singular values 3 and 1: (9 + 1) / 9. Variances of 3^2 and 1 hold shares of 0.9 and 0.1."""
    features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) / math.sqrt(2)
    assert metrics.stable_rank(features) == pytest.approx(10 / 9)
    assert [metrics.pca_rank(features, share) for share in (0.5, 0.9, 0.91)] == [1, 1, 2]
    # Variances of 1 and 1e-8: small singular values count until their square is lost too.
    assert metrics.pca_rank(features * torch.tensor([1.0, 3e-4]), 1 - 1e-9) == 2
    assert metrics.pca_rank(features + 100) == 2  # where they lie does not count
    assert metrics.stable_rank(torch.zeros(5, 3)) == 0
    assert metrics.pca_rank(torch.full((5, 3), 7.0)) == 0
    assert metrics.stable_rank(torch.full((5, 3), 7.0)) == pytest.approx(1)


def test_zero_neurons_by_hand():
    """Would catch: a sum that cancels, a constant that is not 0, a tiny value taken for 0."""
    activations = torch.tensor([[0.0, 1.0, 2.0, 1e-30], [0.0, -1.0, 2.0, 0.0]])
    assert metrics.zero_neurons(activations).tolist() == [True, False, False, False]
