"""The subcommands of `moe-hf`, one file each with `add_parser(commands)`."""
