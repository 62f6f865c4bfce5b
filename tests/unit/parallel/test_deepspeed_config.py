"""A DeepSpeed JSON is read as it is or not at all, and tells and takes the size of expert parallelism."""

import json

import pytest
from deepspeed_mistakes import config_with, refuses

from moe_hf.parallel import deepspeed_config as dc


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1,\n "b": }', "is not JSON in line 2: Expecting value"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', 'key "stage" stands twice in one object'),
        ("[1, 2]", 'must hold an object {"key": value, ...}, not [1, 2]'),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ("", "is not JSON in line 1"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with refuses(sentence) as caught:
        dc.read_deepspeed_json(str(path))
    assert "ds.json" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path):
    with refuses("absent.json cannot be read: No such file or directory"):
        dc.read_deepspeed_json(tmp_path / "absent.json")
    with refuses("cannot be read: Is a directory"):
        dc.read_deepspeed_json(tmp_path)
    (tmp_path / "latin1.json").write_bytes(b'{"a": "\xe9"}')
    with refuses("latin1.json is not UTF-8 text"):
        dc.read_deepspeed_json(tmp_path / "latin1.json")


def test_reading_a_dict_copies_it_deeply():
    config = config_with()
    copied = dc.read_deepspeed_json(config)
    copied["zero_optimization"]["stage"] = 3
    assert config == config_with()


def test_expert_parallel_size_replaces_the_one_of_the_file():
    config = config_with({"expert_parallel.use_grouped_mm": False})
    larger = dc.with_expert_parallel_size(config, 4)
    assert larger["expert_parallel"] == {"enabled": True, "autoep_size": 4, "use_grouped_mm": False}
    off = dc.with_expert_parallel_size(config, 0)
    assert off["expert_parallel"] == {"enabled": False, "use_grouped_mm": False}
    assert config == config_with({"expert_parallel.use_grouped_mm": False})
    assert dc.with_expert_parallel_size({}, 1) == {"expert_parallel": {"enabled": True, "autoep_size": 1}}
    for wrong in (-1, 2.0, True, "2"):
        with refuses(f"expert_parallel_size={json.dumps(wrong)} must be an integer of at least 0"):
            dc.with_expert_parallel_size(config, wrong)


@pytest.mark.parametrize(
    ("section", "enabled", "size"),
    [
        ({}, False, 0),
        ({"enabled": False, "autoep_size": 2}, False, 0),
        ({"autoep_size": 2}, False, 0),  # DeepSpeed's default is off, whatever the size says
        ({"enabled": True}, True, 1),
        ({"enabled": True, "autoep_size": 4}, True, 4),
    ],
)
def test_getters_tell_size_one_from_disabled(section, enabled, size):
    config = {"expert_parallel": section}
    assert (dc.autoep_enabled(config), dc.expert_parallel_size(config), dc.zero_stage(config)) == (enabled, size, 0)
