"""Whether the installed packages are those that work together."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from ..parallel.versions import SUPPORTED, require_supported
from .findings import ADVICE, OK, WRONG, Finding

_AREA = "versions"
# What a training run consists of: each also has to agree with what the others need.
_CORE = ("torch", "deepspeed", "transformers", "accelerate")
_WITH_NEEDS = (*_CORE, "datasets", "tokenizers", "huggingface_hub")
# Packages that only some flags use, as they are imported.
_OPTIONAL = {"flash-attn": "flash_attn", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}


def check_versions() -> list[Finding]:
    """Compare what is installed with what moe_hf was made for, and the packages of a run with each other."""
    needs = _requirements("moe_hf") or [Requirement(f"{name}{specifier}") for name, specifier in SUPPORTED.items()]
    required = {_plain(need.name): need for need in needs if need.marker is None or need.marker.evaluate()}
    findings = [Finding(_AREA, "python", OK, platform.python_version())]
    findings += [_compared(name, required.pop(name, Requirement(name))) for name in _CORE]
    others = [_compared(name, need) for name, need in required.items()]
    wrong = [finding for finding in others if finding.status != OK]
    findings += wrong or [Finding(_AREA, "other packages", OK, f"{len(others)}, all as required")]
    findings += [finding for name in _OPTIONAL if (finding := _optional(name, needs)) is not None]
    findings += _disagreements()
    return findings + [_attached(package) for package in SUPPORTED]


def _compared(name: str, need: Requirement) -> Finding:
    """Compare the installed version of a package with what is needed."""
    installed = _version(name)
    wanted = f"pip install '{need}'"
    if installed is None:
        return Finding(_AREA, name, WRONG, "not installed", wanted)
    if not need.specifier.contains(installed, prereleases=True):
        return Finding(_AREA, name, WRONG, f"{installed}, but moe_hf needs {need.specifier}", wanted)
    return Finding(_AREA, name, OK, installed)


def _optional(name: str, needs: list[Requirement]) -> Finding | None:
    """Judge a package that may be missing, but must fit and load when it is there."""
    installed = _version(name)
    if installed is None:
        return None
    need = next((need for need in needs if _plain(need.name) == name), Requirement(name))
    if not need.specifier.contains(installed, prereleases=True):
        remedy = f"pip install '{need.name}{need.specifier}', or leave its flags out"
        return Finding(_AREA, name, ADVICE, f"{installed}, but moe_hf was tried with {need.specifier}", remedy)
    try:
        importlib.import_module(_OPTIONAL[name])
    except Exception as error:  # compiled for another torch, say: whatever it raises, Transformers will meet it too
        what = " ".join(str(error).split())[:120]
        remedy = f"reinstall it for torch {_version('torch')}, or pip uninstall {name}"
        return Finding(_AREA, name, WRONG, f"{installed} cannot be imported: {type(error).__name__}: {what}", remedy)
    return Finding(_AREA, name, OK, installed)


def _disagreements() -> Iterator[Finding]:
    """Yield what the packages of a run need of others and do not find, as `pip check` would tell it."""
    for package in _WITH_NEEDS:
        for need in _requirements(package):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            installed = _version(need.name)
            if installed is not None and need.specifier.contains(installed, prereleases=True):
                continue
            found = f"{package} {_version(package)} needs {need}, but {installed or 'none'} is installed"
            yield Finding(_AREA, need.name, WRONG, found, f"pip install '{need.name}{need.specifier}'")


def _attached(package: str) -> Finding:
    """Judge whether the names inside a library that moe_hf attaches to are where it expects them."""
    name = f"{package} internals"
    try:
        require_supported(package)
    except ImportError as error:
        return Finding(_AREA, name, WRONG, str(error), f"pip install '{package}{SUPPORTED[package]}'")
    return Finding(_AREA, name, OK, "where moe_hf attaches to them")


def _requirements(package: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(package) or ()]
    except metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
