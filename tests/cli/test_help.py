"""Help answers at once, and every verb describes itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from vlm_export import __version__
from vlm_export.cli.examples import EXAMPLES
from vlm_export.cli.main import VERBS, build_parser

VERB_NAMES = list(VERBS)
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "transformers", "PIL", "yaml")


def test_help_answers_within_half_a_second() -> None:
    command = [sys.executable, "-m", "vlm_export.cli.main", "--help"]
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        # Of the processor, and the best of five: what else runs on the machine is not the command's time.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert 0 < min(seconds) <= 0.5


def test_help_imports_nothing_heavy(spawn: Callable[..., Any]) -> None:
    code = f"import atexit\natexit.register(lambda: print('imported', *[m for m in {HEAVY} if m in sys.modules]))"
    for arguments in (["--help"], ["export", "--help"], ["classify"]):
        assert spawn(*arguments, code=code).out.splitlines()[-1] == "imported"


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_every_verb_has_help(cli: Callable[..., Any], verb: str) -> None:
    result = cli(verb, "--help")
    assert result.status == 0
    for option in ("--json", "--quiet"):
        assert option in result.out


def test_every_verb_has_two_examples(cli: Callable[..., Any]) -> None:
    for verb in [*VERB_NAMES, "graph show", "graph rename-tensor", "graph split"]:
        _, _, examples = cli(*verb.split(), "--help").out.partition("examples:\n")
        lines = examples.splitlines()
        assert len(lines) == 2
        assert all(line.startswith(f"  vlm-export {verb} ") for line in lines), (verb, lines)


def test_examples_are_commands_that_the_parser_takes() -> None:
    for pair in EXAMPLES.values():
        for example in pair:
            build_parser().parse_args(shlex.split(example))


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "vlm_export", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"vlm-export {__version__}"


def test_help_lists_verbs_and_statuses(cli: Callable[..., Any]) -> None:
    result = cli("--help")
    assert result.status == 0
    for verb in VERB_NAMES:
        assert f"  {verb} " in result.out
    for status in (
        "0 done",
        "1 verification failed",
        "2 usage",
        "3 bad or unsafe input",
        "4 environment",
        "70 a defect",
    ):
        assert status in result.out


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out.strip() == f"vlm-export {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [[], ["explode"], ["export"], ["export", "x"], ["export", "x", "-o", "y", "--opset", "eighteen"], ["search", "x"]],
)
def test_malformed_command_lines(cli: Callable[..., Any], arguments: list[str]) -> None:
    result = cli(*arguments)
    assert (result.status, result.out) == (2, "")
    assert len(result.err.splitlines()) == 3
    assert "--help" in result.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("exprot",), "did you mean 'export'?"),
        (("graph", "nothing-like-it"), "see vlm-export graph --help"),
        (("export", "clip-demo", "-o", "out", "--precision", "int8"), "known: fp32, fp16"),
    ],
)
def test_a_wrong_word_is_told_in_few_lines(cli: Callable[..., Any], arguments: tuple[str, ...], told: str) -> None:
    result = cli(*arguments).refused(2, repr(arguments[-1]), told)
    assert len(result.err) <= 200
