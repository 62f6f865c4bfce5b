"""`moe-hf presets`: list the configurations for `--config_name`, with parameter counts."""

import argparse

from ..presets import preset_names, read_preset


def add_parser(commands) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("presets", help="list the configurations for --config_name, with parameter counts")
    parser.set_defaults(run=_presets)


def _presets(arguments: argparse.Namespace) -> None:
    from ..checkpoint.model_card import active_parameters
    from ..training.model_config import make_config

    print(f"{'preset':<16} {'parameters':>14} {'active':>14}  layers (sparse)  experts  per token")
    for name in preset_names():
        config = make_config(read_preset(name))
        count = active_parameters(config)
        layers = f"{config.num_hidden_layers} ({config.num_sparse_layers})"
        print(
            f"{name:<16} {count.total:>14,} {count.active:>14,}  {layers:<15}  {config.num_experts:>7}  "
            f"{config.num_experts_per_tok:>9}"
        )
