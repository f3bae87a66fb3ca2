"""The npm packages that the page runs on: pinned by version and by the digest of their archives, fetched by npm itself.

npm asks the registry that it is set up for. What it brings is not run and not installed: single files are taken out of
an archive whose sha512 is the one that is stated here, as in a lock file (`integrity`, Subresource Integrity).
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_export.bundle.cache_directory import cache_directory
from vlm_export.bundle.staging import staged_file
from vlm_export.errors import EnvironmentFailure, InputError

_PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class NpmPackage:
    """A package at one version.

    Attributes:
        integrity: sha512 of its archive in base64, as lock files write it.
        folder: what the page calls it.
        files: path in the archive, below `package/` → name in the page's folder.
    """

    name: str
    version: str
    integrity: str
    folder: str
    files: Mapping[str, str]

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives its archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _dist(*names: str) -> dict[str, str]:
    return {f"dist/{name}": name for name in names}


NPM_PACKAGES = (
    NpmPackage(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        "onnxruntime-web",
        {
            "package.json": "package.json",
            # WebAssembly alone, then WebGPU, which only browsers load that have it.
            **_dist("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
            **_dist("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs"),
            **_dist("ort-wasm-simd-threaded.asyncify.wasm"),
        },
    ),
    NpmPackage(
        "@huggingface/tokenizers",
        "0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        "tokenizers",
        {"package.json": "package.json", "LICENSE": "LICENSE", **_dist("tokenizers.min.mjs")},
    ),
)


def package_files(package: NpmPackage, folder: Path | None) -> dict[str, bytes]:
    """The package's files by the page's names for them.

    Args:
        folder: where archives of `npm pack` lie; None for the cache, into which npm fetches what is missing.

    Raises:
        InputError: the archive is another one than the one that is pinned, or is missing in `folder`.
        EnvironmentFailure: npm is missing, or cannot fetch the package.
    """
    archive = _fetched(package) if folder is None else folder / package.archive
    if not archive.is_file():
        raise InputError(
            "a package of the page is missing",
            where=str(archive),
            expected=f"the archive of {package.name} {package.version}",
            fix=f"make it where there is a network: npm pack {package.name}@{package.version}",
        )
    _check_integrity(package, archive)
    with tarfile.open(archive) as opened:
        members = {name: opened.extractfile(f"package/{path}") for path, name in package.files.items()}
        return {name: member.read() for name, member in members.items() if member is not None}


def _check_integrity(package: NpmPackage, archive: Path) -> None:
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode("ascii")
    if digest != package.integrity:
        raise InputError(
            "a package of the page is another one than the one that is pinned",
            where=str(archive),
            expected=f"{package.name} {package.version}: {package.integrity}",
            got=digest,
            fix="delete it, and let npm fetch it again",
        )


def _fetched(package: NpmPackage) -> Path:
    """The archive in the cache, verified before it is put there."""
    target = cache_directory() / "npm" / package.archive
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        staged_file(target, "fetching a package", overwrite=True, wait=True) as staged,
        tempfile.TemporaryDirectory() as folder,
    ):
        made = _packed(package, Path(folder))
        _check_integrity(package, made)
        shutil.copyfile(made, staged)
    return target


def _packed(package: NpmPackage, folder: Path) -> Path:
    wanted = f"{package.name}@{package.version}"
    elsewhere = f"run `npm pack {wanted}` where there is one, copy {package.archive} here, and pass --packages FOLDER"
    npm = shutil.which("npm")
    if npm is None:
        raise EnvironmentFailure(
            "npm is needed to fetch the packages that the page runs on",
            where=wanted,
            got="no npm on PATH",
            fix=f"install Node.js, or {elsewhere}",
        )
    command = [npm, "pack", wanted, "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"no answer within {_PATIENCE_SECONDS} s"]
    made = folder / package.archive
    if not made.is_file():
        raise EnvironmentFailure(
            "npm cannot fetch a package that the page runs on",
            where=wanted,
            got=next((line for line in said if "notice" not in line), "no archive"),
            fix=f"connect to the network, or {elsewhere}",
        )
    return made
