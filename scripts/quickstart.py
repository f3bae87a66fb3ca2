"""The main job, offline, on a machine that has Python and pip only: `python3 scripts/quickstart.py`.

Exports the demo checkpoint with PyTorch in one environment, then uses the bundle in another that has no PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bootstrap import ROOT, SetupError, ensure_environment, run

EXPORT_ENVIRONMENT = ROOT / ".venv"
RUNTIME_ENVIRONMENT = ROOT / ".venv-runtime"
IMAGES = Path("configs", "demo", "images")
LABELS = ("red circle", "blue circle", "red square", "blue square")
QUERY = "two green triangles"
_NO_TORCH = "import importlib.util as u; print('PyTorch here:', 'yes' if u.find_spec('torch') else 'no')"


def main(arguments: list[str] | None = None) -> int:
    """Sets up both environments and runs the job; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", default="out/quickstart", help="folder for the bundle and the embeddings (default: %(default)s)"
    )
    parser.add_argument("--installer", choices=("auto", "uv", "pip"), default="auto", help="what makes environments")
    args = parser.parse_args(arguments)
    try:
        export_python = ensure_environment(EXPORT_ENVIRONMENT, ("export", "parquet"), args.installer)
        runtime_python = ensure_environment(RUNTIME_ENVIRONMENT, (), args.installer)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run_job(export_python, runtime_python, Path(args.output))


def run_job(export_python: Path, runtime_python: Path, output: Path) -> int:
    """Exports the demo, then classifies and searches its images; stops at the first failure."""
    bundle = output / "clip-demo"
    (ROOT / output).mkdir(parents=True, exist_ok=True)
    print("\n1. The demo checkpoint becomes a verified bundle (needs PyTorch):")
    status = _vlm_export(export_python, "export", "clip-demo", "-o", bundle, "--overwrite")
    return status or use_bundle(runtime_python, bundle, output / "images.npy")


def use_bundle(runtime_python: Path, bundle: Path, embeddings: Path) -> int:
    """Verifies the bundle, classifies an image with it and searches the demo's images, without PyTorch."""
    image = next(iter(sorted((ROOT / IMAGES).iterdir()))).relative_to(ROOT)
    print("\n2. The bundle is used where there is no PyTorch:")
    steps = (
        ("verify", bundle),
        ("classify", bundle, image, *LABELS),
        ("embed", bundle, IMAGES, "-o", embeddings, "--overwrite"),
        ("search", bundle, embeddings, QUERY, "-k", "3"),
    )
    status = run([runtime_python, "-c", _NO_TORCH], show='python -c "import importlib.util …  # is PyTorch here?"')
    for step in steps:
        status = status or _vlm_export(runtime_python, *step)
    return status


def _vlm_export(python: Path, *arguments: str | Path) -> int:
    shown = " ".join(f'"{part}"' if " " in str(part) else str(part) for part in arguments)
    return run([python, "-m", "vlm_export.cli.main", *arguments], show=f"vlm-export {shown}")


if __name__ == "__main__":
    sys.exit(main())
