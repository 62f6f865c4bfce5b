"""YAML whose numbers are those of Python."""

import re

import yaml


class _FloatLoader(yaml.SafeLoader):
    """YAML as its version 1.2 and Python read numbers: 1e-6 is one."""


_FloatLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str):
    """Return what the text means; numbers such as `1e-6` are numbers."""
    return yaml.load(text, Loader=_FloatLoader)
