"""Odd arguments, manifests and files of embeddings: each verb says in short what is wrong, and replaces nothing."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from vlm_export.runtime.search.store import EmbeddingsMeta, write_embeddings

pytestmark = pytest.mark.needs_torch

Cli = Callable[..., Any]
LONGEST_MESSAGE = 9_000
DRAWN = int(os.environ.get("ODD_DRAWN", "2"))
"""Odd words or values for each place: few, so that the whole takes seconds; more find no more in minutes."""
# What stands in the place of any argument; no shell and no program can pass a zero byte.
ODD = (
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "-x",
        "=",
        "=x",
        "x=",
        "x=y=z",
        "a=-1",
        "a=[1",
        "@x",
        ".",
        "..",
        "~",
        "/",
        "/dev/null",
    ),
    *("\x1b[2J\x1b]0;gone\x07", "\r\n\tvlm-export: all good", "\u202eevil\u200b\u2028", "\udcff\udc80", "\x9b31m"),
    *("0", "-1", "1.5", "1e3", "1_0", "\u0663", "nan", "-inf", "1e999", "1e-400", "9" * 30, "9" * 5000, "2147483648"),
    *("9223372036854775808", "[0, 1]", "None", "{", "{}", "{0}", "{x}", "%s", "*", "(" * 300, "x" * 300, "a/" * 700),
    *("\U0001f600" * 70_000, "cpu", "fp16", "int8", "main", "hf://x", "https://example.invalid/x", "x.npy", "x.PNG"),
)
# Commands that are right: F/ stands for the directory of all files, O for an output.
COMMANDS = (
    "inspect F/bundle --revision main",
    "inspect F/checkpoint.pt --base F/checkpoint.pt",
    "inspect F/image.png --bundle F/bundle -o O.png",
    "export F/checkpoint.pt -o O.bundle --opset 17 --exporter dynamo --image-size 28 --part vision --precision fp32 "
    "--target web --external-data-threshold 64 --tokenizer F/texts.txt --sha256 0 --base F/checkpoint.pt "
    "--revision main --random-weights 1 --activation gelu --head-width 64 --text-heads 1 --image F/image.png "
    "--threads 1",
    "verify F/exported --provider cpu --threads 1 --precision fp32",
    "verify F/exported --source F/nothing.bin --base F/checkpoint.pt",
    "classify F/bundle F/image.png cat --template {} --truncate --threads 1 --provider cpu --precision fp32",
    "caption F/bundle F/image.png --prompt a --beams 1 --max-new-tokens 1 --repetition-penalty 1 --max-length 9 "
    "--min-length 1 --batch-size 1",
    "ask F/bundle F/image.png what --sample --seed 1 --temperature 1 --top-k 1 --top-p 1 --max-length 9",
    "ask F/bundle F/image.png what --candidates a --rank-k 2",
    "match F/bundle F/image.png cat --first-token cls --threads 1",
    "embed F/bundle F/image.png -o O.npy --batch-size 1 --threads 1 --provider cpu",
    "embed F/bundle F/folder --on-error stop -o O.parquet --precision fp32",
    "embed F/bundle F/texts.txt --truncate -o O.npy",
    "search F/bundle F/vectors.npy cat -k 1 --threads 1",
    "search F/bundle F/vectors.npy cat -k 1 --rerank --candidates 2",
    "graph show F/graph.onnx",
    "graph find F/graph.onnx Mul",
    "graph check F/graph.onnx",
    "graph draw F/graph.onnx --from x --to y --distance 2 -o O.svg",
    "graph verify F/graph.onnx F/second.onnx --inputs F/vectors.npy --tolerance 0",
    "graph add-opset-imports F/graph.onnx --versions a=1 -o O.onnx",
    "graph add-output F/graph.onnx a --external --shard-size 1MB --threshold 1KB -o O.onnx",
    "graph cancel-transposes F/graph.onnx -o O.onnx",
    "graph compose F/graph.onnx F/second.onnx --connect y=x --prefix-second b/ --shared-inputs x -o O.onnx",
    "graph convert-opset F/graph.onnx 21 -o O.onnx",
    "graph delete-attribute F/graph.onnx c axis -o O.onnx",
    "graph drop-output F/graph.onnx z -o O.onnx",
    "graph extract F/graph.onnx --from x --to y -o O.onnx",
    "graph fold-constants F/graph.onnx --limit 1MB --growth 1MB -o O.onnx",
    "graph insert-node F/graph.onnx Relu --after a --attributes a=1 --name n --output-name o -o O.onnx",
    "graph remove-node F/graph.onnx r --connect r=a --function f -o O.onnx",
    "graph remove-noops F/graph.onnx --verify --inputs F/vectors.npy --tolerance 0 -o O.onnx",
    "graph rename-tensor F/graph.onnx x=x2 -o O.onnx",
    "graph reorder F/graph.onnx --input-order x --output-order z y -o O.onnx",
    "graph replace-node F/graph.onnx r Abs --operands a --domain d -o O.onnx",
    "graph set-attribute F/graph.onnx c axis 0 -o O.onnx",
    "graph set-axis F/graph.onnx N 2 -o O.onnx",
    "graph set-dtype F/graph.onnx x=float16 -o O.onnx",
    "graph set-shape F/graph.onnx x=3,8 -o O.onnx",
    "graph apply F/graph.onnx F/recipe.yaml -o O.onnx",
    "graph store F/graph.onnx -o O.onnx",
    "graph split F/graph.onnx --at a -o O.onnx --second O.second.onnx",
)
GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,8] x) => (float[N,8] y, float[N,8] z) <float[8] w = {1,2,3,4,5,6,7,8}> {
    a = Mul(x, w)
    r = Relu(a)
    c = Concat <axis = 1> (r)
    y = Sqrt(c)
    z = Clip(c)
}"""


@dataclass(frozen=True)
class Files:
    """All that the commands work on, below one directory; `kept.*` must not be replaced."""

    root: Path

    def words(self, command: str, kept: bool) -> list[str]:
        """The words of a command; its outputs are there already if they are `kept`."""
        output = f"{self.root}/{'kept' if kept else 'new'}."
        words = (word.replace("F/", f"{self.root}/") for word in command.split(" "))
        return [output + word[2:] if word.startswith("O.") else word for word in words]

    def state(self) -> dict[str, tuple[int, ...]]:
        """Path → inode, and of a file its size in bytes and the time of its last change."""
        found: dict[str, tuple[int, ...]] = {}
        for where, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                status = os.lstat(os.path.join(where, name))
                times = (status.st_size, status.st_mtime_ns) if name in names else ()
                found[os.path.join(where, name)] = (status.st_ino, *times)
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, exported: Path, checkpoint: Path, image_path: Path) -> Files:
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(Path(__file__).parents[1] / "data" / "runtime" / "tiny_bundle", root / "bundle")
    for name in ("exported", "kept.bundle"):
        shutil.copytree(exported, root / name)
    shutil.copy(checkpoint, root / "checkpoint.pt")
    (root / "folder").mkdir()
    (root / "empty").mkdir()
    for name in ("image.png", "folder/image.png", "kept.png"):
        shutil.copy(image_path, root / name)
    (root / "texts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    for name in ("kept.npy", "kept.svg", "kept.parquet", "nothing.bin"):
        (root / name).write_bytes(b"")
    for name in ("graph.onnx", "second.onnx", "kept.onnx", "kept.second.onnx"):
        onnx.save(onnx.parser.parse_model(GRAPH), str(root / name))
    (root / "recipe.yaml").write_text("- remove-noops\n", encoding="utf-8")
    (root / "vectors.npy").write_bytes(b"")
    return Files(root)


def changed(command: Sequence[str], files: Files, draw: random.Random) -> Iterator[list[str]]:
    """The command with an odd word in each place, without a word, with one twice, and with options of nothing."""
    verb = 2 if command[0] == "graph" else 1
    kinds = [str(path) for path in sorted(files.root.iterdir()) if path.name.partition(".")[0] not in ("kept", "new")]
    for i in range(verb - 1, len(command)):
        if command[i].startswith("-"):
            yield [*command[: i + 1], *command[i:]]
            continue
        odd = draw.sample((*ODD, *kinds, f"{files.root}/bundle/{command[i]}"), DRAWN)
        for words in (*([word] for word in odd), [], [command[i]] * 2):
            yield [*command[:i], *words, *command[i + 1 :]]
    yield [*command, "--json", "--quiet", "--json"]
    yield [*command[:verb], "--", *command[verb:]]
    yield [*command, "--", "-o", "--json"]
    yield [*command, "--no-such-option", "x"]


def complaints(result: Any, statuses: Sequence[int]) -> list[str]:
    """What is wrong with how a command ended."""
    printed = result.out + result.err
    hidden = {c for c in printed if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    checks = {
        f"status {result.status}": result.status not in statuses,
        "a traceback": "Traceback" in printed,
        "no message": result.status > 0 and "vlm-export: " not in result.err,
        f"a message of {len(result.err)} characters": result.status > 0 and len(result.err) > LONGEST_MESSAGE,
        f"hidden characters {hidden!r}": bool(hidden),
    }
    return [text for text, is_so in checks.items() if is_so]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(" -")[0].replace("F/", ""))
def test_odd_words_in_the_place_of_arguments(
    cli: Cli, files: Files, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files.root / "empty")
    draw, wrong, statuses = random.Random(command), [], set()
    before = files.state()
    for kept in (False, True):
        for words in changed(files.words(command, kept), files, draw):
            # Outputs that are there are refused before the rest is read.
            if kept and draw.random() > 0.2:
                continue
            result = cli(*words)
            statuses.add(result.status)
            found = complaints(result, (0, 2, 3, 4))
            after = files.state()
            if before != {path: after.get(path) for path in before}:
                found.append("something was replaced")
            new = sorted(after.keys() - before.keys(), reverse=True)
            if result.status and new:
                found.append(f"{new} is left behind")
            for path in new:
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
            wrong += [f"{found}: {[word[:200] for word in words]}: {result.err[-800:]}"] if found else []
    assert not wrong, "\n".join(wrong)
    assert 2 in statuses


# What stands in the place of any value of a manifest.
WRONG: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\x1b[2J\u202e", "../x", "/etc/passwd", "x" * 5000, "0" * 64, [], {}, [[]], [None]),
    *([{}], {"": 0}, -1, 0, 1, 3, 0.5, -1e300, 1e308, 1e-320, 2**31, 2**63 - 1, 2**63, 10**40, ["x"] * 3, [1e308] * 3),
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value lies, containers included."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from paths_of(entry, (*path, key))


def one_of_each(paths: Iterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Of places that differ in a list's index or in the name of a file or tool alone, the first."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in paths:
        named = path[0] in ("files", "tools") and len(path) > 1
        kind = tuple("*" if isinstance(step, int) or (named and i == 1) else step for i, step in enumerate(path))
        found.setdefault(kind, path)
    return list(found.values())


def mutated(manifest: str, path: tuple[Any, ...], draw: random.Random) -> Iterator[tuple[str, str]]:
    """What was done to the value there, and the manifest with that: another value, none, and a field too many."""
    for number in range(DRAWN + 1):
        data = json.loads(manifest)
        *above, key = path
        place = data
        for step in above:
            place = place[step]
        if number == 0:
            done = f"no {path}"
            del place[key]
        elif number == 1 and isinstance(place[key], dict):
            done = f"{path} with a field that nothing knows"
            place[key] = {**place[key], "x\x1b": 1}
        else:
            place[key] = draw.choice(WRONG)
            done = f"{path} = {place[key]!r:.100}"
        yield done, json.dumps(data)


@pytest.mark.parametrize("name", ["bundle", "exported"])
def test_odd_values_in_a_manifest(cli: Cli, files: Files, name: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(files.root / name, tmp_path / "bundle"))
    image_path, output = files.root / "image.png", tmp_path / "x.npy"
    commands: dict[str, tuple[Sequence[object], Sequence[int]]] = {
        "inspect": (("inspect", bundle), (0, 3)),
        "embed": (("embed", bundle, image_path, "-o", output, "--quiet", "--threads", "1"), (0, 2, 3)),
        "classify": (("classify", bundle, image_path, "cat", "dog", "--template", "{}", "--threads", "1"), (0, 2, 3)),
    }
    if name == "exported":
        # It alone has a record, whose replay takes longest.
        commands = {"verify": (("verify", bundle, "--threads", "1"), (0, 1, 2, 3))}
    manifest, draw, wrong = (bundle / "vlm_export.json").read_text(encoding="utf-8"), random.Random(name), []
    for path in one_of_each(paths_of(json.loads(manifest))):
        if "verification" in path[:-1] and draw.random() > 0.3:
            # Some of the many numbers that verify does not read.
            continue
        mutations = list(mutated(manifest, path, draw))
        for done, text in mutations if name == "bundle" else [draw.choice(mutations)]:
            (bundle / "vlm_export.json").write_text(text, encoding="utf-8")
            words, statuses = commands[draw.choice(sorted(commands))]
            result = cli(*words)
            found = complaints(result, statuses)
            if result.status and output.exists():
                found.append("embeddings were written")
            output.unlink(missing_ok=True)
            wrong += [f"{found}: {words[0]} with {done}: {result.err[-800:]}"] if found else []
    assert not wrong, "\n".join(wrong)


def npy(*arrays: npt.NDArray[Any], **options: bool) -> bytes:
    """The arrays one after the other, as numpy writes them."""
    file = io.BytesIO()
    for array in arrays:
        np.save(file, array, **options)
    return file.getvalue()


def test_odd_files_of_embeddings(cli: Cli, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    rows = np.eye(2, 12, dtype=np.float32)
    write_embeddings(path, ["a", "b"], rows, EmbeddingsMeta("text", "m", "0" * 64))
    right, side = path.read_bytes(), np.frombuffer(b"{}", np.uint8)
    notes = right[len(npy(rows)) :]
    odd = {
        "objects": npy(np.array([{}, None], dtype=object), allow_pickle=True) + notes,
        "NaN": npy(np.full((2, 12), np.nan, np.float32)) + notes,
        "a header without end": b"\x93NUMPY\x01\x00\xff\xff{" + right,
        "a huge shape": right.replace(b"(2, 12)", b"(9" + b"9" * 15 + b",)", 1),
        "a negative shape": right.replace(b"(2, 12)", b"(-2,12)", 1),
        "a nested header": right.replace(b"(2, 12)", b"((2,)," * 30 + b")", 1),
        "a third array": right + notes,
        "notes of no object": npy(rows, np.frombuffer(b"[]", np.uint8)),
        "notes that are nested": npy(rows, np.frombuffer(b"[" * 100_000, np.uint8)),
        "notes that are empty": npy(rows, side),
        **{f"{array.dtype} {array.shape}": npy(array) + notes for array in odd_arrays()},
        **{f"the first {size} bytes": right[:size] for size in range(0, len(right), 97)},
        **{f"without the first {size} bytes": right[size:] for size in range(1, len(right), 311)},
    }
    for what, raw in odd.items():
        path.write_bytes(raw)
        for options in ((), ("--rerank",)):
            result = cli("search", files.root / "bundle", path, "cat", *options)
            assert not complaints(result, (3,)), (what, result)
            assert str(path) in result.err
        assert path.read_bytes() == raw


def odd_arrays() -> Iterator[npt.NDArray[Any]]:
    """Of other dtypes and shapes than two rows of 12 numbers of float32."""
    for dtype in (np.float64, np.int32, np.complex64, "U3", "V4", [("a", "f4")], "M8[s]", ">f4", np.float16, bool):
        yield np.zeros((2, 12), dtype)
    for shape in ((), (0,), (24,), (2, 0), (0, 12), (1, 12), (3, 12), (2, 12, 1), (1,) * 30):
        yield np.zeros(shape, np.float32)
