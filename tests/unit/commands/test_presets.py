"""`moe-hf presets` lists every configuration with its sizes, and prints small twins that training takes."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout

import pytest
from launching import ROOT

from moe_hf import MoEConfig, cli
from moe_hf.checkpoint.model_card import active_parameters
from moe_hf.presets import preset_names, read_preset
from moe_hf.presets.scaling import scaled_down
from moe_hf.training.arguments import ModelArguments
from moe_hf.training.model_config import build_config


@pytest.fixture(scope="module")
def listing() -> list[str]:
    with redirect_stdout(io.StringIO()) as printed:
        cli.main(["presets"])
    return printed.getvalue().splitlines()


def test_rows_hold_sizes_and_memory(listing):
    rows = {line.split()[0]: line.split()[1:] for line in listing[1 : 1 + len(preset_names())]}
    assert rows["quickstart"] == ["4,625,344", "3,298,240", "4", "(2)", "8", "2", "9.25MB", "74.0MB"]
    assert rows["gpt-5m"] == ["5,212,928", "5,212,928", "4", "(0)", "0", "0", "10.4MB", "83.4MB"]
    assert rows["xlarge-70b"] == ["70,284,172,288", "40,085,183,488", "60", "(20)", "8", "2", "141GB", "1.12TB"]
    assert rows["qwen3-30b-a3b"][:6] == ["30,532,122,624", "3,353,032,704", "48", "(48)", "128", "8"]


def test_every_preset_is_listed_once_by_its_active_size(listing):
    names, counts = zip(*(line.split()[:3:2] for line in listing[1 : 1 + len(preset_names())]), strict=True)
    assert sorted(names) == preset_names()
    active = [int(count.replace(",", "")) for count in counts]
    assert active == sorted(active)
    assert active == [active_parameters(MoEConfig(**read_preset(name))).active for name in names]


def test_table_is_aligned_and_explained(listing):
    header, *rows = listing[: 1 + len(preset_names())]
    # Of the last column the right ends, of the layers the left ones.
    assert len({len(line) for line in [header, *rows]}) == 1
    assert all(row[header.index("layers") - 2 : header.index("layers")] == "  " for row in rows)
    assert all(row[header.index("layers")].isdigit() for row in rows)
    explanation = " ".join(listing[1 + len(preset_names()) :])
    assert "include the embeddings, tied ones once" in explanation
    assert "2 bytes a parameter" in explanation and "16 bytes a parameter" in explanation
    assert max(map(len, listing)) <= 120


def test_json_tells_the_same(capsys):
    cli.main(["presets", "--json"])
    presets = json.loads(capsys.readouterr().out)
    assert list(presets) == preset_names()
    assert presets["small-1.3b"] == {
        "size": {
            "parameters": 1_313_461_248,
            "active_parameters": 860_476_416,
            "layers": 12,
            "sparse_layers": 4,
            "experts": 8,
            "experts_per_token": 2,
        }
    }


@pytest.mark.parametrize("name", preset_names())
def test_twin_can_be_trained_from_the_printed_file(name, capsys, tmp_path):
    cli.main(["presets", "--scaled_down", name])
    file = tmp_path / "twin.json"
    file.write_text(capsys.readouterr().out)
    assert build_config(ModelArguments(config_name=str(file))) == MoEConfig(**scaled_down(read_preset(name)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scaled_down", "quikstart"], "invalid choice: 'quikstart' (choose from"),
        (["--scaled_down"], "expected one argument"),
        (["--json", "--scaled_down", "quickstart"], "not allowed with argument --json"),
    ],
)
def test_wrong_flags_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["presets", *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_installed_from_the_wheel_it_needs_no_clone(tmp_path, listing):
    """The wheel brings every JSON file: outside the clone the same table and the same twins are printed."""
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "moe_hf", sources / "moe_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path / "wheels", sources]
    subprocess.run([sys.executable, "-m", *build], capture_output=True, check=True)
    (wheel,) = (tmp_path / "wheels").glob("moe_hf-*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(sources)
    elsewhere.mkdir()
    code = (
        "import moe_hf; from moe_hf import cli; print(moe_hf.__file__); cli.main(['presets'])\n"
        "cli.main(['presets', '--scaled_down', 'fine-64e'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    origin, *printed = done.stdout.splitlines()
    assert origin == str(site / "moe_hf" / "__init__.py")
    assert printed[: len(listing)] == listing
    assert json.loads("\n".join(printed[len(listing) :])) == scaled_down(read_preset("fine-64e"))
