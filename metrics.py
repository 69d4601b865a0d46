"""Dead neurons and ranks of a network's representation, and the same questions for every layer.

This file needs torch and nothing else: copy it into any project. Three lines measure somebody else's agent:

    import metrics
    layers = metrics.layer_metrics(q_network, {"conv3": "network.5", "z": "network.8"}, observations)
    z = metrics.record(q_network, {"z": "network.8"}, observations)["z"]  # for `representation_metrics(z)`

Names are those of `q_network.named_modules()`. docs/metrics.md compares the definitions.

Everything else is a pure function of activations, a float tensor (n, w): n observations, w neurons, on the CPU or CUDA.
"dead" always means: the neuron outputs (almost) the same value whatever the observation.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Density at the centre of the standard normal kernel.
K0 = 1 / math.sqrt(2 * math.pi)

# The grid that finds a density's mode has this many points per bandwidth. Spreading each sample over its two
# neighbouring points then misplaces the density by at most (1/8)^2 / 8 = 0.2 % of K0 / bandwidth.
GRID_STEPS = 8
KERNEL_RADIUS = 5  # bandwidths; exp(-5^2 / 2) = 4e-6

MOSTLY_CONSTANT = 0.99  # of a layer's neurons; where more are constant, `dead_neurons_scaled` has no value


def kde_peak_density(
    activations: Tensor, noise_variance: float = 1e-5, generator: torch.Generator | None = None
) -> Tensor:
    """Highest value of each neuron's kernel density estimate (paper, Appendix B.1).

    The density is scipy's `gaussian_kde` with Scott's rule on the jittered activations. Its mode is first found on a
    grid and then refined on the samples themselves, so the result is the density, not its approximation on the grid.

    Args:
        activations: (n, w), n >= 2, finite.
        noise_variance: variance of the normal jitter; 0 leaves the activations as they are.
        generator: of the jitter, on the activations' device.

    Returns:
        (w,) float32, in 1 / (unit of activation); inf for a constant neuron without jitter.

    Raises:
        ValueError: wrong shape, fewer than two observations, or values that are not finite or whose range is not.
    """
    samples = _jittered(activations, noise_variance, generator)
    return _peak_density(samples, _bandwidth(samples))


def dead_neurons(
    activations: Tensor,
    threshold: float = 20.0,
    noise_variance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which neurons are dead: peak density >= threshold, the paper's omega (Appendix B.1).

    Args: as `kde_peak_density`; 20 is the peak of a normal density with standard deviation 0.02.

    Returns:
        (w,) bool.

    Raises:
        ValueError: as `kde_peak_density`.
    """
    samples = _jittered(activations, noise_variance, generator)
    bandwidth = _bandwidth(samples)
    # No density can exceed n kernels stacked on one point: this alone settles most living neurons.
    undecided = K0 / bandwidth >= threshold
    dead = torch.zeros_like(undecided)
    if undecided.any():
        dead[undecided] = _peak_density(samples[undecided], bandwidth[undecided]) >= threshold
    return dead


def _jittered(activations: Tensor, noise_variance: float, generator: torch.Generator | None) -> Tensor:
    """(n, w) -> jittered (w, n), neurons first so that each is contiguous."""
    _check(activations)
    if len(activations) < 2:
        raise ValueError(f"a density needs at least 2 observations, got {len(activations)}")
    samples = activations.float()
    if noise_variance > 0:
        noise = torch.randn(samples.shape, generator=generator, device=samples.device)
        samples = torch.add(samples, noise, alpha=math.sqrt(noise_variance))
    samples = samples.T.contiguous()
    if not torch.isfinite(samples.amax(dim=1) - samples.amin(dim=1)).all():
        raise ValueError("the activations' range overflows float32")
    return samples


def _bandwidth(samples: Tensor) -> Tensor:
    """Scott's rule (Appendix B.1): (w, n) -> (w,)."""
    return samples.shape[1] ** -0.2 * samples.std(dim=1)


def _peak_density(samples: Tensor, bandwidth: Tensor) -> Tensor:
    """(w, n) and (w,) -> (w,): the maximum over x of 1/(n bw) sum_j K((x - a_j) / bw)."""
    w, n = samples.shape
    constant = bandwidth == 0
    bandwidth = bandwidth.masked_fill(constant, 1.0)
    # From here on, positions are in bandwidths above the smallest sample.
    u = (samples - samples.amin(dim=1, keepdim=True)) / bandwidth[:, None]

    position = u * GRID_STEPS
    left = position.floor()
    share = position - left
    left = left.long()
    points = int(left.max()) + 2
    grid = torch.zeros(w, points, device=u.device)
    grid.scatter_add_(1, left, 1 - share)
    grid.scatter_add_(1, left + 1, share)
    reach = KERNEL_RADIUS * GRID_STEPS
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=u.device) / GRID_STEPS) ** 2)
    length = 1 << (points + 2 * reach - 1).bit_length()  # powers of two transform fastest
    density = torch.fft.irfft(torch.fft.rfft(grid, n=length) * torch.fft.rfft(kernel, n=length), n=length)
    mode = density[:, reach : reach + points].argmax(dim=1, keepdim=True) / GRID_STEPS

    # Mean shift never descends; from so close a start, two rounds left errors of up to 0.03 % when this was tried.
    # If two modes differ by less than the grid's 0.2 %, it may have climbed the lower one.
    for _ in range(2):
        weight = torch.exp(-0.5 * (u - mode) ** 2)
        mode = (weight * u).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
    peak = K0 * torch.exp(-0.5 * (u - mode) ** 2).sum(dim=1) / (n * bandwidth)
    return peak.masked_fill(constant, torch.inf)


def dead_neurons_scaled(
    activations: Tensor,
    threshold: float = 20.0,
    noise_variance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which neurons are dead once the layer's scale, on which `dead_neurons` depends, is divided out.

    The activations are divided by the layer's typical standard deviation, the root mean square over neurons and
    observations of z minus each neuron's mean; then as `dead_neurons`, jitter included. Beyond the paper. It does not
    see a layer that fades as a whole, and measures rounding where `std_dead_neurons` is above MOSTLY_CONSTANT.

    Args: as `dead_neurons`.

    Returns:
        (w,) bool; all true where every neuron is constant.

    Raises:
        ValueError: as `dead_neurons`.
    """
    _check(activations)
    scale = _centred(activations).square().mean().sqrt()
    if scale == 0:
        return torch.ones(activations.shape[1], dtype=torch.bool, device=activations.device)
    return dead_neurons(activations.float() / scale, threshold, noise_variance, generator)


def effective_rank_centred(features: Tensor, delta: float = 0.01) -> int:
    """`effective_rank` of z minus each neuron's mean, so that a large mean does not count. Beyond the paper.

    Args: as `effective_rank`.

    Returns:
        0 (every neuron is constant) to min(n - 1, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    _check(features)
    return effective_rank(_centred(features), delta)


def _centred(activations: Tensor) -> Tensor:
    """(n, w) -> (n, w) float64, each neuron minus its mean; a constant one becomes exactly 0."""
    constant = activations.amax(dim=0) == activations.amin(dim=0)
    activations = activations.double()
    return (activations - activations.mean(dim=0)).masked_fill(constant, 0)


def effective_rank(features: Tensor, delta: float = 0.01) -> int:
    """Smallest k such that the k largest singular values hold 1 - delta of the sum of all (Kumar et al. 2021).

    Singular values, not their squares; the features are not centred.

    Args:
        features: (n, w), finite. A rank says something about w neurons only where n >= w.
        delta: in (0, 1).

    Returns:
        0 (all zeros) to min(n, w).

    Raises:
        ValueError: wrong shape or values that are not finite.
    """
    return _effective_rank(_without_noise(_singular_values(features)), delta)


def entropy_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

    Args: as `effective_rank`.

    Returns:
        0 (all zeros) or 1 to min(n, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    return _entropy_rank(_singular_values(features))


def stable_rank(features: Tensor) -> float:
    """Squared Frobenius norm / squared spectral norm (Rudelson & Vershynin 2005; Ipsen & Saibaba, arXiv 2407.21594).

    Args: as `effective_rank`.

    Returns:
        0 (all zeros) or 1 to min(n, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    squares = _singular_values(features).square()
    return float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0


def pca_rank(features: Tensor, share: float = 0.99) -> int:
    """Smallest number of principal components that explain this share of the variance.

    Squares of singular values, and the features are centred: otherwise they would not be variances. The code of
    Moalla et al. (2024), which cites Yang et al. (2020) for it, does not centre them.

    Args:
        features: as for `effective_rank`.
        share: in (0, 1).

    Returns:
        0 (every neuron is constant) to min(n - 1, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    _check(features)
    return _effective_rank(_without_noise(_singular_values(_centred(features))).square(), 1 - share)


def _singular_values(features: Tensor) -> Tensor:
    """(n, w) -> (min(n, w),) float64, descending."""
    _check(features)
    # Through the Gram matrix in double precision, which takes a quarter of the time: it resolves ratios down to 1e-8,
    # and float32 features hold no more.
    features = features.double()
    gram = features.T @ features if features.shape[0] >= features.shape[1] else features @ features.T
    # On the CPU, since CUDA refuses `cumsum` to those who ask torch for deterministic algorithms.
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cpu()


def _without_noise(singular_values: Tensor) -> Tensor:
    # A null direction's singular value is the root of the Gram matrix's rounding: hundreds of them would add up.
    noise = singular_values[0] * math.sqrt(torch.finfo(singular_values.dtype).eps * len(singular_values))
    return singular_values.masked_fill(singular_values < noise, 0)


def _effective_rank(sizes: Tensor, delta: float) -> int:
    share = sizes.cumsum(0)
    if share[-1] == 0:
        return 0
    # The slack lets a share of exactly 1 - delta survive rounding.
    return int((share < (1 - delta - 1e-9) * share[-1]).sum()) + 1


def _entropy_rank(singular_values: Tensor) -> float:
    total = singular_values.sum()
    return float(torch.special.entr(singular_values / total).sum().exp()) if total > 0 else 0.0


def dormant_neurons(activations: Tensor, tau: float = 0.025) -> Tensor:
    """Which neurons are tau-dormant: mean |h_i| <= tau * mean_k mean |h_k| (Sokar et al. 2023, Definition 3.1).

    Args:
        activations: (n, w), finite.
        tau: >= 0.

    Returns:
        (w,) bool; all true where every activation is 0.

    Raises:
        ValueError: wrong shape or values that are not finite.
    """
    _check(activations)
    score = activations.abs().mean(dim=0)
    return score <= tau * score.mean()


def zero_neurons(activations: Tensor) -> Tensor:
    """Which neurons are exactly 0 on the whole sample, as a dead ReLU is (Moalla et al. 2024, in their code).

    Args:
        activations: (n, w), finite.

    Returns:
        (w,) bool.

    Raises:
        ValueError: wrong shape or values that are not finite.
    """
    _check(activations)
    return (activations == 0).all(dim=0)


def representation_metrics(
    activations: Tensor,
    factors: dict[str, Tensor] | None = None,
    threshold: float = 20.0,
    generator: torch.Generator | None = None,
    peaks: Tensor | None = None,
) -> dict[str, float]:
    """Everything that is logged about a representation, keyed by the last part of its TensorBoard tag.

    Args:
        activations: z, (n, w), finite.
        factors: of a LaN, by name ("z_enc", "z_star", ...), each (n, w).
        threshold: omega of `dead_neurons`.
        generator: of the jitter, on the activations' device.
        peaks: `kde_peak_density(activations)`, if the caller already has it.

    Returns:
        dead_neurons, dead_neurons_scaled, std_dead_neurons (standard deviation over the batch < 1e-3),
        dormant_neurons and dead_neurons_<factor>: fractions of w in [0, 1]; effective_rank, effective_rank_centred,
        entropy_rank, effective_rank_<factor>; feature_norm (mean L2). No dead_neurons_scaled where std_dead_neurons is
        above MOSTLY_CONSTANT.

    Raises:
        ValueError: wrong shape, fewer than two observations, or values that are not finite.
    """
    if peaks is None:
        peaks = kde_peak_density(activations, generator=generator)
    singular_values = _singular_values(activations)
    metrics = {
        "dead_neurons": float((peaks >= threshold).float().mean()),
        "effective_rank": float(_effective_rank(_without_noise(singular_values), delta=0.01)),
        "entropy_rank": _entropy_rank(singular_values),
        "dormant_neurons": float(dormant_neurons(activations).float().mean()),
        "std_dead_neurons": float((activations.std(dim=0) < 1e-3).float().mean()),
        "feature_norm": float(activations.norm(dim=1).mean()),
    }
    for name, factor in (factors or {}).items():
        metrics[f"dead_neurons_{name}"] = float(dead_neurons(factor, threshold, generator=generator).float().mean())
        metrics[f"effective_rank_{name}"] = float(effective_rank(factor))
    if metrics["std_dead_neurons"] <= MOSTLY_CONSTANT:
        scaled = dead_neurons_scaled(activations, threshold, generator=generator)
        metrics["dead_neurons_scaled"] = float(scaled.float().mean())
    metrics["effective_rank_centred"] = float(effective_rank_centred(activations))
    return metrics


# ------------------------------------------------------------------------------------- layers of a network

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
BOUNDS = {nn.Tanh: (-1.0, 1.0), nn.Sigmoid: (0.0, 1.0)}


def record(
    network: nn.Module, modules: Mapping[str, nn.Module | str], observations: Any, chunk: int | None = None
) -> dict[str, Tensor]:
    """The outputs of some modules while `network(observations)` runs: in evaluation mode, without gradients.

    The network is left as it was, also after an error: training mode, gradients, no hook, and the random numbers that a
    network which samples would draw next. If it is compiled, or wrapped for several devices, the module inside is run.

    Args:
        network: any module.
        modules: by the name under which its output is returned: a module of the network, or its dotted name.
        observations: the network's one argument, passed on as it is.
        chunk: splits a tensor along its first axis, which then has to be the observations (of a recurrent network, not
            time), so many at a time, to save memory.

    Returns:
        {name: output} in float32, on the network's device, observations along the first axis.

    Raises:
        ValueError: a module that the network does not have, does not call, or calls more than once; an output that is
            not a tensor, or nested (of a recurrent or attention module, the first output counts: the sequence); `chunk`
            with observations that are not a tensor.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in modules}
    _watch(network, modules, observations, chunk, lambda name, output: pieces[name].append(output.clone()))
    return {name: torch.cat(outputs) for name, outputs in pieces.items()}


def layer_metrics(
    network: nn.Module, modules: Mapping[str, nn.Module | str], observations: Any, chunk: int | None = None
) -> dict[str, dict[str, float]]:
    """What the units of some layers do on these observations, and the gradients that their parameters hold.

    A unit is a neuron, or a channel of a convolution at all its positions; of a sequence (n, time, units), a neuron at
    all its times. A module without weights whose output has 4 or 5 dimensions is taken to put out maps, (n, channels,
    height, width). Beyond the paper, which looks at z alone.

    Args: as `record`. Name modules that hold the weights and end with the activation, so that both are measured.

    Returns:
        {name: values}, each a fraction of the units unless said otherwise:
        constant: standard deviation over the observations below 1e-3, at every position.
        zero: exactly 0 on every observation, at every position.
        dormant: mean |h| at most 0.025 of the layer's mean (Sokar et al. 2023), over a channel's positions too.
        saturated: fraction of the values within 0.01 of a bound of tanh or sigmoid, where the module is one or an
            `nn.Sequential` that ends with one.
        and, where the module has any, the values of `gradient_metrics`.

    Raises:
        ValueError: as `record`; an output whose units cannot be told; a single observation; NaN or infinite outputs.
    """
    return record_and_measure(network, modules, observations, chunk, keep=())[1]


def record_and_measure(
    network: nn.Module,
    modules: Mapping[str, nn.Module | str],
    observations: Any,
    chunk: int | None = None,
    keep: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """`record` of the modules named in `keep` and `layer_metrics` of all, in one pass: feature maps are never kept."""
    found = _find(network, modules)
    kept: dict[str, list[Tensor]] = {name: [] for name in found if name in keep}
    units = {name: _Units(name, module) for name, module in found.items()}

    def see(name: str, output: Tensor) -> None:
        units[name].add(output)
        if name in kept:
            kept[name].append(output.clone())

    _watch(network, found, observations, chunk, see)
    measured = {name: units[name].metrics() | gradient_metrics(module) for name, module in found.items()}
    return {name: torch.cat(pieces) for name, pieces in kept.items()}, measured


def gradient_metrics(module: nn.Module, tau: float = 0.025) -> dict[str, float]:
    """Norms of the weights of a module's linear and convolutional layers, and of the gradients that they hold.

    Clipping changes gradients in place, so that after `clip_grad_norm_` they are the clipped ones. Transposed
    convolutions do not count, nor do weights that are computed from others, as by `spectral_norm`.

    Returns:
        {} without such layers; without gradients, weight_norm alone.
        weight_norm, grad_norm: L2.
        no_gradient: fraction of the module's output units whose incoming weights' gradient has an L2 norm of at most
            tau of the layer's mean. In an `nn.Sequential` the last layer counts; layers in any other module are taken
            to be parallel, and all count: name a residual block's layers one by one. Missing if their widths
            differ, or if the last layer is of another kind. (GraMa, Liu et al. 2025, takes the gradient with respect
            to the activation.)
    """
    weights = list({layer.weight: None for layer in module.modules() if _has_weights(layer)})
    if not weights:
        return {}
    values = {"weight_norm": _norm(weights)}
    if any(weight.grad is None for weight in weights):
        return values
    values["grad_norm"] = _norm([weight.grad for weight in weights])
    incoming = [layer.weight.grad for layer in _last_layers(module)]
    if len({len(gradient) for gradient in incoming}) == 1:
        squares = [gradient.flatten(1).float().square().sum(dim=1) for gradient in incoming]
        of_units = torch.stack(squares).sum(dim=0).sqrt()
        values["no_gradient"] = float((of_units <= tau * of_units.mean()).float().mean())
    return values


def _has_weights(module: nn.Module) -> bool:
    # To look at a weight that `spectral_norm` computes would change it.
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) and "weight" in module._parameters


def _last_layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose outputs a module's units are made of."""
    if _has_weights(module):
        return [module]
    children = list(module.children())
    if isinstance(module, nn.Sequential):
        # The last with a matrix of any kind: neither an activation nor a normalisation, but a layer that is not known.
        children = [each for each in children if any(weight.ndim > 1 for weight in each.parameters())][-1:]
    return [layer for child in children for layer in _last_layers(child)]


def _last_activation(module: nn.Module) -> nn.Module | None:
    """What is applied last, where the module's kind says so: a product with a tanh is not a tanh."""
    children = list(module.children())
    if isinstance(module, nn.Sequential) and children:
        return _last_activation(children[-1])
    if [type(child) for child in children] == [nn.ModuleDict] and len(children[0]) == 1:
        return _last_activation(*children[0].values())  # this project's `Hidden`, with a single factor
    return None if children else module


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.detach().float().norm() for tensor in tensors]).norm())


def _unwrapped(network: nn.Module) -> nn.Module:
    """The module inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` return."""
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        else:
            return network


def _find(network: nn.Module, modules: Mapping[str, nn.Module | str]) -> dict[str, nn.Module]:
    network = _unwrapped(network)
    own = dict(network.named_modules(remove_duplicate=False))  # a shared module goes by each of its names
    names = ", ".join(filter(None, own))
    found = {name: own.get(module) if isinstance(module, str) else module for name, module in modules.items()}
    for name, module in found.items():
        if not any(module is each for each in own.values()):
            raise ValueError(f"{name}: {modules[name]!r} is not a module of the network; it has {names}")
    return found


def _watch(
    network: nn.Module,
    modules: Mapping[str, nn.Module | str],
    observations: Any,
    chunk: int | None,
    see: Callable[[str, Tensor], None],
) -> None:
    """Call `see(name, output)` as soon as a module has returned, since a later layer may work in place."""
    network, found = _unwrapped(network), _find(network, modules)
    if chunk and not isinstance(observations, Tensor):
        raise ValueError(f"chunk splits a tensor, not {type(observations).__name__}; leave it out")
    called: set[str] = set()

    def hook(name: str, output: Any) -> None:
        if isinstance(output, tuple) and isinstance(found[name], (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
            output = output[0]  # the others are its last states, or the attention
        if not isinstance(output, Tensor):
            raise ValueError(f"{name} returns {type(output).__name__}, not a tensor: name the module that makes it")
        if output.is_nested:
            raise ValueError(
                f"{name} returns a nested tensor: give its `nn.TransformerEncoder` enable_nested_tensor=False"
            )
        if name in called:
            raise ValueError(f"{name} was called more than once in one pass: name a module that is called once")
        called.add(name)
        see(name, output.detach().float())

    modes = {module: module.training for module in network.modules()}
    cards = {each.device for each in network.parameters() if each.device.type == "cuda"}
    hooks = []
    try:
        for name, module in found.items():
            hooks.append(module.register_forward_hook(lambda module, inputs, output, name=name: hook(name, output)))
        network.eval()
        with torch.no_grad(), torch.random.fork_rng(cards), _eager():
            for piece in observations.split(chunk) if chunk else (observations,):
                called.clear()
                network(piece)
                if missing := found.keys() - called:
                    raise ValueError(f"{', '.join(sorted(missing))} was not called by network(observations)")
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _eager() -> contextlib.AbstractContextManager:
    """A compiled graph would not call the hooks; nothing is compiled before dynamo, which takes seconds to import."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # torch has it since 2.6
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Units:
    """Running statistics of a layer's units: a few numbers for each of their positions, (positions, units)."""

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        layers = list(module.modules())
        self.is_dense = any(isinstance(layer, (nn.Linear, nn.RNNBase, nn.Embedding)) for layer in layers)
        convolutions = CONVOLUTIONS | TRANSPOSED
        self.map_dims = {2 + dims for kind, dims in convolutions.items() for each in layers if isinstance(each, kind)}
        self.bounds = BOUNDS.get(type(_last_activation(module)))
        self.n, self.near_bounds = 0, 0

    def _units_first(self, output: Tensor) -> Tensor:
        """-> (n, units) or (n, units, ...); a sequence's steps count as observations.

        Raises:
            ValueError: the units cannot be told.
        """
        shape = tuple(output.shape)
        if 0 in shape or not 2 <= output.ndim <= 5:
            raise ValueError(f"{self.name}: an output of shape {shape} has no units that can be counted")
        is_map = output.ndim in self.map_dims
        if output.ndim == 2 or (is_map and not self.is_dense) or (output.ndim > 3 and (is_map or not self.is_dense)):
            return output
        if self.is_dense and not is_map:
            return output.flatten(0, -2)
        raise ValueError(
            f"{self.name}: {shape} may be (n, time, units) or (n, channels, length): name a module that holds its "
            "linear, recurrent or 1-d convolutional layer, and not both kinds"
        )

    def add(self, output: Tensor) -> None:
        """Add the outputs of a chunk, observations along the first axis."""
        output = self._units_first(output)
        n, units, total = len(output), output.shape[1], self.n + len(output)
        values = output.movedim(1, -1).reshape(n, -1)  # no copy if memory has channels last; sums of rows are fast
        if self.n and values.shape[1] != self.size.numel():
            raise ValueError(f"{self.name}: its outputs change their shape from chunk to chunk, {tuple(output.shape)}")
        size = values.abs().sum(dim=0)
        if self.n == 0:
            self.units, self.origin = units, values[0].clone()
        # Relative to the first observation, so that a constant unit is exactly 0, without rounding.
        values = values - self.origin
        mean = values.mean(dim=0)
        squares = values.sub_(mean).square_().sum(dim=0)
        if self.n:
            # Chan et al. (1979): the means and sums of squares of two samples give those of their union.
            difference = mean - self.mean
            squares += self.squares + difference.square() * (self.n * n / total)
            mean = self.mean + difference * (n / total)
            size += self.size
        self.n, self.mean, self.squares, self.size = total, mean, squares, size
        if self.bounds:
            low, high = self.bounds
            self.near_bounds = self.near_bounds + ((output <= low + 0.01) | (output >= high - 0.01)).sum()

    def metrics(self) -> dict[str, float]:
        """constant, zero, dormant and perhaps saturated of `layer_metrics`."""
        if self.n < 2:
            raise ValueError(f"{self.name}: a deviation needs at least 2 observations, got {self.n}")
        if not torch.isfinite(self.size).all():
            raise ValueError(f"{self.name}: its outputs hold NaN or infinite values")
        deviation = (self.squares / (self.n - 1)).sqrt().view(-1, self.units)
        size = self.size.view(-1, self.units) / self.n
        mean_size = size.mean(dim=0)
        values = {
            "constant": float((deviation < 1e-3).all(dim=0).float().mean()),
            "zero": float((size == 0).all(dim=0).float().mean()),
            "dormant": float((mean_size <= 0.025 * mean_size.mean()).float().mean()),
        }
        if self.bounds:
            values["saturated"] = float(self.near_bounds) / (self.n * self.size.numel())
        return values


def _check(activations: Tensor) -> None:
    if activations.ndim != 2 or 0 in activations.shape:
        raise ValueError(f"expected activations of shape (observations, neurons), got {tuple(activations.shape)}")
    if not all(torch.isfinite(extreme) for extreme in activations.aminmax()):  # NaN propagates
        raise ValueError("the activations hold NaN or infinite values")
