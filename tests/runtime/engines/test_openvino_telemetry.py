"""OpenVINO reports no use to anybody when it runs for this project."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The environment without torch lacks OpenVINO too.
pytestmark = pytest.mark.needs_torch
SCRIPT = """
import sys
from vlm_export.runtime.engines.openvino import computes_in_bf16
computes_in_bf16()
assert "openvino" in sys.modules
print(sys.modules["openvino_telemetry"], "openvino.tools.ovc.telemetry_stub" in sys.modules)
"""


def test_its_telemetry_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "None True\n"
