"""Deep modules are traced with four blocks, and their graphs compute what the modules do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from vlm_export.exporting import backends, repeated_blocks
from vlm_export.exporting.backends import export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph
from vlm_export.family import Model, Part
from vlm_export.specs.signature import Axis, Signature, TensorSpec

DATA = Path(__file__).parent.parent / "data"
DEPTH = 6
NUMBER = re.compile(r"\.(\d+)\.")
PARTS = [
    ("clip/vit_p14/state_dict_fp32.pt", "vision"),
    ("blip/caption", "text_decoder"),
    ("blip/vqa", "vqa_encoder"),
    ("minicpmv/v2_6", "vision"),
    ("nanovlm/222m", "decoder"),
]
MORE = [
    ("clip/vit_p14/state_dict_fp32.pt", "text"),
    ("blip/caption", "vision"),
    ("blip/caption", "cross_key_values"),
    ("blip/retrieval", "multimodal_text"),
    ("minicpmv/omnilmm", "vision"),
    ("minicpmv/v4_5", "vision"),
    ("nanovlm/222m", "vision_encoder"),
]


def with_depth(part: Part, depth: int) -> Part:
    """The part with as many blocks in each list of alike ones, and with the inputs and outputs of each."""
    module = copy.deepcopy(part.module)
    before = 0
    for path, blocks in list(module.named_modules()):
        if isinstance(blocks, nn.ModuleList) and len({str(block) for block in blocks}) == 1:
            before = len(blocks)
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, nn.ModuleList(_more_blocks(blocks, depth)))
    assert before

    def numbered(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Keys and values of a layer stay beside each other."""
        found: list[TensorSpec] = []
        for prefix, group in groupby(tensors, lambda tensor: tensor.name.partition(".")[0]):
            own = list(group)
            first = [tensor for tensor in own if tensor.name.startswith(f"{prefix}.0.")]
            found += [
                replace(tensor, name=NUMBER.sub(f".{number}.", tensor.name))
                for number in range(depth)
                for tensor in first
            ] or own
        return tuple(found)

    inputs, outputs = numbered(part.signature.inputs), numbered(part.signature.outputs)
    signature = replace(part.signature, inputs=inputs, outputs=outputs)

    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
        made = dict(part.examples(sizes, seed))
        for name in signature.input_names:
            if name not in made:
                match = NUMBER.search(name)
                assert match is not None
                made[name] = made[NUMBER.sub(f".{int(match[1]) % before}.", name)] + np.float32(0.1)
        return {name: made[name] for name in signature.input_names}

    return replace(part, module=module, signature=signature, examples=examples)


def _more_blocks(blocks: nn.ModuleList, depth: int) -> Iterator[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    for number in range(depth):
        block = copy.deepcopy(blocks[number % len(blocks)])
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
        yield block


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of blocks of each module that the back end traces."""
    found: list[int] = []
    trace = backends._trace_dynamo

    def noted(part: Part, opset: int) -> ir.Model:
        lists = [module for module in part.module.modules() if isinstance(module, nn.ModuleList)]
        found.append(max(map(len, lists)))
        return trace(part, opset)

    monkeypatch.setattr(backends, "_trace_dynamo", noted)
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [*PARTS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)],
    ids=lambda value: str(value).replace("/", "-"),
)
def test_graph_computes_what_the_module_does(
    source: str, name: str, build_model: Callable[..., Model], traced: list[int], tmp_path: Path
) -> None:
    path = DATA / source
    path = next(path.glob("*.pth"), path) if path.is_dir() else path
    part = with_depth(next(part for part in build_model(path).parts if part.name == name), DEPTH)
    raw = export_part(part, 18, "dynamo")
    assert traced == [repeated_blocks.TRACED]
    graph = finish_graph(simplify_graph(raw), part.signature)
    ir.save(graph, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    for seed, size in ((0, 3), (1, 5)):
        sizes = {
            axis.name: axis.multiple_of * min(size + place, axis.maximum or size + place)
            for place, axis in enumerate(part.signature.axes)
            if not axis.sum_of
        }
        inputs = part.examples(part.signature.related(sizes), seed)
        with torch.no_grad():
            expected = part.module(*(torch.from_numpy(np.asarray(array)) for array in inputs.values()))
        rows = expected if isinstance(expected, tuple) else (expected,)
        got = session.run(list(part.signature.output_names), dict(inputs))
        flat = [tensor for row in rows for tensor in (row if isinstance(row, tuple | list) else (row,))]
        for one, other in zip(flat, got, strict=True):
            # Random caches amplify rounding; another block's weights differ by a tenth.
            np.testing.assert_allclose(other, one.numpy(), rtol=0, atol=1e-3 * float(one.abs().max()))


class _Block(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.scale * self.linear(x)
        return made


class _Stack(nn.Module):
    """Blocks of which one in the middle is used otherwise."""

    def __init__(self, scales: Sequence[float], odd: int | None = None) -> None:
        super().__init__()
        self.odd = odd
        self.blocks = nn.ModuleList(_Block(scale) for scale in scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x).abs() if number == self.odd else block(x)
        return x


class _Twins(nn.Module):
    """Goes through two lists together, of which one has blocks that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(7))
        self.twins = nn.ModuleList(_Block(float(number)) for number in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, twin in zip(self.blocks, self.twins, strict=True):
            x = twin(block(x))
        return x


class _Counted(_Stack):
    """Knows how many blocks it has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(7):
            x = self.blocks[number](x)
        return x


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (_Stack([1.0] * 7), [4]),
        (_Stack([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0]), [7]),
        (_Stack([1.0] * 7, odd=2), [4, 7]),
        (_Stack([1.0] * 4), [4]),
        (_Twins(), [7]),
        (_Counted([1.0] * 7), [4, 7]),
    ],
    ids=[
        "alike",
        "a block with another constant",
        "a block that is used otherwise",
        "few blocks",
        "another list",
        "a number",
    ],
)
def test_what_is_no_repetition_is_traced_whole(module: nn.Module, expected: list[int], traced: list[int]) -> None:
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),), (Axis("batch"),)
    )

    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
        return {"x": np.random.default_rng(seed).normal(size=(sizes["batch"], 4)).astype(np.float32)}

    part = Part("stack", module.eval(), signature, examples)
    graph = export_part(part, 18, "dynamo")
    assert traced == expected
    weights = {name for name in graph.graph.initializers if name.endswith("weight")}
    assert weights == {name for name in module.state_dict() if name.endswith("weight")}
