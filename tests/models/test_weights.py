"""Tables and loading: strict, all problems in one error, and without copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlm_export.checkpoint.store import ScratchStore
from vlm_export.errors import InputError
from vlm_export.family import Checkpoint, StoredTensorInfo
from vlm_export.models.registry import recognise
from vlm_export.models.weights import Rows, Transposed, WeightTable, load_weights, prefixed, repeat

TABLE: WeightTable = {
    "q": Rows("packed.weight", 0, 3),
    "k": Rows("packed.weight", 1, 3),
    "v": Rows("packed.weight", 2, 3),
    "bias": "packed.bias",
    "projection": Transposed("projection.weight"),
    "leftover": None,
}


def build_module() -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"packed": nn.Linear(2, 6), "projection": nn.Linear(3, 4, bias=False)})


def stored_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 2), "k": (2, 2), "v": (2, 2), "bias": (6,), "projection": (3, 4), "leftover": (7,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def as_checkpoint(tensors: Mapping[str, Tensor]) -> Checkpoint:
    infos = {key: StoredTensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in tensors.items()}
    return Checkpoint("weights.pt", "state_dict", (), infos, tensors.__getitem__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_target_is_filled(tmp_path: Path, dtype: torch.dtype) -> None:
    module = build_module()
    tensors = {key: tensor.to(dtype) for key, tensor in stored_tensors().items()}
    with ScratchStore(tmp_path / "store") as store:
        dropped = load_weights(module, as_checkpoint(tensors), TABLE, store)
        weights = module.state_dict()
        assert dropped == ("leftover",)
        expected = torch.cat([tensors["q"], tensors["k"], tensors["v"]]).float()
        assert torch.equal(weights["packed.weight"], expected)
        assert torch.equal(weights["packed.bias"], tensors["bias"].float())
        assert torch.equal(weights["projection.weight"], tensors["projection"].T.float())
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_float32_is_used_as_it_lies_in_the_file(tmp_path: Path) -> None:
    module, tensors = build_module(), stored_tensors()
    with ScratchStore(tmp_path / "store") as store:
        load_weights(module, as_checkpoint(tensors), TABLE, store)
    assert np.shares_memory(module.state_dict()["packed.bias"].numpy(), tensors["bias"].numpy())


def test_all_problems_stand_in_one_error(tmp_path: Path) -> None:
    tensors = stored_tensors()
    del tensors["k"]
    tensors["surplus"] = torch.zeros(3)
    tensors["v"] = torch.zeros(2, 3)
    tensors["bias"] = torch.zeros(6, dtype=torch.int8)
    with ScratchStore(tmp_path / "store") as store, pytest.raises(InputError) as caught:
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)
    assert caught.value.what.startswith("4 of")
    for problem in ("missing: k", "unexpected: surplus (3,)", "shape: v expected (2, 2), got (2, 3)", "dtype: bias"):
        assert problem in caught.value.got


def test_long_lists_are_cut(tmp_path: Path) -> None:
    tensors = {**stored_tensors(), **{f"surplus{i}": torch.zeros(1) for i in range(30)}}
    with ScratchStore(tmp_path / "store") as store, pytest.raises(InputError, match="and 10 more"):
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in stored_tensors().items()}
    tensors["v"][0, :] = bad
    with ScratchStore(tmp_path / "store") as store, pytest.raises(InputError) as caught:
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)
    assert (caught.value.where, caught.value.got) == ("tensor v", "2 of 4 values are not finite")


@pytest.mark.parametrize("bad", [1e300, -1e39])
def test_values_that_float32_cannot_hold_are_refused(tmp_path: Path, bad: float) -> None:
    tensors = {key: tensor.double() for key, tensor in stored_tensors().items()}
    tensors["k"][0, 0] = bad
    with ScratchStore(tmp_path / "store") as store, pytest.raises(InputError, match="float32") as caught:
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)
    assert caught.value.where == "tensor k"
    tensors["k"][0, 0] = torch.finfo(torch.float32).max
    with ScratchStore(tmp_path / "fits") as store:
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)


def test_keys_move_no_terminals_cursor(tmp_path: Path) -> None:
    tensors = {**stored_tensors(), "\x1b[2Jgone\n": torch.zeros(1), "long" * 1000: torch.zeros(1)}
    with ScratchStore(tmp_path / "store") as store, pytest.raises(InputError) as caught:
        load_weights(build_module(), as_checkpoint(tensors), TABLE, store)
    assert "unexpected: \\x1b[2Jgone\\n (1,)" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match="no family") as caught:
        recognise(as_checkpoint({"\x1b[2J": torch.zeros(1)}))
    assert "\x1b" not in str(caught.value)


def test_tables_are_repeated_and_prefixed() -> None:
    table: WeightTable = {"w{i}": "ours.{i}.w", "q{i}": Rows("ours.{i}.p", 0, 3), "x": None, "t": Transposed("z")}
    assert repeat(prefixed(table, "a.", "b."), 2) == {
        "a.w0": "b.ours.0.w",
        "a.w1": "b.ours.1.w",
        "a.q0": Rows("b.ours.0.p", 0, 3),
        "a.q1": Rows("b.ours.1.p", 0, 3),
        "a.x": None,
        "a.t": Transposed("b.z"),
    }


def test_table_that_leaves_a_parameter_empty_is_our_mistake(tmp_path: Path) -> None:
    table = {key: target for key, target in TABLE.items() if key != "bias"}
    tensors = {key: tensor for key, tensor in stored_tensors().items() if key != "bias"}
    with ScratchStore(tmp_path / "store") as store, pytest.raises(AssertionError, match=r"packed\.bias"):
        load_weights(build_module(), as_checkpoint(tensors), table, store)
