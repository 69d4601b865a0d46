"""Training on CUDA; and that an update mixes no devices, which a stand-in for a GPU shows on every machine."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_events, run_script

sys.path.insert(0, str(ROOT / "benchmark"))
import benchmark
import metrics

ALGORITHMS = ("dqn", "ppo", "pqn")
SMALL = {
    "dqn": ["--total-timesteps", "3000", "--learning-starts", "500", "--metrics-frequency", "1000"],
    "ppo": ["--total-timesteps", "3072", "--metrics-frequency", "1000"],
    "pqn": ["--total-timesteps", "3072", "--metrics-frequency", "1000", "--num-envs", "32", "--num-minibatches", "8"],
}
THIS_FILE = "import sys; sys.path.insert(0, 'tests'); import test_cuda"


@pytest.fixture
def gpu(tmp_path_factory):
    """The GPU for this test alone, whatever pytest's other workers do: its memory and its time are measured."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    with open(tmp_path_factory.getbasetemp().parent / "gpu.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def command(algorithm, runs_dir, *flags):
    return [f"{algorithm}_atari_lan.py", *SMALL[algorithm], "--runs-dir", str(runs_dir), *flags]


def only_run(runs_dir):
    (folder,) = (folder for folder in Path(runs_dir).iterdir() if not folder.name.startswith("."))
    return folder


def weights(runs_dir):
    return torch.load(only_run(runs_dir) / "model.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--amp"], ["--compile"], ["--amp", "--compile", "--tf32"]], ids=" ".join)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training(algorithm, flags, runs_dir, tmp_path, gpu):
    """Would catch: a tensor left on the CPU, an optimizer that a CUDA graph cannot hold, outputs that a graph reuses,
    weights that only load where there is a GPU, more memory than the run announces, or than
    scripts/sweep.sh counts with."""
    run_flags = command(algorithm, runs_dir, "--activation", "tanh-2xlan", *flags)  # the largest network
    run_flags[0] = str(ROOT / run_flags[0])
    peaks, _, gpu_gb = benchmark.run_all([run_flags], tmp_path, 1, pinned=False, name=algorithm, cuda=True)
    assumed = int(re.search(r"^RUN_GPU_MEMORY=(\d+)", (ROOT / "scripts/sweep.sh").read_text(), re.M)[1])
    assert 0 < gpu_gb * 1000 < assumed
    announced = re.search(r"([\d.]+) GB needed", (tmp_path / "0.out").read_text())
    assert peaks[0] < float(announced[1])

    folder = only_run(runs_dir)
    config = json.loads((folder / "config.json").read_text())
    assert config["device"].startswith("cuda")
    assert config["hardware"] == torch.cuda.get_device_name(0)
    events = read_events(folder)
    losses = [value for tag, points in events.items() if tag.startswith("losses/") for _, value in points]
    assert len(losses) >= 4
    assert torch.tensor(losses).isfinite().all()
    assert len(events["representation/dead_neurons"]) >= 1
    load = f"import torch; state = torch.load({str(folder / 'model.pt')!r}, weights_only=True); "
    load += "print(torch.cuda.is_available(), {str(weight.device) for weight in state.values()})"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert done.stdout == "False {'cpu'}\n", done.stderr


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_killed_run_resumes_to_equal_weights(algorithm, tmp_path, gpu):
    """Would catch: a random state of CUDA, or an optimizer's step count on the device, that no checkpoint holds."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(*command(algorithm, whole, "--checkpoint-frequency", "1000")).returncode == 0
    run_flags = command(algorithm, killed, "--checkpoint-frequency", "1000")
    process = subprocess.Popen(
        [sys.executable, *run_flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not list(killed.glob("*/checkpoints/*.ckpt")):
        assert process.poll() is None, "it ended without a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_script(*run_flags)
    assert done.returncode == 0, done.stderr
    assert "resumed at" in done.stdout
    resumed = weights(killed)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights(whole).items())


def train_with_sync_as_an_error(algorithm, broken, arguments):
    """Run a script, from the first line of its update to the optimizer's step with waiting for the device an error."""
    from lan_utils import cli, replay

    module = __import__(f"{algorithm}_atari_lan")
    loss_function = getattr(module, f"{'ppo' if algorithm == 'ppo' else 'td'}_loss")
    optimizer = torch.optim.RAdam if algorithm == "pqn" else torch.optim.Adam
    sample, optimizer_step = replay.ReplayMemory.sample, optimizer.step
    updates = []

    def forbidding(function):
        def wrapper(*arguments, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            return function(*arguments, **kwargs)

        return wrapper

    def loss_of(*arguments):
        loss, parts = loss_function(*arguments)
        if broken:
            loss.item()
        return loss, parts

    def step(*arguments, **kwargs):
        result = optimizer_step(*arguments, **kwargs)
        torch.cuda.set_sync_debug_mode("default")
        updates.append(1)
        return result

    setattr(module, loss_function.__name__, forbidding(loss_of))
    replay.ReplayMemory.sample = forbidding(sample)
    optimizer.step = step
    sys.argv = [f"{algorithm}_atari_lan.py", *arguments]
    cli.launch(module.main, module.Args)
    print(len(updates), "updates")


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_update_waits_for_the_device(algorithm, broken, runs_dir, gpu):
    """Would catch: .item(), .cpu(), a mask as an index, a copy from memory that is not pinned, in the update. (With
    one put in, it has to fail.)"""
    arguments = command(algorithm, runs_dir)[1:]
    done = run_script("-c", f"{THIS_FILE}; test_cuda.train_with_sync_as_an_error({algorithm!r}, {broken}, {arguments})")
    if broken:
        assert done.returncode != 0
        assert "synchronizing CUDA operation" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split(" updates")[0].split()[-1]) == {"dqn": 625, "ppo": 48, "pqn": 48}[algorithm]


@pytest.mark.cuda
def test_metrics_equal_the_cpu_s(gpu):
    """Would catch: a generator on another device, float16 or TF32 in a rank, a kernel that sums in another precision.

    Neurons: 100 normal ones, 20 constant ones; 3 directions of the first 50 are copies of others.
    """
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2048, 120, generator=generator)
    z[:, 100:] = 0.3
    z[:, 40:50] = z[:, 30:40]
    on_gpu = z.cuda()
    assert metrics.effective_rank(on_gpu) == metrics.effective_rank(z)
    assert metrics.entropy_rank(on_gpu) == pytest.approx(metrics.entropy_rank(z), rel=1e-4)
    assert torch.equal(metrics.dormant_neurons(on_gpu).cpu(), metrics.dormant_neurons(z))
    dead = metrics.dead_neurons(on_gpu, generator=torch.Generator("cuda").manual_seed(1)).cpu()
    assert dead.tolist() == [False] * 100 + [True] * 20
    jitterless = (metrics.kde_peak_density(part[:, :100], noise_variance=0.0) for part in (on_gpu, z))
    torch.testing.assert_close(*(peaks.cpu() for peaks in jitterless), rtol=1e-4, atol=1e-5)
    values = [metrics.representation_metrics(part) for part in (on_gpu, z)]
    for name in ("feature_norm", "std_dead_neurons", "dead_neurons", "effective_rank", "dormant_neurons"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-5), name


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("parallel"), reason="GNU parallel is missing")
def test_a_sweep_of_two_runs_of_each_algorithm_two_at_once_on_one_gpu(tmp_path, gpu):
    """Would catch: a run that takes the whole GPU, a slot that is given a GPU which is not there, all one by one."""
    runs_dir = tmp_path / "runs"
    lines = [
        " ".join(["python", *command(algorithm, runs_dir, "--seed", seed)])
        for algorithm in ALGORITHMS
        for seed in ("1", "2")
    ]
    (tmp_path / "jobs.txt").write_text("\n".join(lines) + "\n")
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run(
        ["bash", "scripts/sweep.sh", "--jobs-per-gpu", "2", tmp_path / "jobs.txt"],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": device}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [folder for folder in runs_dir.iterdir() if folder.name != ".sweep"]
    assert len(folders) == len(lines)
    assert all((folder / "model.pt").exists() for folder in folders)
    assert all(json.loads((folder / "config.json").read_text())["device"].startswith("cuda") for folder in folders)
    (log,) = (runs_dir / ".sweep").glob("joblog-*.tsv")
    rows = [row.split("\t") for row in log.read_text().splitlines()[1:]]
    spans = sorted((float(row[2]), float(row[2]) + float(row[3])) for row in rows)
    assert spans[1][0] < spans[0][1], "the first two did not overlap"
    most = max(sum(start <= moment < stop for start, stop in spans) for moment, _ in spans)
    assert most == 2


# --------------------------------------------------------------------------------------- on every machine

STAND_IN = "gpu"  # torch's name for the device that is made up


def make_stand_in():
    """Register a device that computes nothing: with FakeTensorMode its tensors have shapes, types and a device.

    A device "cuda" would need a GPU for the backward pass, even with a CUDA build of torch 2.13.
    """
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(STAND_IN, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casting = torch.library.Library("aten", "IMPL")
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def in_bfloat16(operator):
        def cast(*arguments):
            with torch._C._ExcludeDispatchKeyGuard(without_autocast):
                low = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
                return operator(*low)

        return cast

    for name in ("conv2d", "linear"):
        casting.impl(name, in_bfloat16(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    return library, casting


def update_on_the_stand_in(algorithm, amp, break_with):
    """The update of a script as its `main` makes it; prints what became of it."""
    from torch._subclasses import FakeTensorMode

    kept = make_stand_in()
    assert kept
    module, functional = __import__(f"{algorithm}_atari_lan"), torch.nn.functional
    if break_with == "a tensor on the CPU":
        functional.mse_loss = lambda values, targets: (values - targets + torch.zeros(len(values))).square().mean()
        module.torch.min = lambda a, b: torch.minimum(a, b + torch.zeros(len(b)))
    elif break_with == "a host copy":
        functional.mse_loss = lambda values, targets: (values - targets).square().mean() * float(values.sum() + 1)
        module.torch.min = lambda a, b: torch.minimum(a, b) * float(a.sum())
    if algorithm == "pqn" and break_with:
        of_returns = {"a tensor on the CPU": lambda r: torch.zeros(len(r)), "a host copy": lambda r: float(r.sum())}
        make_batch = module.Batch
        module.Batch = lambda *columns: make_batch(*columns[:2], columns[2] + of_returns[break_with](columns[2]))
    with FakeTensorMode():
        n = 32
        with torch.device(STAND_IN):
            floats, integers = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
            frames = torch.zeros((n, 5, 84, 84), dtype=torch.uint8)
            make = module.Network
            module.nn.init.orthogonal_ = lambda weight, gain: weight  # draws what it computes with on the CPU
            module.nn.init.trunc_normal_ = lambda weight, **limits: weight  # looks at what it has drawn
            network, target = make(4, "tanh-2xlan", amp=amp), make(4, "tanh-2xlan", amp=amp)
        if algorithm == "pqn":
            optimizer = torch.optim.RAdam(network.parameters(), lr=1e-4)
        else:
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, eps=1e-5, fused=True)
        if algorithm == "dqn":
            batch = module.Batch(frames, integers, floats, floats)
            loss, _ = module.td_loss(network, target, batch, 0.99, True)
        elif algorithm == "pqn":
            parts = [floats.reshape(8, 4)] * 4
            returns = module.lambda_returns(*parts, 0.99, 0.65).flatten()
            loss, _ = module.td_loss(network, module.Batch(frames[:, 1:], integers, returns))
        else:
            parts = [part.reshape(8, 4) for part in (floats, floats, floats, floats, floats)]
            advantages = module.compute_gae(*parts, 0.99, 0.95).flatten()
            assert module.explained_variance(floats, floats).device.type == STAND_IN
            batch = module.Batch(frames[:, 1:], integers, floats, advantages, floats, floats)
            loss, _ = module.ppo_loss(network, batch, 0.1, 0.01, 0.5, True, True)
        optimizer.zero_grad()
        loss.backward()
        if algorithm != "dqn":
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        gradients = {parameter.grad.device.type for parameter in network.parameters()}
        z = {}
        network.encoder.z.register_forward_hook(lambda module, inputs, output: z.update(dtype=output.dtype))
        network(frames[:, 1:])
    print(json.dumps([sorted(gradients), str(loss.dtype), str(z["dtype"])]))


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make up a device",
)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_stays_on_its_device(algorithm, amp, tmp_path):
    """Needs no GPU. Would catch: a tensor made on the CPU in loss, backward or optimizer, a copy to the host, --amp
    that does not reach the representation or that reaches the loss. (With each put in, it has to fail.)"""

    def update(break_with):
        file = tmp_path / "update.py"  # forked, so that torch is imported already
        file.write_text(f"{THIS_FILE}; test_cuda.update_on_the_stand_in({algorithm!r}, {amp}, {break_with!r})\n")
        return run_script(file)

    done = update(None)
    assert done.returncode == 0, done.stderr[-2000:]
    z = "torch.bfloat16" if amp else "torch.float32"
    assert json.loads(done.stdout.splitlines()[-1]) == [[STAND_IN], "torch.float32", z]
    if amp:  # one of the two is enough
        return
    for break_with, error in (
        ("a tensor on the CPU", "device"),
        ("a host copy", "DataDependentOutputException"),
    ):
        done = update(break_with)
        assert done.returncode != 0
        assert error in done.stderr
