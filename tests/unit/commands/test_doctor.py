"""`moe-hf doctor` prints a table or the documented JSON; 0 if all is well, 1 if not, 2 for a mistake."""

import json

import pytest

from moe_hf import cli
from moe_hf.commands import doctor
from moe_hf.doctor import examination
from moe_hf.doctor.findings import OK, WRONG, Finding

NUMBERS = {
    "ranks": 2,
    "on_cpu": True,
    "layout": "2 processes",
    "seconds": 20.0,
    "losses": [6.0],
    "grad_norms": [1.0],
    "losses_of_one_process": [6.0],
    "grad_norms_of_one_process": [1.0],
    "exchange": {"all_reduce": {"seconds": 1.0, "bytes": 1, "gigabytes_per_second": 1.0, "right": True}},
    "last_lines": [],
}


@pytest.fixture
def installation(monkeypatch):
    """Function that sets what the checks of the installation find; libraries print besides."""

    def find(*findings: Finding) -> None:
        def versions() -> list[Finding]:
            print("noise of a library")
            return list(findings)

        monkeypatch.setattr(examination, "check_versions", versions)
        monkeypatch.setattr(examination, "check_compiler", lambda config: [])

    find(Finding("versions", "torch", OK, "2.13.0"))
    return find


@pytest.fixture
def self_tests(monkeypatch):
    """What self-tests are asked for; each finds that all is well."""
    asked = []

    def run(run, num_ranks, **others):
        asked.append((run, num_ranks, others))
        return [Finding("self-test", "loss", OK, "6.0")], NUMBERS

    monkeypatch.setattr(examination, "run_self_test", run)
    return asked


def examined(capsys, *words) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(["doctor", *map(str, words)])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def test_an_installation(installation, capsys):
    code, out, err = examined(capsys)
    assert code == 0 and out.startswith("versions\n  ✓ torch") and out.endswith("\nAll is well.\n")
    assert "no run was named" in out and "noise" not in out and "versions …" in err


def test_what_is_wrong_ends_with_1_and_says_what_to_change(installation, capsys):
    installation(Finding("versions", "torch", WRONG, "1.0", "pip install torch"))
    code, out, _ = examined(capsys)
    assert code == 1 and "✗ torch" in out and "-> pip install torch" in out
    assert out.endswith("\nNot well: versions: torch.\n")
    assert json.loads(examined(capsys, "--json")[1])["well"] is False


def test_the_flags_of_a_run(installation, self_tests, capsys, tmp_path):
    words = ["--config_name", "quickstart", "--deepspeed", "ds_configs/zero3_ep.json", "--gpus", 8, "--bf16"]
    words += ["--expert_parallel_size", 4, "--output_dir", tmp_path, "--", "--learning_rate", "1e-4"]
    code, out, _ = examined(capsys, *words)
    assert code == 0, out
    ((run, num_ranks, _),) = self_tests
    assert run.topology.describe() == "8 processes, ZeRO 3, EP 4, bfloat16" and run.namespace.learning_rate == 1e-4
    assert num_ranks <= 4 and "8 processes, ZeRO 3, EP 4, bfloat16" in out and "for 8 processes" in out


def test_a_file_of_arguments(installation, self_tests, capsys, tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text(f"config_name: quickstart\ndeepspeed: ds_configs/zero2_ep.json\noutput_dir: {tmp_path / 'out'}\n")
    assert examined(capsys, path, "--gpus", 2, "--self_test_ranks", 1)[0] == 0
    assert self_tests[0][1] == 1 and self_tests[0][0].topology.zero_stage == 2


def test_a_run_that_is_refused_is_not_tried(installation, self_tests, capsys, tmp_path):
    words = ["--config_name", "quickstart", "--deepspeed", "ds_configs/zero3_ep.json", "--output_dir", tmp_path]
    code, out, _ = examined(capsys, *words, "--gpus", 3)
    assert code == 1 and not self_tests
    assert "world_size=3 is no multiple of expert_parallel_size=2" in out and "the run itself is refused" in out


def test_the_json_is_as_documented(installation, self_tests, capsys, tmp_path):
    words = ["--config_name", "quickstart", "--deepspeed", "ds_configs/zero3_ep.json", "--output_dir", tmp_path]
    code, out, _ = examined(capsys, *words, "--gpus", 2, "--json")
    record = json.loads(out)
    assert code == 0 and record["well"] and record["self_test"] == NUMBERS
    assert {finding["area"] for finding in record["findings"]} >= {"versions", "accelerator", "space", "run"}
    names = {*record, *record["findings"][0], *NUMBERS, *NUMBERS["exchange"], *NUMBERS["exchange"]["all_reduce"]}
    for name in names:
        assert f"`{name}`" in doctor.__doc__, name
    record = json.loads(examined(capsys, *words, "--self_test_ranks", 0, "--json")[1])
    assert record["self_test"] is None and len(self_tests) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config_name", "quickstart"], "A run without --deepspeed has no processes"),
        (["--config_name", "nosuch", "--deepspeed", "ds_configs/zero2.json"], "--config_name nosuch is neither"),
        (["--config_name", "quickstart", "--deepspeed", "nosuch.json"], "DeepSpeed JSON nosuch.json cannot be read"),
        (["--gpus", "0"], "--gpus 0 must be at least 1."),
        (["--gpus_per_node", "0"], "--gpus_per_node 0 must be at least 1."),
        (["--self_test_ranks", "-1"], "--self_test_ranks -1 must be 0"),
        (["--timeout", "0"], "--timeout 0 must be more than 0 seconds."),
        (["--", "--learnin_rate", "1"], "did you mean --learning_rate?"),
    ],
)
def test_mistakes_in_the_command_line(words, sentence, installation, capsys):
    code, out, err = examined(capsys, *words)
    assert code == 2 and out == "" and sentence in err and "Traceback" not in err


def test_the_work_dir_must_be_new(installation, capsys, tmp_path):
    (tmp_path / "file").touch()
    words = ["--config_name", "quickstart", "--deepspeed", "ds_configs/zero3_ep.json", "--gpus", 2]
    code, _, err = examined(capsys, *words, "--output_dir", tmp_path / "out", "--work_dir", tmp_path)
    assert code == 2 and "is not empty; give a new folder" in err
