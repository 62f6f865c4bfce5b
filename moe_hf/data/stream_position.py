"""The place in a stream in the files of a checkpoint: one for each process, with the places of its parts."""

import json
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from .streaming import TokenStream

_NAME = "data_state_{}.json"
_FORMAT = 1


def write_position(folder: Path, rank: int, stream: TokenStream, states: dict[int, dict]) -> None:
    """Write where the parts that this process reads stand."""
    record = {"format": _FORMAT, "stream": stream.describe(), "num_parts": stream.num_parts, "states": states}
    (folder / _NAME.format(rank)).write_text(json.dumps(record, default=lambda tokens: tokens.tolist()))


def read_position(checkpoint: Path, stream: TokenStream, rank: int, world_size: int) -> dict[int, dict]:
    """Divide the stream as the checkpoint did, and return where the parts of this process stand.

    Args:
        checkpoint: a `checkpoint-N` folder.
        stream: its layout is set.
        rank: of this process.
        world_size: number of processes, which may be another than the checkpoint's.

    Raises:
        ConfigError: The checkpoint read something else, or the parts cannot be dealt out evenly.
        CheckpointError: The checkpoint does not know its place in a stream.
    """
    records = [_read(path) for path in sorted(checkpoint.glob(_NAME.format("*")))]
    if not records:
        raise CheckpointError(
            f"{checkpoint} has no place in a stream, because its run did not read one; resume without --streaming, or "
            "begin the stream anew with --ignore_data_skip."
        )
    saved, current = records[0]["stream"], stream.describe()
    for name, value in current.items():
        if saved.get(name) != value:
            raise ConfigError(
                f"{checkpoint} was reading a stream with {name}={saved.get(name)}, and now it is {value}, so its place "
                "cannot be found; use what it was, or begin the stream anew with --ignore_data_skip."
            )
    stream.set_layout(records[0]["num_parts"], rank, world_size)
    states = {int(part): state for record in records for part, state in record["states"].items()}
    return {part: states[part] for part in stream.rank_parts if part in states}


def has_position(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written while a stream was read."""
    return any(checkpoint.glob(_NAME.format("*")))


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint.") from None
    if record["format"] != _FORMAT:
        raise CheckpointError(f"{path} is of another version of moe_hf; resume with the one that wrote it.")
    return record
