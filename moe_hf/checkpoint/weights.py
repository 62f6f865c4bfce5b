"""Named tensors in safetensors files, read and written one shard at a time."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsFolder:
    """The weights of a Hugging Face folder, of which only what is asked for is read.

    Args:
        folder: holds `model.safetensors`, or the shards that its index names.

    Raises:
        CheckpointError: there are no safetensors, the index names what is not there, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self._paths():
            self._open(path)
        if missing := self._indexed.keys() - self._file_of.keys():
            raise CheckpointError(f"{self.folder} is incomplete: {min(missing)} is in its index but in no file.")

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in the dtype it is stored in."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def _paths(self) -> list[Path]:
        self._indexed: dict[str, str] = {}
        if (self.folder / INDEX_NAME).is_file():
            try:
                self._indexed = json.loads((self.folder / INDEX_NAME).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(f"{self.folder / INDEX_NAME} is damaged; copy the folder again.") from None
            paths = [self.folder / name for name in sorted(set(self._indexed.values()))]
        else:
            paths = [self.folder / SINGLE_NAME]
        for path in paths:
            if path.parent != self.folder or not path.is_file():
                raise CheckpointError(
                    f"{self.folder} has no {path.name}; weights are read from safetensors only, never from pickles."
                )
        return paths

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_slice(name)
                    self._file_of[name] = path
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = _DTYPES[tensor.get_dtype()]
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); copy the folder again.") from None


# Names of the safetensors format.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def plan_shards(expected: Mapping[str, torch.Tensor], max_shard_size: str) -> StateDictSplit:
    """Return which file each tensor goes to; `expected` are tensors on the meta device by their names."""
    return split_torch_state_dict_into_shards(dict(expected), max_shard_size=max_shard_size)


def write_weights(
    folder: Path,
    expected: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor | None],
    *,
    max_shard_size: str = "5GB",
    collective: bool = False,
) -> None:
    """Write `expected` to safetensors in `folder`, never holding more than one shard and one tensor.

    Args:
        folder: exists, and holds no weights yet.
        expected: what has to be written, on the meta device: names, shapes, and the dtypes it is cast to.
        read: returns the tensor of a name, or `None` on a process that does not write.
        max_shard_size: as in `save_pretrained`.
        collective: `read` waits for other processes, so that all names are read even after an error.

    Raises:
        CheckpointError: a tensor has another shape than expected, or what was written is not what was expected.
        OSError: the disk is full or cannot be written.
    """
    plan = plan_shards(expected, max_shard_size)
    error: Exception | None = None
    written = False
    for filename, names in plan.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = read(name)
            if tensor is None or error is not None:
                continue
            if tensor.shape != expected[name].shape:
                shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
                error = CheckpointError(f"{name} has shape {shape} but the model's is {wanted}.")
            else:
                shard[name] = tensor.to(expected[name].dtype).contiguous()
            if error is not None and not collective:
                raise error
        if shard and error is None:
            written = True
            try:
                save_file(shard, folder / filename, {"format": "pt"})
            except Exception as caught:
                if not collective:
                    raise
                error = caught
    if error is not None:
        raise error
    if written:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        verify_weights(folder, expected)


def verify_weights(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` unless the files in `folder` hold exactly the expected names, shapes and dtypes."""
    found = SafetensorsFolder(folder)
    missing = sorted(expected.keys() - found.shapes.keys())
    surplus = sorted(found.shapes.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"The weights are wrong: missing {missing[:3] or 'nothing'}, surplus {surplus[:3] or 'none'}."
        )
    for name, shape in found.shapes.items():
        wanted = expected[name]
        if wanted.shape != shape or wanted.dtype != found.dtypes[name]:
            raise CheckpointError(
                f"{name} was written as {found.dtypes[name]} {shape}, not {wanted.dtype} {tuple(wanted.shape)}."
            )
