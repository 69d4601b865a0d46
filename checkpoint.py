"""What a training run needs whatever its algorithm: plain errors, a folder of its own, exact resume.

A run folder belongs to one process at a time (`.lock`). While the run is unfinished it holds `checkpoints/`:
`<step>.ckpt`, the newest two, and the immutable `<start>-<stop>.segment` files that they list. Each begins with
the SHA-256 of the rest, is written under another name, synced, and renamed into place, so that a kill at any
moment leaves the files before it whole. Loading executes nothing: `torch.load(weights_only=True)`.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import ale_py
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import torch
import tyro
from gymnasium.wrappers import FrameStackObservation, RecordEpisodeStatistics
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv, MaxAndSkipEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner on stderr

# Flags that leave every weight and every logged point of the training as it is: they never block a resume.
NEUTRAL_FLAGS = {
    *("num_threads", "cuda", "checkpoint_frequency", "runs_dir", "overwrite", "async_envs"),
    *("track", "wandb_project_name", "wandb_entity", "capture_video", "eval_episodes"),
}
KEPT_CHECKPOINTS = 2
SEGMENT_ENTRIES = 25_000  # at most: what a checkpoint copies at once stays small however rare checkpoints are
PRINT_SECONDS = 30  # between two lines of progress where there is no terminal
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "stable-baselines3", "opencv-python-headless", "tensorboard")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ------------------------------------------------------------------------------------------------ errors


class BadInput(Exception):
    """What was asked for cannot be: exit code 2, nothing written."""


class RunFailed(Exception):
    """The run cannot go on: exit code 1."""


class Stopped(Exception):
    """A signal ended the run: exit code 128 + its number."""

    def __init__(self, signum: int, saved: bool):
        super().__init__(signum)
        self.signum, self.saved = signum, saved


def launch(main: Callable[[Any], None], args_class: type) -> None:
    """Parse the command line, run `main(args)`, and turn what a user can cause into one line and an exit code.

    Args:
        args_class: dataclass of flags; each of its bases becomes a group of `--help`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (closed by whoever started this)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    groups = dataclasses.make_dataclass("Args", [(base.__name__.lower(), base) for base in args_class.__bases__])
    try:
        parsed = tyro.cli(groups, description=args_class.__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except BrokenPipeError:  # --help | head
        os._exit(128 + signal.SIGPIPE)
    args = args_class(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    threading.excepthook = lambda thread: None  # TensorBoard's writer thread: the main thread raises it again
    try:
        main(args)
    except BadInput as error:
        leave(2, f"error: {error}")
    except RunFailed as error:
        leave(1, f"error: {error}")
    except OSError as error:
        disk_full = error.errno in DISK_FULL
        what = f"cannot use {error.filename or 'the run folder'}: {error.strerror or error}"
        remedy = "free some space, then" if disk_full else "mend that, then"
        line = f"error: {what}. The last checkpoint, if there was one, is whole: {remedy} resume with {_same_command()}"
        leave(1, line, at_once=disk_full)
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        remedy = "this resumes it" if stop.saved else "nothing was saved; this starts anew"
        leave(128 + stop.signum, f"stopped by {name}; {remedy}: {_same_command()}")
    except KeyboardInterrupt:  # before the run has begun
        leave(130, "interrupted before the training began")
    except Exception as error:
        first_line = str(error).split("\n", 1)[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            leave(1, f"error: out of memory: {first_line}; free some, then resume with {_same_command()}")
        if args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            leave(1, f"error: --compile failed: {first_line}; start anew without it")
        raise
    finally:
        for worker in multiprocessing.active_children():  # they ignore the SIGTERM that python would send
            worker.kill()


def leave(code: int, message: str, at_once: bool = False) -> NoReturn:
    """Print one line on stderr and exit; `at_once` where TensorBoard's writer would wait for a full disk."""
    print(message, file=sys.stderr, flush=True)
    if at_once:
        os._exit(code)
    sys.exit(code)


def say(line: str) -> None:
    """Print a line; training goes on when nobody reads any more."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _same_command() -> str:
    return shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])


def refuse_unless(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


def require(condition: bool, args: Any, name: str, expected: str) -> None:
    """Refuse the flag `name`, saying its value and what was expected."""
    refuse_unless(condition, f"--{name.replace('_', '-')} is {getattr(args, name)}; it must {expected}")


# ------------------------------------------------------------------------------- what is checked beforehand


def check_env_id(env_id: str) -> None:
    """Accept `<Game>NoFrameskip-v4` and nothing else.

    Raises:
        BadInput: with the id that was probably meant.
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
    raise BadInput(f"there is no game {env_id!r}; " + (f"did you mean {' or '.join(close)}?" if close else wanted))


def check_memory(needed: int, what: str) -> str:
    """Compare what the run needs with what this process may still use.

    Args:
        needed: bytes.
        what: the part of the run that needs most, and the flag that sets it.

    Returns:
        "1.3 GB needed, 20.1 GB free", for the header.

    Raises:
        BadInput: it cannot fit.
    """
    free = psutil.virtual_memory().available
    # A container's or a Slurm job's limit (cgroup v2) is lower than what the machine has.
    for line in Path("/proc/self/cgroup").read_text().splitlines() if os.path.exists("/proc/self/cgroup") else ():
        group = Path("/sys/fs/cgroup") / line.rsplit(":", 1)[1].lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text().strip().isdigit():
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
                free = min(free, int(limit.read_text()) - used)
    summary = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    refuse_unless(needed <= free, f"not enough memory: {summary}; {what}")
    return summary


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


def check_common_flags(args: Any, width: int) -> None:
    """What both algorithms refuse.

    Args:
        width: of the representation.

    Raises:
        BadInput
    """
    check_env_id(args.env_id)
    for name, value in vars(args).items():
        if isinstance(value, int):
            require(value < 2**53, args, name, "be below 2**53")
        if name in ("learning_rate", "adam_eps", "ent_coef", "vf_coef"):
            require(math.isfinite(value), args, name, "be finite")
        if name in ("runs_dir", "exp_name"):
            require(value.strip() != "" and value.isprintable(), args, name, "be a printable name")
    for name in ("total_timesteps", "learning_rate", "dead_threshold"):
        require(getattr(args, name) > 0, args, name, "be positive")
    for name in ("seed", "metrics_frequency", "checkpoint_frequency", "eval_episodes", "num_threads", "adam_eps"):
        require(getattr(args, name) >= 0, args, name, "not be negative")
    require(0 <= args.gamma <= 1, args, "gamma", "lie in [0, 1]")
    enough = f"be at least {width}, the width of {args.activation}'s representation, or a rank means nothing"
    require(args.metrics_samples >= width, args, "metrics_samples", enough)
    films_something = args.eval_episodes > 0 or not args.capture_video
    refuse_unless(films_something, "--capture-video films the evaluation; add e.g. --eval-episodes 1")
    has_wandb = importlib.util.find_spec("wandb") is not None
    refuse_unless(has_wandb or not args.track, "--track needs Weights & Biases; install it: pip install wandb")
    fits = "/" not in args.exp_name and len(os.fsencode(run_name(args))) <= 255
    require(fits, args, "exp_name", "be part of a folder's name, which has at most 255 bytes and no slash")
    cores = os.cpu_count() or 1
    require(args.num_threads <= cores, args, "num_threads", f"not exceed the {cores} cores of this machine")
    if args.capture_video:
        try:
            imageio_ffmpeg.get_ffmpeg_version()
        except (OSError, RuntimeError, IndexError) as error:
            raise BadInput(
                f"--capture-video needs a working ffmpeg, {imageio_ffmpeg.get_ffmpeg_exe()}: {error}"
            ) from None
    check_runs_dir(args.runs_dir)


# -------------------------------------------------------------------------------------------- environment


class WholeGames(gym.Wrapper):
    """Outermost wrapper: tells when a whole game has ended, and can be saved and restored in mid-game.

    `info["episode"]` of a step or of a reset holds the game that ended in it: `r`, the unclipped score, and `l`,
    its length in agent steps. (A reset can end a game: after a lost life stable-baselines3 plays on in it.)
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.wrappers: list[gym.Env] = []
        while isinstance(env, gym.Wrapper):
            self.wrappers.append(env)
            env = env.env
        self.statistics = next(wrapper for wrapper in self.wrappers if isinstance(wrapper, RecordEpisodeStatistics))
        self.games = self.agent_steps = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return obs, self._with_game(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.agent_steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, float(reward), bool(terminated), bool(truncated), self._with_game(info)

    def _with_game(self, info: dict) -> dict:
        info = {key: value for key, value in info.items() if key != "episode"}
        if self.statistics.episode_count > self.games:
            if self.agent_steps:  # none: the no-ops of a reset ran into the game's end
                info["episode"] = {"r": float(self.statistics.return_queue[-1]), "l": self.agent_steps}
            self.games, self.agent_steps = self.statistics.episode_count, 0
        return info

    @property
    def snapshot(self) -> dict[str, Any]:
        """The game and the wrappers' own fields; after a reset of another environment, setting it continues exactly."""
        atari = self.env.unwrapped
        state = {
            "ale": np.frombuffer(atari.ale.cloneState(include_rng=True).serialize(), np.uint8).copy(),
            "generator": json.dumps(atari.np_random.bit_generator.state),
            "games": self.games,
            "agent_steps": self.agent_steps,
        }
        for wrapper in self.wrappers:
            if isinstance(wrapper, RecordEpisodeStatistics):
                state["score"] = float(wrapper.episode_returns)
                state["frames"] = wrapper.episode_lengths
            elif isinstance(wrapper, EpisodicLifeEnv):
                state["lives"] = wrapper.lives
                state["was_real_done"] = bool(wrapper.was_real_done)
            elif isinstance(wrapper, MaxAndSkipEnv):
                state["skip_buffer"] = wrapper._obs_buffer.copy()
            elif isinstance(wrapper, FrameStackObservation):
                state["stack"] = np.stack(wrapper.obs_queue)
        return state

    @snapshot.setter
    def snapshot(self, state: dict[str, Any]) -> None:
        atari = self.env.unwrapped
        atari.ale.restoreState(ale_py.ALEState(np.asarray(state["ale"]).tobytes()))
        atari.np_random.bit_generator.state = json.loads(state["generator"])
        self.games, self.agent_steps = state["games"], state["agent_steps"]
        for wrapper in self.wrappers:
            if isinstance(wrapper, RecordEpisodeStatistics):
                wrapper.episode_returns, wrapper.episode_lengths = state["score"], state["frames"]
                wrapper.episode_count = state["games"]
            elif isinstance(wrapper, EpisodicLifeEnv):
                wrapper.lives, wrapper.was_real_done = state["lives"], state["was_real_done"]
            elif isinstance(wrapper, MaxAndSkipEnv):
                wrapper._obs_buffer[:] = np.asarray(state["skip_buffer"])
            elif isinstance(wrapper, FrameStackObservation):
                wrapper.obs_queue.extend(np.array(state["stack"]))


@contextlib.contextmanager
def film(file: Path | None, env: gym.Env) -> Iterator[Callable[[], None]]:
    """Yield a function that adds what `env` shows to the mp4 `file`, one picture per agent step; None films nothing."""
    if file is None:
        yield lambda: None
        return
    height, width, _ = env.render().shape
    writer = imageio_ffmpeg.write_frames(str(file), (width, height), fps=15, macro_block_size=2)
    writer.send(None)
    try:
        yield lambda: writer.send(np.ascontiguousarray(env.render()))
    finally:
        writer.close()


# ------------------------------------------------------------------------------------------ files on disk


def write_checked(path: Path, content: Any) -> str:
    """Write `content` (tensors, arrays, plain values) to `path`, whole or not at all.

    Returns:
        The SHA-256 that `read_checked` compares, in hex.
    """
    buffer = io.BytesIO()
    torch.save(_tensors(content), buffer)
    digest = hashlib.sha256(buffer.getbuffer())
    replace(path, lambda file: (file.write(digest.digest()), file.write(buffer.getbuffer())))
    return digest.hexdigest()


def checked_content(path: Path, digest: str | None = None) -> memoryview:
    """The bytes that `write_checked` wrote after the digest.

    Raises:
        ValueError: the file is truncated, corrupt, or not the one that `digest` is of.
    """
    content = memoryview(path.read_bytes())
    found = hashlib.sha256(content[32:])
    if len(content) <= 32 or found.digest() != content[:32] or digest not in (None, found.hexdigest()):
        raise ValueError(f"{path} is truncated or corrupt")
    return content[32:]


def read_checked(path: Path, digest: str | None = None) -> Any:
    """What `write_checked` wrote, arrays as tensors.

    Raises:
        ValueError: as `checked_content`.
    """
    return torch.load(io.BytesIO(checked_content(path, digest)), map_location="cpu", weights_only=True)


def replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Make or replace the file at `path` atomically: the old or the new content survives a crash, nothing between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _tensors(content: Any) -> Any:
    """Arrays as tensors, which is what `torch.load(weights_only=True)` reads."""
    if isinstance(content, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(content))
    if isinstance(content, dict):
        return {key: _tensors(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_tensors(value) for value in content]
    return content


def arrays(content: Any) -> Any:
    """Tensors as arrays again, for what goes to another process."""
    if isinstance(content, torch.Tensor):
        return content.numpy()
    if isinstance(content, dict):
        return {key: arrays(value) for key, value in content.items()}
    return [arrays(value) for value in content] if isinstance(content, list) else content


def _all_finite(content: Any) -> bool:
    if isinstance(content, torch.Tensor):
        return not content.is_floating_point() or bool(torch.isfinite(content).all())
    if isinstance(content, dict):
        return all(map(_all_finite, content.values()))
    return not isinstance(content, (list, tuple)) or all(map(_all_finite, content))


# ------------------------------------------------------------------------------------------- random states


def set_up_device(args: Any) -> torch.device:
    """What the flags say of threads, CUDA and its rounding, set for all of torch; returns the device."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # By default glibc gives an update's tensors back to the system and faults their pages in again for the next.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    precision = "tf32" if args.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.fp32_precision = precision
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def seed_everything(seed: int, deterministic: bool) -> np.random.Generator:
    """Seed python, numpy and torch.

    Args:
        deterministic: torch's deterministic kernels, where it has them.

    Returns:
        The generator of everything that the script itself draws.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and writing it costs 3 %
        torch.backends.cudnn.benchmark = False
    return np.random.default_rng(seed)


def random_states(rng: np.random.Generator) -> dict[str, Any]:
    """Every random state of this process; the environments' are in their snapshots."""
    return {
        "generator": json.dumps(rng.bit_generator.state),
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any], rng: np.random.Generator) -> None:
    rng.bit_generator.state = json.loads(states["generator"])
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    numpy_state = json.loads(states["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# ------------------------------------------------------------------------------------------------ the run


class Run:
    """One run's folder, from the lock to `model.pt`; made by `open_run`.

    Attributes:
        folder: `<runs-dir>/<env_id>__<exp_name>__<activation>__<seed>`.
        writer: TensorBoard's, points beyond the checkpoint purged.
        resumed: what the checkpoint holds, or None for a start from nothing.
        signum: the signal that asked the run to stop, or 0.
    """

    writer: SummaryWriter

    def __init__(self, folder: Path, algorithm: str):
        self.folder = folder
        self.algorithm = algorithm
        self.checkpoints = folder / "checkpoints"
        self.resumed: dict[str, Any] | None = None
        self.signum = 0
        self.signalled_at = 0.0
        self.saved = -1  # agent step of the newest checkpoint
        self._at_once = False  # does a signal stop the run without waiting for a checkpoint?
        self._segments: dict[int, list] = {}  # [start, stop, digest] of each kept checkpoint's, by step
        self._good_losses = "none was logged"

    # -- start ----------------------------------------------------------------------------------------

    def leave_if_finished(self) -> None:
        model = self.folder / "model.pt"
        if not os.path.lexists(model):
            return
        refuse_unless(
            model.is_file() and model.stat().st_size > 0, f"{model} is not a whole file: move it away, or --overwrite"
        )
        if self.checkpoints.exists():  # a kill came between model.pt and their deletion
            self.lock()
            self.delete_checkpoints(keep=set())
        say(f"{self.folder} has finished; --overwrite trains it anew")
        sys.exit(0)

    def lock(self) -> None:
        # POSIX locks are not inherited by workers, and the kernel drops those of dead processes.
        self._lock_file = open(self.folder / ".lock", "a+")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.seek(0)
            owner = self._lock_file.read().strip() or "another process"
            raise BadInput(f"{self.folder} is being trained by {owner}; wait for it or stop it") from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {platform.node()}")
        self._lock_file.flush()

    def load(self) -> None:
        """Read the newest whole checkpoint of this algorithm.

        Raises:
            BadInput: there are checkpoints and none is whole.
        """
        files = sorted(self.checkpoints.glob("*.ckpt"), reverse=True)
        whole: set[str] = set()
        for file in files:
            try:
                content = read_checked(file)
                if not isinstance(content, dict) or content.get("algorithm") != self.algorithm:
                    raise ValueError(f"{file} is no checkpoint of {self.algorithm}")
                for start, stop, digest in content["segments"]:
                    if digest not in whole:
                        checked_content(self._segment(start, stop), digest)
                        whole.add(digest)
            except (ValueError, OSError) as error:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
                continue
            self._segments[content["step"]] = content["segments"]
            if self.resumed is None:
                self.resumed, self.saved = content, content["step"]
        if files and self.resumed is None:
            raise BadInput(
                f"none of the {len(files)} checkpoints in {self.checkpoints} is whole; nothing was changed: "
                "restore one from a backup, or start anew with --overwrite"
            )

    def read_segments(self) -> Iterator[Any]:
        """The segments of the checkpoint that is resumed, in order, one in memory at a time."""
        for start, stop, digest in self.resumed["segments"]:
            yield read_checked(self._segment(start, stop), digest)

    def purge_events(self) -> None:
        """Cut the event files back to where the checkpoint found them; without one, delete them."""
        known = self.resumed["event_files"] if self.resumed else {}
        for file in filter(Path.is_file, self.folder.glob("events.out.tfevents.*")):
            size, digest = known.pop(file.name, (0, ""))
            if size == 0:
                file.unlink()
                continue
            os.truncate(file, min(size, file.stat().st_size))
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                print(f"warning: {file} is damaged; curves will lack points", file=sys.stderr)
        for name in known:
            print(f"warning: {self.folder / name} is gone; curves will lack its points", file=sys.stderr)

    def on_signal(self, signum: int, frame: Any) -> None:
        if not self.signum:
            self.signum, self.signalled_at = signum, time.monotonic()
        elif time.monotonic() - self.signalled_at > 1:  # launchers may send one signal twice
            os._exit(128 + signum)
        if self._at_once:
            raise Stopped(signum, self.saved > 0)

    def print_header(self, args: Any, device: torch.device, start: int, memory: str) -> None:
        """What is about to happen, before the first step."""
        config = json.loads((self.folder / "config.json").read_text())
        threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
        say(f"{config['algorithm'].upper()}, {args.activation}, on {args.env_id}, seed {args.seed}")
        say(f"  run folder  {self.folder}")
        say(f"  device      {device}{threads}, {config['parameters']:,} parameters, {memory}")
        say(f"  agent steps {args.total_timesteps:,}" + (f", resumed at {start:,}" if start else ""))

    # -- while it runs --------------------------------------------------------------------------------

    def require_finite(self, network: torch.nn.Module, step: int) -> None:
        """Raises RunFailed where a weight is NaN or infinite."""
        if not _all_finite(network.state_dict()):
            self._diverged(step, "the weights are NaN or infinite")

    def _diverged(self, step: int, what: str) -> NoReturn:
        raise RunFailed(
            f"the training diverged before step {step:,}: {what}; the last good losses: {self._good_losses}"
        )

    def log_losses(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """Log `losses/<name>`, the only place where the device is waited for.

        Raises:
            RunFailed: a loss is NaN or infinite.
        """
        values = {name: float(value) for name, value in losses.items()}
        text = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        if not np.isfinite(list(values.values())).all():
            self._diverged(step, text)
        for name, value in values.items():
            self.writer.add_scalar(f"losses/{name}", value, step)
        if values:
            self._good_losses = f"{text} at step {step:,}"

    def save(
        self,
        step: int,
        state: dict[str, Any],
        export: Callable[[int, int], dict[str, Any]] | None = None,
        first_needed: int = 0,
    ) -> None:
        """Write a checkpoint, then delete what no kept checkpoint needs.

        Args:
            step: agent steps so far.
            state: tensors, arrays and plain values.
            export: gives the entries [start, stop) of a memory that gains one per step; those that no segment
                holds yet become one.
            first_needed: of those entries.

        Raises:
            RunFailed: the state holds NaN or infinity.
            OSError: the disk is full; the checkpoints before this one are whole.
        """
        if not _all_finite(state):
            self._diverged(step, "the state holds NaN or infinity, no checkpoint of it was written")
        if not self.checkpoints.exists():
            self.checkpoints.mkdir()
            _sync_folder(self.folder)
        segments = [
            entry for entry in self._segments.get(max(self._segments, default=0), []) if entry[1] > first_needed
        ]
        start = max([first_needed, *(stop for _, stop, _ in segments)])
        for begin in range(start, step if export else start, SEGMENT_ENTRIES):
            end = min(begin + SEGMENT_ENTRIES, step)
            segments = [*segments, [begin, end, write_checked(self._segment(begin, end), export(begin, end))]]
        content = {
            "algorithm": self.algorithm,
            "step": step,
            "segments": segments,
            "event_files": self._sync_events(),
            **state,
        }
        write_checked(self.checkpoints / f"{step:010d}.ckpt", content)
        self.saved = step

        self._segments = dict(sorted((self._segments | {step: segments}).items())[-KEPT_CHECKPOINTS:])
        keep = {self.checkpoints / f"{kept:010d}.ckpt" for kept in self._segments}
        keep |= {self._segment(start, stop) for entries in self._segments.values() for start, stop, _ in entries}
        self.delete_checkpoints(keep)

    def _sync_events(self) -> dict[str, tuple[int, str]]:
        """Bring what was logged to the disk; {event file: (size, SHA-256)}."""
        self.writer.flush()
        found = {}
        for file in filter(Path.is_file, self.folder.glob("events.out.tfevents.*")):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                content = opened.read()
            found[file.name] = (len(content), hashlib.sha256(content).hexdigest())
        return found

    def leave_if_signalled(self) -> None:
        if self.signum:
            raise Stopped(self.signum, self.saved > 0)

    def _segment(self, start: int, stop: int) -> Path:
        return self.checkpoints / f"{start:010d}-{stop:010d}.segment"

    # -- end ------------------------------------------------------------------------------------------

    def stop_at_once(self) -> None:
        """From here on, the evaluation, a signal does not wait for a checkpoint: there is one."""
        self._at_once = True
        self.leave_if_signalled()

    def finish(
        self, activations: dict[str, np.ndarray], weights: dict[str, torch.Tensor], step: int, speed: float
    ) -> None:
        """Write `activations.npz`, then `model.pt`, then `status.json`, then delete the checkpoints."""
        self._sync_events()
        self.writer.close()
        if activations:
            replace(self.folder / "activations.npz", lambda file: np.savez_compressed(file, **activations))
        buffer = io.BytesIO()  # torch.save would hide a full disk's error behind its own
        torch.save(weights, buffer)
        replace(self.folder / "model.pt", lambda file: file.write(buffer.getbuffer()))
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # it has finished: nothing is left to stop
        status = {
            "state": "finished",
            "step": step,
            "total_timesteps": step,
            "steps_per_second": round(speed, 1),
            "pid": os.getpid(),
            "host": platform.node(),
            "updated": time.time(),
        }
        replace(self.folder / "status.json", lambda file: file.write(json.dumps(status, indent=2).encode()))
        self.delete_checkpoints(keep=set())

    def delete_checkpoints(self, keep: set[Path]) -> None:
        """Delete what runs write into `checkpoints/`, but for `keep`, and the folder where nothing else is in it."""
        for file in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            if re.fullmatch(r"\d{10}(-\d{10}\.segment|\.ckpt)(\.tmp)?", file.name) and file not in keep:
                file.unlink()
        if not keep:
            with contextlib.suppress(OSError):  # it holds a stranger's files, or is a link
                self.checkpoints.rmdir()

    def print_summary(self, returns: list[float], representation: dict[str, float]) -> None:
        """How it went, and where to look."""
        games = f"{np.mean(returns):.2f} over the last {len(returns)} games" if returns else "no game has ended"
        say(f"finished {self.folder}")
        say(f"  return          {games}")
        if representation:
            std_dead = representation["std_dead_neurons"]
            say(f"  dead neurons    {representation['dead_neurons']:.1%} (constant to 1e-3: {std_dead:.1%})")
            say(f"  effective rank  {representation['effective_rank']:.0f}")
        else:
            say("  not measured    no --metrics-frequency, or fewer observations than --metrics-samples")
        runs_dir = shlex.quote(str(self.folder.parent))
        say(f"  TensorBoard     {Path(sys.executable).parent / 'tensorboard'} --logdir {runs_dir}")


def run_name(args: Any) -> str:
    """The run folder's name: no time stamp, the same command names the same run."""
    return f"{args.env_id}__{args.exp_name}__{args.activation}__{args.seed}"


def open_run(algorithm: str, args: Any, device: torch.device, parameters: int) -> Run:
    """Claim the run's folder: new, or to be resumed from its newest whole checkpoint.

    Args:
        algorithm: "dqn" or "ppo".
        args: the flags.
        parameters: of the network.

    Raises:
        BadInput: other flags than the run had, another process at work in it, no checkpoint whole, not a run's folder.
        SystemExit: 0, the run has finished.
    """
    folder = Path(args.runs_dir) / run_name(args)
    run = Run(folder, algorithm)
    config = {
        "algorithm": algorithm,
        "args": dataclasses.asdict(args),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": str(device),
        "parameters": parameters,
    }
    config_file = folder / "config.json"
    try:
        is_run = config_file.exists()
    except OSError as error:
        raise BadInput(f"cannot make {folder}: {error.strerror}; change --exp-name or --runs-dir") from None
    refuse_unless(folder.is_dir() or not folder.exists(), f"{folder} is not a folder: move it away")
    for part, is_right in ((config_file, Path.is_file), (run.checkpoints, Path.is_dir)):
        refuse_unless(is_right(part) or not os.path.lexists(part), f"{part} is not what a run makes: move it away")
    if folder.exists() and not is_run:
        strangers = [file.name for file in folder.iterdir() if file.name not in (".lock", "config.json.tmp")]
        refuse_unless(not strangers, f"{folder} exists and is not a run's folder (no config.json): move it away")
    if is_run and not args.overwrite:
        old = _compared_config(config_file, config)
        run.leave_if_finished()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock()
    except OSError as error:
        raise BadInput(f"cannot make {folder}: {error.strerror}; change --exp-name or --runs-dir") from None
    # Another process may have held the lock until now.
    refuse_unless(config_file.exists() == is_run, f"{folder} was begun by another process just now; try again")
    if not args.overwrite:
        run.leave_if_finished()

    if is_run and args.overwrite:
        # In an order that a kill may interrupt: first it is unfinished, and to the last it is a run.
        (folder / "model.pt").unlink(missing_ok=True)
        for file in folder.iterdir():
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            elif file.name not in (".lock", "config.json"):
                file.unlink()
    elif is_run:
        run.load()
        run.purge_events()
        changes = {key: config[key] for key in ("versions", "device") if old[key] != config[key]}
        for key in changes:
            was, now = old[key], config[key]
            if key == "versions":
                was = {name: was.get(name) for name in now if was.get(name) != now[name]}
                now = {name: now[name] for name in was}
            print(
                f"warning: this run began with {key} {was}, now {now}: it may not continue bit by bit", file=sys.stderr
            )
        if changes:
            step = run.resumed["step"] if run.resumed else 0
            config = old | {"resumes": [*old.get("resumes", []), {"step": step, **changes}]}
        else:
            config = old
    if not is_run or args.overwrite or config != old:
        replace(config_file, lambda file: file.write(json.dumps(config, indent=2).encode()))

    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=folder.name,
            name=folder.name,
            resume="allow",
            config=config["args"],
            sync_tensorboard=True,
            dir=str(folder),
        )
    purge_step = run.resumed["step"] + 1 if run.resumed else None
    run.writer = SummaryWriter(str(folder), purge_step=purge_step)
    atexit.register(run.writer.close)  # however the run ends, what was logged reaches the disk
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, run.on_signal)
    return run


def _compared_config(file: Path, new: dict) -> dict:
    """The run's config.json, where it agrees with the flags of this command."""
    try:
        old = json.loads(file.read_text())
        old_args, new_args = dict(old["args"]), json.loads(json.dumps(new["args"]))
        old["algorithm"], old["device"], old["parameters"], dict(old["versions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{file} is unreadable: restore it, or start anew with --overwrite") from None
    differing = [
        f"--{name.replace('_', '-')} {new_args.get(name)} (was {old_args.get(name)})"
        for name in sorted(old_args.keys() | new_args.keys())
        if name not in NEUTRAL_FLAGS and old_args.get(name) != new_args.get(name)
    ]
    if old["algorithm"] != new["algorithm"]:
        differing = [f"algorithm {new['algorithm']} (was {old['algorithm']})"]
    refuse_unless(
        not differing,
        f"{file.parent} was started with other flags: {', '.join(differing)}; "
        "use the same ones, another --exp-name, or --overwrite",
    )
    return old


def _commit() -> str | None:
    """Of the working tree that this file lies in, "-dirty" where it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


# ----------------------------------------------------------------------------------------------- progress


class Progress:
    """A bar on a terminal; elsewhere the same line every 30 seconds."""

    def __init__(self, total: int, done: int):
        self.bar = tqdm(total=total, initial=done, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None)
        self.first, self.total, self.done = done, total, done
        self.start = self.printed = time.monotonic()

    def update(self, step: int, **values: str) -> None:
        """Show `step` agent steps and, beside speed and time left, `values`."""
        if not self.bar.disable:
            self.bar.set_postfix(values, refresh=False)
        self.bar.update(step - self.done)
        self.done = step
        if self.bar.disable and time.monotonic() - self.printed >= PRINT_SECONDS:
            self.printed = time.monotonic()
            postfix = ", ".join(f"{name}={value}" for name, value in values.items())
            elapsed = self.printed - self.start
            line = tqdm.format_meter(
                step, self.total, elapsed, ncols=0, unit="step", initial=self.first, postfix=postfix
            )
            say(line)

    def speed(self) -> float:
        """Agent steps per second since this process began."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        self.bar.close()
