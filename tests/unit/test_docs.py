"""What the documentation tells a reader to type exists: flags, presets, fields of the model, files, headings."""

import argparse
import re
import shlex
from dataclasses import fields

import pytest
from launching import ROOT

from benchmarks.run import build_parser as build_benchmarks_parser
from moe_hf.cli import COMMANDS
from moe_hf.configuration_moe import MoEConfig
from moe_hf.training.arguments import build_parser

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PRESETS = {path.stem for path in (ROOT / "moe_hf" / "presets").glob("*.json")}
FIELDS = {field.name for field in fields(MoEConfig)}
ENDS_OF_COMMAND = {"|", "||", "&&", ";", "&", ">", ">>", "2>"}
# Folders whose files are named by their path from the root, or from the package.
FOLDERS = (
    "moe_hf|benchmarks|scripts|docs|ds_configs|tests|"
    "parallel|training|data|checkpoint|commands|reporting|unit|distributed|fault"
)
PATH = re.compile(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]+\.(?:py|sh|json|md|yaml|jinja)")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


@pytest.fixture(scope="module")
def training_flags() -> set[str]:
    return flags_of(build_parser())


@pytest.fixture(scope="module")
def flags_of_commands() -> dict[str, set[str]]:
    """The flags of each subcommand of moe-hf."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    return {name: flags_of(parser) for name, parser in subparsers.choices.items()}


def commands_in(text: str) -> list[list[str]]:
    """Return the words of every command line in blocks of bash and console; in the latter a `$` begins it."""
    found = []
    for language, block in re.findall(r"^```(bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        if language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def arguments_after(words: list[str], is_program) -> list[str]:
    """Return what is given to the program, or nothing when it is not among the words."""
    start = next((i for i, word in enumerate(words) if is_program(word)), len(words))
    rest = words[start + 1 :]
    end = next((i for i, word in enumerate(rest) if word in ENDS_OF_COMMAND), len(rest))
    return rest[:end]


def trains(word: str) -> bool:
    return word.endswith("run_clm_moe.py") or re.fullmatch(r"(?:\./)?scripts/train_\w+\.sh", word) is not None


def unknown_flags(words: list[str], known: set[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")} - known


def value_of(words: list[str], flag: str) -> str | None:
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word == flag), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_command_lines_can_be_typed(page, training_flags, flags_of_commands):
    for words in commands_in(page.read_text()):
        arguments = arguments_after(words, trains)
        assert not unknown_flags(arguments, training_flags), words
        preset = value_of(arguments, "--config_name")
        assert preset is None or preset in PRESETS or preset.endswith((".json", ".yaml")), words
        overrides = value_of(arguments, "--config_overrides") or ""
        assert {part.split("=")[0] for part in overrides.split(",") if "=" in part} <= FIELDS, words
        arguments = arguments_after(words, lambda word: word == "benchmarks.run")
        assert not unknown_flags(arguments, flags_of(build_benchmarks_parser())), words
        if command := arguments_after(words, lambda word: word.endswith("moe-hf")):
            assert command[0] in flags_of_commands or command[0].startswith("--"), words
            assert not unknown_flags(command[1:], flags_of_commands.get(command[0], set())), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_in_the_text_exist(page, training_flags, flags_of_commands):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    known = training_flags.union(*flags_of_commands.values(), flags_of(build_benchmarks_parser()))
    for code in re.findall(r"`(--[^`]+)`", prose):
        assert not unknown_flags(code.split(), known), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_headings_exist(page):
    text = page.read_text()
    for path in PATH.findall(text):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "moe_hf", ROOT / "tests")), path
    for target in re.findall(r"\]\(([^)#:\s]*(?:#[\w-]+)?)\)", text):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target
