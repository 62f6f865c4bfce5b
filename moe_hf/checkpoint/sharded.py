"""A training checkpoint as whole tensors under their Hugging Face names, whatever layout wrote it."""

import json
from pathlib import Path

import torch

from ..configuration_moe import MoEConfig
from ..errors import CheckpointError
from .manifest import EXPORT_NAME, read_manifest
from .zero_layout import is_expert_weight, open_layout


class ShardedCheckpoint:
    """Reads `checkpoint-N` of any ZeRO stage, world size and expert-parallel size, in one process.

    Attributes:
        path: the `checkpoint-N` folder.
        manifest: its record.
        topology: of the run that wrote it.
        config: of its model.
        shapes: shape of every whole tensor, by its Hugging Face name.
        frozen: Hugging Face names of the parameters that were not trained: they have no optimizer states, and `"fp32"`
            of them is the weight in the dtype of training.
        state_names: `"fp32"` and the optimizer's states, such as `"exp_avg"` and `"exp_avg_sq"`.
        step: updates that the optimizer has counted; `None` if it is one that does not count.
        counters: DeepSpeed's own counters.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.topology = self.manifest.topology
        if not self.topology.has_deepspeed:
            raise CheckpointError(
                f"{self.path} was written without DeepSpeed and has no shards; its model is {self.path / EXPORT_NAME}."
            )
        if self.topology.tensor_parallel_size > 1:
            raise CheckpointError(
                f"{self.path} has matrices cut by tensor_parallel_size={self.topology.tensor_parallel_size}, which are "
                f"put together while training only; its model, in {self.topology.dtype}, is {self.path / EXPORT_NAME}."
            )
        self.config = _read_config(self.path)
        self._layout = open_layout(_state_folder(self.path), self.topology.zero_stage, self.topology.routers)
        self.frozen = {_hf_name(name) for name in self._layout.frozen}
        self.state_names = self._layout.state_names()
        self.step = self._layout.step()
        self.counters = self._layout.counters
        self.buffers = {_hf_name(name): tensor for name, tensor in self._layout.buffers.items()}
        self.shapes = self._whole_shapes() | {name: tuple(tensor.shape) for name, tensor in self.buffers.items()}

    def read(self, name: str, state: str = "fp32") -> torch.Tensor:
        """Return one whole tensor: the float32 weight, an optimizer state of it, or a buffer.

        Args:
            name: as in an exported model.
            state: one of `state_names`.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or not all of it.
        """
        if name in self.buffers:
            return self.buffers[name]
        engine_name = name.replace(".mlp.gate.", ".mlp.router.")
        if name in self._layout.shapes:
            return self._layout.read(name, state)
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            return self._read_experts((f"{prefix}w1", f"{prefix}w3"), state)
        if name.endswith(".experts.down_proj"):
            return self._read_experts((f"{name.removesuffix('down_proj')}w2",), state)
        if engine_name not in self._layout.shapes:
            raise CheckpointError(f"{self.path} holds no {name}; the model it was trained with has none.")
        return self._layout.read(engine_name, state)

    def _read_experts(self, parts: tuple[str, ...], state: str) -> torch.Tensor:
        """Join `parts` along the rows of each expert, and the ranks' experts in the order of their EP rank."""
        if missing := [name for name in parts if name not in self._layout.shapes]:
            raise CheckpointError(f"{self.path} holds no {missing[0]}; the model it was trained with has none.")
        num_ranks = self._layout.num_ep_ranks
        local_shapes = [self._layout.shapes[name] for name in parts]
        num_local, columns = local_shapes[0][0], local_shapes[0][2]
        whole = torch.empty(num_local * num_ranks, sum(shape[1] for shape in local_shapes), columns)
        for ep_rank in range(num_ranks):
            experts, row = slice(ep_rank * num_local, (ep_rank + 1) * num_local), 0
            for name, shape in zip(parts, local_shapes, strict=True):
                whole[experts, row : row + shape[1]] = self._layout.read(name, state, ep_rank)
                row += shape[1]
        return whole

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for name, shape in self._layout.shapes.items():
            if not is_expert_weight(name):
                shapes[_hf_name(name)] = shape
                continue
            prefix, experts = name[:-2], shape[0] * self._layout.num_ep_ranks
            if name.endswith("w1"):
                shapes[f"{prefix}gate_up_proj"] = (experts, 2 * shape[1], shape[2])
            elif name.endswith("w2"):
                shapes[f"{prefix}down_proj"] = (experts, *shape[1:])
        return shapes


def _hf_name(engine_name: str) -> str:
    return engine_name.replace(".mlp.router.", ".mlp.gate.")


def _read_config(checkpoint: Path) -> MoEConfig:
    path = checkpoint / EXPORT_NAME / "config.json"
    try:
        return MoEConfig.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} has no {EXPORT_NAME}/config.json, which describes its model.") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:120]}).") from None


def _state_folder(checkpoint: Path) -> Path:
    """Return the `global_stepN` folder that DeepSpeed's `latest` names."""
    try:
        folder = checkpoint / (checkpoint / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(f"{checkpoint} has no readable file `latest`; use another checkpoint.") from None
    if folder.parent != checkpoint or not folder.is_dir():
        raise CheckpointError(f"{checkpoint} is torn: {folder.name} is missing; use another checkpoint.")
    return folder
