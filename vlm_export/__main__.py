"""`python -m vlm_export`: the command line."""

from __future__ import annotations

from vlm_export.cli.main import console

if __name__ == "__main__":
    console()
