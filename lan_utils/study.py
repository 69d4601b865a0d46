"""The facts of the study, said once: games, activations, the runs of each figure, how a run is named. No torch."""

import csv
import functools
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent

ALGORITHMS = ("dqn", "ppo", "pqn")  # <algorithm>_atari_lan.py is the script of each
GAMES = ("BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball")
SEEDS = (1, 2, 3, 4, 5)

# Random and human score by game: the table that papers after 2016 share (Wang et al. 2016, "Dueling Network
# Architectures for Deep Reinforcement Learning"); that of Mnih et al. (2015) differs, e.g. in BeamRider.
ATARI_SCORES = ROOT / "results" / "atari_scores.csv"


def read_atari_scores() -> dict[str, tuple[float, float]]:
    """{game: (random, human)}"""
    with open(ATARI_SCORES, newline="") as file:
        rows = csv.DictReader(file)
        return {r["env_id"].removesuffix("NoFrameskip-v4"): (float(r["random"]), float(r["human"])) for r in rows}


PUBLISHED_SCORES = ROOT / "results" / "published_scores.csv"
FULL_LENGTH = 10_000_000  # agent steps of the published runs
# What the published runs of these scores have in common, where the script's default is another (docs/decisions.md).
FLAGS_OF_PUBLISHED = {"dqn": {"double_q": False, "end_e": 0.01, "adam_eps": 1e-8}}


class Published(NamedTuple):
    """A score that others report for a ReLU network."""

    algorithm: str
    game: str
    mean: float
    deviation: float
    deviation_over: str  # runs, or the episodes of one run
    source: str

    @property
    def source_name(self) -> str:
        return self.source.split()[0].rstrip(",")


@functools.cache
def read_published_scores() -> tuple[Published, ...]:
    """All that are known, each after FULL_LENGTH agent steps, as their sources have them."""
    with open(PUBLISHED_SCORES, newline="") as file:
        return tuple(
            Published(
                *(row["algorithm"], row["game"], float(row["mean"]), float(row["deviation"])),
                *(row["deviation_over"], row["source"]),
            )
            for row in csv.DictReader(file)
        )


class Style(NamedTuple):
    """How an activation is shown, the same everywhere."""

    label: str
    color: str
    dashes: Any  # matplotlib's linestyle
    width: int = 512  # of the representation


# Every --activation: Okabe and Ito's palette, then Tol's muted one.
ACTIVATIONS = {
    "relu": Style("ReLU", "#000000", "-"),
    "tanh": Style("Tanh", "#0072B2", (0, (5, 1.5))),
    "sigmoid": Style("Sigmoid", "#009E73", (0, (4, 1.2, 1, 1.2))),
    "selu": Style("SELU", "#882255", (0, (3, 1))),
    "tanh-lan": Style("Tanh (LaN)", "#D55E00", "-"),
    "tanh-2xlan": Style("Tanh (2×LaN)", "#E69F00", (0, (5, 1.5))),  # noqa: RUF001
    "tanh-addlan": Style("Tanh (+LaN)", "#999933", (0, (4, 1.2, 1, 1.2))),
    "layernorm": Style("Tanh (LayerNorm)", "#CC79A7", (0, (1, 1))),
    "wide-1024": Style("Tanh (1024)", "#56B4E9", (0, (6, 1.2, 1, 1.2, 1, 1.2)), width=1024),
    "relu-lan": Style("ReLU (LaN)", "#7F7F7F", (0, (4, 1.2, 1, 1.2))),
    "sigmoid-lan": Style("Sigmoid (LaN)", "#332288", (0, (1, 1))),
    # Controls, beyond the paper.
    "bilinear": Style("Bilinear", "#117733", "-"),
    "tanh-glu": Style("Tanh (GLU)", "#44AA99", (0, (5, 1.5))),
    "layernorm-lan": Style("LaN (LayerNorm)", "#AA4499", "-"),
    "layernorm-relu": Style("ReLU (LayerNorm)", "#661100", (0, (1, 1))),
    "relu-1024": Style("ReLU (1024)", "#888888", (0, (6, 1.2, 1, 1.2, 1, 1.2)), width=1024),
    "crelu": Style("CReLU", "#6699CC", (0, (3, 1))),
    "gelu": Style("GELU", "#AA9933", (0, (4, 1.2, 1, 1.2))),
}
CONTROLS = ("bilinear", "tanh-glu", "layernorm-lan", "layernorm-relu", "relu-1024", "crelu", "gelu")
DASHES = ((2, 1), (4, 2), (7, 1.5), (3, 1, 1, 1), (6, 1, 1, 1, 1, 1))  # of experiments shown with the first
further_experiments: list[str] = []  # those that are shown with the first, in this order; each has a look of its own
MAIN = ("relu", "tanh", "sigmoid", "tanh-lan")


def style(group: str) -> Style:
    """How an activation is shown; one that is not in ACTIVATIONS under its own name, in a colour derived from it.

    A number of three digits or more at the end of such a name is the width, as in `wide-1024`.

    Args:
        group: an activation, or `<activation>@<exp_name>` for one of a second experiment shown with the first.
    """
    if group in ACTIVATIONS:
        return ACTIVATIONS[group]
    activation, exp_name = split_group(group)
    if exp_name:  # the activation's colour, halfway to a grey of the experiment's
        first, is_known = style(activation), exp_name in further_experiments
        place = further_experiments.index(exp_name) if is_known else zlib.crc32(exp_name.encode())
        muted = "#" + "".join(f"{(byte + 80 + 40 * (place % 3)) // 2:02X}" for byte in bytes.fromhex(first.color[1:]))
        return first._replace(label=f"{first.label}, {exp_name}", color=muted, dashes=(0, DASHES[place % len(DASHES)]))
    # Dark enough to be read on white: each channel below 200.
    red, green, blue = (byte % 200 for byte in zlib.crc32(group.encode()).to_bytes(4, "big")[1:])
    color = f"#{red:02X}{green:02X}{blue:02X}"
    base, _, conv = activation.partition("+conv-")
    if conv:
        label = f"{style(base).label}, conv {style(conv).label}"
        return style(base)._replace(label=label, color=color, dashes=(0, (2, 1)))
    width = re.search(r"-([0-9]{3,})$", group)
    return Style(activation, color, (0, (2, 1)), *(int(found) for found in (width.groups() if width else ())))


def split_group(group: str) -> tuple[str, str]:
    """(activation, exp_name) of `<activation>@<exp_name>`; the exp_name is "" for the first experiment's groups."""
    activation, _, exp_name = group.partition("@")
    return activation, exp_name


class Needed(NamedTuple):
    """The runs that a figure is drawn from."""

    algorithm: str
    activations: tuple[str, ...] = MAIN
    games: tuple[str, ...] = GAMES
    seeds: tuple[int, ...] = SEEDS


# By the paper's number; the controls are beyond it. ReLU is always there where scores are normalised by it.
RUNS_OF_FIGURES = {
    "1": Needed("dqn", ("relu", "tanh")),
    "4": Needed("dqn", ("tanh", "tanh-lan"), ("Breakout",), (1,)),  # the neurons of one trained network each
    "5a": Needed("dqn"),
    "5b": Needed("dqn", ("relu", "tanh", "tanh-lan", "layernorm", "wide-1024")),
    "6": Needed("dqn"),
    "7": Needed("dqn", ("relu", "selu", "tanh-lan", "tanh-addlan", "tanh-2xlan")),
    "8": Needed("ppo"),
    "10": Needed("dqn", ("tanh", "tanh-lan"), ("Breakout",), (1,)),
    "11": Needed("dqn", ("tanh", "tanh-lan", "sigmoid", "sigmoid-lan"), ("Breakout",), (1,)),
    "13": Needed("dqn", ("relu", "relu-lan", "sigmoid", "sigmoid-lan", "tanh", "tanh-lan")),
    "14": Needed("dqn", ("relu", "relu-lan")),
    "15": Needed("dqn"),
    "16": Needed("dqn"),
    "17": Needed("ppo"),
    "controls-dqn": Needed("dqn", ("relu", "tanh", "tanh-lan", "layernorm", "wide-1024", *CONTROLS)),
    "controls-ppo": Needed("ppo", ("relu", "tanh", "tanh-lan", "layernorm", "wide-1024", *CONTROLS)),
}


def run_name(args: Any) -> str:
    """The run folder's name: no time stamp, the same command names the same run.

    Args:
        args: has env_id, exp_name, activation and seed.
    """
    return f"{args.env_id}__{args.exp_name}__{group_of(vars(args))}__{args.seed}"


def group_of(flags: Mapping[str, Any]) -> str:
    """The runs that are drawn together: the activation, and what else the convolutions are made with than ReLU."""
    conv = flags.get("conv_activation", "relu")
    return flags["activation"] + (f"+conv-{conv}" if conv != "relu" else "")


def codes_of(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """What config.json says of the code that trained a run: at its beginning, and after each resume that changed it."""
    resumes = config["resumes"] if isinstance(config.get("resumes"), list) else []
    codes = (part.get("code") for part in (config, *resumes) if isinstance(part, dict))
    return [code for code in codes if isinstance(code, dict)]


# Games whose transitions took more than 1,250 bytes in DQN's replay memory: the larger of two kinds of random play
# (results/replay_benchmark_every.txt has all games).
TRANSITION_BYTES = {
    "Alien": 1523,
    "BattleZone": 1342,
    "JourneyEscape": 1716,
    "Krull": 1729,
    "MsPacman": 1515,
    "PrivateEye": 1283,
    "Qbert": 1486,
    "SpaceInvaders": 1495,
    "UpNDown": 2181,
    "YarsRevenge": 1531,
}


def transition_bytes(env_id: str) -> int:
    """Bytes to count on for a transition in DQN's replay memory.

    A fifth more than random play took: learned play sees other frames, and its bytes have not been measured.
    """
    return max(1500, TRANSITION_BYTES.get(env_id.removesuffix("NoFrameskip-v4"), 0) * 6 // 5)


def dqn_memory(env_id: str, transitions: int, batch_size: int) -> int:
    """Bytes of resident memory, an upper estimate: the process, the replay memory, and a batch in use."""
    return 800_000_000 + transitions * transition_bytes(env_id) + 300_000 * batch_size


def dqn_disk(env_id: str, transitions: int) -> int:
    """Bytes on disk of an unfinished run, an upper estimate: the replay memory, and the rest of three checkpoints."""
    return 300_000_000 + transitions * transition_bytes(env_id)


# Flags that leave every weight and every logged point of the training as it is: they never block a resume.
NEUTRAL_FLAGS = {
    *("num_threads", "cuda", "checkpoint_frequency", "keep_weights", "runs_dir", "overwrite", "async_envs"),
    *("track", "wandb_project_name", "wandb_entity", "capture_video", "eval_episodes"),
}
# Flags that tell the runs of a study apart.
NAMING_FLAGS = {"env_id", "exp_name", "activation", "conv_activation", "seed"}
