"""The export stage holds no copy of the weights: its anonymous memory does not grow with the model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

# Exports a vision part whose fp32 weights are far larger than what an export may take beyond them.
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from vlm_export.checkpoint.random import random_checkpoint
from vlm_export.checkpoint.store import ScratchStore
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph
from vlm_export.exporting.finishing import write_graph
from vlm_export.models.clip.family import ClipFamily

folder, exporter, opset, half = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "half"


def architecture(width, layers):
    tower = {"width": width, "layers": layers, "heads": width // 64, "hidden": 4 * width}
    return {
        "key_names": "openai", "embed_dim": 64, "activation": "quick_gelu", "eps": 1e-5,
        "vision": {"kind": "vit", "patch_size": 16, "image_size": 32, **tower},
        "text": {"width": 64, "layers": 1, "heads": 1, "hidden": 256, "context_length": 8, "vocab_size": 64,
                 "pooling": "argmax", "end_token_id": 63},
    }


def run(name, width, layers):
    tensors = ClipFamily().published_tensors(architecture(width, layers))
    if not half:
        tensors = {key: type(info)(info.shape, "float32") for key, info in tensors.items()}
    checkpoint = random_checkpoint(name, tensors, 0, folder / f"{name}.safetensors")
    with ScratchStore(folder / f"{name}.bin") as store:
        part = ClipFamily().build(checkpoint, store).parts[0]
        raw = export_part(part, opset, exporter)
        graph = finish_graph(simplify_graph(raw), part.signature)
        write_graph(graph, folder / f"{name}.onnx", 1 << 20)
    return sum(tensor.nbytes for tensor in part.module.state_dict().values())


# What torch imports and allocates at its first export is no matter of the model's size.
run("small", 64, 1)
print("ready", flush=True)
sys.stdin.readline()
print(run("large", 1024, 2), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize(("exporter", "opset", "stored"), [("dynamo", 18, "half"), ("torchscript", 17, "full")])
def test_peak_memory_does_not_follow_the_weights(tmp_path: Path, exporter: str, opset: int, stored: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), exporter, str(opset), stored]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        baseline = _anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        # From outside, because the back ends hold the interpreter's lock in their longest steps.
        peak = baseline
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(0.002)
        size = int(process.stdout.read())
    assert process.returncode == 0
    assert size > 95 << 20
    growth = peak - baseline
    assert growth < 0.6 * size, f"{growth >> 20} MiB more for {size >> 20} MiB of weights"


# Exports a known tiny model and prints the most anonymous memory that any stage took.
WHOLE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vlm_export.exporting.options import ExportOptions
from vlm_export.exporting.pipeline import export_bundle
from vlm_export.exporting.stages import Stages
from vlm_export.family import BuildOptions

exporter, opset, with_texts = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "texts"
options = ExportOptions(
    opset=opset, exporter=exporter, threads=1, build=BuildOptions(dynamic_image_size=True),
    with_preprocessing=with_texts,
    parts=() if with_texts else ("vision",), with_tokenizer=with_texts, precisions=("fp32", "fp16"),
)
stages = Stages()
export_bundle("clip-demo", Path(sys.argv[1]) / "bundle", options, stages)
print(max(record.peak_anonymous_bytes for record in stages.records))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize(
    ("exporter", "opset", "kind"),
    [("dynamo", 18, "texts"), ("torchscript", 17, "texts"), ("torchscript", 17, "vision")],
)
def test_a_tiny_model_with_image_sizes_as_axes_is_verified_in_less_than_a_gibibyte(
    tmp_path: Path, exporter: str, opset: int, kind: str
) -> None:
    command = [sys.executable, "-c", WHOLE, str(tmp_path), exporter, str(opset), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1 << 30


def _anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
