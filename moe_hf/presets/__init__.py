"""Ready-made configurations: each JSON file beside this one holds exactly the keyword arguments of `MoEConfig`."""

import difflib
import json
from importlib import resources

from ..errors import ConfigError


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read_preset(name: str) -> dict:
    """Return the keyword arguments of the preset called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in preset_names():
        nearest = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(preset_names())}."
        raise ConfigError(f"--config_name {name} is neither a preset nor a .json or .yaml file; {hint}")
    return json.loads((resources.files(__package__) / f"{name}.json").read_text())
