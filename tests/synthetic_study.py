"""A study that nobody trained: run folders with known curves, to test the plots and to see what they look like.

    python tests/synthetic_study.py --runs-dir study
    python plot_results.py --runs-dir study --out-dir study_figures

Every score is drawn around `true_score`, every measurement is `true_measurement`: the numbers mean nothing.
"""

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.record_writer import RecordWriter

ROOT = Path(__file__).parent.parent
GAMES = ("BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball")

# Progress from the random player's score (0) to the human's (1) at these shares of the training. ReLU's lowest and
# highest points lie inside.
TIMES = (0.0, 0.15, 0.45, 0.7, 1.0)
PROGRESS = {
    "relu": (0.05, 0.0, 0.7, 1.0, 0.8),
    "tanh": (0.05, 0.1, 0.4, 0.5, 0.6),
    "sigmoid": (0.05, 0.05, 0.2, 0.35, 0.4),
    "tanh-lan": (0.05, 0.2, 0.9, 1.1, 1.3),
    "layernorm": (0.05, 0.2, 0.5, 0.6, 0.7),
    "wide-1024": (0.05, 0.1, 0.3, 0.4, 0.5),
    "selu": (0.05, 0.1, 0.3, 0.45, 0.55),
    "tanh-addlan": (0.05, 0.1, 0.45, 0.6, 0.75),
    "tanh-2xlan": (0.05, 0.1, 0.8, 1.15, 1.35),
    "relu-lan": (0.05, 0.05, 0.3, 0.5, 0.65),
    "sigmoid-lan": (0.05, 0.1, 0.25, 0.4, 0.5),
}
DEAD = {"relu": 0.6, "tanh": 0.4, "sigmoid": 0.45, "layernorm": 0.2, "wide-1024": 0.5, "selu": 0.3}  # at the end
RANK = {"relu": 150, "tanh": 250, "sigmoid": 180, "tanh-lan": 380, "relu-lan": 90}
FACTORS = {"tanh-lan": 2, "tanh-addlan": 2, "relu-lan": 2, "sigmoid-lan": 2, "tanh-2xlan": 3}
FACTORS |= {"bilinear": 2, "tanh-glu": 2, "layernorm-lan": 2}
RANK |= {"bilinear": 420, "tanh-glu": 350, "layernorm-lan": 400, "layernorm-relu": 220, "relu-1024": 170, "crelu": 130}
PARAMETERS = {"crelu": 883_108, "wide-1024": 3_294_372, "relu-1024": 3_294_372}  # of DQN with 4 actions
DEATH = 0.3  # share of the training after which a layer that dies is constant
LAN_LAW = {"tanh-lan": lambda p: p**2, "sigmoid-lan": lambda p: p, "relu-lan": lambda p: 2 * p - p**2}

with open(ROOT / "results" / "atari_scores.csv") as file:
    RANDOM_HUMAN = {
        row["env_id"].removesuffix("NoFrameskip-v4"): (float(row["random"]), float(row["human"]))
        for row in csv.DictReader(file)
    }


def true_score(game: str, activation: str, seed: int, time: np.ndarray) -> np.ndarray:
    """Expected score of a game that ends at this share of the training; seeds are 0.05 of the human's range apart."""
    random, human = RANDOM_HUMAN.get(game, (0.0, 100.0))
    return random + (human - random) * (
        np.interp(time, TIMES, PROGRESS.get(activation, PROGRESS["tanh"])) + 0.05 * (seed - 2)
    )


def true_measurement(name: str, activation: str, seed: int, time: np.ndarray) -> np.ndarray:
    """Value of `representation/<name>` at this share of the training."""
    base = activation.split("-")[0]
    dead = time * (DEAD.get(activation, DEAD.get(base, 0.4)) + 0.01 * (seed - 2))
    if name.startswith("dead_neurons_z_"):
        return dead
    if name == "dead_neurons":
        return LAN_LAW.get(activation, lambda p: p)(dead)
    if name == "std_dead_neurons":
        return 0.5 * true_measurement("dead_neurons", activation, seed, time)
    if name == "dead_neurons_scaled":
        return 0.7 * true_measurement("dead_neurons", activation, seed, time)
    rank = RANK.get(activation, 300) * (1 - 0.4 * time) + 2 * seed
    return {
        "effective_rank": rank,
        "effective_rank_centred": 1.1 * rank,
        "entropy_rank": 0.6 * rank,
        "dormant_neurons": 0.8 * dead,
        "feature_norm": 10 + time,
    }[name]


def layers_of(activation: str) -> list[str]:
    """From the input to z."""
    factors = ["z_enc", "z_star", "z_star2"][: FACTORS.get(activation, 0)]
    return ["conv1", "conv2", "conv3", *factors, "z"]


def true_layer(layer: str, what: str, activation: str, seed: int, time: np.ndarray, dies: str = "") -> np.ndarray:
    """Value of `layers/<layer>/<what>` at this share of the training; `dies` and all above it do so at DEATH."""
    layers = layers_of(activation)
    place = layers.index(layer)
    is_dead = bool(dies) and place >= layers.index(dies)
    constant = np.where(is_dead & (time >= DEATH), 1.0, 0.04 * place * time + 0.01 * (seed - 1))
    return {"constant": constant, "dormant": 0.5 * constant, "grad_norm": (1 - constant) * (place + 1)}[what]


def write_events(
    file: Path,
    points: Iterable[tuple[str, int, float]],
    purge_step: int | None = None,
    histograms: Iterable[int] = (),
    wall_time: float = 1.7e9,
) -> None:
    """An event file as TensorBoard's own writer makes it.

    Args:
        points: (tag, step, value).
        purge_step: the file begins as that of a resumed run: earlier files' points from this step on do not count.
        histograms: steps of a 60-bin `representation/kde_peak`.
        wall_time: of every event, seconds since 1970.
    """
    with open(file, "wb") as opened:
        writer = RecordWriter(opened)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        if purge_step is not None:
            start = Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            writer.write(start.SerializeToString())
        for tag, step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())
        for step in histograms:
            histogram = HistogramProto(bucket_limit=np.linspace(-2, 4, 61), bucket=np.arange(61.0))
            summary = Summary(value=[Summary.Value(tag="representation/kde_peak", histo=histogram)])
            writer.write(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())


def make_run(
    runs_dir: Path,
    algorithm: str,
    game: str,
    activation: str,
    seed: int,
    agent_steps: int = 100_000,
    games: int = 300,
    measurements: int = 20,
    noise: float = 0.0,
    finished: bool = True,
    stop: float = 1.0,
    exp_name: str = "",
    histograms: bool = False,
    constant: bool = False,
    layers: bool = True,
    dies: str = "",
    **flags: object,
) -> Path:
    """Write one run's folder.

    Args:
        games: that end at equal distances; the last one with the training.
        measurements: of the representation, likewise.
        noise: standard deviation of a game's score, as a share of the human's range.
        stop: share of the training after which nothing was logged any more.
        constant: all neurons, from the start; the scaled count is logged nevertheless, as runs of before did.
        layers: whether every layer is measured; runs of before did not.
        dies: name of a layer that dies at DEATH of the training.
        flags: of the run, beside the ones named here.

    Returns:
        The folder.
    """
    env_id = f"{game}NoFrameskip-v4"
    exp_name = exp_name or f"{algorithm}_atari_lan"
    conv = f"+conv-{flags['conv_activation']}" if "conv_activation" in flags else ""
    folder = Path(runs_dir) / f"{env_id}__{exp_name}__{activation}{conv}__{seed}"
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "exp_name": exp_name, "activation": activation, "seed": seed}
    args |= {"total_timesteps": agent_steps, "learning_rate": 1e-4, "dead_threshold": 20.0} | flags
    config = {"algorithm": algorithm, "args": args, "versions": {}, "commit": None, "device": "cpu"}
    config["parameters"] = PARAMETERS.get(activation, 80_036 + 1_606_144 * FACTORS.get(activation, 1))
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    rng = np.random.default_rng((seed, *f"{algorithm}{game}{activation}".encode()))
    random, human = RANDOM_HUMAN.get(game, (0.0, 100.0))
    ends = np.linspace(agent_steps / games, agent_steps, games).round().astype(int)
    scores = true_score(game, activation, seed, ends / agent_steps)
    scores = scores + noise * (human - random) * rng.standard_normal(games)
    points = [("charts/episodic_return", int(step), float(score)) for step, score in zip(ends, scores, strict=True)]
    points += [("charts/episodic_length", int(step), agent_steps / games) for step in ends]
    names = ["dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons", "feature_norm"]
    names += ["dead_neurons_scaled", "effective_rank_centred"]
    names += ["dead_neurons_z_enc", "dead_neurons_z_star", "dead_neurons_z_star2"][: FACTORS.get(activation, 0)]
    measured = np.linspace(agent_steps / measurements, agent_steps, measurements).round().astype(int)
    for name in names:
        values = true_measurement(name, activation, seed, measured / agent_steps)
        if constant and name == "std_dead_neurons":
            values = np.ones(len(measured))
        points += [(f"representation/{name}", int(step), float(v)) for step, v in zip(measured, values, strict=True)]
    for layer in layers_of(activation) if layers else ():
        for what in ("constant", "dormant", "grad_norm"):
            values = true_layer(layer, what, activation, seed, measured / agent_steps, dies)
            points += [
                (f"layers/{layer}/{what}", int(step), float(v)) for step, v in zip(measured, values, strict=True)
            ]
    points = sorted((point for point in points if point[1] <= stop * agent_steps), key=lambda point: point[1])
    write_events(
        folder / "events.out.tfevents.1700000000.host.1.0", points, histograms=measured.tolist() if histograms else ()
    )

    if finished:
        if game == "Breakout":
            np.savez_compressed(folder / "activations.npz", **activations(activation, rng))
        (folder / "model.pt").write_bytes(b"weights")
    status = {"state": "finished" if finished else "stopped", "step": int(stop * agent_steps)}
    status |= {"total_timesteps": agent_steps, "steps_per_second": 100.0, "pid": 1, "host": "nobody", "updated": 1.7e9}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def activations(activation: str, rng: np.random.Generator, n: int = 1024, width: int = 64) -> dict[str, np.ndarray]:
    """z and its factors, (n, width) float32: neurons from barely used to saturated."""
    f = {"relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x))}.get(
        activation.split("-")[0], np.tanh
    )
    factors = []
    for _ in range(FACTORS.get(activation, 1)):
        centre, spread = 3 * rng.standard_normal(width), rng.exponential(1.0, width)
        factors.append(f(centre + spread * rng.standard_normal((n, width))).astype(np.float32))
    if len(factors) == 1:
        return {"z": factors[0]}
    z = sum(factors) if activation == "tanh-addlan" else np.prod(factors, axis=0)
    return {"z": z} | dict(zip(("z_enc", "z_star", "z_star2"), factors, strict=False))


def make_study(
    runs_dir: Path,
    algorithms: tuple[str, ...] = ("dqn", "ppo"),
    games: tuple[str, ...] = GAMES,
    activations: tuple[str, ...] = tuple(PROGRESS),
    seeds: int = 3,
    agent_steps: int = 1_000_000,
    games_per_run: int = 300,
    measurements: int = 50,
    noise: float = 0.3,
) -> None:
    """Write a whole study into a new folder: every algorithm, game, activation and seed.

    Args:
        runs_dir: is made; must not exist.
        seeds: 1 to this number.
        noise: standard deviation of a game's score, as a share of the human's range.
    """
    if runs_dir.exists():
        sys.exit(f"error: {runs_dir} exists; name a new folder")
    for algorithm in algorithms:
        for game in games:
            for activation in activations:
                for seed in range(1, seeds + 1):
                    make_run(
                        *(runs_dir, algorithm, game, activation, seed, agent_steps, games_per_run, measurements, noise),
                        histograms=True,
                        dies="conv3" if activation == "tanh" and seed == 1 else "",
                    )


if __name__ == "__main__":
    tyro.cli(make_study)
