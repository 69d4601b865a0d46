"""The flags that every training script has, and the defaults that each script gives them. No torch."""

import ast
import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt


@dataclass(kw_only=True)
class RunArgs:
    """A script's own `Args` gives the first five their defaults; this is their order in --help."""

    env_id: str
    activation: str
    seed: int
    exp_name: str
    total_timesteps: int
    runs_dir: str = "runs"
    """folder that holds the run folders"""
    metrics_frequency: Annotated[int, Ge(0)] = 10_000
    """agent steps between two measurements of the network; 0: never"""
    metrics_samples: int = 2048
    """observations per measurement; at least the width of z"""
    dead_threshold: Annotated[float, Gt(0)] = 20.0
    """omega: a neuron whose peak density reaches it is dead (Appendix B.1)"""
    eval_episodes: Annotated[int, Ge(0)] = 0
    """games played after training; their scores are logged"""
    capture_video: bool = False
    """film the evaluation as mp4 into the run folder; needs --eval-episodes"""
    checkpoint_frequency: Annotated[int, Ge(0)] = 50_000
    """agent steps between two checkpoints; 0: only on a signal and at the end"""
    keep_weights: Annotated[int, Ge(0)] = 0
    """agent steps between two copies of the weights to keep, weights_<step>.pt; 0: none"""
    overwrite: bool = False
    """delete what an earlier run left in the run folder, and start anew"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases"""
    wandb_project_name: str = "latent-assistance-networks"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases user or team"""
    cuda: bool = True
    """use CUDA if there is a GPU"""
    torch_deterministic: bool = True
    """deterministic kernels: the same seed gives the same weights"""
    num_threads: Annotated[int, Ge(0)] = 0
    """CPU threads of torch; 0: torch's own choice, within what a container allows"""
    tf32: bool = False
    """TensorFloat-32 on CUDA; rounds differently; its speed was not measured"""
    amp: bool = False
    """bfloat16 up to the representation: for hardware on which it is faster; rounds differently"""
    compile: bool = False
    """torch.compile the loss; rounds differently; time it before a long run (docs/speed.md)"""


def defaults_of(script: Path) -> dict[str, Any]:
    """The plain defaults of a training script's flags, read from its source: importing it would import torch.

    Returns:
        {} if the script has no class `Args`.
    """
    tree = ast.parse(script.read_text())
    for args in [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]:
        fields = dataclasses.fields(RunArgs)
        defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        for flag in [node for node in args.body if isinstance(node, ast.AnnAssign) and node.value]:
            with contextlib.suppress(ValueError):  # computed when the script runs
                defaults[flag.target.id] = ast.literal_eval(flag.value)
        return defaults
    return {}
