"""The pages are true without running a session: links, anchors, commands, recipes, tables, fields and verbs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from vlm_export.bundle.ledger import GraphLedger
from vlm_export.bundle.manifest import Manifest
from vlm_export.cli.main import VERBS, build_parser
from vlm_export.graph.look.find import find_nodes
from vlm_export.graph.recipe import read_recipe

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
_SHELL = re.compile(r"```(?:sh|console)\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`(vlm-export [^`…]+)`")
_REDIRECTIONS = (">", "|", "&&")


def page_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """The anchors that hosts make of a page's headings: lower case, without punctuation, dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page_text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(text: str) -> Iterator[str]:
    """Every `vlm-export …` of a page's shell blocks and of its sentences."""
    for block in _SHELL.findall(text):
        lines = (line.removeprefix("$ ") for line in block.splitlines())
        yield from (line for line in lines if line.startswith("vlm-export "))
    yield from _INLINE.findall(_FENCED.sub("", text))


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)[1:]
    ends = [words.index(sign) for sign in _REDIRECTIONS if sign in words]
    return words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_FENCED.sub("", page_text(page))):
        if "://" in target:
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.relative_to(ROOT)}: {target}"
        assert not anchor or anchor in anchors_of(linked), f"{page.relative_to(ROOT)}: {target}#{anchor}"


def test_every_page_is_linked_from_readme() -> None:
    linked = {target for target, _ in _LINK.findall(page_text(ROOT / "README.md"))}
    assert {page.relative_to(ROOT).as_posix() for page in DOCS.glob("*.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_parse(page: Path) -> None:
    parser = build_parser()
    for command in commands_of(page_text(page)):
        words = words_of(command)
        # In a sentence a verb may stand alone, or `graph VERB` for all of them.
        if len(words) > 1 and "VERB" not in words:
            parser.parse_args(words)


def test_commands_are_found() -> None:
    text = "```sh\nvlm-export verify a --json > b  # why\n```\nand `vlm-export inspect x` or `vlm-export verify`.\n"
    found = [words_of(command) for command in commands_of(text)]
    assert found == [["verify", "a", "--json"], ["inspect", "x"], ["verify"]]
    assert sum(len(list(commands_of(page_text(page)))) for page in PAGES) > 50


def test_recipes_are_read_and_patterns_parse(tmp_path: Path) -> None:
    import onnx_ir as ir

    text = page_text(DOCS / "graphs.md")
    recipes = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert recipes
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        assert read_recipe(tmp_path / "recipe.yaml")
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    patterns = [words[3] for words in map(words_of, commands_of(text)) if words[:2] == ["graph", "find"]]
    assert len(patterns) > 3
    for pattern in patterns:
        assert find_nodes(model, pattern) == []


def test_tables_are_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_the_check_of_tables_sees_a_missing_row(tables: ModuleType) -> None:
    for page, row in (("checkpoints.md", "`clip-rn50`"), ("verbs.md", "`--rank-k N`")):
        text = page_text(DOCS / page)
        without = "\n".join(line for line in text.splitlines() if row not in line) + "\n"
        assert without != text
        assert tables.updated(without) == text


def test_every_verb_and_exit_status_stands_in_the_reference(tables: ModuleType) -> None:
    text = page_text(DOCS / "verbs.md")
    for verb in VERBS:
        assert f"\n## {verb}\n" in text
        assert f"| [`{verb}`](#{verb}) |" in text
        assert verb == "graph" or f"<!-- table: options of {verb} -->" in text
    graph = tables.parsers_of(tables.parsers_of(build_parser())["graph"])
    assert len(graph) > 25
    for verb in graph:
        assert f"\n| `{verb} " in text
    statuses = re.findall(r"\b(\d+) [a-z(]", build_parser().epilog or "")
    assert len(statuses) == 7
    for status in statuses:
        assert f"\n| {status} |" in text
        assert f"{status} " in page_text(ROOT / "README.md").partition("Exit statuses: ")[2].partition("\n")[0]


def dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses that a type is made of."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    elif get_origin(hint) in (Annotated, Union, UnionType, tuple) or get_args(hint):
        for argument in get_args(hint):
            yield from dataclasses_in(argument)


def fields_below(kind: type) -> set[str]:
    """The names of all fields of a dataclass and of those that it holds."""
    found, todo = set[type](), [kind]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += [inner for hint in get_type_hints(current).values() for inner in dataclasses_in(hint)]
    return {field.name for entry in found for field in dataclasses.fields(entry)}


@pytest.mark.parametrize("kind", [Manifest, GraphLedger])
def test_every_field_of_a_bundle_stands_in_its_reference(kind: type) -> None:
    text = page_text(DOCS / "bundle.md")
    names = fields_below(kind)
    assert len(names) > 5
    missing = sorted(name for name in names if f"`{name}`" not in text)
    assert not missing


def test_the_walk_over_fields_reaches_all_tasks() -> None:
    assert {"size_pixels", "max_side_pixels", "query_token", "logit_scale", "rank", "tile_tokens"} - fields_below(
        Manifest
    ) == {"rank"}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:vlm_export|tests|scripts|models|configs|docs)/[\w./-]+)`", text))
    assert paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_what_people_read_says_image() -> None:
    """One word for one thing, in all that no script writes."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        text = re.sub(r"<!-- (session|table).*?<!-- /\1 -->", "", _FENCED.sub("", page_text(page)), flags=re.DOTALL)
        text = "" if text.startswith("# Planted faults") else text
        assert not re.search(r"\bpictures?\b", text), page.relative_to(ROOT)
