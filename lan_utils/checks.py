"""What is refused before anything is written: games, memory, folders, ranges."""

import difflib
import importlib.util
import math
import os
import re
import resource
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ale_py
import gymnasium as gym
import imageio_ffmpeg
import psutil
import torch
from annotated_types import Ge, Gt, Interval

from lan_utils import machine
from lan_utils.atari import film_writer
from lan_utils.cli import BadInput
from lan_utils.flags import RunArgs
from lan_utils.study import run_name, style

gym.register_envs(ale_py)


def refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


def require(condition: bool, args: Any, name: str, expected: str) -> None:
    """Refuse the flag `name` unless the condition holds, naming its value and what was expected."""
    refuse_unless(condition, f"--{name.replace('_', '-')} is {getattr(args, name)}; it must {expected}")


def check_env_id(env_id: str) -> None:
    """Accept `<Game>NoFrameskip-v4` and nothing else.

    Raises:
        BadInput: names the id that was probably meant.
    """
    games = {name.removesuffix("NoFrameskip-v4") for name in gym.registry if name.endswith("NoFrameskip-v4")}
    if env_id.removesuffix("NoFrameskip-v4") in games and env_id.endswith("NoFrameskip-v4"):
        return
    wanted = "--env-id takes <Game>NoFrameskip-v4, e.g. BreakoutNoFrameskip-v4"
    game = env_id.removeprefix("ALE/").rsplit("-v", 1)[0].removesuffix("NoFrameskip")
    if game in games:
        raise BadInput(f"{env_id} skips frames or repeats actions by itself; use --env-id {game}NoFrameskip-v4")
    if env_id in gym.registry and not str(gym.registry[env_id].entry_point).startswith("ale_py"):
        raise BadInput(f"{env_id} is not an Atari environment; {wanted}")
    close = [f"{name}NoFrameskip-v4" for name in difflib.get_close_matches(game, games, n=3, cutoff=0.7)]
    raise BadInput(f"unknown game {env_id!r}; " + (f"did you mean {' or '.join(close)}?" if close else wanted))


def cuda_memory(args: RunArgs) -> int:
    """Bytes of resident memory that CUDA's libraries add to a process, as measured once (docs/speed.md)."""
    return 1_400_000_000 if args.cuda and torch.cuda.is_available() else 0


def check_memory(needed: int, remedy: str) -> None:
    """Refuse a run that needs more memory than this process may still use.

    Args:
        needed: bytes.
        remedy: the part of the run that needs most, and the flag that sets it.

    Raises:
        BadInput
    """
    free = free_memory()
    refuse_unless(
        needed <= free, f"not enough memory: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; {remedy}"
    )


def free_memory() -> int:
    """Bytes that this process may still use."""
    free = machine.free_memory()
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    if address_space != resource.RLIM_INFINITY:
        free = min(free, max(address_space - psutil.Process().memory_info().vms, 0))
    return free


def check_runs_dir(runs_dir: str) -> None:
    """Refuse a runs folder that cannot be made or written, without making it.

    Raises:
        BadInput
    """
    existing = Path(runs_dir).absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
    except OSError as error:
        raise BadInput(f"--runs-dir {runs_dir}: {error.strerror}; name another folder") from None
    refuse_unless(existing.is_dir(), f"--runs-dir {runs_dir}: {existing} is not a folder; name another one")
    writable = os.access(existing, os.W_OK | os.X_OK) and not os.statvfs(existing).f_flag & os.ST_RDONLY
    refuse_unless(writable, f"--runs-dir {runs_dir}: {existing} is not writable; name another folder")


def check_flags(args: RunArgs) -> None:
    """Refuse what no algorithm accepts: values out of the ranges that `Args` declares, unknown games, odd names.

    Raises:
        BadInput
    """
    check_ranges(args)
    check_env_id(args.env_id)
    for name in ("runs_dir", "exp_name"):
        value = getattr(args, name)
        require(value.strip() != "" and value.isprintable(), args, name, "be a printable name")
    fits = "/" not in args.exp_name and len(os.fsencode(run_name(args))) <= 255
    require(fits, args, "exp_name", "be part of a folder's name, which has at most 255 bytes and no slash")
    cores = os.cpu_count() or 1
    require(args.num_threads <= cores, args, "num_threads", f"not exceed the {cores} cores of this machine")
    films_something = args.eval_episodes > 0 or not args.capture_video
    refuse_unless(films_something, "--capture-video films the evaluation; add e.g. --eval-episodes 1")
    if args.capture_video:
        check_ffmpeg("--capture-video")
    if args.track:
        check_wandb(run_name(args), args.wandb_project_name, args.wandb_entity)
    check_runs_dir(args.runs_dir)


def check_width(args: RunArgs, width: int) -> None:
    """Refuse fewer --metrics-samples than z has neurons, and an activation whose name or width plots cannot read.

    Args:
        width: of z.

    Raises:
        BadInput
    """
    require(args.metrics_samples >= width, args, "metrics_samples", f"be at least {width}, the width of z")
    is_name = re.fullmatch(r"[\w.-]+", args.activation) is not None
    require(is_name, args, "activation", "be of letters, digits, dots and dashes: folders and plots are named after it")
    shown = style(args.activation).width
    refuse_unless(
        shown == width,
        f"z of {args.activation} has {width} neurons, and plots would take its name for {shown}; "
        + (f"end the name with -{width}, or " if width >= 100 else "")
        + "give it a Style with this width in ACTIVATIONS of lan_utils/study.py",
    )


def check_ranges(args: Any) -> None:
    """Refuse a flag that is not of its annotation's type, such as a `Literal`, or out of its range, such as `Gt(0)`.

    Every number has to be finite, and a whole one below 2**53, which JSON and TensorBoard still count exactly.

    Raises:
        BadInput
    """
    plain = get_type_hints(type(args))
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        _check_type(args, name, plain[name])
        if not isinstance(value, (int, float)):
            continue
        require(math.isfinite(value), args, name, "be finite")
        require(isinstance(value, float) or abs(value) < 2**53, args, name, "be below 2**53")
        for option in (hint, *get_args(hint)):  # Annotated[...], or Annotated[...] | None
            for limit in getattr(option, "__metadata__", ()):
                is_within, expected = _within(value, limit)
                none = ", or None" if type(None) in get_args(hint) else ""
                require(is_within, args, name, expected + none)


def _check_type(args: Any, name: str, hint: Any) -> None:
    """The command line gives each flag its type; a call of `main` may not."""
    value, options = getattr(args, name), get_args(hint)
    if get_origin(hint) is Literal:
        require(value in options, args, name, f"be one of {', '.join(map(str, options))}")
        return
    if type(None) in options:
        if value is None:
            return
        hint = next(option for option in options if option is not type(None))
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    if hint in kinds:
        fits = isinstance(value, (int, float) if hint is float else hint)
        fits = fits and (hint is bool or not isinstance(value, bool))
        require(fits, args, name, f"be {kinds[hint]}, of type {hint.__name__} and not {type(value).__name__}")


def _within(value: float, limit: Any) -> tuple[bool, str]:
    """Whether the value is within a limit of `annotated_types`, and what was expected, to follow "it must"."""
    match limit:
        case Interval(gt=None, ge=low, lt=None, le=high):
            return low <= value <= high, f"lie in [{low}, {high}]"
        case Gt(0):
            return value > 0, "be positive"
        case Ge(0):
            return value >= 0, "not be negative"
    raise TypeError(f"{limit}: this kind of limit is not supported")


def check_ffmpeg(flag: str) -> None:
    """Refuse `flag` if films cannot be written, which is tried with three pictures.

    Raises:
        BadInput
    """
    program = "none was found"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        with tempfile.TemporaryDirectory() as folder:
            film = Path(folder) / "film.mp4"
            writer = film_writer(film, width=160, height=210)
            for _ in range(3):
                writer.send(bytes(160 * 210 * 3))
            writer.close()
            imageio_ffmpeg.count_frames_and_secs(film)
    except Exception as error:  # any error would end the run after its training
        reason = str(error).strip().split("\n", 1)[0]
        raise BadInput(
            f"{flag} needs a working ffmpeg, and this one cannot encode a film: {program} ({reason}); "
            "name another one with IMAGEIO_FFMPEG_EXE"
        ) from None


def check_wandb(name: str, project: str, entity: str | None) -> None:
    """Refuse --track if Weights & Biases is missing, would ask for a key, or does not accept a name.

    Args:
        name: of the run's folder, which is the run's id at Weights & Biases.
        project, entity: the flags.

    Raises:
        BadInput
    """
    refuse_unless(
        importlib.util.find_spec("wandb") is not None,
        "--track needs Weights & Biases; install it: pip install wandb",
    )
    import wandb

    try:
        wandb.Settings(run_id=name, project=project, entity=entity)
        can_log = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled") or wandb.login(prompt=False)
    except Exception as error:  # an older release, a malformed key: any error would end the run later
        raise BadInput(f"--track: Weights & Biases says: {str(error).split(chr(10))[0]}") from None
    # Its folder is offline-run-<time>-<id>.
    fits = len(os.fsencode(name)) <= 227
    refuse_unless(fits, f"--track: {name} is too long a name for Weights & Biases (227 bytes); shorten --exp-name")
    refuse_unless(can_log, "--track: nobody is logged in to Weights & Biases; wandb login, or WANDB_MODE=offline")
