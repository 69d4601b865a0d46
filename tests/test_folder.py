"""folder.py: whose a run's folder is, what may be in it, what it says of the run."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import contents

import dqn_atari_lan as dqn
import ppo_atari_lan as ppo
from lan_utils import checkpoint, folder
from lan_utils.checkpoint import LoopState
from lan_utils.cli import BadInput, RunFailed
from lan_utils.folder import HasFinished, RunFolder
from lan_utils.run import Run

CPU = torch.device("cpu")
NAME = "BreakoutNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"


@pytest.fixture(autouse=True)
def one_commit(monkeypatch, request):
    """Somebody may commit while the tests run."""
    if "commit" not in request.node.name:
        monkeypatch.setattr(folder, "_commit", lambda: "one commit")


def begin(runs_dir, device=CPU, **flags):
    """A run's folder as `resume` leaves it, of a run that begins or goes on; the run."""
    args = dqn.Args(runs_dir=str(runs_dir), **flags)
    run = Run("dqn", args, device, np.random.default_rng(args.seed))
    network = torch.nn.Linear(3, 2)
    run.resume(network=network, play=LoopState(step=0))
    return run


def with_points(run, checkpoints=(), step=None):
    """What a run of some steps leaves: points, a status, and perhaps checkpoints."""
    for i in range(10):
        run.writer.add_scalar("charts/episodic_return", i, i)
    run.writer.flush()
    for saved in checkpoints:
        run.things["play"].step = saved
        run._save(saved)
    return run.folder.path


# ------------------------------------------------------------------------------------ what is in a folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"args": []}', "config.json is not this run's: restore it, or move the folder away"),
        ("config.json", '{"args": {}, "algorithm": "dqn"}', "config.json is not this run's: restore it"),
        ("config.json", "[1, 2]", "is not a run's folder: config.json cannot be read; move the folder away"),
        ("config.json", '{"args": ', "is not a run's folder: config.json cannot be read; move the folder away"),
        ("checkpoints/0000000100.ckpt", "", "none of the 1 checkpoints"),
    ],
)
def test_odd_run_folders_are_refused_unchanged(tmp_path, name, content, message):
    """Would catch: a traceback, or event files deleted before the folder is found to be odd."""
    path = with_points(begin(tmp_path))
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content)
    before = contents(path)
    with pytest.raises(BadInput, match=message):
        begin(tmp_path)
    assert contents(path) == before


# ------------------------------------------------------------------------------------------- --overwrite


@pytest.mark.parametrize("through_a_link", [False, True])
def test_overwrite_deletes_what_a_run_makes_and_nothing_else(tmp_path, through_a_link):
    """Would catch: a folder emptied because it has a config.json; notes that lay beside a run's files."""
    run = begin(tmp_path / "runs")
    path = with_points(run, checkpoints=(4, 5))
    if through_a_link:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    for name in ("game_0.mp4", "activations.npz", "model.pt", "model.pt.tmp", "checkpoints/0000000006.ckpt.tmp"):
        (path / name).write_text("made by a run")
    (path / "wandb").mkdir()
    (path / "wandb" / "log").write_text("made by wandb")
    strangers = {"thesis.tex", "game_theory.mp4", "thesis.tmp", "checkpoints/notes.txt", "model.pt.bak"}
    for name in strangers:
        (path / name).write_text("years of work")
    begin(tmp_path / "runs", overwrite=True, gamma=0.5)
    left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and "tfevents" not in file.name}
    assert left == strangers | {".lock", "config.json", "status.json"}
    assert len(list(path.glob("events.*"))) == 1
    assert json.loads((path / "config.json").read_text())["args"]["gamma"] == 0.5
    assert path.is_symlink() == through_a_link


@pytest.mark.parametrize("config", [None, '{"name": "my-web-app"}', "{}", "no json", "foreign args"])
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, config, through_a_link):
    """Would catch: --overwrite deleting a stranger's files, or an error that recommends it."""
    path, real = tmp_path / "runs" / NAME, tmp_path / "runs" / ("elsewhere" if through_a_link else NAME)
    real.mkdir(parents=True)
    if through_a_link:
        path.symlink_to(real)
    (real / "thesis.tex").write_text("years of work")
    (real / "model.pt").write_text("their model")
    if config == "foreign args":
        args = dataclasses.asdict(dqn.Args(seed=2))
        config = json.dumps({"algorithm": "dqn", "args": args, "versions": {}})
    if config is not None:
        (real / "config.json").write_text(config)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="move the folder away") as error:
            begin(tmp_path / "runs", overwrite=overwrite)
        assert "--overwrite" not in str(error.value)
        assert contents(tmp_path) == before


# ------------------------------------------------------------------------------ what does not go together


@pytest.mark.parametrize("state", ["running", "stopped", "failed", "finished"])
def test_points_without_checkpoints_are_not_trained_over(tmp_path, state):
    """checkpoints/ is gone, or model.pt was moved away. Would catch: a run that starts at 0 and deletes its curves."""
    run = begin(tmp_path)
    path = with_points(run, checkpoints=(4, 5))
    run._write_status(state)
    shutil.rmtree(path / "checkpoints")
    before = contents(path)
    with pytest.raises(BadInput, match="has logged points, but its checkpoints or its model"):
        begin(tmp_path)
    (path / "status.json").unlink()
    with pytest.raises(BadInput, match="restore them from a backup, or start anew with --overwrite"):
        begin(tmp_path)
    del before[path / "status.json"]
    assert contents(path) == before
    assert begin(tmp_path, overwrite=True).step == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    path = with_points(begin(tmp_path))
    first = {file.name for file in path.glob("events.*")}
    run = begin(tmp_path)
    assert run.step == 0
    assert not first & {file.name for file in path.glob("events.*")}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"seed": 2}, "--seed 1 (was 2);"),
        ({"learning_rate": 1e-3}, "--learning-rate 0.0001 (was 0.001);"),
        ({"conv_activation": "tanh-lan"}, "--conv-activation relu (was tanh-lan);"),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path, theirs, message):
    """Copied into the folder. Would catch: a run that ends with another seed's weights."""
    ours = with_points(begin(tmp_path / "ours"), checkpoints=(4,))
    other = with_points(begin(tmp_path / "other", **theirs), checkpoints=(5,))
    shutil.copy(other / "checkpoints/0000000005.ckpt", ours / "checkpoints")
    before = contents(ours)
    with pytest.raises(BadInput) as error:
        begin(tmp_path / "ours")
    assert message in str(error.value)
    assert "0000000005.ckpt is a checkpoint of other flags" in str(error.value)
    assert contents(ours) == before
    # The one before the newest is looked at too.
    (ours / "checkpoints/0000000005.ckpt").rename(ours / "checkpoints/0000000003.ckpt")
    with pytest.raises(BadInput, match="is a checkpoint of other flags"):
        begin(tmp_path / "ours")


def lose_config(path):
    (path / ".lock").unlink()
    (path / "config.json").unlink()


def test_a_deleted_config_is_written_again_from_the_checkpoints(tmp_path, capsys):
    """As a cleaner of old files does it to a long run. Would catch: days of training that nothing resumes any more,
    although the error told to start the run again; a config.json of other flags."""
    run = begin(tmp_path, gamma=0.5)
    path = with_points(run, checkpoints=(4, 5))
    written = json.loads((path / "config.json").read_text())
    lose_config(path)
    with pytest.raises(RunFailed, match=r"nothing more is written; start the run again$"):
        run._save(6)
    before = contents(path)
    with pytest.raises(BadInput, match=r"was started with other flags: --gamma 0.99 \(was 0.5\);"):
        begin(tmp_path)
    assert contents(path) == before
    resumed = begin(tmp_path, gamma=0.5)
    assert resumed.step == 5
    assert json.loads((path / "config.json").read_text()) == written
    assert capsys.readouterr().err == (
        f"warning: {path}/config.json was missing: the checkpoints tell its flags, not the versions it began with\n"
    )
    assert begin(tmp_path, gamma=0.5).step == 5
    lose_config(path)
    assert begin(tmp_path, overwrite=True).step == 0  # with other flags
    assert not (path / "checkpoints").exists()


def test_checkpoints_that_do_not_make_a_folder_a_runs(tmp_path):
    """Would catch: another run's checkpoints, or a damaged one, for which a stranger's files would be overwritten."""
    other = with_points(begin(tmp_path / "other", seed=2), checkpoints=(4,))
    path = tmp_path / "runs" / NAME
    path.mkdir(parents=True)
    shutil.copytree(other / "checkpoints", path / "checkpoints")
    (path / "checkpoints" / "0000000005.ckpt").write_text("damaged")
    before = contents(path)
    for overwrite in (False, True):
        with pytest.raises(BadInput, match=r"config.json is not this run's: restore it, or move the folder away"):
            begin(tmp_path / "runs", overwrite=overwrite)
        assert contents(path) == before


def test_what_a_run_says_that_lost_its_folder_can_be_done(tmp_path):
    """Would catch: "start the run again" before the first checkpoint, where the next command refuses the folder."""
    run = begin(tmp_path)
    path = with_points(run)
    lose_config(path)
    with pytest.raises(RunFailed, match=r"move what is left of it away and start the run again$"):
        run._save(6)
    shutil.move(path, tmp_path / "away")
    assert begin(tmp_path).step == 0


def test_edited_flags_in_config_are_refused(tmp_path):
    """Would catch: a learning rate changed in config.json and on the command line, and a resume with both."""
    path = with_points(begin(tmp_path), checkpoints=(4,))
    config = json.loads((path / "config.json").read_text())
    config["args"]["learning_rate"] = 0.5
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"was started with other flags: --learning-rate 0.0001 \(was 0.5\);"):
        begin(tmp_path)
    with pytest.raises(BadInput, match=r"is a checkpoint of other flags: --learning-rate 0.5 \(was 0.0001\);"):
        begin(tmp_path, learning_rate=0.5)


def test_a_run_from_before_a_flag_is_resumed_with_its_default(tmp_path):
    """Would catch: days of training that a new flag makes unusable; a flag that is not compared at all."""
    path = with_points(begin(tmp_path), checkpoints=(4,))
    config = json.loads((path / "config.json").read_text())
    for name in ("conv_activation", "adam_eps"):
        del config["args"][name]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"was started with other flags: --adam-eps 0.01 \(was 1e-05\);"):
        begin(tmp_path, adam_eps=0.01)
    assert begin(tmp_path).step == 4


def test_runs_whose_convolutions_differ_have_folders_of_their_own(tmp_path):
    """Would catch: two runs that overwrite each other, a name of the default that has changed."""
    paths = [begin(tmp_path, conv_activation=name).folder.path for name in ("relu", "tanh-lan", "tanh")]
    ending = ["", "+conv-tanh-lan", "+conv-tanh"]
    assert [path.name for path in paths] == [NAME.replace("__1", f"{end}__1") for end in ending]
    shutil.copy(paths[1] / "config.json", paths[2])
    with pytest.raises(BadInput, match=r"config.json is not this run's"):
        begin(tmp_path, conv_activation="tanh")


def test_another_algorithm_is_named(tmp_path):
    begin(tmp_path, exp_name="x")
    args = ppo.Args(runs_dir=str(tmp_path), exp_name="x")
    with pytest.raises(BadInput, match=r"was started with other flags: algorithm ppo \(was dqn\);"):
        RunFolder("ppo", args).claim()


@pytest.mark.parametrize("damage", ["no run", "odd run", "other things", "odd events", "odd states", "odd returns"])
def test_foreign_content_under_a_valid_digest_is_passed_over(tmp_path, capsys, damage):
    """As for damage: back to the checkpoint before. Would catch: a traceback, returns that count twice."""
    run = begin(tmp_path)
    run.returns.extend([1.0, 2.0])
    path = with_points(run, checkpoints=(4, 5))
    file = path / "checkpoints" / "0000000005.ckpt"
    state = checkpoint.read_checked(file)
    state |= {
        "no run": {"run": None},
        "odd run": {"run": {"args": [1], "algorithm": "dqn"}},
        "other things": {"things": {"network": 1}},
        "odd events": {"events": {"a": 1}},
        "odd states": {"random": state["random"] | {"torch": torch.zeros(1, dtype=torch.uint8)}},
        "odd returns": {"returns": ["many"]},
    }[damage]
    checkpoint.write_checked(file, state)
    resumed = begin(tmp_path)
    assert resumed.step == resumed.things["play"].step == 4
    assert list(resumed.returns) == [1.0, 2.0]
    warnings = capsys.readouterr().err
    assert f"warning: {file} is not a checkpoint of this script: " in warnings
    assert warnings.count("\n") == 1
    resumed._save(6)
    assert sorted(file.name for file in file.parent.iterdir()) == ["0000000004.ckpt", "0000000006.ckpt"]


def test_what_is_not_as_it_was_warns_and_is_recorded(monkeypatch, tmp_path, capsys):
    """Would catch: a silent resume under another torch, commit, code, device, GPU or thread count; a return to what
    there was at first that is not recorded, as if the run had gone on elsewhere; a changed evaluation nobody sees."""
    path = begin(tmp_path).folder.path
    first = json.loads((path / "config.json").read_text())
    assert first["device"] == "cpu"
    assert first["hardware"] == folder.hardware(CPU) != ""
    assert first["threads"] == torch.get_num_threads()
    assert first.keys() >= {"algorithm", "args", "versions", "commit", "code", "device", "parameters"}
    assert first["parameters"] == 8
    assert first["args"]["target_network_frequency"] == 1000
    assert "resumes" not in first
    begin(tmp_path)
    assert json.loads((path / "config.json").read_text()) == first
    assert capsys.readouterr().err == ""

    network = torch.nn.Linear(3, 2)
    args = dqn.Args(runs_dir=str(tmp_path))
    before = folder.describe("dqn", args, CPU, network)
    monkeypatch.setattr(folder.importlib.metadata, "version", lambda name: "0.1" if name == "torch" else "1.0")
    monkeypatch.setattr(folder, "_commit", lambda: "abc")
    monkeypatch.setattr(folder, "_code", lambda *of_script: first["code"] | {"lan_utils": "123"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Abacus")
    args = dqn.Args(runs_dir=str(tmp_path), eval_episodes=3)
    config = folder.describe("dqn", args, torch.device("cuda"), network)
    run_folder = RunFolder("dqn", args)
    run_folder.record_changes(run_folder.claim(), config, step=7)
    warnings = capsys.readouterr().err
    assert "warning: so far this run had versions {'torch': '2." in warnings
    assert "warning: so far this run had device cpu, now cuda: it may not continue bit for bit" in warnings
    assert f"warning: so far this run had commit {first['commit']}, now abc" in warnings
    lan_utils = first["code"]["lan_utils"]
    assert f"warning: so far this run had code {{'lan_utils': '{lan_utils}'}}, now {{'lan_utils': '123'}}" in warnings
    assert f"warning: so far this run had threads {first['threads']}, now 3" in warnings
    assert f"warning: so far this run had hardware {first['hardware']}, now NVIDIA Abacus" in warnings
    assert "eval" not in warnings  # it changes nothing of the training
    now = json.loads((path / "config.json").read_text())
    (resume,) = now.pop("resumes")
    assert now == first
    assert resume["step"] == 7
    assert (resume["device"], resume["commit"], resume["threads"]) == ("cuda", "abc", 3)
    assert resume["code"] == first["code"] | {"lan_utils": "123"}
    assert resume["hardware"] == "NVIDIA Abacus"
    assert resume["versions"]["torch"] == "0.1"
    assert resume["args"] == {"eval_episodes": 3}

    run_folder.record_changes(run_folder.claim(), config, step=8)  # the same again: nothing new
    assert capsys.readouterr().err == ""
    run_folder.record_changes(run_folder.claim(), before, step=9)
    assert "warning: so far this run had device cuda, now cpu: it may not continue" in capsys.readouterr().err
    _, back = json.loads((path / "config.json").read_text())["resumes"]
    assert (back["step"], back["device"], back["commit"]) == (9, "cpu", first["commit"])
    assert back["args"] == {"eval_episodes": 0}
    run_folder.record_changes(run_folder.claim(), before | {"commit": "def"}, step=10)
    assert capsys.readouterr().err == ""  # another commit with the same code, such as one of the documentation
    assert json.loads((path / "config.json").read_text())["resumes"][2] == {"step": 10, "commit": "def"}

    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({key: config[key] for key in config if key not in ("code", "resumes")})
    )
    run_folder.record_changes(run_folder.claim(), before, step=11)  # begun before code was recorded
    assert capsys.readouterr().err == ""
    assert json.loads((path / "config.json").read_text())["resumes"] == [{"step": 11, "code": first["code"]}]


def test_the_code_of_a_run_is_its_script_and_what_it_imports_here(monkeypatch, tmp_path):
    """Would catch: two changes of one script that are both "-dirty"; a script outside of git that no commit holds."""

    def code_of(script):
        (tmp_path / "my_script.py").write_text(script)
        module = types.ModuleType("my_script")
        module.__file__ = str(tmp_path / "my_script.py")
        monkeypatch.setitem(sys.modules, "my_script", module)
        exec(script, module.__dict__)
        return folder._code(module.Args(), torch.nn.Linear(3, 2))

    first = code_of("class Args: pass\n")
    assert first.keys() == {"my_script.py", "lan_utils", "metrics.py"}
    assert code_of("class Args: pass\n") == first
    second = code_of("class Args: pass\ngamma = 0.9\n")
    assert {name for name in first if first[name] != second[name]} == {"my_script.py"}
    args = sys.modules["my_script"].Args()
    with_network = folder._code(args, dqn.QNetwork(4, "relu"))  # of another file
    assert with_network.keys() == {"my_script.py", "dqn_atari_lan.py", "lan_utils", "metrics.py"}
    monkeypatch.delattr(sys.modules["my_script"], "__file__")  # as in a notebook
    assert folder._code(args).keys() == {"lan_utils", "metrics.py"}
    monkeypatch.delitem(sys.modules, "my_script")  # executed, and never imported
    assert folder._code(args).keys() == {"lan_utils", "metrics.py"}
    shutil.copytree(folder.ROOT / "lan_utils", tmp_path / "lan_utils")
    shutil.copy(folder.ROOT / "metrics.py", tmp_path)
    before = folder._code(args)
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    assert folder._code(args) == before
    for file, name in (("metrics.py", "metrics.py"), ("lan_utils/replay.py", "lan_utils")):
        (tmp_path / file).write_text((tmp_path / file).read_text() + "# changed\n")
        now = folder._code(args)
        assert {key for key in now if now[key] != before[key]} == {name}
        before = now


def test_a_flag_without_a_default_resumes(tmp_path):
    """As tyro takes it. Would catch: a run that starts, and whose every resume ends in a traceback."""

    @dataclasses.dataclass(kw_only=True)
    class Args(dqn.Args):
        n_step: int
        layers: list = dataclasses.field(default_factory=list)

    for n_step in (3, 3):
        RunFolder("dqn", Args(runs_dir=str(tmp_path), n_step=n_step)).claim()
        path = tmp_path / NAME
        args = {key: value for key, value in dataclasses.asdict(Args(runs_dir=str(tmp_path), n_step=3)).items()}
        del args["layers"]  # of a run that did not know it yet
        (path / "config.json").write_text(json.dumps({"algorithm": "dqn", "args": args}))
    with pytest.raises(BadInput, match=r"--n-step 4 \(was 3\)"):
        RunFolder("dqn", Args(runs_dir=str(tmp_path), n_step=4)).claim()


def test_checkpoints_of_a_changed_script_are_not_called_damaged(tmp_path):
    """Would catch: advice to delete weeks of training, where undoing an edit resumes them; a reason that is cut off."""
    path = with_points(begin(tmp_path), checkpoints=(4, 5))
    before = contents(path)
    run = Run("dqn", dqn.Args(runs_dir=str(tmp_path)), CPU, np.random.default_rng(1))
    with pytest.raises(BadInput) as refused:
        run.resume(network=torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)), play=LoopState(step=0))
    message = str(refused.value)
    assert "the newest whole checkpoint in " in message
    assert " is not of this script: its network does not fit (" in message
    assert '"0.weight"' in message
    assert message.endswith(
        "undo what was changed in the script since then, or train it as another run with --exp-name"
    )
    assert "overwrite" not in message
    assert contents(path) == before
    assert begin(tmp_path).step == 5


# ------------------------------------------------------------------------------------- the lock, the status


def test_nothing_is_written_once_the_folder_is_anothers(monkeypatch, tmp_path):
    """Deleted, or deleted and begun anew. Would catch: two processes that write one run."""
    for destroy in (lambda path: (path / ".lock").unlink(), shutil.rmtree):
        run = begin(tmp_path, overwrite=True)
        path = with_points(run)
        destroy(path)
        before = contents(tmp_path)
        for write in (
            lambda run: run.log_games(10, {"episode": {"r": 1.0, "l": 10}}),
            lambda run: run.log(1000, run.things["network"], []),
            lambda run: run._save(1000),
            lambda run: run._write_status("running"),
        ):
            with pytest.raises(RunFailed, match="was deleted or replaced while this run trained in it: nothing more"):
                write(run)
        run._leave(None, None, None)
        assert contents(tmp_path) == before
    run = begin(tmp_path)
    shutil.rmtree(path)
    path.mkdir()
    (path / ".lock").write_text("process 1 on another machine")
    with pytest.raises(RunFailed):
        run.folder.require_ours()
    closed = []
    monkeypatch.setattr(run.writer, "close", lambda: closed.append("TensorBoard would make its file anew"))
    run._leave(None, None, None)
    assert not closed
    assert [file.name for file in path.iterdir()] == [".lock"]


def hold(folder, ready, done):
    args = dqn.Args(runs_dir=str(folder.parent))
    run_folder = RunFolder("dqn", args)
    run_folder.claim()
    ready.set()
    done.wait(60)


def test_a_locked_folder_names_its_process(tmp_path):
    """Would catch: --overwrite in a folder where another process trains."""
    path = begin(tmp_path).folder.path
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, ready, done))
    (path / ".lock").unlink()  # this process holds it
    process.start()
    assert ready.wait(60)
    before = contents(path)
    for overwrite in (False, True):
        with pytest.raises(BadInput, match=f"is being trained by process {process.pid} on .*; wait for it or stop it"):
            begin(tmp_path, overwrite=overwrite)
    assert contents(path) == before
    done.set()
    process.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])  # 524: ENOTSUPP, as NFS says
def test_a_file_system_without_locks_is_named_and_left_as_it_was(monkeypatch, tmp_path, number):
    """Would catch: "is being trained by another process" for ever; a folder that the next file system need not have."""
    finished = begin(tmp_path / "finished")
    (finished.folder.path / "model.pt").write_text("weights")
    with_points(begin(tmp_path / "begun"), checkpoints=(4,))

    def lockf(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder.fcntl, "lockf", lockf)
    before = contents(tmp_path)
    for runs_dir in ("new", "begun", "finished"):
        with pytest.raises(
            BadInput, match=r"its file system has no file locks.*; name a --runs-dir on another"
        ) as error:
            begin(tmp_path / runs_dir)
        assert os.strerror(number) in str(error.value)
    assert contents(tmp_path) == before
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    assert begin(tmp_path / "begun").step == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_is_held_says_so_by_either_error(monkeypatch, tmp_path, number):
    """POSIX allows both. Would catch: a held lock that is called a missing one."""

    def lockf(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder.fcntl, "lockf", lockf)
    with pytest.raises(BadInput, match="is being trained by another process; wait for it or stop it"):
        begin(tmp_path)


def test_what_weights_and_biases_refuses_only_then_is_one_line_and_the_run_begins_without_it(monkeypatch, tmp_path):
    """An entity that its server does not know. Would catch: a traceback, or a folder that no command accepts."""

    def init(**kwargs):
        raise ValueError("entity nobody not found\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(
        RunFailed, match=r"^--track: Weights & Biases says: entity nobody not found; fix this, or start"
    ):
        begin(tmp_path, track=True, wandb_entity="nobody")
    assert begin(tmp_path).step == 0


def test_status_is_replaced_atomically(tmp_path, monkeypatch):
    """Would catch: a reader that finds half a status; a status that says less than SPEC.md promises."""
    run = begin(tmp_path)
    file = run.folder.path / "status.json"
    status = json.loads(file.read_text())
    assert status.keys() >= {"state", "step", "total_timesteps", "steps_per_second", "pid", "host", "updated"}
    assert (status["state"], status["step"], status["pid"]) == ("running", 0, os.getpid())
    assert status["total_timesteps"] == 10_000_000
    before = file.stat().st_ino
    with open(file) as opened:
        run._write_status("stopped")
        assert json.loads(opened.read()) == status
    assert file.stat().st_ino != before
    assert json.loads(file.read_text())["state"] == "stopped"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    """With the checkpoints and the status that a kill left. Would catch: a finished run that is trained again, and one
    of PPO whose last step is not the end of a rollout."""
    run = begin(tmp_path)
    path = with_points(run, checkpoints=(4,))
    run.folder.write_status("running", 4, 96, 10.0, 4)
    (path / "model.pt").write_text("weights")
    with pytest.raises(HasFinished) as finished:
        begin(tmp_path)
    assert str(finished.value) == f"{path} has finished; --overwrite trains it anew"
    assert not (path / "checkpoints").exists()
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["step"], status["total_timesteps"]) == ("finished", 96, 96)
    before = contents(path)
    with pytest.raises(HasFinished):
        begin(tmp_path)
    assert contents(path) == before


def test_the_commit_is_that_of_this_code_wherever_it_is_called(monkeypatch, tmp_path):
    command = ["git", "-C", folder.ROOT, "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert folder._commit() in (head, f"{head}-dirty") or not head
    monkeypatch.setenv("PATH", str(tmp_path))
    assert folder._commit() is None


def test_the_commit_is_none_inside_somebody_elses_repository(monkeypatch, tmp_path):
    """A copy without .git. Would catch: that repository's commit in config.json, as if it were this project's."""
    (tmp_path / "copy").mkdir()
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(folder, "ROOT", tmp_path)
    assert len(folder._commit()) == 40
    monkeypatch.setattr(folder, "ROOT", tmp_path / "copy")
    assert folder._commit() is None


@pytest.mark.parametrize("content", ["", "[]", "no json", "{" * 100_000, "\x00", '"x"', "1" * 5000])
def test_a_status_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert folder.read_json(tmp_path / "status.json") == {}
    assert folder.read_json(tmp_path / "missing.json") == {}
