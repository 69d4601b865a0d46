"""A run's folder: whose it is, what may be in it, what it says of the run.

A run folder belongs to one process at a time, which holds its `.lock`. `config.json` says how the run began and what
has changed since, `status.json` what has become of it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch

from lan_utils import checkpoint
from lan_utils.checks import refuse_unless
from lan_utils.cli import BadInput, RunFailed, warn
from lan_utils.files import read_json, replace
from lan_utils.flags import RunArgs
from lan_utils.study import NEUTRAL_FLAGS, ROOT, run_name

PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "stable-baselines3", "opencv-python-headless", "tensorboard")
# What a run makes in its folder beside .lock, config.json and checkpoints/: --overwrite deletes nothing else.
MADE = (
    *("model.pt", "activations.npz", "status.json"),
    *("events.out.tfevents.*", "weights_[0-9]*.pt", "game_[0-9]*.mp4", "wandb"),
)


class HasFinished(Exception):
    """The run that the flags name has finished before."""


class RunFolder:
    """`<runs-dir>/<env_id>__<exp_name>__<activation>__<seed>` of the run that the flags name.

    Args:
        algorithm: "dqn" or "ppo".
        args: the flags.
    """

    def __init__(self, algorithm: str, args: RunArgs):
        self.algorithm, self.args = algorithm, args
        self.path = Path(args.runs_dir) / run_name(args)
        self.checkpoints = checkpoint.Checkpoints(self.path / "checkpoints")
        self._lock_file: TextIO | None = None

    # -- whose it is ----------------------------------------------------------------------------------

    def claim(self) -> dict[str, Any] | None:
        """Lock the folder, and make it or, with --overwrite, clear it.

        Returns:
            config.json of the run that is to be resumed, {} where only its checkpoints are left; None where one begins.

        Raises:
            BadInput: other flags than the run had, another process at work in it, not a run's folder.
            HasFinished
        """
        config_file = self.path / "config.json"
        try:
            self._refuse_odd_kinds()
            has_config = os.path.lexists(config_file)
            is_run = has_config or self._compared_checkpoint()
            if not is_run:
                self._refuse_strangers()
            old = self._compared_config() if has_config else {} if is_run and not self.args.overwrite else None
            self._leave_if_finished()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise BadInput(f"cannot make {self.path}: {error.strerror}; change --exp-name or --runs-dir") from None
        # Another process may have held the lock until now.
        is_same = os.path.lexists(config_file) == has_config
        refuse_unless(is_same, f"{self.path} was begun by another process just now; try again")
        self._leave_if_finished()
        if is_run and self.args.overwrite:
            self._delete_all()
        if old == {}:
            warn(f"{config_file} was gone: the checkpoints tell the flags; with what else the run began is not known")
        return old

    def _refuse_odd_kinds(self) -> None:
        folder = self.path
        refuse_unless(folder.is_dir() or not os.path.lexists(folder), f"{folder} is not a folder: move it away")
        kinds = {
            "config.json": Path.is_file,
            "checkpoints": Path.is_dir,
            ".lock": lambda lock: lock.is_file() and not lock.is_symlink(),
        }
        for name, is_right in kinds.items():
            path = folder / name
            refuse_unless(is_right(path) or not os.path.lexists(path), f"{path} is not what a run makes: move it away")

    def _refuse_strangers(self) -> None:
        folder = self.path
        names = [file.name for file in folder.iterdir()] if folder.exists() else []
        is_empty = set(names) <= {".lock", "config.json.tmp"}
        refuse_unless(is_empty, f"{folder} exists and is not a run's folder (no config.json): move it away")

    def _compared_checkpoint(self) -> bool:
        """Is a whole checkpoint of this run, and of these flags, left of it where somebody deleted its config.json?"""
        for file in sorted(self.checkpoints.folder.glob("*.ckpt"), reverse=True):
            try:
                run = checkpoint.read_checked(file)["run"]
                algorithm, args = run["algorithm"], run["args"]
                is_this_run = run_name(SimpleNamespace(**args)) == self.path.name
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if is_this_run and not self.args.overwrite:
                self.compare(algorithm, args, f"{self.path} was started with other flags")
            if is_this_run:
                return True
        return False

    def _compared_config(self) -> dict[str, Any] | None:
        """The run's config.json, where it agrees with the flags of this command; None where --overwrite replaces it."""
        file = self.path / "config.json"
        try:
            old = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            # A crash of the machine can leave it so. The lock tells that a run made this folder.
            is_run = (self.path / ".lock").exists()
            refuse_unless(is_run, f"{file} is unreadable and no run's: move its folder away")
            refuse_unless(
                self.args.overwrite, f"{file} is unreadable: restore it, or start this run anew with --overwrite"
            )
            return None
        is_config = isinstance(old, dict) and all(isinstance(old.get(key), dict) for key in ("args", "versions"))
        is_config = is_config and isinstance(old.get("algorithm"), str)
        refuse_unless(is_config, f"{file} is not what a run writes: restore it, or move its folder away")
        try:
            is_this_run = run_name(SimpleNamespace(**old["args"])) == self.path.name
        except AttributeError:
            is_this_run = False
        refuse_unless(is_this_run, f"{file} is another run's: restore this one's, or move its folder away")
        if self.args.overwrite:
            return None
        self.compare(old["algorithm"], old["args"], f"{self.path} was started with other flags")
        return old

    def compare(
        self,
        algorithm: str,
        old_args: dict[str, Any],
        what: str,
        remedy: str = "use the same ones, another --exp-name, or --overwrite",
    ) -> None:
        """Refuse another algorithm, or flags that would make another run, naming each difference."""
        new_args = json.loads(json.dumps(dataclasses.asdict(self.args)))
        differing = [
            f"--{name.replace('_', '-')} {new_args.get(name)} (was {old_args.get(name)})"
            for name in sorted(old_args.keys() | new_args.keys())
            if name not in NEUTRAL_FLAGS and old_args.get(name) != new_args.get(name)
        ]
        if algorithm != self.algorithm:
            differing = [f"algorithm {self.algorithm} (was {algorithm})"]
        refuse_unless(not differing, f"{what}: {', '.join(differing)}; {remedy}")

    def _leave_if_finished(self) -> None:
        model = self.path / "model.pt"
        if self.args.overwrite or not os.path.lexists(model):
            return
        is_whole = model.is_file() and model.stat().st_size > 0
        resumes = self.checkpoints or not self.has_lost_checkpoints()
        remedy = "move it away" if resumes else "restore it from a backup"
        refuse_unless(is_whole, f"{model} is not a whole file: {remedy}, or start anew with --overwrite")
        status = read_json(self.path / "status.json")
        if status.get("state") != "finished" or self.checkpoints.folder.exists():  # a kill came after model.pt
            self._lock()
            total = status.get("total_timesteps", self.args.total_timesteps)  # PPO trains whole rollouts of these
            self.write_status("finished", total, total, 0.0, None)
            self.checkpoints.delete(keep=set())
        self.unlock()
        raise HasFinished(f"{self.path} has finished; --overwrite trains it anew")

    def _lock(self) -> None:
        # POSIX locks are not inherited by workers, and the kernel drops those of dead processes.
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._lock_file = os.fdopen(descriptor, "r+")  # held until the process ends
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = self._lock_file.read().strip() or "another process"
                raise BadInput(f"{self.path} is being trained by {owner}; wait for it or stop it") from None
            with contextlib.suppress(OSError):  # another file is in it where it is a run's
                if not os.path.lexists(self.path / "config.json"):
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
            raise BadInput(
                f"{self.path} cannot be locked against a second process ({error.strerror}): its file system has no "
                "file locks, or its lock service is down; name a --runs-dir on another one, such as a local disk"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {platform.node()}")
        self._lock_file.flush()

    def unlock(self) -> None:
        if self._lock_file:
            self._lock_file.close()
            self._lock_file = None

    def require_ours(self) -> None:
        """Before each write: is this still the folder whose lock this process holds?

        Raises:
            RunFailed: it was deleted or replaced; another process may be training in it.
        """
        try:
            ours, there = os.fstat(self._lock_file.fileno()), os.stat(self.path / ".lock", follow_symlinks=False)
            is_ours = os.path.samestat(ours, there)
        except OSError:
            is_ours = False
        if not is_ours:
            is_empty = not self.path.exists() or os.path.lexists(self.path / "config.json")
            remedy = "" if is_empty or self.checkpoints else "move what is left of it away and "
            raise RunFailed(
                f"{self.path} or its .lock was deleted or replaced while this run trained in it: nothing more is "
                f"written; {remedy}start the run again"
            )

    def _delete_all(self) -> None:
        # In an order that a kill may interrupt: first it is unfinished, and to the last it is a run.
        for pattern in (*MADE, *(f"{name}.tmp" for name in (*MADE[:3], "config.json"))):
            for file in self.path.glob(pattern):
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                else:
                    file.unlink()
        self.checkpoints.delete(keep=set())

    # -- what it says of the run ----------------------------------------------------------------------

    def write_config(self, config: dict[str, Any]) -> None:
        self._write_json("config.json", config)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        replace(self.path / name, lambda file: file.write(json.dumps(content, indent=2).encode()))

    def record_changes(self, old: dict[str, Any], new: dict[str, Any], step: int) -> None:
        """Warn of what is not as when the run began, and write it under `resumes` of its config.json."""
        changes = {key: new[key] for key in ("versions", "commit", "device", "hardware", "threads")}
        changes = {key: value for key, value in changes.items() if old.get(key) != value}
        for key, now in changes.items():
            was = old.get(key)
            if key == "versions":
                was = {name: was.get(name) for name in now if was.get(name) != now[name]}
                now = {name: now[name] for name in was}
            warn(f"this run began with {key} {was}, now {now}: it may not continue bit for bit")
        if changes:
            resumes = old.get("resumes") if isinstance(old.get("resumes"), list) else []
            self.write_config(old | {"resumes": [*resumes, {"step": step, **changes}]})

    def _event_files(self) -> list[Path]:
        return [file for file in sorted(self.path.glob("events.out.tfevents.*")) if file.is_file()]

    def cut_events(self, known: dict[str, tuple[int, str]]) -> None:
        """Cut the event files back to where the checkpoint found them: {name: (size, SHA-256)}."""
        for file in self._event_files():
            size, digest = known.pop(file.name, (0, ""))
            if size == 0:
                file.unlink()
                continue
            os.truncate(file, min(size, file.stat().st_size))
            if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                warn(f"{file} is damaged; curves will lack points")
        for name in known:
            warn(f"{self.path / name} is gone; curves will lack its points")

    def sync_events(self) -> dict[str, tuple[int, str]]:
        """Bring the event files to the disk; {name: (size, SHA-256)}."""
        found = {}
        for file in self._event_files():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                content = opened.read()
            found[file.name] = (len(content), hashlib.sha256(content).hexdigest())
        return found

    def has_lost_checkpoints(self) -> bool:
        """Are there points, but neither a checkpoint nor a status that says that none was ever written?"""
        status = read_json(self.path / "status.json")
        had_none = status.get("state") in ("running", "stopped", "failed") and status.get("checkpoint") is None
        # TensorBoard's files begin with some 90 bytes that are no point.
        return not had_none and any(file.stat().st_size > 100 for file in self._event_files())

    def write_status(self, state: str, step: int, total: int, speed: float, saved: int | None) -> None:
        """Replace status.json.

        Args:
            state: running, stopped, failed or finished.
            step, total: agent steps.
            speed: agent steps per second.
            saved: agent step of the newest checkpoint.
        """
        self.require_ours()
        status = {
            "state": state,
            "step": step,
            "total_timesteps": total,
            "steps_per_second": round(speed, 1),
            "pid": os.getpid(),
            "host": platform.node(),
            "updated": time.time(),
            "checkpoint": saved,
        }
        self._write_json("status.json", status)


def describe(algorithm: str, args: RunArgs, device: torch.device, parameters: int) -> dict[str, Any]:
    """What config.json says of a run that begins now.

    Args:
        parameters: of the network.
    """
    return {
        "algorithm": algorithm,
        "args": dataclasses.asdict(args),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
    }


def _commit() -> str | None:
    """Of the working tree that this project is, "-dirty" where it was changed; None of a tree that it only lies in."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """The model of the GPU or of the CPU: "cuda" is not a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.machine()
