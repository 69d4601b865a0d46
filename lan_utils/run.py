"""One training run: its flags, how it resumes, what it logs, how it stops and ends."""

import atexit
import contextlib
import ctypes
import dataclasses
import io
import json
import os
import random
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import metrics
from lan_utils import checkpoint
from lan_utils.atari import ended_games
from lan_utils.checks import free_memory, refuse_unless
from lan_utils.cli import STOP_SIGNALS, BadInput, Progress, RunFailed, Stopped, print_line, warn
from lan_utils.folder import RunFolder, describe
from lan_utils.machine import usable_cores
from lan_utils.study import RunName

LOG_FREQUENCY = 1000  # agent steps between two points of losses and charts
STATUS_SECONDS = 5  # at least, between two writings of status.json
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(kw_only=True)
class RunArgs(RunName):
    """The flags that every training script has."""

    metrics_frequency: int = 10_000
    """agent steps between two measurements of the representation; 0 for none"""
    metrics_samples: int = 2048
    """observations per measurement; at least the representation's width"""
    dead_threshold: float = 20.0
    """omega: from this peak density on a neuron is dead (Appendix B.1)"""
    eval_episodes: int = 0
    """games played after training; their scores are logged"""
    capture_video: bool = False
    """film the evaluation as mp4 into the run folder"""
    checkpoint_frequency: int = 50_000
    """agent steps between two checkpoints; 0 for none but on a signal and at the end"""
    overwrite: bool = False
    """delete what the run folder holds of an earlier run and start anew"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project_name: str = "latent-assistance-networks"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    cuda: bool = True
    """use CUDA where there is one"""
    torch_deterministic: bool = True
    """deterministic kernels: the same seed gives the same weights"""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice, within what a container allows"""
    tf32: bool = False
    """TensorFloat-32 on CUDA: faster, rounds differently"""
    amp: bool = False
    """bfloat16 up to the representation: for hardware that is faster at it, rounds differently"""
    compile: bool = False
    """torch.compile the loss: faster, rounds differently"""


def set_up(args: RunArgs) -> tuple[torch.device, np.random.Generator]:
    """Set torch's threads, kernels and rounding as the flags say, and seed python, numpy and torch.

    Returns:
        The device, and the generator of everything that the script itself draws.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # By default glibc gives an update's tensors back to the system and faults their pages in again for the next.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())  # torch does not know a container's quota
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


class Run:
    """One run's folder, from the lock to `model.pt`. Nothing is written before `resume`.

    Args:
        algorithm: "dqn" or "ppo".
        args: the flags.
        device: that the networks are on.
        rng: the generator of everything that the script itself draws.
        memory_needed: bytes, for the header.
        stride: agent steps between two turns of the training loop.
    """

    writer: SummaryWriter
    progress: Progress

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
        self.signum = 0  # the signal that asked the run to stop
        self._signalled_at = 0.0
        self._saved: int | None = None  # agent step of the newest checkpoint
        self._stops_at_once = False  # does a signal stop the run without waiting for a checkpoint?
        self._good_losses = "none was logged"
        self._status_written = 0.0

    # -- start ----------------------------------------------------------------------------------------

    def resume(self, **things: Any) -> None:
        """Claim the folder, and continue from its newest whole checkpoint where it has one.

        Args:
            things: everything that a resumed run needs, the network first. Each has `state_dict()` and
                `load_state_dict()`; one whose `state_dict` is None makes a run without checkpoints.

        Raises:
            BadInput: other flags than the run had, another process at work in it, no checkpoint whole, points but no
                checkpoint, not a run's folder.
            SystemExit: 0, the run has finished.
        """
        self.things = things
        network = next(iter(things.values()))
        parameters = sum(weight.numel() for weight in network.parameters())
        config = describe(self.algorithm, self.args, self.device, parameters)
        old = self.folder.claim()
        if old is not None:
            self._load()
        if old:
            self.folder.record_changes(old, config, self.step)
        else:
            self.folder.write_config(config)
        if self.args.track:
            self._mirror(config)
        self.writer = SummaryWriter(str(self.folder.path), purge_step=self.step + 1 if self.step else None)
        atexit.register(self._close)
        for signum in STOP_SIGNALS:
            # `nohup` ignores SIGHUP. What bash starts with & ignores SIGINT, although nobody asked for that.
            if signum in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._on_signal)
        self.progress = Progress(self.total, self.step)
        self._write_status("running")
        self._print_header(config)

    def _load(self) -> None:
        """Restore the newest whole checkpoint, and cut the event files back to it.

        Raises:
            BadInput: there are checkpoints and none is whole, one is another run's, or they are gone.
        """
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
                checkpoint.restore_random_states(state["random"], self.rng, self.device)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
                what = str(error).split("\n", 1)[0][:160]
                warn(f"{file} is no checkpoint of this script: {what}; trying the checkpoint before it")
                del self.checkpoints.parts[state["step"]]
                continue
            self.returns.extend(returns)
            self.step = self._saved = state["step"]
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
        except Exception as error:  # no network, no such entity: only its server knows
            reason = str(error).split("\n", 1)[0]
            raise RunFailed(f"--track: Weights & Biases says: {reason}; mend that, or start without --track") from None

    def _print_header(self, config: dict[str, Any]) -> None:
        """What is about to happen, before the first step."""
        hardware = config["hardware"] + (f", {config['threads']} threads" if self.device.type == "cpu" else "")
        memory = f"{self.memory_needed / 1e9:.1f} GB needed, {free_memory() / 1e9:.1f} GB free"
        print_line(f"{self.algorithm.upper()}, {self.args.activation}, on {self.args.env_id}, seed {self.args.seed}")
        print_line(f"  run folder  {self.folder.path}")
        print_line(f"  device      {self.device} ({hardware})")
        print_line(f"  size        {config['parameters']:,} parameters, {memory}")
        print_line(f"  agent steps {self.total:,}" + (f", resumed at {self.step:,}" if self.step else ""))

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self.signum:
            self.signum, self._signalled_at = signum, time.monotonic()
        # Launchers may send one signal twice, and the kernel sends SIGXCPU every second.
        elif signum in (signal.SIGINT, signal.SIGTERM) and time.monotonic() - self._signalled_at > 1:
            os._exit(128 + signum)
        if self._stops_at_once:
            self._stop()

    # -- every turn of the training loop --------------------------------------------------------------

    def _due(self, frequency: int, step: int) -> bool:
        """Did this turn, which ends at `step`, reach or pass a multiple of `frequency`?"""
        return frequency > 0 and step // frequency > (step - self.stride) // frequency

    def log_games(self, step: int, info: dict) -> None:
        """Log the games that `info` says have ended; of several side by side, environment i's at `step` + i."""
        games = ended_games(info)
        if games:
            self.folder.require_ours()
        for i, (score, length) in games.items():
            self.returns.append(score)
            self.writer.add_scalar("charts/episodic_return", score, step + i)
            self.writer.add_scalar("charts/episodic_length", length, step + i)

    def log(self, step: int, network: nn.Module, losses: dict[str, Tensor], **charts: float) -> None:
        """Log losses and charts every 1,000 agent steps: what is waited for here need not be waited for elsewhere.

        Raises:
            RunFailed: a loss or a weight is NaN or infinite.
        """
        if not self._due(LOG_FREQUENCY, step):
            if self.stride > 1:
                self._require_finite(network, step)  # nothing could be sampled from a policy of NaN
            return
        last_games = f"{np.mean(self.returns):.2f}" if self.returns else "none yet"
        self.progress.update(step, last_100_games=last_games)
        values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True)) if losses else {}
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

    def measure(self, step: int, network: nn.Module, observations: Callable[[int], Tensor | None]) -> None:
        """Log what `metrics` says of the network's representation, when it is due.

        Args:
            observations: gives the sample at an agent step, uint8 (n, 4, 84, 84); None where there is none yet.
        """
        if self._due(self.args.metrics_frequency, step):
            self._measure(step, network, observations, self.writer)

    def _measure(
        self,
        step: int,
        network: nn.Module,
        observations: Callable[[int], Tensor | None],
        writer: SummaryWriter | None,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        sample = observations(step)
        if sample is None:
            return {}, {}
        self._require_finite(network, step)
        activations = metrics.activations(network, sample)
        self.folder.require_ours()
        seed = (self.args.seed, step)
        return activations, metrics.log_representation(writer, activations, self.args.dead_threshold, seed, step)

    def save(self, step: int) -> None:
        """Write a checkpoint when it is due, and stop where a signal asked for it."""
        if self.signum or self._due(self.args.checkpoint_frequency, step):
            self._save(step)
            if self.signum:
                self._stop()

    def _save(self, step: int) -> None:
        if not all(thing.state_dict for thing in self.things.values()):
            return
        self.folder.require_ours()
        self.writer.flush()
        things = {name: thing.state_dict() for name, thing in self.things.items()}
        if not checkpoint.all_finite(things):
            self._diverged(step, "the state holds NaN or infinity, no checkpoint of it was written")
        state = {
            "run": {"algorithm": self.algorithm, "args": json.loads(json.dumps(dataclasses.asdict(self.args)))},
            "step": step,
            "returns": list(self.returns),
            "random": checkpoint.random_states(self.rng, self.device),
            "events": self.folder.sync_events(),
            "things": things,
        }
        self.checkpoints.save(step, state)
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

    def _close(self) -> None:
        """However the process ends: what was logged reaches the disk, and a run that goes on no more says so."""
        with contextlib.suppress(RunFailed, OSError):
            self.folder.require_ours()  # TensorBoard would make its file anew, in another process's run
            self.writer.close()
        if self.state == "running":
            with contextlib.suppress(RunFailed, OSError):
                self._write_status("failed")

    # -- end ------------------------------------------------------------------------------------------

    def finish(
        self,
        network: nn.Module,
        observations: Callable[[int], Tensor | None],
        evaluate: Callable[..., Iterator[float]],
    ) -> None:
        """Measure once more, evaluate, write `activations.npz`, then `model.pt`; the checkpoints are not needed then.

        Args:
            observations: as for `measure`.
            evaluate: (network, env_id, seed, games, video folder) -> each game's score.
        """
        self.progress.close()
        self._require_finite(network, self.total)
        if self._saved != self.total:
            self._save(self.total)
        # From here on a signal does not wait for a checkpoint: there is one.
        self._stops_at_once = True
        if self.signum:
            self._stop()
        self.step = self.total
        sample, representation = {}, {}
        if self.args.metrics_frequency:
            was_logged = self._due(self.args.metrics_frequency, self.total)
            writer = None if was_logged else self.writer
            sample, representation = self._measure(self.total, network, observations, writer)
        video_folder = self.folder.path if self.args.capture_video else None
        scores = evaluate(network, self.args.env_id, self.args.seed, self.args.eval_episodes, video_folder)
        for game, score in enumerate(scores):
            self.folder.require_ours()
            self.writer.add_scalar("eval/episodic_return", score, game)
            print_line(f"evaluation game {game}: {score:g}")
        self.folder.require_ours()
        self.writer.close()
        self.folder.sync_events()
        if sample:
            arrays = {name: part.cpu().numpy() for name, part in sample.items()}
            checkpoint.replace(
                self.folder.path / "activations.npz",
                lambda file: np.savez_compressed(file, allow_pickle=False, **arrays),
            )
        buffer = io.BytesIO()  # torch.save would hide a full disk's error behind its own
        torch.save({name: weight.cpu() for name, weight in network.state_dict().items()}, buffer)
        checkpoint.replace(self.folder.path / "model.pt", lambda file: file.write(buffer.getbuffer()))
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)  # it has finished: nothing is left to stop
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
            print_line(f"  effective rank  {representation['effective_rank']:.0f}")
        else:
            print_line("  not measured    no --metrics-frequency, or fewer observations than --metrics-samples")
        runs_dir = shlex.quote(str(self.folder.path.parent))
        print_line(f"  TensorBoard     {Path(sys.executable).parent / 'tensorboard'} --logdir {runs_dir}")
