"""Watch a trained agent, finished or not: play whole games with a run's newest weights.

python scripts/enjoy.py runs/BreakoutNoFrameskip-v4__ppo_atari_lan__tanh-lan__1

python scripts/enjoy.py RUN_FOLDER --episodes 1 --video

The games are those of the script's own `evaluate`: with the same seed and number of games they are exactly the games
that `--eval-episodes` played at the end of a training on the CPU. Everything is written into a new folder
RUN_FOLDER/enjoy_<n>. The run itself is only read, even while it trains. Everything is computed on the CPU.

Three names of an algorithm's script, `<algorithm>_atari_lan.py`, are used: `Network(num_actions, ...)`, whose other
parameters are named as flags, `make_env(env_id)` and `evaluate(network, args, games, video_folder, watch)`.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType, SimpleNamespace
from typing import Any

import ale_py
import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils import checkpoint
from lan_utils.checks import check_env_id, check_ffmpeg, refuse_unless
from lan_utils.cli import BadInput, launch, print_line, warn
from lan_utils.files import read_json, replace
from lan_utils.folder import digest_of
from lan_utils.run import measure_network, measure_representation
from lan_utils.study import ATARI_SCORES, ROOT, codes_of, group_of, read_atari_scores


@dataclass
class Args:
    """Play whole games with the agent that a run has trained so far, finished or not."""

    folder: tyro.conf.Positional[Path]
    """the run's folder, e.g. runs/BreakoutNoFrameskip-v4__ppo_atari_lan__tanh-lan__1"""
    episodes: int = 5
    """whole games to play, with the exploration of an evaluation"""
    seed: int | None = None
    """seed of the games; None: the run's own"""
    video: bool = False
    """film each game as mp4 into a new folder RUN_FOLDER/enjoy_<n>"""
    watch: bool = False
    """show the games in a window"""
    step: int | None = None
    """play the weights that --keep-weights kept at this agent step; None: the newest"""
    measure: bool = False
    """measure the representation on these games' observations; activations.npz goes into RUN_FOLDER/enjoy_<n>"""


# ------------------------------------------------------------------------------------------ what was trained


def read_run(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The algorithm's script, and every flag of the run by its snake_case name.

    Raises:
        BadInput: it is not a run's folder, or its algorithm or game is unknown here.
    """
    file = folder / "config.json"
    refuse_unless(os.path.lexists(folder), f"{folder} does not exist; name a run's folder")
    example = f", e.g. {folder.parent}" if (folder.parent / "config.json").exists() else ""
    refuse_unless(folder.is_dir(), f"{folder} is not a folder; name a run's folder{example}")
    inside = [run.parent for depth in ("*", "*/*") for run in sorted(folder.glob(f"{depth}/config.json"))]
    hint = f"one of those in it, e.g. {inside[0]}" if inside else "another one"
    refuse_unless(os.path.lexists(file), f"{folder} is not a run's folder (no config.json); name {hint}")
    config = read_json(file)
    algorithm, flags = config.get("algorithm"), config.get("args")
    kinds = {"env_id": str, "activation": str, "seed": int, "dead_threshold": (int, float), "metrics_samples": int}
    is_config = isinstance(algorithm, str) and isinstance(flags, dict)
    is_config = is_config and all(isinstance(flags.get(name), kind) for name, kind in kinds.items())
    refuse_unless(is_config, f"{file} is damaged, or not what a run writes; restore it from a backup")
    name = f"{algorithm}_atari_lan"
    has_script = re.fullmatch(r"[a-z0-9_]+", algorithm) and (ROOT / f"{name}.py").is_file()
    refuse_unless(bool(has_script), f"{file}: unknown algorithm {algorithm!r}: there is no {name}.py here")
    script = importlib.import_module(name)
    missing = [part for part in ("Network", "make_env", "evaluate") if not hasattr(script, part)]
    refuse_unless(not missing, f"{file}: {name}.py has no {' and no '.join(missing)}, which this program needs")
    try:
        check_env_id(flags["env_id"])
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    codes = codes_of(config)
    if codes and codes[-1].get(f"{name}.py") != digest_of(ROOT / f"{name}.py"):
        warn(f"{name}.py is not the script that trained this run, or has changed since: its agent may play otherwise")
    return script, flags


def read_weights(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], int, Path]:
    """The newest weights of a run: of model.pt, else of the newest whole checkpoint, else the newest kept ones.

    From a checkpoint, only the file with the network is read, not the replay memory.

    Args:
        step: reads weights_<step>.pt instead.

    Returns:
        The network's state dict, its agent step, and its file.

    Raises:
        BadInput: there are none, or none can be read.
    """
    model = folder / "model.pt"
    kept = sorted(int(file.stem.removeprefix("weights_")) for file in folder.glob("weights_[0-9]*.pt"))
    if step is not None:
        hint = f"kept are {', '.join(map(str, kept))}" if kept else "none were kept: train with --keep-weights"
        refuse_unless(step in kept, f"--step {step}: {folder} has no weights of this agent step; {hint}")
        return _load(folder / f"weights_{step}.pt"), step, folder / f"weights_{step}.pt"
    files = sorted((folder / "checkpoints").glob("*.ckpt"), reverse=True)
    for file in () if os.path.lexists(model) else files:
        try:
            state = checkpoint.read_checked(file)
            step = int(state["step"])
            return next(iter(state["things"].values())), step, file  # Run.resume: the network comes first
        except (ValueError, OSError, KeyError, TypeError, AttributeError, StopIteration) as error:
            warn(f"{error}; trying the checkpoint before it")
    # Also reached if a training has just finished: it writes model.pt first, then deletes its checkpoints.
    if not os.path.lexists(model):
        if kept:
            return read_weights(folder, kept[-1])
        unsaved = (
            "nothing is saved yet, no model.pt, checkpoint or kept weights; a run saves every --checkpoint-frequency "
            "steps and when Ctrl-C stops it, and with --env-backend ale only at its end"
        )
        raise BadInput(f"{folder}: " + (f"none of its {len(files)} checkpoints is whole" if files else unsaved))
    return _load(model), int(read_json(folder / "status.json").get("step") or 0), model


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, UnpicklingError, EOFError, KeyError):
        raise BadInput(f"{file} is damaged; restore it from a backup, or train anew with --overwrite") from None


def load_network(script: ModuleType, flags: dict[str, Any], weights: Any, file: Path) -> nn.Module:
    """The script's network with these weights.

    Raises:
        BadInput: the weights or the activation do not belong to this script.
    """
    env = script.make_env(flags["env_id"])
    num_actions = int(env.action_space.n)
    env.close()
    wanted = {name: flags[name] for name in inspect.signature(script.Network).parameters if name in flags}
    try:
        network = script.Network(num_actions, **wanted)
    except KeyError as error:
        raise BadInput(f"{file.parent}: {script.__name__}.py has no activation {error}") from None
    network.to(memory_format=torch.channels_last)  # as in training: another layout rounds differently
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:120]
        raise BadInput(f"{file} does not fit the network of {script.__name__}.py: {detail}") from None
    refuse_unless(checkpoint.all_finite(network.state_dict()), f"{file} holds weights that are NaN or infinite")
    return network


# ------------------------------------------------------------------------------------------------- games


class Sample:
    """A uniform sample of the observations that a network is shown (reservoir sampling, Vitter's algorithm R)."""

    def __init__(self, network: nn.Module, size: int, seed: int):
        self.observations: list[Tensor] = []
        self.seen, self.size, self.rng = 0, size, np.random.default_rng(seed)
        self.hook = network.register_forward_pre_hook(self._add)

    def _add(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen += 1
        place = len(self.observations) if self.seen <= self.size else int(self.rng.integers(self.seen))
        if place < self.size:
            self.observations[place : place + 1] = [inputs[0].clone()]


def new_folder(folder: Path) -> Path:
    """Make RUN_FOLDER/enjoy_<n> with the lowest free n from 1 on.

    Raises:
        BadInput: the run's folder cannot be written.
    """
    for n in range(1, 2**31):
        try:
            made = folder / f"enjoy_{n}"
            made.mkdir()
            return made
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"{folder} cannot be written ({error.strerror}): leave out --video and --measure") from None
    raise AssertionError


def report_scores(scores: list[float], env_id: str) -> Iterator[str]:
    """Mean and standard deviation (ddof 1) beside the random and the human score, a line each."""
    yield f"  mean      {np.mean(scores):10.2f}"
    if len(scores) > 1:
        yield f"  deviation {np.std(scores, ddof=1):10.2f}   standard deviation over {len(scores)} games"
    if known := read_atari_scores().get(env_id.removesuffix("NoFrameskip-v4")):
        yield f"  random    {known[0]:10.2f}   a random player's mean"
        yield f"  human     {known[1]:10.2f}   a human player's mean"
    else:
        yield f"  random and human score: {env_id} is not in {ATARI_SCORES.name}"


def measure(network: nn.Module, observations: Tensor, flags: dict[str, Any], seed: tuple[int, int], out: Path) -> None:
    """Print what `metrics` says about the network on these observations, and write `activations.npz`."""
    sample, layers = measure_network(network, observations)
    values, _ = measure_representation(sample, flags["dead_threshold"], seed)
    print_line(f"representation, on {len(observations):,} observations of these games")
    for name, value in values.items():
        text = f"{value:.1%}" if "neurons" in name else f"{value:.1f}"
        print_line(f"  {name:22} {text:>8}")
    print_line("layers                   constant     zero  dormant")
    for name, of_layer in layers.items():
        columns = (f"{of_layer[what]:9.1%}" for what in ("constant", "zero", "dormant"))
        print_line(f"  {name:22}" + "".join(columns))
    arrays = {name: activations.numpy() for name, activations in sample.items()}
    replace(out / "activations.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


OPEN_WINDOW = """
import ale_py, gymnasium
gymnasium.register_envs(ale_py)
gymnasium.make("PongNoFrameskip-v4", render_mode="human").close()
"""
WINDOW_SECONDS = 20  # for a display to answer


def check_window() -> None:
    """Refuse --watch where no window opens.

    If no display answers, SDL, which draws ale-py's windows, silently falls back to drivers that show nothing. So it is
    told not to, and a window is opened in another process: a display that never answers would block this one for ever.

    Raises:
        BadInput
    """
    instead = "film instead with --video"
    refuse_unless(ale_py.SDL_SUPPORT, f"--watch needs an ale-py that was built with SDL; {instead}")
    drivers = os.environ.get("SDL_VIDEODRIVER", "").lower()
    shows_nothing = {"dummy", "offscreen", "evdev"} & set(drivers.split(","))
    refuse_unless(not shows_nothing, f"--watch: SDL_VIDEODRIVER={drivers} shows no window; unset it, or {instead}")
    names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    given = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name)) or "DISPLAY is not set"
    if sys.platform == "linux" and not drivers:
        os.environ["SDL_VIDEODRIVER"] = "x11,wayland"
    try:
        opened = subprocess.run([sys.executable, "-c", OPEN_WINDOW], capture_output=True, timeout=WINDOW_SECONDS)
        has_window = opened.returncode == 0
    except subprocess.TimeoutExpired:
        has_window = False
    refuse_unless(has_window, f"--watch cannot open a window ({given}); name a display that answers, or {instead}")


def check_flags(args: Args) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        BadInput
    """
    refuse_unless(args.episodes > 0, f"--episodes is {args.episodes}; it must be positive")
    refuse_unless(args.seed is None or 0 <= args.seed < 2**53, f"--seed is {args.seed}; it must lie in [0, 2**53)")
    refuse_unless(not (args.watch and args.video), "--watch and --video exclude each other: a game is shown or filmed")
    if args.watch:
        check_window()
    if args.video:
        check_ffmpeg("--video")


def main(args: Args) -> None:
    check_flags(args)
    script, flags = read_run(args.folder)
    weights, step, file = read_weights(args.folder, args.step)
    network = load_network(script, flags, weights, file)
    torch.set_num_threads(1)  # more would slow down a training that runs meanwhile
    seed = flags["seed"] if args.seed is None else args.seed
    of_run = SimpleNamespace(**{"repeat_action_probability": 0.0} | flags | {"seed": seed})

    algorithm = script.__name__.removesuffix("_atari_lan").upper()
    of_weights = "finished" if file.name == "model.pt" else "kept along the way"
    state = of_weights if file.suffix == ".pt" else "not finished yet"
    print_line(f"{algorithm}, {group_of(flags)}, on {flags['env_id']}, games of seed {seed}")
    print_line(f"  weights   {file}")
    print_line(f"  trained   {step:,} agent steps, {state}")
    measurable = hasattr(network, "encoder") and hasattr(network, "measured")
    needs = f"--measure needs a network with `encoder` and `measured`, which that of {script.__name__}.py lacks"
    refuse_unless(measurable or not args.measure, needs)
    sample = Sample(network, flags["metrics_samples"], seed) if args.measure else None
    out = new_folder(args.folder) if args.video or args.measure else None
    scores = []
    try:
        video_folder = out if args.video else None
        for score in script.evaluate(network, of_run, args.episodes, video_folder, args.watch):
            print_line(f"  {f'game {len(scores)}':9} {score:10g}")
            scores.append(score)
        for line in report_scores(scores, flags["env_id"]):
            print_line(line)
        if sample:
            sample.hook.remove()
            width = network.encoder.width
            refuse_unless(
                sample.seen >= width,
                f"--episodes {args.episodes}: {sample.seen} observations are too few to measure {width} neurons; "
                "play more games",
            )
            measure(network, torch.cat(sample.observations), flags, (seed, step), out)
    finally:
        if out and any(out.iterdir()):
            print_line(f"written to {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
        elif out:
            out.rmdir()


if __name__ == "__main__":
    launch(main, Args)
