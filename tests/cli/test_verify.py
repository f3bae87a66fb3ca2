"""What `verify` looks at: every file, everything that the manifest states about the model, and at least one graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_export.errors import EnvironmentFailure

Cli = Callable[..., Any]
# What the manifest of an export without such options states.
BUILD: dict[str, Any] = {"image_size": None, "dynamic_image_size": False, "family_options": {}}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the exported bundle whose manifest was changed."""

    def change(edit: Change) -> Path:
        bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
        manifest = json.loads((bundle / "vlm_export.json").read_text())
        edit(manifest)
        (bundle / "vlm_export.json").write_text(json.dumps(manifest))
        return bundle

    return change


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize(
    "edit",
    [lambda data: data.update(parts=[]), lambda data: [part.update(variants=[]) for part in data["parts"]]],
)
def test_a_bundle_without_graphs_proves_nothing(
    cli: Cli, changed: Callable[[Change], Path], checkpoint: Path, edit: Change, with_source: bool
) -> None:
    bundle = changed(edit)
    options = ("--source", checkpoint, "--quiet") if with_source else ()
    cli("verify", bundle, *options).refused(3, "at least one")
    data = cli("verify", bundle, *options, "--json").data
    assert (data["error"], data["exit_status"]) == ("input", 3)


def test_no_report_is_no_proof(cli: Cli, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_export.api.verify_bundle", lambda *_, **__: [])
    cli("verify", exported).refused(1, "nothing was compared", "fix: ")
    assert cli("verify", exported, "--json").refused(1, "nothing").data["error"] == "verification"


def _set(*path: str | int, value: Any) -> Change:
    def edit(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "field", "expected", "got"),
    [
        (_set("family", value="blip"), "family", "'clip'", "'blip'"),
        (_set("architecture", value={}), "architecture.key_names", "'openai'", "no such field"),
        (_set("architecture", "x\u001b[31m", value=1), r"architecture.'x\x1b[31m'", "no such field", "1"),
        (_set("image", "mean", value=[0.1, 0.9, 0.1]), "image.mean", "0.48145466", "0.9"),
        (_set("image", "resample", value="bilinear"), "image.resample", "'bicubic'", "'bilinear'"),
        (_set("image", value=None), "image", "size_pixels", "None"),
        (_set("text", "cleaning", value="none"), "text.cleaning", "'openai'", "'none'"),
        (_set("tasks", 0, "score", "logit_scale", value=-3.0), "tasks.embed.score.logit_scale", "3.25", "-3.0"),
        (_set("export", "keep_fp32", value={"text": ["x"]}), "export.keep_fp32.text", "no such field", "['x']"),
        (_set("export", "reference", value="the authors"), "export.reference", "unpatched", "'the authors'"),
        (_set("tasks", value=[]), "tasks", "embed", "[]"),
        (_set("source", "dropped_keys", value=["a.key"]), "source.dropped_keys", "input_resolution", "['a.key']"),
        (
            lambda data: data["parts"][1]["signature"]["axes"][1].update(maximum=77),
            "signature.text.axes.sequence.maximum",
            "20",
            "77",
        ),
    ],
)
def test_what_the_manifest_states_is_compared_with_the_source(
    cli: Cli,
    changed: Callable[[Change], Path],
    checkpoint: Path,
    edit: Change,
    field: str,
    expected: str,
    got: str,
) -> None:
    result = cli("verify", changed(edit), "--source", checkpoint, "--json", "--quiet").refused(1, "than its source")
    assert f"vlm_export.json: {field} (stage: " in result.data["where"]
    assert expected in result.data["expected"]
    assert got in result.data["got"]
    assert "with vlm-export" not in result.data["fix"]


def test_bundles_of_another_version_may_state_other_things(
    cli: Cli, changed: Callable[[Change], Path], checkpoint: Path
) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["tools"]["vlm-export"] = "0.0.1"
        data["export"]["reference"] = "an older one"

    result = cli("verify", changed(edit), "--source", checkpoint, "--quiet")
    result.refused(1, "export.reference", "verify with vlm-export '0.0.1'")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "golden/text/test_data_set_0/output_0.pb"])
@pytest.mark.parametrize("with_source", [False, True])
def test_every_file_is_checked(
    cli: Cli, exported: Path, tmp_path: Path, checkpoint: Path, name: str, with_source: bool
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    (bundle / name).write_bytes(b"junk")
    options = ("--source", checkpoint, "--quiet") if with_source else ()
    cli("verify", bundle, *options).refused(3, name, "not the one that was exported")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (5, "an object"),
        ({**BUILD, "image_size": "x"}, "an integer from 1"),
        ({**BUILD, "image_size": 8_000_000}, "an integer from 1"),
        ({**BUILD, "image_size": -14}, "an integer from 1"),
        ({**BUILD, "dynamic_image_size": "yes"}, "true or false"),
        ({**BUILD, "image_sizes": 42}, "unknown field 'image_sizes'"),
        ({**BUILD, "family_options": {"activation": 1.5}}, "an integer"),
        ({**BUILD, "family_options": {"heads": 4}}, "head"),
        ({}, "missing fields"),
    ],
)
def test_odd_options_in_the_manifest(
    cli: Cli, changed: Callable[[Change], Path], checkpoint: Path, build: Any, says: str
) -> None:
    bundle = changed(_set("export", "build", value=build))
    cli("verify", bundle, "--source", checkpoint, "--quiet").refused(3, says)


@pytest.mark.parametrize(
    "options",
    [
        ("--image-size", "56"),
        ("--dynamic-image-size", "--target", "onnxruntime"),
        ("--with-preprocessing", "--precision", "fp16"),
        ("--part", "text", "--no-simplify"),
    ],
)
def test_options_of_the_export_are_no_difference(
    cli: Cli,
    tmp_path: Path,
    checkpoint: Path,
    fast: tuple[str, ...],
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Verified at few sizes, as large parts are: this is about what the manifest states.
    monkeypatch.setattr("vlm_export.exporting.verification._LARGE_PART_BYTES", 0)
    bundle = tmp_path / "bundle"
    assert cli("export", checkpoint, "-o", bundle, "--quiet", *fast, *options).status == 0
    result = cli("verify", bundle, "--source", checkpoint, "--quiet", "--threads", "1")
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize("options", [(), ("--random-weights", "7")])
def test_known_names_are_no_difference(
    cli: Cli, tmp_path: Path, fast: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Of a checkpoint without a config: our own states how images and texts are prepared."""
    bundle = tmp_path / "bundle"
    assert cli("export", "clip-demo", "-o", bundle, "--quiet", *fast, "--part", "text", *options).status == 0
    assert cli("verify", bundle, "--source", "clip-demo", "--quiet", "--threads", "1").status == 0


@pytest.mark.parametrize(
    "options",
    [("--random-weights", "-1"), ("--random-weights", str(2**63)), ("--image-size", "8000000")],
)
def test_numbers_that_no_bundle_could_state(
    cli: Cli, tmp_path: Path, fast: tuple[str, ...], options: tuple[str, ...]
) -> None:
    cli("export", "clip-demo", "-o", tmp_path / "bundle", *fast, *options).refused(2, options[1], "expected: ", "from ")
    assert not list(tmp_path.iterdir())


def test_a_hub_source_is_fetched_at_the_commit_that_was_exported(
    cli: Cli, changed: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(hub_id: str, revision: str | None, reads: object) -> None:
        asked.append((hub_id, revision))
        raise EnvironmentFailure("no network", fix="connect")

    monkeypatch.setattr("vlm_export.checkpoint.open.fetch_snapshot", fetch)
    bundle = changed(_set("source", "revision", value="a" * 40))
    cli("verify", bundle, "--source", "owner/name", "--quiet").refused(4, "no network")
    assert asked == [("owner/name", "a" * 40)]


@pytest.mark.parametrize(
    ("edit", "status", "said"),
    [
        (_set("tasks", 0, "score", "activation", value="sigmoid"), 1, "activation: expected 'softmax', got 'sigmoid'"),
        (_set("tasks", 0, "score", "logit_bias", value=-3.0), 1, "logit_bias: expected 0.0, got -3.0"),
        (_set("parts", 0, "variants", 0, "precision", value="fp16"), 3, "precision is not that of its file"),
        (_set("parts", 0, "variants", 0, "precision", value="fp64"), 3, "precision is not that of its file"),
    ],
    ids=["activation", "bias", "another precision", "no precision"],
)
def test_verify_alone_sees_what_decides_scores_and_gates(
    cli: Cli, changed: Callable[[Change], Path], edit: Change, status: int, said: str
) -> None:
    cli("verify", changed(edit), "--quiet").refused(status, said)
