"""Training checkpoints as DeepSpeed 0.19.8 leaves them, cut from whole tensors in one process.

Written from the files of real runs: concatenate, pad, split. Left out is only what no reader of a checkpoint looks at
(random states, the scheduler, geometry that AutoEP keeps beside its placement).
"""

import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from small import save_tokenizer
from torch.nn.functional import pad

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checkpoint.export import export_model
from moe_hf.checkpoint.manifest import Progress, write_manifest
from moe_hf.checkpoint.topology import Topology

STATES = ("fp32", "exp_avg", "exp_avg_sq")
MOMENTS = STATES[1:]
STEP = 3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Who wrote a checkpoint: processes, ZeRO stage, AutoEP size (`None`: off), dtype, sub groups of ZeRO 3."""

    ranks: int
    zero: int
    ep: int | None = None
    bf16: bool = False
    sub_group_size: int | None = None

    @property
    def name(self) -> str:
        ep = "off" if self.ep is None else self.ep
        sub = f"-sub{self.sub_group_size}" if self.sub_group_size else ""
        return f"ranks{self.ranks}-zero{self.zero}-ep_{ep}-{'bf16' if self.bf16 else 'fp32'}{sub}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def counted_steps(self) -> float:
        """Updates that Adam has counted: at ZeRO 0 in 16 bits, the optimizer makes its states by one with zeros."""
        return STEP + (self.zero == 0 and self.bf16)


def odd_config(**changes) -> MoEConfig:
    """Sizes that few numbers divide: parameters and whole groups need padding, and vectors are shorter than ranks."""
    values = {
        "vocab_size": 33,
        "hidden_size": 21,
        "intermediate_size": 11,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "first_k_dense_replace": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_qk_norm": True,
        "shared_expert_intermediate_size": 3,
        "shared_expert_gate": True,
        "max_position_embeddings": 16,
    }
    return MoEConfig(**(values | changes))


def loss_free(**changes) -> MoEConfig:
    """As `odd_config`, with the correction bias, which is a buffer."""
    return odd_config(scoring_func="sigmoid", router_balancing="loss_free", **changes)


def live_model(config: MoEConfig, seed: int = 5) -> MoEForCausalLM:
    """Return a model of which no two values are alike, norms and buffers included."""
    torch.manual_seed(seed)
    model = MoEForCausalLM(config)
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model


def draw_states(model: MoEForCausalLM, seed: int = 6) -> dict[str, Tensors]:
    """Return float32 weights of the model and two moments of each, by state and Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: param.detach().float().clone() for name, param in model.named_parameters()}
    moments = {
        state: {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
        for state in MOMENTS
    }
    return {"fp32": weights, **moments}


def correction_biases(model: MoEForCausalLM) -> Tensors:
    """Return the buffers that a saved model has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in parameters}


def write_checkpoint(
    folder: Path, run: Run, model: MoEForCausalLM, states: dict[str, Tensors], *, export: bool = False
) -> Path:
    """Write what `run` would have saved of `model`, whose masters and moments are `states`.

    Args:
        folder: the `checkpoint-N` to create.
        run: see `Run`.
        model: gives the configuration and the buffers.
        states: from `draw_states`.
        export: write the whole model to `hf/`, otherwise only its configuration.
    """
    shards = folder / f"global_step{STEP}"
    shards.mkdir(parents=True)
    (folder / "latest").write_text(shards.name)
    write = {0: _write_whole, 1: _write_sliced_groups, 2: _write_sliced_groups, 3: _write_sliced_parameters}[run.zero]
    write(shards, run, model, states)
    if export:
        export_model(model.to(run.dtype), folder / "hf", model_card="# A card\n")
        model.float()
    else:
        model.config.save_pretrained(folder / "hf")
    save_tokenizer(folder / "hf")
    topology = Topology(run.ranks, run.ep or 0, run.zero, str(run.dtype).removeprefix("torch."))
    write_manifest(folder, topology, model.config, Progress(STEP, 4 * STEP, 4))
    return folder


@contextmanager
def disk_that_holds(num_bytes: int) -> Iterator[None]:
    """Make the system refuse to write more than that into any one file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --------------------------------------------------------------------------------------------------------------------
# What one rank holds


def on_rank(whole: Tensors, run: Run, rank: int) -> Tensors:
    """Return the tensors of one rank by the engine's names: all of each, but of the experts only its own."""
    if run.ep is None:
        return dict(whole)
    held = {}
    for name, tensor in whole.items():
        prefix = name.rpartition(".")[0]
        if name.endswith(".experts.gate_up_proj"):
            num_local = len(tensor) // run.ep
            first = rank % run.ep * num_local
            gate_up, down = (
                whole[f"{prefix}.{part}"][first : first + num_local] for part in ("gate_up_proj", "down_proj")
            )
            middle = gate_up.shape[1] // 2
            held |= {f"{prefix}.w1": gate_up[:, :middle], f"{prefix}.w2": down, f"{prefix}.w3": gate_up[:, middle:]}
        elif not name.endswith(".experts.down_proj"):
            held[name.replace(".mlp.gate.", ".mlp.router.")] = tensor
    return {name: tensor.contiguous() for name, tensor in held.items()}


def _is_expert(name: str) -> bool:
    return name.endswith((".experts.w1", ".experts.w2", ".experts.w3"))


def _groups(tensors: Tensors, run: Run) -> list[list[str]]:
    """Return the optimizer's groups: matrices, which decay, vectors, which do not, and experts spread over ranks."""
    shared = [name for name in tensors if not _is_expert(name)]
    matrices = [name for name in shared if tensors[name].dim() > 1]
    vectors = [name for name in shared if tensors[name].dim() == 1]
    experts = [name for name in tensors if _is_expert(name)]
    # AutoEP makes its routers when the optimizer exists: they come last, and at ZeRO 3 in a group of their own.
    routers = [name for name in matrices if ".mlp.router." in name]
    others = [name for name in matrices if name not in routers]
    front = [others, routers] if run.zero == 3 else [others + routers]
    return [group for group in (*front, vectors, experts) if group]


def _sharers(group: list[str], run: Run, rank: int) -> list[int]:
    """Return the ranks over which a group is cut: those that hold the same parameters."""
    if _is_expert(group[0]):
        return [other for other in range(run.ranks) if other % run.ep == rank % run.ep]
    return list(range(run.ranks))


# --------------------------------------------------------------------------------------------------------------------
# The files


def _model_state(run: Run, model: MoEForCausalLM, module: Tensors, rank: int = 0, **others) -> dict:
    """Return the content of a `model_states.pt`; `others` replace what is empty by default."""
    biases = correction_biases(model)
    if run.ep is not None:
        biases = {name.replace(".mlp.gate.", ".mlp.router."): tensor for name, tensor in biases.items()}
    if model.config.tie_word_embeddings:
        module = module | {"lm_head.weight": module["model.embed_tokens.weight"]}
    state = {
        "module": OrderedDict(module | biases),
        "buffer_names": list(biases),
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 1,
        "global_steps": STEP,
        "global_samples": 4 * STEP,
        "dp_world_size": run.ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": run.zero}, "bf16": {"enabled": run.bf16}},
        "ds_version": "0.19.8",
    }
    if run.zero > 0:
        state |= {"shared_params": {}}
        if model.config.tie_word_embeddings:
            state["shared_params"] = {"lm_head.weight": "model.embed_tokens.weight"}
    if run.zero >= 2:
        state |= {"frozen_param_shapes": OrderedDict(), "frozen_param_fragments": OrderedDict()}
    if run.ep is not None:
        layers = _autoep_layers(run, model.config, rank)
        state |= {"num_experts": [model.config.num_experts] * len(layers), "ds_autoep_layers": layers}
        state["universal_checkpoint_info"] = {
            "universal_checkpoint_version": 0.4,
            "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            "ds_autoep_layers": layers,
        }
    return state | others


def _autoep_layers(run: Run, config: MoEConfig, rank: int) -> list[dict]:
    num_local = config.num_experts // run.ep
    first = rank % run.ep * num_local
    placement = [
        {"rank": ep_rank, "experts": list(range(ep_rank * num_local, (ep_rank + 1) * num_local))}
        for ep_rank in range(run.ep)
    ]
    sparse = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    return [
        {
            "moe_layer_id": layer_id,
            "module_path": f"model.layers.{index}.mlp",
            "num_experts": config.num_experts,
            "num_local_experts": num_local,
            "ep_size": run.ep,
            "expert_placement": {
                "version": 1,
                "num_experts": config.num_experts,
                "ep_size": run.ep,
                "ranks": placement,
            },
            "expert_key_prefix": f"model.layers.{index}.mlp.experts",
            "checkpoint_format": "zero3_partitioned" if run.zero == 3 else "per_expert_files",
            "checkpoint_format_version": 1 if run.zero == 3 else None,
            "ep_group_name": f"ep_size_{run.ep}",
            "ep_rank": rank % run.ep,
            "expert_data_parallel_rank": rank // run.ep,
            "expert_data_parallel_world_size": run.ranks // run.ep,
            "global_expert_start": first,
            "global_expert_end": first + num_local,
        }
        for layer_id, index in enumerate(sparse)
    ]


def _shapes(tensors: Tensors, names: list[str], run: Run) -> OrderedDict:
    kind = torch.Size if run.ep is None else tuple
    return OrderedDict((name, kind(tensors[name].shape)) for name in names)


def _param_groups(indices: list[list[int]], kinds: list[str], run: Run) -> list[dict]:
    """Return the settings of optimizer groups, as far as anyone reads them."""
    settings = []
    for own, kind in zip(indices, kinds, strict=True):
        group = {"weight_decay": 0.0 if kind == "vectors" else 0.1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-5}
        if kind == "experts":
            group |= {"moe": True, "name": f"ep_size_{run.ep}"}
        settings.append(group | {"params": own})
    return settings


def _kind(group: list[str], tensors: Tensors) -> str:
    if _is_expert(group[0]):
        return "experts"
    return "matrices" if tensors[group[0]].dim() > 1 else "vectors"


def _adam_state(run: Run, moments: dict[str, torch.Tensor]) -> dict:
    return {"step": torch.tensor(float(run.counted_steps)), **moments}


def _optim_name(run: Run, rank: int) -> str:
    return f"{'bf16_' if run.bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _save_optim_file(shards: Path, run: Run, rank: int, state: dict) -> None:
    common = {"loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False, "overflow": False}
    state = common | {"zero_stage": ZeroStageEnum(run.zero)} | state
    content = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
    torch.save(content, shards / _optim_name(run, rank))


def _write_whole(shards: Path, run: Run, model: MoEForCausalLM, states: dict[str, Tensors]) -> None:
    """ZeRO 0: one file. In 16 bits, float32 copies of the parameters lie beside the optimizer."""
    weights = states["fp32"]
    groups = _groups(weights, run)
    order = [name for group in groups for name in group]
    indices, count = [], 0
    for group in groups:
        indices.append(list(range(count, count + len(group))))
        count += len(group)
    optimizer = {
        "state": {
            i: _adam_state(run, {state: states[state][name] for state in MOMENTS}) for i, name in enumerate(order)
        },
        "param_groups": _param_groups(indices, ["matrices", "vectors"], run),
    }
    if run.bf16:
        optimizer = {
            "dynamic_loss_scale": False,
            "cur_scale": 1.0,
            "cur_iter": STEP,
            "optimizer_state_dict": optimizer,
            "fp32_groups": [[weights[name] for name in group] for group in groups],
        }
    module = {name: tensor.to(run.dtype) for name, tensor in weights.items()}
    torch.save(_model_state(run, model, module, optimizer=optimizer), shards / "mp_rank_00_model_states.pt")


def _write_sliced_groups(shards: Path, run: Run, model: MoEForCausalLM, states: dict[str, Tensors]) -> None:
    """ZeRO 1 and 2: every group becomes one vector, padded at its end, of which each rank saves a slice."""
    for rank in range(run.ranks):
        held = {state: on_rank(states[state], run, rank) for state in STATES}
        groups = _groups(held["fp32"], run)
        masters, adam, mappings, paddings, counts = [], {}, [], [], []
        for index, group in enumerate(groups):
            sharers = _sharers(group, run, rank)
            slices, addresses, padding = {}, OrderedDict(), 0
            for state in STATES:
                flat = torch.cat([held[state][name].flatten() for name in group])
                numel = len(flat)
                flat = pad(flat, (0, -numel % (2 * len(sharers))))
                size = len(flat) // len(sharers)
                begin = sharers.index(rank) * size
                slices[state] = flat[begin : begin + size].clone()
            padding = max(0, min(size, begin + size - numel))
            offset = 0
            for name in group:
                own = range(max(offset, begin), min(offset + held["fp32"][name].numel(), begin + size))
                if len(own):
                    addresses[name] = fragment_address(numel=len(own), start=own.start - begin)
                offset += held["fp32"][name].numel()
            # The masters are saved without their padding, the moments with it.
            masters.append(slices["fp32"][: size - padding])
            adam[index] = _adam_state(run, {state: slices[state] for state in MOMENTS})
            mappings.append(addresses)
            paddings.append(padding)
            counts.append(len(sharers))
        kinds = [_kind(group, held["fp32"]) for group in groups]
        base = {"state": adam, "param_groups": _param_groups([[i] for i in range(len(groups))], kinds, run)}
        optimizer = {
            "clip_grad": 1.0,
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(group) for group in groups],
            "partition_count": counts,
            "ds_version": "0.19.8",
            "param_slice_mappings": mappings,
        }
        _save_optim_file(shards, run, rank, optimizer)
        if rank == 0:
            module = {name: t.to(run.dtype) for name, t in held["fp32"].items() if not _is_expert(name)}
            shapes = [_shapes(held["fp32"], group, run) for group in groups]
            torch.save(_model_state(run, model, module, param_shapes=shapes), shards / "mp_rank_00_model_states.pt")
    if run.ep is not None:
        _write_expert_files(shards, run, model, states["fp32"])


def _write_expert_files(shards: Path, run: Run, model: MoEForCausalLM, weights: Tensors) -> None:
    """Beside the slices, every expert has a file with its weights in the dtype of training."""
    everything = on_rank(weights, Run(ranks=1, zero=1, ep=1), 0)
    for layer in _autoep_layers(run, model.config, 0):
        prefix = layer["expert_key_prefix"]
        for expert in range(model.config.num_experts):
            parts = {
                f"{prefix}.{w}.{expert}": everything[f"{prefix}.{w}"][expert].to(run.dtype) for w in ("w1", "w2", "w3")
            }
            name = f"layer_{layer['moe_layer_id']}_expert_{expert}_mp_rank_00_model_states.pt"
            torch.save({key: tensor.clone() for key, tensor in parts.items()}, shards / name)


def _sub_groups(group: list[str], sizes: dict[str, int], limit: int | None) -> list[list[str]]:
    """Cut a group after every parameter with which its pieces have come to `limit` elements."""
    if limit is None or limit >= sum(sizes[name] for name in group):
        return [group]
    parts = [[]]
    for name in group:
        if sum(sizes[other] for other in parts[-1]) >= limit:
            parts.append([])
        parts[-1].append(name)
    return parts


def _write_sliced_parameters(shards: Path, run: Run, model: MoEForCausalLM, states: dict[str, Tensors]) -> None:
    """ZeRO 3: every parameter is padded and cut, and a rank's pieces are joined, one vector for each sub group."""
    for rank in range(run.ranks):
        held = {state: on_rank(states[state], run, rank) for state in STATES}
        weights = held["fp32"]
        pieces: dict[str, Tensors] = {state: {} for state in STATES}
        groups = _groups(weights, run)
        for group in groups:
            sharers = _sharers(group, run, rank)
            for state in STATES:
                for name in group:
                    flat = held[state][name].flatten()
                    flat = pad(flat, (0, -len(flat) % len(sharers)))
                    pieces[state][name] = flat.chunk(len(sharers))[sharers.index(rank)]
        sizes = {name: len(piece) for name, piece in pieces["fp32"].items()}
        by_group = [_sub_groups(group, sizes, run.sub_group_size) for group in groups]
        sub_groups = [sub for subs in by_group for sub in subs]
        vectors = {state: [torch.cat([pieces[state][name] for name in sub]) for sub in sub_groups] for state in STATES}
        adam = {i: _adam_state(run, {state: vectors[state][i] for state in MOMENTS}) for i in range(len(sub_groups))}
        kinds = [_kind(sub, weights) for sub in sub_groups]
        indices = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
        base = {"state": adam, "param_groups": _param_groups(list(indices.values()), list(indices), run)}
        optimizer = {"partition_count": run.ranks}
        if run.ep is not None:
            optimizer["ds_zero_partition_groups"] = _partition_groups(sub_groups, run, rank)
        _save_optim_file(
            shards, run, rank, optimizer | {"optimizer_state_dict": base, "fp32_flat_groups": vectors["fp32"]}
        )
        module = {name: torch.empty(0, dtype=run.dtype) for name in weights if not _is_expert(name)}
        shapes = [_shapes(weights, sub, run) for sub in sub_groups]
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save(_model_state(run, model, module, rank, param_shapes=shapes), shards / name)


def _partition_groups(sub_groups: list[list[str]], run: Run, rank: int) -> list[dict]:
    records = []
    for index, sub in enumerate(sub_groups):
        sharers, is_expert = _sharers(sub, run, rank), _is_expert(sub[0])
        records.append(
            {
                "sub_group": index,
                "partition_count": len(sharers),
                "partition_rank": sharers.index(rank),
                "partition_ranks": sharers,
                "families": ["autoep_expert" if is_expert else "replicated"],
                "group_names": [f"ep_size_{run.ep}" if is_expert else "replicated"],
            }
        )
    return records
