"""Where the elements of each parameter lie in the files of a DeepSpeed checkpoint.

ZeRO flattens the parameters of an optimizer group into one vector and gives every data-parallel rank a slice of it
(stages 1 and 2), or slices every parameter and flattens the slices (stage 3); stage 0 keeps parameters whole. The same
vectors exist for the float32 weights and for each optimizer state. Expert-parallel parameters are spread over the ranks
that hold the same experts. Frozen routers are in no group: what there is of them are the weights in the dtype of
training, whole at stages 0 to 2 and sliced at stage 3.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..parameter_families import is_router_weight
from . import unpickling

# Bytes read from mapped files before they are mapped anew, which gives the pages back.
_MAPPED_BYTES = 1 << 27

_EXPERT_WEIGHTS = (".experts.w1", ".experts.w2", ".experts.w3")


def is_expert_weight(name: str) -> bool:
    """Return whether an engine's parameter holds one rank's experts of a layer."""
    return name.endswith(_EXPERT_WEIGHTS)


@dataclass(frozen=True)
class Fragment:
    """`numel` consecutive elements of a parameter, from `start` on in one rank's vector of one group."""

    rank: int
    group: int
    start: int
    numel: int


class ZeroLayout:
    """The files of one `global_stepN` folder and what lies where in them.

    Attributes:
        shapes: shape of each parameter as one rank holds it, by the engine's name.
        frozen: names of the parameters that have a weight but no optimizer state.
        buffers: the model's buffers, by the engine's name.
        num_ep_ranks: ranks over which the experts of a layer are spread, 1 without AutoEP.
        counters: DeepSpeed's `global_steps`, `global_samples` and `skipped_steps`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.frozen: set[str] = set()
        self.buffers: dict[str, torch.Tensor] = {}
        self.num_ep_ranks = 1
        self._fragments: dict[tuple[str, int], list[Fragment]] = defaultdict(list)
        self._files: dict[Path, dict] = {}
        self._bytes_read = 0

    def fragments(self, name: str, ep_rank: int) -> list[Fragment]:
        """Return the fragments of a parameter in the order of its elements."""
        found = self._fragments[name, ep_rank]
        if sum(fragment.numel for fragment in found) != math.prod(self.shapes[name]):
            raise self._lacks(name)
        return found

    def read(self, name: str, state: str, ep_rank: int = 0) -> torch.Tensor:
        """Return a copy of what the ranks of one `ep_rank` hold of a parameter, in its own shape.

        Raises:
            CheckpointError: the files do not hold all of it, or it was frozen and has no such state.
        """
        if name not in self.frozen:
            pieces = [
                self.vectors(fragment.rank, state)[fragment.group].view(-1)[fragment.start :][: fragment.numel]
                for fragment in self.fragments(name, ep_rank)
            ]
        elif state == "fp32":
            pieces = [piece.view(-1) for piece in self._frozen_pieces(name)]
        else:
            raise CheckpointError(f"{self.folder} has no {state} of {name}, which was frozen.")
        whole = torch.cat(pieces)
        if whole.numel() != math.prod(self.shapes[name]):
            raise self._lacks(name)
        self._bytes_read += whole.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            self._files.clear()
            self._bytes_read = 0
        return whole.view(self.shapes[name])

    def state_names(self) -> list[str]:
        """Return `"fp32"` and the names of the optimizer's states that have an element for each of a parameter."""
        vector, states = self.vectors(0, "fp32")[0], self._optimizer_states(0).get(0, {})
        return ["fp32", *(key for key, value in states.items() if _is_like(value, vector))]

    def step(self) -> float | None:
        """Return how many updates the optimizer has counted; `None` if it is one that does not count."""
        steps = {float(state["step"]) for state in self._optimizer_states(0).values() if "step" in state}
        if len(steps) > 1:
            raise CheckpointError(f"{self.folder} has optimizer states of different steps {sorted(steps)}.")
        return steps.pop() if steps else None

    def vectors(self, rank: int, state: str) -> list[torch.Tensor]:
        """Return one rank's vectors of `"fp32"` or of an optimizer state, one for each group."""
        if state == "fp32":
            return self._fp32_vectors(rank)
        states = self._optimizer_states(rank)
        return [states[group][state] for group in sorted(states)]

    def _fp32_vectors(self, rank: int) -> list[torch.Tensor]:
        raise NotImplementedError

    def _optimizer_states(self, rank: int) -> dict[int, dict]:
        raise NotImplementedError

    def _frozen_pieces(self, name: str) -> list[torch.Tensor]:
        return [self._load("mp_rank_00_model_states.pt")["module"][name].float()]

    def _lacks(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} does not hold all of {name}; use another checkpoint.")

    def _load(self, *names: str) -> dict:
        """Return the content of the first of these files that exists."""
        for name in names:
            path = self.folder / name
            if path in self._files:
                return self._files[path]
            if path.is_file():
                self._files[path] = unpickling.load(path)
                return self._files[path]
        raise CheckpointError(f"{self.folder} is torn: {names[0]} is missing; use another checkpoint.")

    def _optim_file(self, rank: int) -> dict:
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return self._load(name, f"bf16_{name}", f"fp16_{name}")["optimizer_state_dict"]

    def _take_model_state(self, state: dict) -> None:
        self.counters = {key: state[key] for key in ("global_steps", "global_samples", "skipped_steps")}
        self.world_size = state["dp_world_size"]
        self.buffers = {name: state["module"][name].clone() for name in state["buffer_names"]}
        layers = state.get("ds_autoep_layers") or []
        self.num_ep_ranks = layers[0]["ep_size"] if layers else 1

    def _take_frozen_routers(self, module: dict[str, torch.Tensor]) -> None:
        """Note the routers of the model's state that no group of the optimizer holds."""
        self.frozen = {name for name in module if is_router_weight(name) and name not in self.shapes}
        self.shapes |= {name: tuple(module[name].shape) for name in module if name in self.frozen}

    def _add(self, name: str, ep_rank: int, fragment: Fragment) -> None:
        if fragment.numel:
            self._fragments[name, ep_rank if is_expert_weight(name) else 0].append(fragment)


class WholeLayout(ZeroLayout):
    """ZeRO 0: rank 0 has saved every parameter whole, each as a group of its own."""

    def __init__(self, folder: Path, routers: str) -> None:
        super().__init__(folder)
        self._routers = routers
        state = self._load("mp_rank_00_model_states.pt")
        self._take_model_state(state)
        module = {name: tensor for name, tensor in state["module"].items() if name not in self.buffers}
        self._names = self._in_order_of_optimizer(module)
        for group, name in enumerate(self._names):
            self.shapes[name] = tuple(module[name].shape)
            self._add(name, 0, Fragment(0, group, 0, module[name].numel()))
        self._take_frozen_routers(module)

    def _in_order_of_optimizer(self, module: dict[str, torch.Tensor]) -> list[str]:
        """Name the optimizer's parameters, which it numbers only: matrices, vectors, and routers with own settings."""
        tied = "lm_head.weight" in module and module["lm_head.weight"].equal(module["model.embed_tokens.weight"])
        names = [name for name in module if not (tied and name == "lm_head.weight")]
        routers = [] if self._routers == "shared" else [name for name in names if is_router_weight(name)]
        names = [name for name in names if name not in routers]
        names = [n for n in names if module[n].dim() > 1] + [n for n in names if module[n].dim() == 1]
        names += routers if self._routers == "own" else []
        states = self._optimizer_states(0)
        shapes = [tuple(states[i]["exp_avg"].shape) for i in sorted(states) if "exp_avg" in states[i]]
        if shapes and shapes != [tuple(module[name].shape) for name in names]:
            raise CheckpointError(f"{self.folder} has optimizer groups of an unknown order; start from its weights.")
        return names

    def _fp32_vectors(self, rank: int) -> list[torch.Tensor]:
        state = self._load("mp_rank_00_model_states.pt")
        if "fp32_groups" in state["optimizer"]:
            return [tensor for group in state["optimizer"]["fp32_groups"] for tensor in group]
        return [state["module"][name] for name in self._names]

    def _optimizer_states(self, rank: int) -> dict[int, dict]:
        optimizer = self._load("mp_rank_00_model_states.pt")["optimizer"]
        return optimizer.get("optimizer_state_dict", optimizer)["state"]


class SlicedGroupsLayout(ZeroLayout):
    """ZeRO 1 and 2: each rank has a slice of every group, whose fragments its file lists by name."""

    def __init__(self, folder: Path, routers: str) -> None:
        super().__init__(folder)
        state = self._load("mp_rank_00_model_states.pt")
        self._take_model_state(state)
        self.shapes = {name: tuple(shape) for group in state["param_shapes"] for name, shape in group.items()}
        self._take_frozen_routers(state["module"])
        for rank in range(self.world_size):
            for group, addresses in enumerate(self._optim_file(rank)["param_slice_mappings"]):
                for name, address in addresses.items():
                    self._add(name, rank % self.num_ep_ranks, Fragment(rank, group, address.start, address.numel))

    def _fp32_vectors(self, rank: int) -> list[torch.Tensor]:
        return self._optim_file(rank)["single_partition_of_fp32_groups"]

    def _optimizer_states(self, rank: int) -> dict[int, dict]:
        return self._optim_file(rank)["base_optimizer_state"]["state"]


class SlicedParametersLayout(ZeroLayout):
    """ZeRO 3: each rank has an equal slice of every parameter, padded at the end, one after the other."""

    def __init__(self, folder: Path, routers: str) -> None:
        super().__init__(folder)
        state = self._load(self._model_file(0))
        self._take_model_state(state)
        self.shapes = {name: tuple(shape) for name, shape in state["frozen_param_shapes"].items()}
        self.frozen = set(self.shapes)
        for rank in range(self.world_size):
            self._add_fragments_of(rank)

    def _add_fragments_of(self, rank: int) -> None:
        state = self._load(self._model_file(rank))
        layers = state.get("ds_autoep_layers")
        ep_rank = layers[0]["ep_rank"] if layers else 0
        groups = self._optim_file(rank).get("ds_zero_partition_groups")
        for group, shapes in enumerate(state["param_shapes"]):
            count = groups[group]["partition_count"] if groups else self.world_size
            index = groups[group]["partition_rank"] if groups else rank
            offset = 0
            for name, shape in shapes.items():
                self.shapes[name] = tuple(shape)
                numel = math.prod(shape)
                size = math.ceil(numel / count)
                own = max(0, min(size, numel - index * size))
                self._add(name, ep_rank, Fragment(rank, group, offset, own))
                offset += size

    def _fp32_vectors(self, rank: int) -> list[torch.Tensor]:
        return self._optim_file(rank)["fp32_flat_groups"]

    def _optimizer_states(self, rank: int) -> dict[int, dict]:
        return self._optim_file(rank)["optimizer_state_dict"]["state"]

    def _frozen_pieces(self, name: str) -> list[torch.Tensor]:
        ranks = range(self.world_size)
        pieces = [self._load(self._model_file(rank))["frozen_param_fragments"][name] for rank in ranks]
        padded = torch.cat([piece.float().view(-1) for piece in pieces])
        return [padded[: math.prod(self.shapes[name])]]

    def _model_file(self, rank: int) -> str:
        return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


_LAYOUTS = {0: WholeLayout, 1: SlicedGroupsLayout, 2: SlicedGroupsLayout, 3: SlicedParametersLayout}


def open_layout(folder: Path, zero_stage: int, routers: str = "shared") -> ZeroLayout:
    """Read where everything lies in a `global_stepN` folder.

    Args:
        folder: of the state.
        zero_stage: of the run that wrote it.
        routers: where its optimizer had them, as in `Topology`.

    Raises:
        CheckpointError: a file is missing, damaged, or not of this ZeRO stage.
    """
    if (folder / "offloaded_tensors").exists():
        raise CheckpointError(
            f"{folder} has optimizer states in files as they were on NVMe, which are not read; start from its weights "
            "with --reset_optimizer."
        )
    try:
        return _LAYOUTS[zero_stage](folder, routers)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of ZeRO {zero_stage} as DeepSpeed 0.19 writes it ({error!r})."
        ) from None


def _is_like(value, vector: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.numel() >= vector.numel()
