"""Writes docs/images/accuracy-latency.svg: what variants of a demo lose against their time, by `vlm-export bench`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import vlm_export
from vlm_export.cli.main import main as vlm_export_command
from vlm_export.precision.recipes import QUANTISED

PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "accuracy-latency.svg"
COMMAND = ["bench", "out/clip-demo", "--part", "vision", "--batch", "8", "--threads", "1", "--rounds", "15"]


def main() -> int:
    """Exports the demo, quantises it to every precision, and runs the command with the plot."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        vlm_export.export("clip-demo", "out/clip-demo", precisions=("fp32", "fp16"), threads=1)
        for precision in QUANTISED:
            vlm_export.quantize("out/clip-demo", precision, threads=1)
        status = vlm_export_command([*COMMAND, "--plot", str(PLOT)])
        os.chdir(PLOT.parent)
    return status


if __name__ == "__main__":
    sys.exit(main())
