"""scripts/status.py: what has become of each run of a job list."""
# ruff: noqa: F401, F811 (the fixture `project` is imported, then an argument)

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launchers import STANDIN, bash, environment, files, job_list, locked_by_another_process, project, sweep

import dqn_atari_lan
import ppo_atari_lan
from lan_utils import cli
from lan_utils.study import run_name


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["python standin.py", "python gone.py --seed 1"], "line 2: there is no gone.py"),
        (["echo hello"], "line 1: echo hello: a job is one line `python <script>.py <flags>`"),
        (["python standin.py; rm -rf x"], "a job is one line `python <script>.py <flags>`"),
        (["python scripts/status.py"], "scripts/status.py is not a training script: those are in"),
        (["python plain.py"], "line 1: plain.py is not a training script: it has no class Args"),
        (["python broken.py"], "line 1: broken.py is not valid Python: "),
        (["python computed.py"], "line 1: computed.py has no plain default of --total-timesteps: add the flag here"),
        (["python standin.py --runs-dir --seed 2"], "line 1: --runs-dir needs a folder"),
        (["", "python standin.py --exp-name 'open"], "line 2: No closing quotation"),
        (["python standin.py --seed 1 --overwrite"], "line 1: --overwrite would delete the run"),
        (["python standin.py --seed x"], "line 1: --seed takes a whole number"),
        (["python standin.py --buffer-size 1e6"], "line 1: --buffer-size takes a whole number"),
        (["python standin.py --seed 1", "python standin.py --seed=01 --seconds 1"], "lines 1 and 2 are the same run"),
        (["python standin.py --exp-name " + "n" * 250], "at most 251 bytes"),
        (["# nothing", ""], "contains no job"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused_before_anything_starts(project, lines, message):
    """One line on stderr, exit code 2, from each launcher. Would catch: half a sweep that ran before the bad line."""
    (project / "plain.py").write_text("print(1)\n")
    (project / "broken.py").write_text("def :\n")
    (project / "computed.py").write_text(STANDIN.replace("total_timesteps: int = 100", "total_timesteps: int = 10**7"))
    file = job_list(project, *lines)
    before = files(project)
    slurm = bash("scripts/sweep.slurm", "--dry-run", file, cwd=project)
    for done in (sweep(project, file), sweep(project, "--status", file), slurm):
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert {path for path in files(project) if "__pycache__" not in str(path)} == before.keys()


def test_other_bad_input(project):
    for arguments, message in [
        (["absent.txt"], "cannot read the job list"),
        (["--jobs-per-gpu", "0", "x"], "--jobs-per-gpu takes a number from 1 to 9999"),
        (["--foo"], "unknown flag --foo"),
        (["a", "b"], "one job list at a time"),
        ([], "the job list on standard input contains no job"),
    ]:
        done = sweep(project, *arguments, cwd=project)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def status(project, *arguments):
    command = [sys.executable, "scripts/status.py", *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=60)


def planned(project, *lines, only=()):
    """The fields of each line of the plan: line number, state, threads, log, command, RAM, disk."""
    done = status(project, "--plan", job_list(project, *lines), *only)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [[], ["--plan"], ["a", "b"], ["--plan", "a", "1x"], ["--jobs", "a"]])
def test_what_is_no_command_line(project, arguments):
    done = status(project, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "status.py --help" in done.stderr


def test_only_some_lines(project):
    """Counted in the file, blank lines too. Would catch: a Slurm task that trains the run of another line."""
    lines = ["", *(f"python standin.py --seed {seed}" for seed in (1, 2, 3))]
    assert [line for line, *_ in planned(project, *lines, only=(2, 4))] == ["2", "4"]
    assert planned(project, *lines, only=(1,)) == []
    table = status(project, project / "jobs.txt", 3).stdout.splitlines()
    assert table[0] == "waiting     BreakoutNoFrameskip-v4__standin__tanh-lan__2"
    assert len(table) == 2


def test_a_copy_of_a_script_is_read(project):
    """Would catch: a run folder guessed from the script's name, where the copy's flags give it another."""
    copy = STANDIN.replace('"standin"', '"mine"').replace('"tanh-lan"', '"relu"').replace(" = 1\n", " = 7\n", 1)
    (project / "copy.py").write_text(copy)
    assert planned(project, "python copy.py")[0][3] == "runs/.sweep/BreakoutNoFrameskip-v4__mine__relu__7.log"


@pytest.mark.parametrize(
    "flags", ["", "--conv-activation tanh-lan", "--conv_activation=layernorm", "--activation crelu"]
)
def test_a_jobs_folder_is_that_of_its_run(monkeypatch, tmp_path, flags):
    """Would catch: a flag that names the folder and that the launchers do not know: a run that never looks finished."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    status = importlib.import_module("status")
    file = tmp_path / "jobs.txt"
    for module in (dqn_atari_lan, ppo_atari_lan):
        file.write_text(f"python {module.__name__}.py {flags}")
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags.split()])
        (job,) = status.read_jobs(str(file))
        assert job.folder.name == run_name(cli.parse(module.Args))


def test_dry_run_does_nothing(project):
    """Blank lines, comments, Windows line ends and repetitions are no jobs; tasks have the list's line numbers."""
    file = job_list(project, "# all", "", "python standin.py --seed 1\r", "python standin.py --seed 1 # again",
                    "  python standin.py --seed 2 --exp-name 'a b'")  # fmt: skip
    before = files(project)
    second = "python standin.py --seed 2 --exp-name 'a b'"
    fixed = ("--jobs-per-gpu", "1")  # free RAM and disk, which decide otherwise, differ from call to call
    done = sweep(project, *fixed, "--dry-run", file.name, cwd=project)
    assert done.stdout.splitlines()[0] == "2 runs: 0 finished, 0 running already, 2 to run"
    assert done.stdout.splitlines()[2:] == ["python standin.py --seed 1", second]
    piped = sweep(project, *fixed, "--dry-run", stdin=file.read_text())
    assert piped.stdout == done.stdout
    slurm = bash("scripts/sweep.slurm", "--dry-run", file, cwd=project)
    assert slurm.stdout.splitlines() == ["task 3: python standin.py --seed 1", f"task 5: {second}"]
    slurm = bash("scripts/sweep.slurm", "--dry-run", "-", cwd=project, stdin=file.read_text())
    assert slurm.stdout.splitlines() == ["task 3: python standin.py --seed 1", f"task 5: {second}"]
    status = sweep(project, "--status", file)
    assert status.stdout.splitlines()[-1].startswith("2 runs: 0 finished, 0 running, 0 failed, 0 stopped, 2 waiting")
    assert files(project) == before


START = "=== 2026-01-01T00:00:00+00:00 start in process 1 on host with OMP_NUM_THREADS=1: python standin.py\n"


def run_folder(project, seed=1):
    return project / "runs" / f"BreakoutNoFrameskip-v4__standin__tanh-lan__{seed}"


def make_run(project, seed=1, log=None, **status):
    """A run folder by hand: with a status.json that says `status`, and the launcher's log."""
    folder = run_folder(project, seed)
    folder.mkdir(parents=True)
    if log is not None:
        (folder.parent / ".sweep").mkdir(exist_ok=True)
        (folder.parent / ".sweep" / f"{folder.name}.log").write_text(log)
    if status:
        known = {"total_timesteps": 100, "pid": 1, "host": os.uname().nodename, "updated": time.time()}
        (folder / "status.json").write_text(json.dumps(known | status))
    return folder


def states(project, count):
    """The first word of each line of the table, and the table."""
    file = job_list(project, *(f"python standin.py --total-timesteps 100 --seed {seed + 1}" for seed in range(count)))
    done = status(project, file)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split()[0] for line in done.stdout.splitlines()[:-1]], done.stdout.splitlines()


def test_status_of_every_state(project):
    """Hand-made folders and logs; 30 and 10 steps a second and 100 to go at 20, one run at work."""
    end = "=== 2026-01-01T00:00:09+00:00 exit"
    make_run(project, 1, f"{START}{end} 0\n", state="finished", step=100, steps_per_second=30)
    make_run(project, 2, START, state="running", step=40, steps_per_second=10)
    make_run(project, 3, f"{START}error: no luck\n{end} 1\n")
    make_run(project, 4, f"{START}{end} 143\n", state="stopped", step=50)
    make_run(project, 5, f"{START}killed by a reboot, without a word\n")
    with locked_by_another_process(run_folder(project, 2)):
        found, lines = states(project, 6)
        assert "1 running already, 4 to run" in sweep(project, "--dry-run", project / "jobs.txt").stdout
    # own speed 10: 60 steps, 6 s; of the others at 20: 50, 100 and 100 steps, 12.5 s
    assert found == ["finished", "running", "failed", "stopped", "stopped", "waiting"]
    assert re.search(r" 40 of 100 steps, 10 per second$", lines[1])
    assert f"exit code 1, see runs/.sweep/{run_folder(project, 3).name}.log" in lines[2]
    assert re.search(r" 50 of 100 steps$", lines[3])
    assert lines[6] == "6 runs: 1 finished, 1 running, 1 failed, 2 stopped, 1 waiting; about 18 s left"


def test_a_dead_process_is_told_from_a_live_one(project):
    """`running` in status.json stands there for ever after a kill -9. Would catch: a run that a sweep never resumes;
    one on another machine that is begun twice."""
    make_run(project, 1, state="running", step=40)
    make_run(project, 2, state="running", step=40)
    make_run(project, 3, state="running", step=40, host="elsewhere")
    make_run(project, 4, state="running", step=40, host="elsewhere", updated=time.time() - 3600)
    with locked_by_another_process(run_folder(project, 2)):
        assert states(project, 4)[0] == ["stopped", "running", "running", "stopped"]


def test_a_file_system_without_locks(project):
    """Would catch: a traceback; a run called unreadable, or begun twice, because nobody can ask its lock."""
    make_run(project, 1, state="running", step=40)
    make_run(project, 2, state="running", step=40, updated=time.time() - 3600)
    make_run(project, 3, state="stopped", step=40)
    for seed in (1, 2, 3):
        (run_folder(project, seed) / ".lock").touch()
    file = job_list(project, *(f"python standin.py --seed {seed}" for seed in (1, 2, 3)))
    program = """if True:
        import errno, fcntl, runpy, sys
        def no_locks(*question):
            raise OSError(errno.ENOLCK, "No locks available")
        fcntl.fcntl = no_locks
        sys.argv = ["status.py", sys.argv[1]]
        runpy.run_path("scripts/status.py", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", program, file], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["running", "stopped", "stopped"]


def test_a_run_that_a_signal_stopped_has_not_failed(project):
    """Would catch: a closed terminal or a batch system's warning shown as a failure."""
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    for seed, signum in enumerate(signals, start=1):
        log = f"{START}=== 2026-01-01T00:00:09+00:00 exit {128 + signum}\n"
        make_run(project, seed, log, state="stopped", step=10)
    assert states(project, 5)[0] == ["stopped"] * 5


def test_what_finished_means(project):
    """Would catch: a 0-byte model.pt that counts; weights of an earlier life that hide a run begun anew; a run without
    weights that is trained again."""
    for seed, weights, status in [(1, "", {}), (2, "weights", {}), (3, "weights", {"state": "stopped", "step": 10})]:
        (make_run(project, seed, **status) / "model.pt").write_text(weights)
    make_run(project, 4, state="finished", step=100)
    assert states(project, 4)[0] == ["waiting", "finished", "stopped", "finished"]


def test_finished_with_other_flags_is_not_finished(project):
    """Whatever its training would refuse. Would catch: a pilot's short runs that a longer list takes for its own."""
    trained = {"total_timesteps": 100, "seconds": 0.5, "anneal": False, "entity": None, "cuda": True}
    for seed in range(1, 8):
        args = trained | {"sizes": [512, 256], "seed": seed}
        (make_run(project, seed, state="finished", step=100) / "config.json").write_text(json.dumps({"args": args}))
    (run_folder(project, 5) / "config.json").write_text('{"args": ["damaged"]}')
    standin = (project / "standin.py").read_text()
    flags = (
        "total_timesteps: int = 100\n    anneal: bool = True\n    entity: str | None = None\n    cuda: bool = True\n"
    )
    flags += "    newer: float = 0.0\n    sizes: tuple[int, ...] = (512, 256)"
    (project / "standin.py").write_text(standin.replace("total_timesteps: int = 100", flags))
    lines = [
        "--seed 1 --seconds 5e-1 --no-anneal --no-cuda",  # equal but for a flag that changes no run
        "--seed 2 --seconds 0.5 --no-anneal --total-timesteps 100000",
        "--seed 3 --seconds=0.5 --entity us",
        "--seed 4 --no-anneal",
        "--seed 5",
        "--seed 6 --seconds 0.5 --no-anneal --newer 0.9",
        "--seed 7 --seconds 0.5 --no-anneal --newer 0 --sizes 512 256",
    ]
    done = status(project, job_list(project, *(f"python standin.py {line}" for line in lines)))
    table = [line.split(maxsplit=2) for line in done.stdout.splitlines()[:-1]]
    other = "it has finished with other flags: --"
    assert [(row[0], *row[2:]) for row in table] == [
        ("finished",),
        ("failed", f"{other}total-timesteps 100, not 100000"),
        ("failed", f"{other}anneal False, not True, --entity None, not us"),
        ("failed", f"{other}seconds 0.5, not 0.0"),
        ("finished",),
        ("failed", f"{other}newer 0.0, not 0.9"),
        ("finished",),
    ]


def test_a_run_that_waits_for_memory(project):
    """Would catch: a second sweep that starts it beside its launcher; a wait that outlasts its launcher, or its end."""
    waits = "=== 2026-01-01T00:00:09+00:00 waits\n"
    log = f"runs/.sweep/{run_folder(project, 1).name}.log"
    launcher = subprocess.Popen(["bash", "-c", "sleep 100; true", log])
    try:
        start = START.replace(" in process 1 on host ", f" in process {launcher.pid} on {os.uname().nodename} ")
        make_run(project, 1, f"{start}{waits}")
        make_run(project, 2, f"{START}{waits}")
        make_run(project, 3, f"{START}{waits}{START}=== 2026-01-01T00:00:19+00:00 exit 2\n")
        found, table = states(project, 3)
    finally:
        launcher.kill()
        launcher.wait()
    assert found == ["running", "stopped", "failed"]
    assert table[0].endswith("  waits for free memory or disk")


def test_a_failure_is_remembered_until_the_run_goes_on(project):
    """Would catch: a failure by a launcher that status.json, older, hides; one that stays after a resume by hand."""
    failed = f"{START}=== 2026-01-01T00:00:09+00:00 exit 137\n"
    make_run(project, 1, failed, state="running", step=10)
    make_run(project, 2, failed, state="stopped", step=10)
    make_run(project, 3, state="failed", step=10)
    now = time.time()
    for seed, written in ((1, now - 100), (2, now + 100)):
        os.utime(run_folder(project, seed) / "status.json", (written, written))
    assert states(project, 3)[0] == ["failed", "stopped", "failed"]


def test_one_unreadable_run_does_not_hide_the_others(project):
    """It is shown with its reason, and left alone. Would catch: a traceback."""
    make_run(project, 1, state="stopped", step=7)
    (make_run(project, 2) / ".lock").mkdir()
    run_folder(project, 3).write_text("no folder")
    (project / "runs" / ".sweep" / f"{run_folder(project, 4).name}.log").mkdir(parents=True)
    found, lines = states(project, 5)
    assert found == ["stopped", "unreadable", "unreadable", "unreadable", "waiting"]
    assert all(" cannot read runs/" in line for line in lines[1:4])
    plan = status(project, "--plan", project / "jobs.txt")
    assert plan.returncode == 0
    assert plan.stderr.count("error: line ") == plan.stderr.count("\n") == 3


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[]", b'{"state": "fini'])
def test_a_damaged_status_is_none(project, damage):
    """As the training itself takes it. Would catch: a traceback; a run with its weights that is trained again."""
    for seed in (1, 2):
        (make_run(project, seed, START) / "status.json").write_bytes(damage)
    (run_folder(project, 2) / "model.pt").write_text("weights")
    assert states(project, 3)[0] == ["stopped", "finished", "waiting"]


def test_a_log_that_is_no_text(project):
    make_run(project, 1, START)
    log = project / "runs" / ".sweep" / f"{run_folder(project, 1).name}.log"
    log.write_bytes(START.encode() + os.urandom(50_000) + b"\n\0=== \xff exit \xff\n")
    assert states(project, 1)[0] == ["stopped"]


def test_the_threads_that_an_unfinished_run_began_with(project):
    """Would catch: a run that goes on with another count, which gives other weights."""
    for seed, (state, config) in enumerate(
        [("stopped", {"threads": 3}), ("stopped", {}), ("finished", {"threads": 3})]
    ):
        (make_run(project, seed + 1, state=state) / "config.json").write_text(json.dumps(config))
    plan = planned(project, *(f"python standin.py --seed {seed}" for seed in (1, 2, 3, 4)))
    assert [threads for _, _, threads, *_ in plan] == ["3", "-", "-", "-"]


def test_a_comment_begins_outside_of_quotes(project):
    """`jobs.py` quotes a #. Would catch: a quoted one that cuts the name, so that another run is trained."""
    names = {"'a#b'": "a#b", '"a #b"': "a #b", r"a\ b": "a b", r"\#b": "#b", "a #b": "a", "c# don't": "c"}
    plan = planned(project, *(f"python standin.py --exp-name {text}" for text in names))
    assert [log.split("__")[1] for _, _, _, log, *_ in plan] == list(names.values())


def test_880_runs_at_once(project):
    """Would catch: something slow for each run, such as reading its script."""
    for seed in range(880):
        make_run(project, seed + 1, START, state="stopped", step=5, steps_per_second=1)
    program = """if True:
        import ast, runpy, sys
        parse, read = ast.parse, []
        ast.parse = lambda text, *rest: read.append(text) or parse(text, *rest)
        runpy.run_path("scripts/status.py", run_name="__main__")
        sys.exit(f"{sum('class Args' in text for text in read)} read")
    """
    file = job_list(project, *(f"python standin.py --seed {seed + 1}" for seed in range(880)))
    done = subprocess.run([sys.executable, "-c", program, file], cwd=project, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("880 runs: 0 finished, 0 running, 0 failed, 880 stopped")
    assert done.stderr == "1 read\n"


@pytest.mark.parametrize(
    "log",
    [
        "error: no luck\n" * 20_000 + "=== 2026-01-01T00:00:09+00:00 exit 1\n",
        "error: no luck\n=== 2026-01-01T00:00:09+00:00 exit 1\nand a child's last words\n",
    ],
)
def test_a_failed_runs_status_whatever_its_log_holds(project, log):
    """Would catch: a failed run shown as waiting or stopped, because of where its last lines are."""
    make_run(project, 1, START + log)
    assert states(project, 1)[0] == ["failed"]
