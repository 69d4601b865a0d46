"""A run's folder: whose it is, what may be in it, what it says about the run.

A run folder belongs to one process at a time, which holds its `.lock`. `config.json` says how the run began and what
has changed since, `status.json` how it stands now.
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
import sys
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
        algorithm: "dqn", "ppo" or "pqn".
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
            config.json of the run to resume; None if a new one begins.

        Raises:
            BadInput: other flags than the run had, another process training it, not a run's folder.
            HasFinished
        """
        try:
            old = self._old_config()
            self._leave_if_finished()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            # Another process may have held the lock until now.
            refuse_unless((self._old_config() is None) == (old is None), f"{self.path} was begun just now; try again")
            self._leave_if_finished()
        except OSError as error:
            raise BadInput(f"cannot use {self.path}: {error.strerror}; change --exp-name or --runs-dir") from None
        if self.args.overwrite:
            self._delete_all()
            return None
        return old

    def _old_config(self) -> dict[str, Any] | None:
        """config.json or, if somebody deleted it, what the newest whole checkpoint says; None in an empty folder.

        Raises:
            BadInput: it is another run's or no run's, or the run has other flags and --overwrite is not given.
        """
        file = self.path / "config.json"
        old = read_json(file) or self._flags_of_checkpoint()
        if not old:
            files = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
            is_empty = files <= {".lock", "config.json.tmp"}
            refuse_unless(
                is_empty, f"{self.path} is not a run's folder: config.json cannot be read; move the folder away"
            )
            return None
        try:
            is_this_run = run_name(SimpleNamespace(**old["args"])) == self.path.name
        except (KeyError, TypeError, AttributeError):
            is_this_run = False
        refuse_unless(is_this_run, f"{file} is not this run's: restore it, or move the folder away")
        if not self.args.overwrite:
            self.compare(old.get("algorithm"), old["args"], f"{self.path} was started with other flags")
        return old

    def _flags_of_checkpoint(self) -> dict[str, Any]:
        """{"algorithm": ..., "args": ...}; {} where no checkpoint is whole."""
        for file in sorted(self.checkpoints.folder.glob("*.ckpt"), reverse=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return checkpoint.read_checked(file)["run"]
        return {}

    def compare(
        self,
        algorithm: str,
        old_args: dict[str, Any],
        what: str,
        remedy: str = "use the same ones, another --exp-name, or --overwrite",
    ) -> None:
        """Refuse another algorithm, or flags that would make another run, naming each difference.

        A flag that the old run did not know yet has its default.
        """
        new_args = json.loads(json.dumps(dataclasses.asdict(self.args)))
        defaults = {}  # a flag may have none
        for field in dataclasses.fields(self.args):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
        old_args = json.loads(json.dumps(defaults)) | old_args
        differing = [
            f"--{name.replace('_', '-')} {new_args.get(name)} (was {old_args.get(name)})"
            for name in sorted(old_args.keys() | new_args.keys())
            if name not in NEUTRAL_FLAGS and old_args.get(name) != new_args.get(name)
        ]
        if algorithm != self.algorithm:
            differing = [f"algorithm {self.algorithm} (was {algorithm})"]
        refuse_unless(not differing, f"{what}: {', '.join(differing)}; {remedy}")

    def _leave_if_finished(self) -> None:
        if self.args.overwrite or not (self.path / "model.pt").exists():
            return
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
        self.unlock()
        self._lock_file = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until the run ends)
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock_file.seek(0)
                owner = self._lock_file.read().strip() or "another process"
                raise BadInput(f"{self.path} is being trained by {owner}; wait for it or stop it") from None
            with contextlib.suppress(OSError):  # another file is in it if it is a run's
                if not (self.path / "config.json").exists():
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
            is_ours = os.path.samestat(os.fstat(self._lock_file.fileno()), os.stat(self.path / ".lock"))
        except OSError:
            is_ours = False
        if not is_ours:
            resumes = not self.path.exists() or (self.path / "config.json").exists() or self.checkpoints
            remedy = "" if resumes else "move what is left of it away and "
            raise RunFailed(
                f"{self.path} or its .lock was deleted or replaced while this run trained in it: nothing more is "
                f"written; {remedy}start the run again"
            )

    def _delete_all(self) -> None:
        # In an order that a kill may interrupt: the run is first unfinished, and remains a run until the end.
        for pattern in (*MADE, *(f"{name}.tmp" for name in (*MADE[:3], "config.json"))):
            for file in self.path.glob(pattern):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.checkpoints.delete(keep=set())

    # -- what it says about the run -------------------------------------------------------------------

    def write_config(self, config: dict[str, Any]) -> None:
        self._write_json("config.json", config)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        replace(self.path / name, lambda file: file.write(json.dumps(content, indent=2).encode()))

    def record_changes(self, old: dict[str, Any], new: dict[str, Any], step: int) -> None:
        """Warn of what has changed since the run was last trained, and write it under `resumes` in its config.json."""
        if "versions" not in old:  # all that is known are the flags
            warn(f"{self.path}/config.json was missing: the checkpoints tell its flags, not the versions it began with")
            self.write_config(new)
            return
        resumes = old["resumes"] if isinstance(old.get("resumes"), list) else []
        known = {key: value for part in (old, *resumes) for key, value in part.items()}  # as it was trained last
        changes = {
            key: new[key]
            for key in ("versions", "commit", "code", "device", "hardware", "threads")
            if known.get(key) != new[key]
        }
        for key, now in changes.items():
            was = known.get(key)
            if key == "code" and was is None:  # it was begun before this was recorded
                continue
            if key in ("versions", "code"):
                was = {name: was.get(name) for name in now if was.get(name) != now[name]}
                now = {name: now[name] for name in was}
            if key != "commit" or known.get("code") != new["code"]:  # a commit may change what trains nothing
                warn(f"so far this run had {key} {was}, now {now}: it may not continue bit for bit")
        flags = {name: value for part in (old, *resumes) for name, value in part.get("args", {}).items()}
        flags = {name: value for name, value in new["args"].items() if name in flags and flags[name] != value}
        if flags:
            changes["args"] = flags
        if changes:
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
        """Sync the event files to the disk; {name: (size, SHA-256)}."""
        found = {}
        for file in self._event_files():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                content = opened.read()
            found[file.name] = (len(content), hashlib.sha256(content).hexdigest())
        return found

    def has_lost_checkpoints(self) -> bool:
        """Whether there are points, but neither a checkpoint nor a status that says that none was ever written."""
        status = read_json(self.path / "status.json")
        had_none = status.get("state") in ("running", "stopped", "failed") and status.get("checkpoint") is None
        # TensorBoard's files begin with some 90 bytes that are not a point.
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


def describe(algorithm: str, args: RunArgs, device: torch.device, network: torch.nn.Module) -> dict[str, Any]:
    """What config.json says about a run that begins now."""
    return {
        "algorithm": algorithm,
        "args": dataclasses.asdict(args),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "code": _code(args, network),
        "device": str(device),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "parameters": sum(weight.numel() for weight in network.parameters()),
    }


def _code(*of_script: Any) -> dict[str, str]:
    """What trains: a digest each of the scripts whose objects these are (a notebook has none), lan_utils, metrics.py.

    A commit does not tell one change of a script from the next.
    """
    modules = {type(each).__module__ for each in of_script if not type(each).__module__.startswith("torch.")}
    scripts = sorted(Path(file) for name in modules if (file := getattr(sys.modules.get(name), "__file__", None)))
    helpers = {
        "lan_utils": digest_of(*sorted((ROOT / "lan_utils").glob("*.py"))),
        "metrics.py": digest_of(ROOT / "metrics.py"),
    }
    return {script.name: digest_of(script) for script in scripts} | helpers


def digest_of(*files: Path) -> str:
    """The first digits of the files' SHA-256."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _commit() -> str | None:
    """The project's git commit, with "-dirty" if files were changed; None without a .git folder of its own."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """The model of the GPU or of the CPU, which "cuda" does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.machine()
