"""Run folders -> figures and tables. A picture is a file: where it is drawn must not change or prevent it."""

import contextlib
import os
import sys

# The import fails where MPLBACKEND names a backend that is not installed here, such as a notebook's.
_backend = "" if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", "")
import matplotlib  # noqa: E402

if _backend:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
