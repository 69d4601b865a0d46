"""What the side experiments share: the look of a figure, and files under --out-dir."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from lan_utils import cli
from lan_utils.cli import BadInput
from lan_utils.study import ROOT
from plots import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOOK = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
plt.style.use(("default", LOOK))  # matplotlib's defaults first, whatever the user's matplotlibrc says


@dataclass
class Args:
    out_dir: Path = ROOT / "results"
    """folder for the recorded numbers, with the figures in figures/"""


def launch(main: Callable[[Path], None], doc: str) -> None:
    """`cli.launch` of `main(out_dir)`; the folder is made first."""

    def draw(args: Args) -> None:
        try:
            (args.out_dir / "figures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out-dir {args.out_dir}: {error.strerror}; name another folder") from None
        main(args.out_dir)

    Args.__doc__ = doc.split("\n")[0]
    cli.launch(draw, Args)


def write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file}")


def save(figure: plt.Figure, out_dir: Path, name: str) -> None:
    """Write out_dir/figures/<name>.png and say so."""
    file = out_dir / "figures" / f"{name}.png"
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    # 256 colours are a third of the bytes, and nobody sees the difference.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"wrote {file}")
