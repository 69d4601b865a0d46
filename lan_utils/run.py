"""One training run: its flags, how it resumes, what it logs, how it stops and ends."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import io
import json
import os
import random
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import metrics
from lan_utils import checkpoint
from lan_utils.atari import ended_games
from lan_utils.checks import free_memory, refuse_unless
from lan_utils.cli import DISK_FULL, STOP_SIGNALS, BadInput, Progress, RunFailed, Stopped, print_line, warn
from lan_utils.files import replace
from lan_utils.flags import RunArgs
from lan_utils.folder import HasFinished, RunFolder, describe
from lan_utils.machine import usable_cores
from lan_utils.study import group_of

LOG_FREQUENCY = 1000  # agent steps between two points of losses and charts
CHUNK = 256  # observations that are measured at a time: more would only need more memory
STATUS_SECONDS = 5  # at least, between two writings of status.json
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """Afterwards torch's settings, warnings, the environment and `threading.excepthook` are as before."""
    threads, backends = torch.get_num_threads(), torch.backends
    flushes = sys.float_info.min / 2 == 0  # torch cannot say it
    is_deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings = [
        (backends.cuda.matmul, "fp32_precision"),
        (backends.cudnn, "fp32_precision"),
        (backends.cudnn, "benchmark"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
        (threading, "excepthook"),
    ]
    before = [getattr(owner, name) for owner, name in settings]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    # TensorBoard's writer thread prints its error, which the main thread raises again.
    threading.excepthook = lambda error: type(error.thread).__name__ == "_AsyncWriterThread" or before[-1](error)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


_at_the_end: ContextVar[contextlib.ExitStack] = ContextVar("what `leaves_no_trace` does at the end of a run")


def leaves_no_trace(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorate a script's `main`: however a run ends, files and games are closed, memory is free, settings as before.

    So a notebook can call it in a loop. A run that had finished before says so and returns.
    """

    @functools.wraps(main)
    def wrapped(args: Any) -> None:
        try:
            with _process_as_before(), contextlib.ExitStack() as stack:
                token = _at_the_end.set(stack)
                try:
                    main(args)
                finally:
                    _at_the_end.reset(token)
        except HasFinished as finished:
            print_line(str(finished))
        except (Stopped, RunFailed) as error:
            traceback.clear_frames(error.__traceback__)  # a notebook keeps the error, and main's replay memory with it
            raise
        finally:
            gc.collect()
            if hasattr(LIBC, "malloc_trim"):
                LIBC.malloc_trim(0)  # else the next run would count this one's memory as used

    return wrapped


def set_up(args: RunArgs) -> tuple[torch.device, np.random.Generator]:
    """Set torch's threads, kernels and rounding as the flags say, and seed python, numpy and torch.

    Returns:
        The device, and the generator of everything that the script itself draws.
    """
    if hasattr(LIBC, "mallopt"):
        # By default glibc returns an update's memory to the system, and the next update faults it in page by page.
        LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**30)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())  # torch does not know a container's quota
    # Adam's moments of a dead neuron decay into denormal numbers, which slow a CPU (docs/speed.md).
    torch.set_flush_denormal(True)
    precision = "tf32" if args.tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.fp32_precision = precision
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and writing it costs 3 %
        torch.backends.cudnn.benchmark = False
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    return device, np.random.default_rng(args.seed)


class Memory(Protocol):
    """What an agent has seen."""

    def observations(self, n: int, seed: Any) -> Tensor | None:
        """`n` of its observations, along the first axis; None while there are fewer."""


class Run:
    """One run's folder, from the lock to `model.pt`. Nothing is written before `resume`.

    Args:
        algorithm: "dqn", "ppo" or "pqn".
        args: the flags.
        device: that the networks are on.
        rng: the generator of everything that the script itself draws.
        memory_needed: bytes, for the header.
        stride: agent steps per turn of the training loop.
    """

    writer: SummaryWriter | None = None
    progress: Progress | None = None

    def __init__(
        self,
        algorithm: str,
        args: RunArgs,
        device: torch.device,
        rng: np.random.Generator,
        memory_needed: int = 0,
        stride: int = 1,
    ):
        self.algorithm, self.args, self.device, self.rng = algorithm, args, device, rng
        self.memory_needed, self.stride = memory_needed, stride
        self.total = args.total_timesteps // stride * stride
        self.folder = RunFolder(algorithm, args)
        self.checkpoints = self.folder.checkpoints
        self.things: dict[str, Any] = {}
        self.step = 0
        self.returns: deque[float] = deque(maxlen=100)
        self.state = ""  # what status.json says
        self.layers: dict[str, dict[str, float]] = {}  # of the newest measurement
        self.signum = 0  # the signal that asked the run to stop
        self._signalled_at = 0.0
        self._saved: int | None = None  # agent step of the newest checkpoint
        self._stops_at_once = False  # does a signal stop the run without waiting for a checkpoint?
        self._good_losses = "none was logged"
        self._status_written = 0.0
        self._mirrored = False  # to Weights & Biases

    # -- start ----------------------------------------------------------------------------------------

    def resume(self, **things: Any) -> None:
        """Claim the folder, and continue from its newest whole checkpoint if it has one.

        Args:
            things: everything that a resumed run needs, the network first. Each has `state_dict()` and
                `load_state_dict()`; one whose `state_dict` is None makes a run without checkpoints.

        Raises:
            BadInput: other flags than the run had, another process training it, no whole checkpoint, points but no
                checkpoint, not a run's folder, a thing that no checkpoint can hold.
            HasFinished
        """
        self.things = things
        at_the_end = _at_the_end.get(None) or contextlib.ExitStack()
        at_the_end.push(self._leave)
        if all(thing.state_dict for thing in things.values()):
            try:
                checkpoint.require_savable(things)
            except TypeError as error:
                raise BadInput(f"this run could not resume: {error}") from None
        network = next(iter(things.values()))
        config = describe(self.algorithm, self.args, self.device, network)
        old = self.folder.claim()
        if old is None:
            self.folder.write_config(config)
        else:
            self._load()
            self.folder.record_changes(old, config, self.step)
        if self.args.track:
            self._mirror(config)
        self.writer = SummaryWriter(str(self.folder.path), purge_step=self.step + 1 if self.step else None)
        for signum in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # `nohup` ignores SIGHUP. What bash starts with & ignores SIGINT, although nobody asked for that.
            if signum in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(signum) != signal.SIG_IGN:
                before = signal.signal(signum, self._on_signal)
                at_the_end.callback(signal.signal, signum, before or signal.SIG_DFL)
        self.progress = Progress(self.total, self.step)
        self._write_status("running")
        self._print_header(config)

    def _load(self) -> None:
        """Restore the newest whole checkpoint, and cut the event files back to it.

        Raises:
            BadInput: there are checkpoints and none is whole or fits this script, one is another run's, or they are
                gone.
        """
        misfit = ""  # why the newest whole checkpoint is not this script's
        events: dict[str, tuple[int, str]] = {}
        for state in self.checkpoints.load():
            file = self.checkpoints.folder / f"{state['step']:010d}.ckpt"
            try:
                run = state["run"]
                what = f"{file} is a checkpoint of other flags"
                remedy = "restore this run's checkpoints, use another --exp-name, or --overwrite"
                self.folder.compare(run["algorithm"], run["args"], what, remedy)
                if self._saved is not None:  # read only to know which parts it needs
                    continue
                returns = [float(score) for score in state["returns"]]
                events = {str(name): (int(size), str(digest)) for name, (size, digest) in state["events"].items()}
                checkpoint.restore(self.things, state["things"])
                network = next(iter(self.things.values()))
                for name, gradient in state["gradients"].items():
                    weight = network.get_parameter(name)
                    weight.grad = torch.empty_like(weight).copy_(gradient)
                checkpoint.restore_random_states(state["random"], self.rng, self.device)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
                what = " ".join(str(error).split())[:240]
                misfit = misfit or what
                warn(f"{file} is not a checkpoint of this script: {what}; trying the checkpoint before it")
                del self.checkpoints.parts[state["step"]]
                continue
            self.returns.extend(returns)
            self.step = self._saved = state["step"]
        refuse_unless(
            self._saved is not None or not misfit,
            f"the newest whole checkpoint in {self.checkpoints.folder} is not of this script: {misfit}; the run was "
            "left as it is: undo what was changed in the script since then, or train it as another run with --exp-name",
        )
        if self._saved is None and self.checkpoints:
            raise BadInput(
                f"none of the {len(list(self.checkpoints.folder.glob('*.ckpt')))} checkpoints in "
                f"{self.checkpoints.folder} is whole; nothing was changed: "
                "restore one from a backup, or start anew with --overwrite"
            )
        refuse_unless(
            self._saved is not None or not self.folder.has_lost_checkpoints(),
            f"{self.folder.path} has logged points, but its checkpoints or its model.pt are gone: it cannot resume; "
            "restore them from a backup, or start anew with --overwrite",
        )
        self.folder.cut_events(events)

    def _mirror(self, config: dict[str, Any]) -> None:
        import wandb

        try:
            wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                id=self.folder.path.name,
                name=self.folder.path.name,
                resume="allow",
                config=config["args"],
                sync_tensorboard=True,
                dir=str(self.folder.path),
            )
            self._mirrored = True
        except Exception as error:  # no network, no such entity: only its server knows
            reason = str(error).split("\n", 1)[0]
            raise RunFailed(f"--track: Weights & Biases says: {reason}; fix this, or start without --track") from None

    def _print_header(self, config: dict[str, Any]) -> None:
        """What is about to happen, before the first step."""
        hardware = config["hardware"] + (f", {config['threads']} threads" if self.device.type == "cpu" else "")
        memory = f"{self.memory_needed / 1e9:.1f} GB needed, {free_memory() / 1e9:.1f} GB free"
        print_line(
            f"{self.algorithm.upper()}, {group_of(vars(self.args))}, on {self.args.env_id}, seed {self.args.seed}"
        )
        print_line(f"  run folder  {self.folder.path}")
        print_line(f"  device      {self.device} ({hardware})")
        print_line(f"  size        {config['parameters']:,} parameters, {memory}")
        print_line(f"  agent steps {self.total:,}" + (f", resumed at {self.step:,}" if self.step else ""))

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self.signum:
            self.signum, self._signalled_at = signum, time.monotonic()
        # Launchers may send one signal twice, and the kernel sends SIGXCPU every second.
        elif signum in (signal.SIGINT, signal.SIGTERM) and time.monotonic() - self._signalled_at > 1:
            raise Stopped(signum, saved=self._saved is not None)
        if self._stops_at_once:
            self._stop()

    # -- every turn of the training loop --------------------------------------------------------------

    def _due(self, frequency: int, step: int) -> bool:
        """Whether this turn, which ends at `step`, reached or passed a multiple of `frequency`."""
        return frequency > 0 and step // frequency > (step - self.stride) // frequency

    def log_games(self, step: int, info: dict) -> None:
        """Log the games that ended, according to `info`; with several environments, number i's at `step` + i."""
        games = ended_games(info)
        if games:
            self.folder.require_ours()
        for i, (score, length) in games.items():
            self.returns.append(score)
            self.writer.add_scalar("charts/episodic_return", score, step + i)
            self.writer.add_scalar("charts/episodic_length", length, step + i)

    def log(self, step: int, network: nn.Module, losses: list[dict[str, Tensor]], **charts: float) -> None:
        """Log losses and charts every 1,000 agent steps; this is the only place where the loop waits for the losses.

        Args:
            losses: scalars by name; the mean of each name is logged.

        Raises:
            RunFailed: a loss or a weight is NaN or infinite.
        """
        if not self._due(LOG_FREQUENCY, step):
            if self.stride > 1:
                self._require_finite(network, step)  # a policy of NaN cannot be sampled
            return
        last_games = f"{np.mean(self.returns):.2f}" if self.returns else "none yet"
        self.progress.update(step, last_100_games=last_games)
        by_name: dict[str, list[Tensor]] = defaultdict(list)
        for terms in losses:
            for name, term in terms.items():
                by_name[name].append(term)
        means = [torch.stack(terms).mean() for terms in by_name.values()]
        values = dict(zip(by_name, torch.stack(means).tolist(), strict=True)) if means else {}
        text = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        if not np.isfinite(list(values.values())).all():
            self._diverged(step, text)
        self._require_finite(network, step)
        self.folder.require_ours()
        for name, value in values.items():
            self.writer.add_scalar(f"losses/{name}", value, step)
        for name, value in charts.items():
            self.writer.add_scalar(f"charts/{name}", value, step)
        self.writer.add_scalar("charts/SPS", self.progress.speed(), step)
        if values:
            self._good_losses = f"{text} at step {step:,}"
        self.step = step
        if time.monotonic() - self._status_written >= STATUS_SECONDS:
            self._write_status("running")

    def measure(self, step: int, network: nn.Module, memory: Memory) -> None:
        """Log what `metrics` says about the network's measured layers, when it is due.

        Args:
            network: its `measured` names the layers.
            memory: gives the observations that it is measured on.
        """
        if self._due(self.args.metrics_frequency, step):
            self._measure(step, network, memory, self.writer)

    def _measure(
        self, step: int, network: nn.Module, memory: Memory, writer: SummaryWriter | None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        seed = (self.args.seed, step)
        observations = memory.observations(self.args.metrics_samples, seed)
        if observations is None:
            return {}, {}
        self._require_finite(network, step)
        sample, layers = measure_network(network, observations.to(self.device))
        values, peaks = measure_representation(sample, self.args.dead_threshold, seed)
        self.layers = layers
        if writer:
            self.folder.require_ours()
            for name, value in values.items():
                writer.add_scalar(f"representation/{name}", value, step)
            for layer, of_layer in layers.items():
                for name, value in of_layer.items():
                    writer.add_scalar(f"layers/{layer}/{name}", value, step)
            log_peaks = peaks.log10().clamp(-2, 4).cpu()
            writer.add_histogram("representation/kde_peak", log_peaks, step, bins=np.linspace(-2, 4, 61))
        return sample, values

    def save(self, step: int) -> None:
        """Write a checkpoint and keep the weights when they are due; stop if a signal asked for it."""
        if self._due(self.args.keep_weights, step):
            self._write_weights(f"weights_{step}.pt")
        if self.signum or self._due(self.args.checkpoint_frequency, step):
            self._save(step)
            if self.signum:
                self._stop()

    def _write_weights(self, name: str) -> None:
        self.folder.require_ours()
        network = next(iter(self.things.values()))
        buffer = io.BytesIO()  # torch.save would hide a full disk's error behind its own
        torch.save({name: weight.cpu() for name, weight in network.state_dict().items()}, buffer)
        replace(self.folder.path / name, lambda file: file.write(buffer.getbuffer()))

    def _save(self, step: int) -> None:
        if not all(thing.state_dict for thing in self.things.values()):
            return
        self.folder.require_ours()
        self.writer.flush()
        things = {name: thing.state_dict() for name, thing in self.things.items()}
        network = next(iter(self.things.values()))
        if not checkpoint.all_finite(things):
            self._diverged(step, "the state holds NaN or infinity, no checkpoint of it was written")
        state = {
            "run": {"algorithm": self.algorithm, "args": json.loads(json.dumps(dataclasses.asdict(self.args)))},
            "step": step,
            "returns": list(self.returns),
            "random": checkpoint.random_states(self.rng, self.device),
            "events": self.folder.sync_events(),
            "things": things,
            # From the latest update: a measurement may come before the next one.
            "gradients": {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None},
        }
        try:
            self.checkpoints.save(step, state)
        except TypeError as error:
            raise RunFailed(f"{error}; the run resumes from its last checkpoint") from None
        self.step = self._saved = step
        self._write_status("running")

    def _stop(self) -> NoReturn:
        with contextlib.suppress(RunFailed, OSError):
            self._write_status("stopped")
        raise Stopped(self.signum, self._saved is not None)

    def _require_finite(self, network: nn.Module, step: int) -> None:
        if not checkpoint.all_finite(network.state_dict()):
            self._diverged(step, "the weights are NaN or infinite")

    def _diverged(self, step: int, what: str) -> NoReturn:
        raise RunFailed(
            f"the training diverged before step {step:,}: {what}; the last good losses: {self._good_losses}"
        )

    def _write_status(self, state: str) -> None:
        self.state, self._status_written = state, time.monotonic()
        self.folder.write_status(state, self.step, self.total, self.progress.speed(), self._saved)

    def _leave(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """However the run ends, what was logged reaches the disk, and status.json no longer says running."""
        # On a full disk TensorBoard's writer would wait for ever.
        if self.writer and not (isinstance(error, OSError) and error.errno in DISK_FULL):
            with contextlib.suppress(RunFailed, OSError):
                self.folder.require_ours()  # TensorBoard would make its file anew, in another process's run
                self.writer.close()
        if self.state == "running":
            with contextlib.suppress(RunFailed, OSError):
                self._write_status("stopped" if isinstance(error, Stopped) else "failed")
        if self._mirrored:
            import wandb

            wandb.finish(exit_code=1 if error else 0)  # the next run of this process is another one there
        if error:
            if self.progress:
                self.progress.close()
            for thing in self.things.values():
                if close := getattr(thing, "close", None):
                    close()
        self.folder.unlock()

    # -- end ------------------------------------------------------------------------------------------

    def finish(
        self,
        network: nn.Module,
        memory: Memory,
        evaluate: Callable[..., Iterator[float]],
    ) -> None:
        """Measure once more, evaluate, write `activations.npz`, then `model.pt`, and delete the checkpoints.

        Args:
            memory: as for `measure`.
            evaluate: (network, args, games, video folder) -> each game's score.
        """
        self.progress.close()
        self._require_finite(network, self.total)
        if self._saved != self.total:
            self._save(self.total)
        # From here on a signal need not wait for a checkpoint: there is one.
        self._stops_at_once = True
        if self.signum:
            self._stop()
        self.step = self.total
        sample, representation = {}, {}
        if self.args.metrics_frequency:
            was_logged = self._due(self.args.metrics_frequency, self.total)
            writer = None if was_logged else self.writer
            sample, representation = self._measure(self.total, network, memory, writer)
        video_folder = self.folder.path if self.args.capture_video else None
        scores = evaluate(network, self.args, self.args.eval_episodes, video_folder)
        for game, score in enumerate(scores):
            self.folder.require_ours()
            self.writer.add_scalar("eval/episodic_return", score, game)
            print_line(f"evaluation game {game}: {score:g}")
        self.folder.require_ours()
        self.writer.close()
        self.folder.sync_events()
        if sample:
            arrays = {name: part.cpu().numpy() for name, part in sample.items()}
            replace(
                self.folder.path / "activations.npz",
                lambda file: np.savez_compressed(file, allow_pickle=False, **arrays),
            )
        self._write_weights("model.pt")
        self._stops_at_once = False  # it has finished: nothing is left to stop
        self._write_status("finished")
        self.checkpoints.delete(keep=set())
        self._print_summary(representation)

    def _print_summary(self, representation: dict[str, float]) -> None:
        """How it went, and where to look."""
        games = "no game has ended"
        if self.returns:
            games = f"{np.mean(self.returns):.2f} over the last {len(self.returns)} games"
        print_line(f"finished {self.folder.path}")
        print_line(f"  return          {games}")
        if representation:
            print_line(f"  neurons dead    {representation['dead_neurons']:.1%} by the paper's count (KDE)")
            print_line(f"  constant        {representation['std_dead_neurons']:.1%} (standard deviation below 0.001)")
            layer = max(self.layers, key=lambda name: self.layers[name]["constant"])  # the lowest of several
            if self.layers[layer]["constant"] > self.layers["z"]["constant"]:
                print_line(f"  most constant   {self.layers[layer]['constant']:.1%} of {layer}")
            print_line(f"  effective rank  {representation['effective_rank']:.0f}")
        else:
            print_line("  not measured    no --metrics-frequency, or fewer observations than --metrics-samples")
        runs_dir = shlex.quote(str(self.folder.path.parent))
        tensorboard = shlex.quote(str(Path(sys.executable).parent / "tensorboard"))
        print_line(f"  TensorBoard     {tensorboard} --logdir {runs_dir}")


# ------------------------------------------------------------------------------------------- measurements


def measure_network(network: nn.Module, observations: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """z with its factors, {name: (n, width)}, and `metrics.layer_metrics` of every module in `network.measured`."""
    representation = [name for name in network.measured if name == "z" or name.startswith("z_")]
    return metrics.record_and_measure(network, network.measured, observations, CHUNK, keep=representation)


def measure_representation(
    sample: dict[str, Tensor], threshold: float, seed: tuple[int, int]
) -> tuple[dict[str, float], Tensor]:
    """What is logged about the representation.

    Args:
        sample: z and its factors, as `measure_network` gives them.
        threshold: omega of `metrics.dead_neurons`.
        seed: (run's seed, agent step): the jitter depends on nothing else.

    Returns:
        `metrics.representation_metrics`, and the peak density of each neuron of z.
    """
    z = sample["z"]
    noise_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator(z.device).manual_seed(noise_seed)
    peaks = metrics.kde_peak_density(z, generator=generator)
    factors = {name: factor for name, factor in sample.items() if name != "z"}
    return metrics.representation_metrics(z, factors, threshold, generator, peaks), peaks
