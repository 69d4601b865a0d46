"""checkpoint.py: files that are whole or not there, and what they hold."""

import copy
import hashlib
import json
import os
import pickle
import random
from collections import deque

import numpy as np
import pytest
import torch

from lan_utils import checkpoint, files
from lan_utils.checkpoint import Checkpoints, LoopState, Part

# ------------------------------------------------------------------------------------------ files on disk


def test_loading_executes_nothing(tmp_path):
    """A file that would run code when unpickled is refused."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = pickle.dumps(Evil(), protocol=2)
    (tmp_path / "x.ckpt").write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(ValueError, match="is not a checkpoint file"):
        checkpoint.read_checked(tmp_path / "x.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """Would catch: a half-written file under its name, a temporary file left behind, an error without the file."""
    path = tmp_path / "x"
    files.replace(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        files.replace(path, fail)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("how", ["truncated", "emptied", "one bit flipped", "a pipe", "a folder", "missing"])
def test_damaged_files_are_not_read(tmp_path, how):
    path = tmp_path / "x"
    digest = checkpoint.write_checked(path, {"step": 3, "weights": np.arange(100.0)})
    assert checkpoint.read_checked(path, digest)["step"] == 3
    with pytest.raises(ValueError, match="truncated or corrupt"):
        checkpoint.read_checked(path, digest[::-1])  # whole, but not the one that is meant
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how != "missing":
        flipped = content.copy()
        flipped[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "one bit flipped": flipped}[how])
    with pytest.raises(ValueError, match="x is truncated or corrupt"):
        checkpoint.read_checked(path)


def test_all_finite_looks_into_nested_states():
    """Would catch: a NaN deep in an optimizer's state."""
    state = {"a": [torch.ones(3), (torch.arange(3), {"b": torch.zeros(2)})], "c": "text", "d": Part("x", lambda: 1)}
    assert checkpoint.all_finite(state)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not checkpoint.all_finite(state | {"e": [{"m": torch.tensor([1.0, bad])}]})


# --------------------------------------------------------------------------------- what is saved and restored


def test_a_loop_state_survives_a_file_as_what_it_was(tmp_path):
    """Would catch: an array that comes back as a tensor, a tensor that loses its layout, a name left out."""
    layout = torch.zeros((2, 8, 8, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    saved = LoopState(step=7, stack=np.arange(6, dtype=np.uint8).reshape(2, 3), recent=layout + 3, losses={"a": 0.5})
    checkpoint.write_checked(tmp_path / "x", saved.state_dict())
    play = LoopState(step=0, stack=np.zeros((2, 3), np.uint8), recent=layout.clone(), losses={})
    recent = play.recent
    play.load_state_dict(checkpoint.read_checked(tmp_path / "x"))
    assert (play.step, play.losses) == (7, {"a": 0.5})
    assert type(play.stack) is np.ndarray
    np.testing.assert_array_equal(play.stack, saved.stack)
    assert play.recent is recent
    assert play.recent.stride() == layout.stride()
    assert (recent == 3).all()
    for state, message in (
        ({"step": 1}, "instead of"),
        (saved.state_dict() | {"more": 1}, "instead of"),
        (saved.state_dict() | {"stack": torch.zeros(3)}, "stack of shape"),
        (saved.state_dict() | {"recent": torch.zeros(1, dtype=torch.uint8)}, "recent of shape"),  # would be broadcast
    ):
        with pytest.raises(ValueError, match=message):
            play.load_state_dict(state)


def test_a_loop_state_keeps_its_types(tmp_path):
    """Would catch: a deque that comes back as a list, and then holds every score since; a tensor where an array was;
    a tuple that equals no tuple; a checkpoint that holds NumPy's numbers and cannot be loaded, found after weeks."""
    numbers = {"best": np.float64(1.5), "over": np.bool_(True), "count": np.int64(2**40), "none": None}
    state = numbers | {
        "recent": deque([1.0, 2.0], maxlen=2),
        "pair": (1, ("a", 2)),
        "means": {"z": np.arange(3.0), "n": [np.ones(2)]},
        "late": np.arange(2, dtype=np.uint8),
    }
    checkpoint.write_checked(tmp_path / "x", LoopState(**state).state_dict())
    play = LoopState(**dict.fromkeys(state))
    play.load_state_dict(checkpoint.read_checked(tmp_path / "x"))
    play.recent.append(3.0)
    assert play.recent == deque([2.0, 3.0])
    assert play.pair == (1, ("a", 2))
    assert [type(array) for array in (play.means["z"], play.means["n"][0], play.late)] == [np.ndarray] * 3
    assert (play.means["z"].tolist(), play.late.dtype, play.late.tolist()) == ([0, 1, 2], np.uint8, [0, 1])
    assert (play.best, play.over, play.count, play.none) == (1.5, True, 2**40, None)


@pytest.mark.parametrize("value", [{1, 2}, np.array([None]), object(), {"a": [print]}])
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path, value):
    """Would catch: weeks of checkpoints that no run can resume."""
    with pytest.raises(TypeError, match=r"^play\['x'\].* is a .*, which a checkpoint cannot hold"):
        checkpoint.require_savable({"play": LoopState(x=value)})
    with pytest.raises(TypeError, match="which a checkpoint cannot hold"):
        checkpoint.write_checked(tmp_path / "x", LoopState(x=value).state_dict())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.Adam])
def test_an_optimizer_goes_on_on_another_kind_of_device(kind):
    """A state from CUDA, where the steps are counted on the device. Would catch: an error at the first update."""
    flags = {"fused": True} if kind is torch.optim.Adam else {}
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [kind([weight], lr=torch.tensor(0.1), **flags) for weight in weights]
    for weight in weights:
        weight.grad = torch.ones(2)
    for optimizer in optimizers:
        optimizer.step()
    state = copy.deepcopy(optimizers[0].state_dict())
    state["param_groups"][0]["capturable"] = True
    checkpoint.restore({"optimizer": optimizers[1]}, {"optimizer": state})
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(*weights)
    assert optimizers[1].param_groups[0]["capturable"] is False


def test_parts_are_written_once_and_leave_with_the_last_checkpoint_that_names_them(tmp_path):
    """Would catch: a part that is written again, one that is still needed deleted, one kept for ever."""
    checkpoints, calls = Checkpoints(tmp_path / "checkpoints"), []

    def part(start):
        name = f"{start:010d}-{start + 9:010d}"
        return Part(name, lambda: calls.append(start) or {"numbers": np.arange(start, start + 9)})

    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"step": step, "memory": {"segments": [part(step), part(step + 1)]}})
    assert calls == [1, 2, 3, 4, 5]
    assert sorted(file.name for file in checkpoints.folder.iterdir()) == [
        *("0000000003-0000000012.part", "0000000003.ckpt", "0000000004-0000000013.part", "0000000004.ckpt"),
        "0000000005-0000000014.part",
    ]
    fresh = Checkpoints(tmp_path / "checkpoints")
    states = list(fresh.load())
    assert [state["step"] for state in states] == [4, 3]
    parts = states[0]["memory"]["segments"]
    assert [p.content()["numbers"].tolist() for p in parts] == [list(range(n, n + 9)) for n in (4, 5)]
    fresh.save(5, {"step": 5, "memory": {"segments": [part(5), part(6)]}})
    assert calls == [1, 2, 3, 4, 5, 6]  # a resumed run writes no part again


def test_a_checkpoint_whose_part_is_damaged_is_not_whole(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        part = Part(f"{step:010d}-{step + 1:010d}", lambda step=step: {"numbers": np.arange(step)})
        checkpoints.save(step, {"step": step, "part": part})
    file = checkpoints.folder / "0000000002-0000000003.part"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fresh = Checkpoints(tmp_path / "checkpoints")
    assert [state["step"] for state in fresh.load()] == [1]
    assert capsys.readouterr().err == f"warning: {file} is truncated or corrupt; trying the checkpoint before it\n"
    assert list(fresh.parts) == [1]


@pytest.mark.parametrize("content", [None, [1, 2], {}, {"step": "x"}, {"step": True}, {"part": 1, "sha256": 2}])
def test_whole_files_that_are_no_checkpoints_are_passed_over(tmp_path, capsys, content):
    """A valid digest around something else. Would catch: a traceback where an older checkpoint could be resumed."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"step": 1})
    checkpoint.write_checked(checkpoints.folder / "0000000009.ckpt", content)
    (checkpoints.folder / "0000000010.ckpt").mkdir()
    assert [state["step"] for state in Checkpoints(checkpoints.folder).load()] == [1]
    assert capsys.readouterr().err.count("trying the checkpoint before it\n") == 2


def test_strangers_files_among_the_checkpoints_stay(tmp_path):
    """Would catch: cleaning up by deleting all that is unknown."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.folder.mkdir()
    (checkpoints.folder / "backup").mkdir()
    (checkpoints.folder / "0000000001.ckpt.tmp").mkdir()
    (checkpoints.folder / "notes.txt").write_text("mine")
    (checkpoints.folder / "0000000001.ckpt.mine").write_text("mine")
    strangers = {"backup", "notes.txt", "0000000001.ckpt.mine", "0000000001.ckpt.tmp"}
    for step in (2, 3, 4):
        checkpoints.save(step, {"step": step})
    names = {file.name for file in checkpoints.folder.iterdir()}
    assert names == strangers | {"0000000003.ckpt", "0000000004.ckpt"}
    checkpoints.delete(keep=set())
    assert {file.name for file in checkpoints.folder.iterdir()} == strangers


def test_restoring_names_what_does_not_fit():
    """Would catch: half a state restored without a word."""
    things = {"network": torch.nn.Linear(2, 3), "play": LoopState(step=0)}
    whole = {"network": torch.nn.Linear(2, 3).state_dict(), "play": {"step": 4}}
    checkpoint.restore(things, whole)
    assert things["play"].step == 4
    assert torch.equal(things["network"].weight, whole["network"]["weight"])
    with pytest.raises(ValueError, match="it holds network instead of network, play"):
        checkpoint.restore(things, {"network": whole["network"]})
    for bad in (torch.nn.Linear(3, 3).state_dict(), None, [], {"weight": 1, "bias": 2}):
        with pytest.raises(ValueError, match="its network does not fit"):
            checkpoint.restore(things, whole | {"network": bad})


# ------------------------------------------------------------------------------------------- random states

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def seeded(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def test_random_states_survive_a_file(tmp_path):
    """Would catch: one generator left out of the checkpoint."""
    rng = seeded(3)

    def draws():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item(), rng.normal()

    draws()
    checkpoint.write_checked(tmp_path / "states", checkpoint.random_states(rng, CPU))
    expected = draws()
    rng = seeded(4)
    assert all(one != other for one, other in zip(draws(), expected, strict=True))
    checkpoint.restore_random_states(checkpoint.read_checked(tmp_path / "states"), rng, CPU)
    assert draws() == expected


def test_the_random_state_of_cuda_is_the_devices_own(monkeypatch, capsys):
    """However many GPUs are visible. Would catch: a state that is left out without a word on another machine."""
    states = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([5], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    rng = seeded(1)
    saved = checkpoint.random_states(rng, CUDA)
    checkpoint.restore_random_states(saved, rng, CUDA)
    assert {device: state.item() for device, state in states.items()} == {CUDA: 5}
    states.clear()
    checkpoint.restore_random_states(saved, rng, CPU)
    assert (states, capsys.readouterr().err) == ({}, "")
    checkpoint.restore_random_states(checkpoint.random_states(rng, CPU), rng, CUDA)
    assert "warning: the checkpoint was written on a CPU and holds no random state of CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generator", "python", "numpy", "torch"])
def test_foreign_random_states_are_errors_that_a_resume_expects(name):
    """Those that Run._load falls back for. Would catch: a traceback from inside numpy or torch."""
    rng = seeded(1)
    states = checkpoint.random_states(rng, CPU)
    for foreign in (None, "no json", json.dumps([1, 2]), torch.zeros(3, dtype=torch.uint8)):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError)):
            checkpoint.restore_random_states(states | {name: foreign}, rng, CPU)
