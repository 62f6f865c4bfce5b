"""Versions that do not go together are named, with what to install."""

import sys
from importlib import metadata
from types import ModuleType

import pytest

from moe_hf.doctor import versions
from moe_hf.doctor.findings import ADVICE, OK, WRONG
from moe_hf.doctor.versions import check_versions


@pytest.fixture(autouse=True)
def nothing_is_imported(monkeypatch):
    """Optional packages take seconds to import."""
    for module in ("flash_attn", "torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))


@pytest.fixture
def pretend(monkeypatch):
    """Function that lets packages have other versions; `None` for one that is missing."""

    def set_versions(**installed: str | None) -> None:
        real = metadata.version

        def version(name: str) -> str:
            plain = name.lower().replace("-", "_")
            if plain not in installed:
                return real(name)
            if installed[plain] is None:
                raise metadata.PackageNotFoundError(name)
            return installed[plain]

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


def statuses() -> dict[str, str]:
    return {finding.name: finding.status for finding in check_versions()}


def remedies() -> str:
    return "\n".join(finding.remedy for finding in check_versions() if finding.status != OK)


def test_this_environment_is_well():
    found = statuses()
    assert set(found.values()) == {OK}
    assert {"python", "torch", "deepspeed", "transformers", "accelerate", "other packages"} <= found.keys()


def test_a_version_out_of_range_is_wrong_and_the_right_one_is_told(pretend):
    pretend(transformers="5.1.0", accelerate=None)
    found = statuses()
    assert found["transformers"] == found["accelerate"] == WRONG
    assert "pip install 'transformers<6,>=5.17'" in remedies() and "pip install 'accelerate" in remedies()


def test_a_smaller_package_is_only_named_when_it_is_wrong(pretend):
    assert "safetensors" not in statuses()
    pretend(safetensors="0.1.0")
    assert statuses()["safetensors"] == WRONG and "other packages" not in statuses()


def test_packages_that_disagree_with_each_other_are_found(pretend):
    pretend(tokenizers="0.99.0")  # above moe_hf's lower bound, but not what Transformers takes
    wrong = [finding for finding in check_versions() if finding.status == WRONG]
    assert any(f.found.startswith("transformers ") and "0.99.0 is installed" in f.found for f in wrong)


def test_an_optional_package_may_be_missing_but_must_load(pretend, monkeypatch):
    pretend(torchao=None, flash_attn="2.8.3", bitsandbytes="0.1")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what an import of an unfit build raises
    found = {finding.name: finding for finding in check_versions()}
    assert "torchao" not in found
    assert found["bitsandbytes"].status == ADVICE
    assert found["flash-attn"].status == WRONG and "ModuleNotFoundError" in found["flash-attn"].found


def test_a_library_that_has_moved_its_insides_is_wrong(monkeypatch):
    def moved(package: str) -> None:
        if package == "deepspeed":
            raise ImportError("deepspeed 0.19.8 has moved a.b, to which moe_hf attaches")

    monkeypatch.setattr(versions, "require_supported", moved)
    assert statuses()["deepspeed internals"] == WRONG and statuses()["transformers internals"] == OK
