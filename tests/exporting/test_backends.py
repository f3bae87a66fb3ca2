"""The back ends: which one is chosen, what they leave behind, and what their graphs hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_export.errors import EnvironmentFailure, UsageError, VerificationError
from vlm_export.exporting.backends import Exporter, choose_exporter, export_part
from vlm_export.exporting.finishing import finish_graph, simplify_graph, write_graph
from vlm_export.family import Array, Model, Part
from vlm_export.specs.signature import Axis, Signature, TensorSpec

EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)
OPSETS: dict[Exporter, int] = {"dynamo": 18, "torchscript": 17}
ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture(scope="module")
def text_part(oracle_model: Callable[[str], Model]) -> Part:
    return oracle_model("vit_p14/state_dict_fp16.pt").parts[1]


@pytest.mark.parametrize(
    ("opset", "exporter", "chosen"),
    [
        (11, None, "torchscript"),
        (17, None, "torchscript"),
        (18, None, "dynamo"),
        (23, None, "dynamo"),
        (18, "torchscript", "torchscript"),
        (20, "torchscript", "torchscript"),
        (20, "dynamo", "dynamo"),
    ],
)
def test_opset_chooses_the_back_end(opset: int, exporter: Exporter | None, chosen: Exporter) -> None:
    assert choose_exporter(opset, exporter) == chosen


@pytest.mark.parametrize(
    ("opset", "exporter", "expected"),
    [
        (10, None, "11 to 23"),
        (24, None, "11 to 23"),
        (17, "dynamo", "18 to 23"),
        (21, "torchscript", "11 to 20"),
        (10, "torchscript", "11 to 20"),
    ],
)
def test_opset_out_of_reach(opset: int, exporter: Exporter | None, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_exporter(opset, exporter)
    assert (caught.value.exit_status, caught.value.expected, caught.value.got) == (2, expected, str(opset))
    assert "--opset" in caught.value.fix


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_export_changes_neither_torch_nor_the_module(text_part: Part, exporter: Exporter) -> None:
    before = {name: tensor.clone() for name, tensor in text_part.module.state_dict().items()}
    raw = export_part(text_part, OPSETS[exporter], exporter)
    assert F.scaled_dot_product_attention is ORIGINAL
    assert not any(module.training for module in text_part.module.modules())
    assert torch.is_grad_enabled()
    for name, tensor in text_part.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    _check_shared_weights(raw, text_part)


def _check_shared_weights(model: Any, part: Part) -> None:
    """Large initializers are the module's own memory, which is a mapped file: exporting copies none of it."""
    own = [tensor.numpy() for tensor in part.module.state_dict().values()]
    large = [v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes > 4096]
    assert sum(tensor.nbytes for tensor in large) > 100_000
    for tensor in large:
        values = tensor.numpy()
        # The causal mask is the only constant that no checkpoint supplies.
        assert any(np.shares_memory(values, weight) for weight in own) or np.isinf(values).any(), tensor.name


class _Failing(nn.Module):
    """Raises while it is traced; notes what attention was then."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.seen: list[object] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.seen.append(F.scaled_dot_product_attention)
        raise self.error


def _broken_part(module: nn.Module) -> Part:
    def examples(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
        return {"pixel_values": np.zeros((sizes["batch"], 3), np.float32)}

    signature = Signature(
        (TensorSpec("pixel_values", "float32", ("batch", 3)),),
        (TensorSpec("image_embeds", "float32", ("batch", 3)),),
        (Axis("batch"),),
    )
    return Part("broken", module.eval(), signature, examples)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_failing_back_end_is_named_and_lowerings_are_undone(exporter: Exporter) -> None:
    with pytest.raises(EnvironmentFailure) as caught:
        export_part(_broken_part(_Failing(ValueError("no such thing\nand more"))), OPSETS[exporter], exporter)
    error = caught.value
    assert error.exit_status == 4
    assert error.what == f"the {exporter} back end failed on part broken"
    assert f"opset {OPSETS[exporter]}" in error.where
    assert "--exporter" in error.fix
    assert "\n" not in error.got
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_interrupt_in_a_back_end_undoes_lowerings(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def interrupt(*_: object, **__: object) -> None:
        seen.append(F.scaled_dot_product_attention)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_part(_broken_part(nn.Identity()), OPSETS[exporter], exporter)
    assert seen
    assert seen[0] is not ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_same_export_gives_the_same_bytes(text_part: Part, exporter: Exporter, tmp_path: Path) -> None:
    for name in ("a", "b"):
        raw = export_part(text_part, OPSETS[exporter], exporter)
        write_graph(finish_graph(simplify_graph(raw), text_part.signature), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_graphs_hold_no_traces_of_this_machine(text_part: Part, exporter: Exporter, tmp_path: Path) -> None:
    raw = export_part(text_part, OPSETS[exporter], exporter)
    for name, graph in (("simplified", simplify_graph(raw)), ("plain", raw)):
        write_graph(finish_graph(graph, text_part.signature), tmp_path / name)
        model = onnx.load(tmp_path / name)
        assert model.producer_name == "vlm-export"
        for message in _messages(model):
            assert not message.doc_string
            assert not message.metadata_props, message
        content = (tmp_path / name).read_bytes()
        for path in (Path(__file__).parents[2], Path(torch.__file__).parents[1], Path.home()):
            assert f"{path}/".encode() not in content


def _messages(model: onnx.ModelProto) -> Iterator[Any]:
    graph = model.graph
    yield from (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)


def test_torchscript_undoes_what_it_hides_from_torch(text_part: Part) -> None:
    original = torch._C._jit_pass_onnx_graph_shape_type_inference
    export_part(text_part, 17, "torchscript")
    assert torch._C._jit_pass_onnx_graph_shape_type_inference is original


def test_batch_that_became_a_constant_is_refused() -> None:
    """The dynamo back end tells; TorchScript does not, and only running other batches shows it."""

    class TwoRows(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.sum(dim=0, keepdim=True).reshape(1, 3).repeat(2, 1)

    part = _broken_part(TwoRows())
    with pytest.raises(VerificationError, match="another type") as caught:
        finish_graph(export_part(part, 18, "dynamo"), part.signature)
    assert "image_embeds" in caught.value.what
    assert "--exporter" in caught.value.fix
