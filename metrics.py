"""What the neurons of a representation do: dead neurons and ranks of an activation matrix.

Pure functions, and what logs them. Activations arrive as a float tensor (n, w): n observations, w neurons, on any
device.
"dead" always means: this neuron says (almost) the same whatever the observation.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

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

    The density is scipy's `gaussian_kde` with Scott's rule on the jittered activations. Its mode is looked up
    on a grid and then climbed to on the samples themselves, so what is returned is the density, not its
    approximation on the grid.

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
    # No density can exceed n kernels stacked on one point: most living neurons are settled by this alone.
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
    # From here on in bandwidths above the smallest sample.
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

    # Mean shift never descends; from so close a start two rounds were seen to leave errors of up to 0.03 %. Where
    # two modes differ by less than the grid's 0.2 %, it may have climbed the lower one.
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
    """Which neurons are dead once the layer's own scale is out of it, which `dead_neurons` depends on.

    The activations are divided by the layer's typical standard deviation, the root mean square over neurons and
    observations of z minus each neuron's mean; then as `dead_neurons`, jitter included. Beyond the paper. It cannot see
    a layer that fades as a whole: it measures rounding where `std_dead_neurons` is above MOSTLY_CONSTANT.

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
    return dead_neurons(activations / scale, threshold, noise_variance, generator)


def effective_rank_centred(features: Tensor, delta: float = 0.01) -> int:
    """`effective_rank` of z minus each neuron's mean: where z lies does not count. Beyond the paper.

    Args: as `effective_rank`.

    Returns:
        0 (every neuron is constant) to min(n - 1, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    _check(features)
    return effective_rank(_centred(features), delta)


def _centred(activations: Tensor) -> Tensor:
    """(n, w) -> (n, w) float64, each neuron minus its mean; of a constant one nothing is left, not even rounding."""
    constant = activations.amax(dim=0) == activations.amin(dim=0)
    activations = activations.double()
    return (activations - activations.mean(dim=0)).masked_fill(constant, 0)


def effective_rank(features: Tensor, delta: float = 0.01) -> int:
    """Smallest k whose k largest singular values hold a share of 1 - delta of their sum (Kumar et al. 2021).

    Singular values, not their squares; the features are not centred.

    Args:
        features: (n, w), finite. A rank says something about w neurons only where n >= w.
        delta: in (0, 1).

    Returns:
        0 (all zeros) to min(n, w).

    Raises:
        ValueError: wrong shape or values that are not finite.
    """
    return _effective_rank(_singular_values(features), delta)


def entropy_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

    Args: as `effective_rank`.

    Returns:
        0 (all zeros) or 1 to min(n, w).

    Raises:
        ValueError: as `effective_rank`.
    """
    return _entropy_rank(_singular_values(features))


def _singular_values(features: Tensor) -> Tensor:
    """(n, w) -> (min(n, w),) float64, descending."""
    _check(features)
    # Through the Gram matrix in double precision: it resolves ratios down to 1e-8, which is all that float32
    # features hold, in a quarter of the time.
    features = features.double()
    gram = features.T @ features if features.shape[0] >= features.shape[1] else features @ features.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _effective_rank(singular_values: Tensor, delta: float) -> int:
    # A null direction's singular value is the root of the Gram matrix's rounding: hundreds of them would add up.
    noise = singular_values[0] * math.sqrt(torch.finfo(singular_values.dtype).eps * len(singular_values))
    share = singular_values.masked_fill(singular_values < noise, 0).cumsum(0)
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
        peaks: `kde_peak_density(activations)`, where the caller has it already.

    Returns:
        dead_neurons, dead_neurons_scaled, std_dead_neurons (standard deviation over the batch < 1e-3),
        dormant_neurons and dead_neurons_<factor>: fractions of w in [0, 1]; effective_rank, effective_rank_centred,
        entropy_rank; feature_norm (mean L2). No dead_neurons_scaled where std_dead_neurons is above MOSTLY_CONSTANT.

    Raises:
        ValueError: wrong shape, fewer than two observations, or values that are not finite.
    """
    if peaks is None:
        peaks = kde_peak_density(activations, generator=generator)
    singular_values = _singular_values(activations)
    metrics = {
        "dead_neurons": float((peaks >= threshold).float().mean()),
        "effective_rank": float(_effective_rank(singular_values, delta=0.01)),
        "entropy_rank": _entropy_rank(singular_values),
        "dormant_neurons": float(dormant_neurons(activations).float().mean()),
        "std_dead_neurons": float((activations.std(dim=0) < 1e-3).float().mean()),
        "feature_norm": float(activations.norm(dim=1).mean()),
    }
    for name, factor in (factors or {}).items():
        metrics[f"dead_neurons_{name}"] = float(dead_neurons(factor, threshold, generator=generator).float().mean())
    if metrics["std_dead_neurons"] <= MOSTLY_CONSTANT:
        scaled = dead_neurons_scaled(activations, threshold, generator=generator)
        metrics["dead_neurons_scaled"] = float(scaled.float().mean())
    metrics["effective_rank_centred"] = float(effective_rank_centred(activations))
    return metrics


@torch.no_grad()
def activations(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    """z, and with a LaN its factors too.

    Args:
        network: has a `trunk` and a `representation` with `factors`, as those of the training scripts.
        observations: uint8 (n, 4, 84, 84), on any device.

    Returns:
        {"z": (n, width)}, and "z_enc", "z_star", "z_star2" where z is made of several, on the network's device.
    """
    device = next(network.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    for chunk in observations.split(256):  # more at once would only need more memory
        x = network.trunk(chunk.to(device) / 255)
        factors = network.representation.factors(x)
        for name, part in ({"z": network.representation(x)} | (factors if len(factors) > 1 else {})).items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(part) for name, part in parts.items()}


def log_representation(
    writer: SummaryWriter | None, sample: dict[str, Tensor], threshold: float, seed: tuple[int, int], step: int
) -> dict[str, float]:
    """Log `representation_metrics` and a histogram of log10 of the peak densities.

    Args:
        writer: None to log nothing.
        sample: what `activations` gives.
        threshold: omega of `dead_neurons`.
        seed: (run's seed, agent step): all that the jitter depends on.

    Returns:
        What `representation_metrics` gives.
    """
    z = sample["z"]
    noise_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator(z.device).manual_seed(noise_seed)
    peaks = kde_peak_density(z, generator=generator)
    factors = {name: factor for name, factor in sample.items() if name != "z"}
    values = representation_metrics(z, factors, threshold, generator, peaks)
    if writer:
        for name, value in values.items():
            writer.add_scalar(f"representation/{name}", value, step)
        log_peaks = peaks.log10().clamp(-2, 4).cpu()
        writer.add_histogram("representation/kde_peak", log_peaks, step, bins=np.linspace(-2, 4, 61))
    return values


def _check(activations: Tensor) -> None:
    if activations.ndim != 2 or 0 in activations.shape:
        raise ValueError(f"expected activations of shape (observations, neurons), got {tuple(activations.shape)}")
    if not all(torch.isfinite(extreme) for extreme in activations.aminmax()):  # NaN propagates
        raise ValueError("the activations hold NaN or infinite values")
