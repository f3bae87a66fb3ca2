"""`regress`: what is untouched passes, and each change is caught and named by its kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import vlm_export
from vlm_export.api import options_from_data
from vlm_export.bundle.opened import open_bundle
from vlm_export.cli.main import main
from vlm_export.errors import InputError, UsageError, VerificationError
from vlm_export.lab.figures import compare_figures
from vlm_export.lab.regress import CaseResult, Check, raise_if_failed, regress_bundles
from vlm_export.lab.regress_process import run_job
from vlm_export.lab.regress_spec import read_cases
from vlm_export.lab.regress_state import State, compare_states, read_state
from vlm_export.lab.snapshot import state_of
from vlm_export.proof.gates import GATES

pytest_plugins = ("pytester",)

CHECKPOINT = Path(__file__).parents[1] / "data" / "clip" / "vit_p14" / "state_dict_fp16.pt"
FAST: dict[str, Any] = {"opset": 17, "threads": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BOMB = "a: &a0 [x, x]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as transformers saves it; tests must not change it."""
    folder = tmp_path_factory.mktemp("clip") / "source"
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(vocab) - 2, len(vocab) - 1
    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {**SIZES, **ends, "vocab_size": len(vocab), "max_position_embeddings": 16, "projection_dim": 8}
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=16).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the tiny CLIP; tests must not change it."""
    target = tmp_path_factory.mktemp("exported") / "bundle"
    vlm_export.export(source, target, **FAST)
    return target


def state(bundle: Path, tolerances: Mapping[str, float] | None = None) -> State:
    return state_of(open_bundle(bundle), "tiny", tolerances or {})


def edited_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def other_activation(source: Path) -> None:
    def change(config: Any) -> None:
        config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = "gelu"

    edited_json(source / "config.json", change)


def other_weight(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["text_model.encoder.layers.0.mlp.fc1.weight"][3] *= 1.001
    save_file(weights, source / "model.safetensors", {"format": "pt"})


def other_tokenizer(source: Path) -> None:
    edited_json(source / "tokenizer.json", lambda data: data["model"]["merges"].pop(0))


def other_processor(source: Path) -> None:
    edited_json(source / "preprocessor_config.json", lambda data: data.update(image_mean=[0.5, 0.5, 0.5]))


def nothing(source: Path) -> None:
    pass


PLANTED: dict[str, tuple[Callable[[Path], None], dict[str, Any], list[tuple[str, str]]]] = {
    "nothing": (nothing, {}, []),
    "operator": (other_activation, {}, [("structure", "mlp: operators: 2 Mul, 2 Reshape, Sigmoid → Add, Div, Erf, ")]),
    "opset": (nothing, {"opset": 16}, [("opset", "text.fp32: value: 'ai.onnx 17, IR 8' → 'ai.onnx 16, IR 8'")]),
    "weight": (
        other_weight,
        {},
        [("weights", "text.fp32 blocks.0.mlp.fc1.weight (transposed): value: 'float [16, 24]")],
    ),
    "tokenizer": (other_tokenizer, {}, [("tokenizer", "tokenizer.json: value"), ("contract", "text ")]),
    "processor": (other_processor, {}, [("preparation", "image.mean[0]: value: 0.48145466 → 0.5")]),
}


@pytest.mark.parametrize(("change", "options", "expected"), PLANTED.values(), ids=PLANTED)
def test_each_change_is_named_by_its_kind(
    change: Callable[[Path], None],
    options: dict[str, Any],
    expected: list[tuple[str, str]],
    source: Path,
    exported: Path,
    tmp_path: Path,
) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "source"))
    change(changed)
    vlm_export.export(changed, tmp_path / "bundle", **{**FAST, **options})
    found = compare_states(state(exported), state(tmp_path / "bundle"))
    assert bool(found) == bool(expected)
    for section, text in expected:
        assert any(one.section == section and text in str(one) for one in found), list(map(str, found))
    if change is other_weight:
        assert [one.section for one in found] == ["weights"]


def test_a_changed_tolerance_is_named(exported: Path, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(GATES, "fp32", replace(GATES["fp32"], cosine=0.999))
    vlm_export.export(source, tmp_path / "bundle", **FAST)
    found = compare_states(state(exported, {"*": 5.0}), state(tmp_path / "bundle", {"*": 50.0}))
    assert [one.section for one in found] == ["tolerances"] * 3
    assert str(found[0]) == "gates.vision.fp32.cosine: value: 0.99999 → 0.999"
    assert str(found[2]) == "specification.*: value: 5.0 → 50.0"


def test_a_state_is_text_that_reads_back_equal(exported: Path, tmp_path: Path) -> None:
    recorded = state(exported)
    (tmp_path / "state.yaml").write_text(recorded.to_text(), encoding="utf-8")
    assert read_state(tmp_path / "state.yaml") == recorded
    assert recorded.to_text() == state(exported).to_text()
    assert "    text.fp32.blocks.0.mlp: 2 Mul, 2 Reshape, Sigmoid | " in recorded.to_text()


THEN = {"text.fp32.x.max_abs": 1e-7, "text.fp32.x.max_abs_floor": 1e-6, "text.fp32.x.seen": 1e-7}


@pytest.mark.parametrize(
    ("grown", "tolerances", "strict", "failed"),
    [
        ({"text.fp32.x.max_abs": 2.5e-6}, {}, False, []),
        ({"text.fp32.x.max_abs": 2.5e-6}, {}, True, ["text.fp32.x.max_abs"]),
        ({"text.fp32.x.max_abs": 9e-7}, {}, True, []),
        ({"text.fp32.x.max_abs": 5e-6}, {}, True, ["text.fp32.x.max_abs"]),
        ({"text.fp32.x.max_abs": 3e-7}, {"*.max_abs": 2.0}, False, ["text.fp32.x.max_abs"]),
        ({"text.fp32.x.max_abs": 2.5e-6}, {"*.max_abs": 30.0}, True, []),
    ],
)
def test_an_error_that_grew(
    grown: dict[str, float], tolerances: dict[str, float], strict: bool, failed: list[str]
) -> None:
    figures = compare_figures(THEN, {**THEN, **grown}, tolerances, strict=strict)
    assert [figure.name for figure in figures if figure.failure] == failed
    assert figures[0].ratio == pytest.approx(grown["text.fp32.x.max_abs"] / 1e-7)
    assert str(figures[0]).startswith("text.fp32.x.max_abs: 1e-07 → ")


def test_a_figure_that_is_gone_fails_where_both_were_measured_alike() -> None:
    now = {name: value for name, value in THEN.items() if name != "text.fp32.x.seen"}
    assert not any(figure.failure for figure in compare_figures(THEN, now, {}))
    (gone,) = [figure for figure in compare_figures(THEN, now, {}, complete=True) if figure.failure]
    assert gone.failure == "text.fp32.x.seen: 1e-07 → none: it is not measured any more"
    (new,) = [figure for figure in compare_figures(now, THEN, {}, complete=True) if figure.failure]
    assert new.failure == "text.fp32.x.seen: none → 1e-07: nothing is recorded of it"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A specification with one case, whose state is recorded."""
    spec = tmp_path_factory.mktemp("regress") / "exports.yaml"
    shutil.copy(CHECKPOINT, spec.parent / "model.pt")
    options = {**FAST, "with_tokenizer": False}
    entry = {"name": "tiny", "source": "model.pt", "options": options}
    spec.write_text(yaml.safe_dump({"entries": [entry]}), encoding="utf-8")
    assert main(["regress", str(spec), "--update", "--quiet"]) == 0
    return spec


def test_untouched_passes(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For the second time in the test of the plugin."""
    state = recorded.parent / "states" / "tiny.yaml"
    before = state.read_bytes()
    assert main(["regress", str(recorded), "--strict", "--quiet"]) == 0
    assert "tiny: pass" in capsys.readouterr().out
    assert state.read_bytes() == before


def test_a_state_is_written_whole_or_stays(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode(encoding)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = recorded.parent / "states" / "tiny.yaml"
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", full_disk)
    assert main(["regress", str(recorded), "--update", "--quiet"]) == 4
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["tiny.yaml"]


def test_a_failing_run_as_junit_and_json(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One case with another opset and an error that grew 25 times, one that cannot be read: both are told."""
    spec = Path(shutil.copytree(recorded.parent, tmp_path / "spec")) / recorded.name
    data = yaml.safe_load(spec.read_text(encoding="utf-8"))
    data["entries"][0]["options"]["opset"] = 16
    data["entries"].insert(0, {"name": "gone", "source": "gone.pt"})
    spec.write_text(yaml.safe_dump(data), encoding="utf-8")
    path = spec.parent / "states" / "tiny.yaml"
    state = yaml.safe_load(path.read_text(encoding="utf-8"))
    state["figures"]["vision.fp32.image_embeds.max_abs"] /= 25
    path.write_text(yaml.safe_dump(state), encoding="utf-8")
    report = tmp_path / "report.xml"
    assert main(["regress", str(spec), "--strict", "--json", "--quiet", "--junit", str(report)]) == 1
    gone, tiny = json.loads(capsys.readouterr().out)["cases"]
    assert [gone["passed"], tiny["passed"]] == [False, False]
    grown = next(one for one in tiny["figures"] if one["name"] == "vision.fp32.image_embeds.max_abs")
    assert grown["ratio"] == pytest.approx(25, rel=0.1)

    suites = {suite.get("name"): suite for suite in ElementTree.parse(report).getroot()}
    assert (suites["gone"].get("tests"), suites["gone"].get("failures")) == ("1", "1")
    failed = {case.get("name"): case for case in suites["tiny"].iter("testcase") if case.find("failure") is not None}
    assert {"opset", "figures"} <= set(failed) <= {"opset", "figures", "structure"}
    assert "'ai.onnx 17, IR 8' → 'ai.onnx 16, IR 8'" in str(failed["opset"].findtext("failure"))
    assert "25 times" in str(failed["figures"].findtext("failure"))
    assert suites["tiny"].get("tests") == str(len(list(suites["tiny"].iter("testcase"))))


def test_the_plugin_of_pytest(recorded: Path, pytester: pytest.Pytester) -> None:
    spec = Path(shutil.copytree(recorded.parent, pytester.path / "spec")) / recorded.name
    data = yaml.safe_load(spec.read_text(encoding="utf-8"))
    data["entries"].append({"name": "gone", "source": "gone.pt"})
    spec.write_text(yaml.safe_dump(data), encoding="utf-8")
    pytester.makepyfile("def test_other(): pass")
    result = pytester.runpytest("-p", "vlm_export.lab.pytest_plugin", "--vlm-export-spec", "spec/exports.yaml")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["export and verification: there is no such file or directory", "*where: gone.pt"])


def test_a_case_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    job = {"kind": "export", "name": "tiny", "source": str(CHECKPOINT), "options": {}, "folder": str(tmp_path)}
    answer = run_job({**job, "tolerances": {}}, max_memory_bytes=64 << 20)
    assert answer.error is not None
    assert answer.error.exit_status == 4
    assert "took more memory" in answer.error.what


def test_a_process_that_crashes_is_told() -> None:
    answer = run_job({"kind": "no such job"})
    assert answer.error is not None
    assert "KeyError: 'no such job'" in str(answer.error)


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("entries: []", InputError, "at least one entry"),
        ("entries: [{name: a, sourc: b}]", InputError, "did you mean 'source'?"),
        ("entries: [{name: ../a, source: b}]", InputError, "letters, digits"),
        ("entries: [{name: a, source: b}, {name: a, source: c}]", UsageError, "two cases have the name 'a'"),
        ("entries: [{name: a, source: b, source: c}]", UsageError, "stands twice"),
        ("entries: &all [{name: a, source: b, options: {more: *all}}]", UsageError, "an alias stands inside what it"),
        (BOMB, UsageError, "aliases make more than 1000000 values"),
        ("entries: [{name: a, source: b, tolerances: {x: -1}}]", InputError, "above 0"),
    ],
)
def test_a_bad_specification(text: str, error: type[Exception], told: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(error) as raised:
        read_cases(tmp_path / "spec.yaml")
    assert told in str(raised.value)


def test_variants_are_cases_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    entry = {"name": "a", "source": "model.pt", "options": {"opset": 17}, "tolerances": {"x": 2.0}}
    variants = {"plain": {}, "half": {"precisions": ["fp16"], "opset": 18}}
    data = {"entries": [{**entry, "variants": variants}], "tolerances": {"*": 5.0, "x": 3.0}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    plain, half = read_cases(tmp_path / "spec.yaml")
    assert (plain.name, plain.options) == ("a-plain", {"opset": 17})
    assert (half.name, half.options) == ("a-half", {"opset": 18, "precisions": ["fp16"]})
    assert plain.source == str(tmp_path / "model.pt")
    assert list(plain.tolerances.items()) == [("x", 2.0), ("*", 5.0)]
    assert half.state == tmp_path / "states" / "a-half.yaml"


def test_a_bad_option_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"entries": [{"name": "a", "source": "gone.pt", "options": {"opsett": 17}}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert main(["regress", str(tmp_path / "spec.yaml")]) == 2
    assert "did you mean 'opset'?" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"opset": "17"}, {"precisions": ["fp8"]}, {"simplify": 1}, {"tokenizer": 5}])
def test_an_option_of_another_type(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has another type or value"):
        options_from_data(options)


def test_the_last_words_tell_what_to_do_about_the_first_failure() -> None:
    """A source that is not found is not to be recorded; a difference may be."""
    gone = CaseResult("gone", (Check("export and verification", ("there is no file\n  where: gone.pt",)),), 1.0, None)
    other = CaseResult("other", (Check("opset", ("17 → 16",)), Check("figures", ("grew",))), 1.0, None)
    with pytest.raises(VerificationError) as raised:
        raise_if_failed([gone, other])
    assert (raised.value.where, raised.value.fix) == ("gone, other", "")
    assert raised.value.got == "export and verification: there is no file"
    with pytest.raises(VerificationError) as raised:
        raise_if_failed([other])
    assert raised.value.got == "opset: 17 → 16"
    assert "--update" in raised.value.fix


def test_a_baseline_that_is_not_there_is_to_be_recorded(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no baseline") as raised:
        regress_bundles([str(exported)], baseline=tmp_path / "old.yaml")
    assert "--update" in raised.value.fix


def test_bundles_are_verified_without_torch_and_onnx(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two is damaged; the other is verified all the same, and an error that grew 25 times is shown."""
    for name in ("torch", "onnx", "onnx_ir", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not in this environment')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    (damaged / "config.json").write_text("{}", encoding="utf-8")
    assert main(["regress", "--bundles", str(exported), str(damaged), "--json"]) == 1
    whole, broken = json.loads(capsys.readouterr().out)["cases"]
    assert (whole["passed"], broken["passed"]) == (True, False)
    assert "config.json" in broken["checks"][0]["failures"][0]

    baseline = tmp_path / "baseline.yaml"
    command = ["regress", "--bundles", str(exported), "--baseline", str(baseline)]
    assert main(["regress", "--bundles", str(damaged), "--baseline", str(baseline), "--update"]) == 1
    assert not baseline.exists(), "figures of a bundle that does not hold are recorded"
    assert main([*command, "--update"]) == 0
    assert main([*command, "--strict"]) == 0
    data = yaml.safe_load(baseline.read_text(encoding="utf-8"))
    figures = data["bundles"][str(exported)]
    name = max((name for name in figures if name.endswith(".max_abs")), key=lambda name: figures[name])
    figures[name] /= 1000
    figures[f"{name}_floor"] = 0.0
    baseline.write_text(yaml.safe_dump(data), encoding="utf-8")
    capsys.readouterr()
    assert main(command) == 0
    assert name in capsys.readouterr().out
    assert main(["regress", "--bundles", str(damaged), "--baseline", str(baseline)]) == 2
    assert "the baseline has no figures of a bundle" in capsys.readouterr().err
