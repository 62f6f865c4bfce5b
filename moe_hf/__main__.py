"""`python -m moe_hf` is the `moe-hf` command."""

from .cli import main

if __name__ == "__main__":
    main()
