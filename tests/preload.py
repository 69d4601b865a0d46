"""What the process has imported from which the tests fork (see forked.py)."""

import test_run  # noqa: F401 (and with it both scripts, pytest, TensorBoard)
import torch

import plot_results  # noqa: F401 (and with it pandas and matplotlib)

torch.use_deterministic_algorithms(True)  # imports torch's compiler, as every training does
torch.use_deterministic_algorithms(False)
