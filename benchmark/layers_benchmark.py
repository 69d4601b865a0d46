"""What `layers/` adds to a measurement of z alone: CPU seconds and peak memory.

python benchmark/layers_benchmark.py             # every algorithm, tanh-lan, 2048 observations, seven rounds
python benchmark/layers_benchmark.py --rounds 3

Both ways alternate, so that both see the same load. Memory: the median over three fresh processes of
how far the peak exceeds what the process had before the measurement.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
from lan_utils.run import CHUNK, measure_network, measure_representation, set_up

N = 2048
WAYS = ("z alone", "every layer")


def measure(network: torch.nn.Module, observations: torch.Tensor, way: str) -> None:
    if way == "every layer":
        sample, _ = measure_network(network, observations)
    else:
        names = {name: module for name, module in network.measured.items() if name.startswith("z")}
        sample = metrics.record(network, names, observations, CHUNK)
    measure_representation(sample, 20.0, (1, 1))


def prepared(algorithm: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network with gradients, and observations."""
    module = __import__(f"{algorithm}_atari_lan")
    set_up(module.Args(num_threads=1))
    network = module.Network(4, "tanh-lan").to(memory_format=torch.channels_last)
    observations = torch.randint(0, 256, (N, 4, 84, 84), dtype=torch.uint8)
    output = network(observations[:32])
    sum(part.sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
    return network, observations


def peak_mb(algorithm: str, way: str) -> float:
    """Of a fresh process: how much its peak memory grew by one measurement."""
    code = f"""
import re, sys
sys.path[:0] = {[str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]!r}
import layers_benchmark as b

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

network, observations = b.prepared({algorithm!r})
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: that of the imports is higher
before = kilobytes("VmRSS")
b.measure(network, observations, {way!r})
print((kilobytes("VmHWM") - before) / 1024)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(rounds: int = 7) -> None:
    """Print, for each algorithm, what a measurement takes with z alone and with every layer.

    Args:
        rounds: measurements each way.
    """
    for algorithm in ("dqn", "ppo", "pqn"):
        network, observations = prepared(algorithm)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in WAYS:
            measure(network, observations, way)  # warms up
        for _ in range(rounds):
            for way in WAYS:
                start = time.process_time()
                measure(network, observations, way)
                seconds[way].append(time.process_time() - start)
        alone, every = (statistics.median(seconds[way]) for way in WAYS)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        peaks = {way: statistics.median(peak_mb(algorithm, way) for _ in range(3)) for way in WAYS}
        print(
            f"{algorithm}  z alone {alone:.3f} s, every layer {every:.3f} s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), added {every - alone:.3f} s; peak memory grew by "
            + ", ".join(f"{way} {peak:.0f} MB" for way, peak in peaks.items()),
            flush=True,
        )


if __name__ == "__main__":
    tyro.cli(main)
