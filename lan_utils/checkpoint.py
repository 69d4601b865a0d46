"""Checkpoints: files that are whole or not there, and what they hold.

A checkpoint is `<step>.ckpt`; the newest two are kept. Big pieces that never change again, such as the replay memory's
segments, are files of their own, `<name>.part`, which a checkpoint names with their SHA-256. Every file begins with
the SHA-256 of the rest, is written under another name, synced, and renamed into place, so that a kill at any moment
leaves the earlier files whole. Loading executes nothing: `torch.load(weights_only=True)`.
"""

import contextlib
import hashlib
import io
import json
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lan_utils.cli import warn
from lan_utils.files import replace, sync_folder

KEPT = 2  # checkpoints


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


def checked_bytes(path: Path, digest: str | None = None) -> memoryview:
    """The bytes that `write_checked` wrote after the SHA-256.

    Raises:
        ValueError: the file is truncated, corrupt, or not the one with this digest.
    """
    content = memoryview(path.read_bytes() if path.is_file() else b"")
    found = hashlib.sha256(content[32:])
    if len(content) <= 32 or found.digest() != content[:32] or digest not in (None, found.hexdigest()):
        raise ValueError(f"{path} is truncated or corrupt")
    return content[32:]


def read_checked(path: Path, digest: str | None = None) -> Any:
    """What `write_checked` wrote, arrays as tensors.

    Raises:
        ValueError: as `checked_bytes`, or the file holds something else.
    """
    content = checked_bytes(path, digest)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint file ({str(error).split(chr(10))[0][:80]})") from None


def _tensors(content: Any, name: str = "it") -> Any:
    """Arrays as tensors and NumPy's numbers as plain ones, which is what `torch.load(weights_only=True)` reads.

    Raises:
        TypeError: something that it would refuse.
    """
    if isinstance(content, np.ndarray) and content.dtype != object:
        return torch.from_numpy(np.ascontiguousarray(content))
    if isinstance(content, np.generic):
        return content.item()
    if isinstance(content, dict):
        return {key: _tensors(value, f"{name}[{key!r}]") for key, value in content.items()}
    if isinstance(content, (list, tuple, deque)):
        return [_tensors(value, f"{name}[{i}]") for i, value in enumerate(content)]
    if content is None or isinstance(content, (bool, int, float, str, bytes, torch.Tensor, Part)):
        return content
    raise TypeError(
        f"{name} is a {type(content).__name__}, which a checkpoint cannot hold: keep numbers, text or arrays"
    )


def require_savable(things: dict[str, Any]) -> None:
    """Raises TypeError if a checkpoint of these things could not be loaded again."""
    for name, thing in things.items():
        _tensors(thing.state_dict(), name)


def all_finite(content: Any) -> bool:
    """Whether no tensor in nested dicts and lists holds NaN or infinity; waits once for each device."""
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in _floating_tensors(content):
        flags.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(on_device).all()) for on_device in flags.values())


def _floating_tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor) and content.is_floating_point():
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _floating_tensors(value)


# --------------------------------------------------------------------------------- what is saved and restored


@dataclass
class Part:
    """A big piece of a state: the content under a name never changes, so it is written once."""

    name: str
    content: Callable[[], Any]


class LoopState(SimpleNamespace):
    """What else changes from step to step: `play = LoopState(step=0, obs=obs)`, then `play.step = 1`."""

    def state_dict(self) -> dict[str, Any]:
        return {name: _with_types(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Arrays, tuples and deques stay what they are, and tensors keep their device and memory layout."""
        if state.keys() != vars(self).keys():
            raise ValueError(f"{sorted(state)} instead of {sorted(vars(self))}")
        for name, value in state.items():
            now, value = getattr(self, name), _of_their_types(value)
            if isinstance(now, (torch.Tensor, np.ndarray)) and tuple(value.shape) != tuple(now.shape):
                raise ValueError(f"{name} of shape {tuple(value.shape)} instead of {tuple(now.shape)}")
            if isinstance(now, torch.Tensor):
                now.copy_(value)
            else:
                setattr(self, name, np.asarray(value) if isinstance(now, np.ndarray) else value)


def _with_types(content: Any) -> Any:
    """What a file would hold as a tensor or a list, beside the name of its type."""
    if isinstance(content, np.ndarray):
        return {"type": "array", "content": content}
    if isinstance(content, deque):
        return {"type": "deque", "content": [*map(_with_types, content)], "maxlen": content.maxlen}
    if isinstance(content, (list, tuple)):
        return {"type": "list" if isinstance(content, list) else "tuple", "content": [*map(_with_types, content)]}
    if isinstance(content, dict):
        return {"type": "dict", "content": {key: _with_types(value) for key, value in content.items()}}
    return content


def _of_their_types(content: Any) -> Any:
    match content:
        case {"type": "array", "content": array}:
            return np.asarray(array)
        case {"type": "dict", "content": values}:
            return {key: _of_their_types(value) for key, value in values.items()}
        case {"type": "deque", "content": values, "maxlen": maxlen}:
            return deque(map(_of_their_types, values), maxlen)
        case {"type": kind, "content": values}:
            return {"list": list, "tuple": tuple}[kind](map(_of_their_types, values))
    return content


class Checkpoints:
    """The checkpoints in one folder, and the parts that they name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: dict[int, dict[str, str]] = {}  # {name: SHA-256} of each kept checkpoint's, by step

    def __bool__(self) -> bool:
        """Whether there is any, whole or not."""
        return any(self.folder.glob("*.ckpt"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete what no kept one needs.

        Args:
            step: agent steps so far.
            state: tensors, arrays, plain values and `Part`s.

        Raises:
            OSError: the disk is full; the checkpoints before this one are whole.
        """
        if not self.folder.exists():
            self.folder.mkdir()
            sync_folder(self.folder.parent)
        known = dict(self.parts.get(max(self.parts, default=0), {}))
        parts: dict[str, str] = {}

        def write_parts(content: Any) -> Any:
            if isinstance(content, Part):
                if content.name not in known:
                    known[content.name] = write_checked(self._part(content.name), content.content())
                parts[content.name] = known[content.name]
                return {"part": content.name, "sha256": parts[content.name]}
            if isinstance(content, dict):
                return {key: write_parts(value) for key, value in content.items()}
            return [write_parts(value) for value in content] if isinstance(content, list) else content

        write_checked(self.folder / f"{step:010d}.ckpt", write_parts(state))
        self.parts = dict(sorted((self.parts | {step: parts}).items())[-KEPT:])
        keep = {self.folder / f"{kept:010d}.ckpt" for kept in self.parts}
        self.delete(keep | {self._part(name) for parts in self.parts.values() for name in parts})

    def load(self) -> Iterator[dict[str, Any]]:
        """The saved states that are whole with all their parts, the newest first; arrays are tensors.

        The others are named on stderr.
        """
        whole: set[str] = set()

        def find_parts(content: Any) -> Any:
            if isinstance(content, dict) and content.keys() == {"part", "sha256"}:
                path, digest = self._part(content["part"]), content["sha256"]
                if digest not in whole:
                    checked_bytes(path, digest)
                    whole.add(digest)
                parts[content["part"]] = digest
                return Part(content["part"], lambda: read_checked(path, digest))
            if isinstance(content, dict):
                return {key: find_parts(value) for key, value in content.items()}
            return [find_parts(value) for value in content] if isinstance(content, list) else content

        for file in sorted(self.folder.glob("*.ckpt"), reverse=True):
            parts: dict[str, str] = {}
            try:
                state = find_parts(read_checked(file))
                if not isinstance(state, dict) or type(state.get("step")) is not int:
                    raise ValueError(f"{file} is not a checkpoint file")
            except (ValueError, TypeError, OSError) as error:
                warn(f"{error}; trying the checkpoint before it")
                continue
            self.parts[state["step"]] = parts
            yield state

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def delete(self, keep: set[Path]) -> None:
        """Delete what runs write here except `keep`, and the folder if nothing else is in it."""
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            is_ours = re.fullmatch(r"\d{10}(-\d{10}\.part|\.ckpt)(\.tmp)?", file.name) and not file.is_dir()
            if is_ours and file not in keep:
                file.unlink()
        if not keep:
            with contextlib.suppress(OSError):  # other files are in it
                self.folder.rmdir()


def restore(things: dict[str, Any], state: dict[str, Any]) -> None:
    """Give each thing its part of a checkpoint's state.

    Raises:
        ValueError: the state is not of these things.
    """
    if state.keys() != things.keys():
        raise ValueError(f"it holds {', '.join(map(str, state))} instead of {', '.join(things)}")
    for name, thing in things.items():
        try:
            if isinstance(thing, torch.optim.Optimizer):  # how it counts steps is the device's matter
                for group, now in zip(state[name]["param_groups"], thing.param_groups, strict=True):
                    group |= {key: now[key] for key in ("capturable", "fused", "foreach") if key in now}
            thing.load_state_dict(state[name])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"its {name} does not fit ({' '.join(str(error).split())[:160]})") from None


# ------------------------------------------------------------------------------------------- random states


def random_states(rng: np.random.Generator, device: torch.device) -> dict[str, Any]:
    """Every random state of this process; the environments' are in their own states."""
    return {
        "generator": json.dumps(rng.bit_generator.state),
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], rng: np.random.Generator, device: torch.device) -> None:
    rng.bit_generator.state = json.loads(states["generator"])
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    numpy_state = json.loads(states["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "cuda":
        warn("the checkpoint was written on a CPU and holds no random state of CUDA: from here on this is another run")
