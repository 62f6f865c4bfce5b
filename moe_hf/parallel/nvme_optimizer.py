"""The ZeRO-3 optimizer whose states rest on NVMe, with checkpoints like those of any other ZeRO-3 run.

DeepSpeed copies its swap files beside a checkpoint and copies them back, but forgets the rest: after a resume Adam's
moments and step count begin anew, groups too small to be swapped (norms) are as the model was initialised, and with
expert parallelism it refuses to save. Here the states on NVMe go into `optim_states.pt` where they would be without
offloading, read from the swap files page by page, so that they are never in memory as a whole. Such a checkpoint can
be resumed with or without offloading, cut anew for other layouts, and exported.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.serialization import config as serialization

from ..errors import ConfigError
from .deepspeed_config import Config
from .offload import nvme_sections
from .swap_files import CheckedHandle, read_mapped, write_swap_file
from .swap_folder import with_own_folder

_MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_nvme(config: Config) -> Config:
    """Return the DeepSpeed JSON with folders of this process on NVMe, and let engines keep their state there.

    Args:
        config: the DeepSpeed JSON, checked by `check_nvme`; returned as it is where nothing goes to NVMe.

    Raises:
        ConfigError: DeepSpeed's operator cannot be compiled.
    """
    if not nvme_sections(config):
        return config
    _load_operator()
    _install()
    return with_own_folder(config)


def _load_operator() -> None:
    """Compile what reads and writes, where that was not done before; the ranks of a machine wait for one of them."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"DeepSpeed's operator async_io, which offloading to NVMe needs, cannot be compiled ({reason}); rest in "
            'host memory: "device": "cpu".'
        ) from error


@functools.cache
def _install() -> None:
    """Change the classes of engines that are built from now on; without anything on NVMe they do what they did."""
    from deepspeed.runtime import engine
    from deepspeed.runtime.swap_tensor import partitioned_param_swapper
    from deepspeed.runtime.zero import partition_parameters, stage3

    stage3.DeepSpeedZeroOptimizer_Stage3 = _nvme_optimizer(stage3.DeepSpeedZeroOptimizer_Stage3)
    # Asked only when saving and loading, where nothing is special any more.
    engine.DeepSpeedEngine.zero_nvme_offload_optimizer = lambda self: False
    load = engine.DeepSpeedEngine._load_zero_checkpoint

    def load_mapped(self, *args, **kwargs):
        with serialization.patch("load.mmap", getattr(self.optimizer, "swap_optimizer", False)):
            return load(self, *args, **kwargs)

    engine.DeepSpeedEngine._load_zero_checkpoint = load_mapped
    swapper = partitioned_param_swapper.AsyncPartitionedParameterSwapper
    configure = swapper._configure_aio

    def configure_checked(self, *args, **kwargs):
        configure(self, *args, **kwargs)
        self.aio_write_handle = CheckedHandle(self.aio_write_handle)

    swapper._configure_aio = configure_checked
    swap_in = swapper.swap_in

    def swap_in_once(self, params, *args, **kwargs):
        # Prefetching meets the last layers twice, on the way forward and on the way back.
        return swap_in(self, list(dict.fromkeys(params)), *args, **kwargs)

    swapper.swap_in = swap_in_once
    for handle in (partition_parameters.NoGatherHandle, partition_parameters.NoGatherCoalescedHandle):
        handle.__init__ = _copying(handle.__init__)


def _copying(gather):
    """Let what one rank gathers from itself be a copy.

    On a CPU it would lie in the buffer for the next weights, under the views that the backward pass has kept.
    """

    @functools.wraps(gather)
    def gather_copy(self, params) -> None:
        gather(self, params)
        for param in params if isinstance(params, list) else [params]:
            if param.ds_tensor.final_location == "nvme" and param.data_ptr() == param.ds_tensor.data_ptr():
                param.data = param.data.clone()

    return gather_copy


def held_on_nvme(optimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield each parameter with this rank's slice of its gradient, which is valid until the next one is asked for.

    DeepSpeed's own accessor would read all states of a group again for every parameter in it.

    Args:
        optimizer: of ZeRO 3 with states on NVMe, between the backward pass and the step.
    """
    for group, params in enumerate(optimizer.fp16_groups):
        is_swapped = optimizer._swappable_optimizer_subgroup(group)
        if is_swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        gradient = optimizer.fp32_partitioned_groups_flat[group].grad
        for param in params:
            _, start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
            yield param, gradient.narrow(0, start, numel)
        if is_swapped:
            optimizer._release_swap_buffers(group)


def _nvme_optimizer(base: type) -> type:
    """Return a subclass of DeepSpeed's ZeRO-3 optimizer; without states on NVMe it is the same."""

    class NvmeOptimizer(base):
        def _configure_tensor_swapping(self, *args, **kwargs) -> None:
            super()._configure_tensor_swapping(*args, **kwargs)
            swapper = self.optimizer_swapper
            for name in ("aio_handle", "read_aio_handle", "write_aio_handle"):
                if hasattr(swapper, name):
                    setattr(swapper, name, CheckedHandle(getattr(swapper, name)))
            swapper.gradient_swapper.aio_handle = swapper.aio_handle

        # ---- saving ----

        def _rigid_state_dict(self) -> dict:
            saved = super()._rigid_state_dict()
            if not self.swap_optimizer:
                return saved
            states = {
                index: {key: self._on_disk(param, value) for key, value in self.optimizer.state[param].items()}
                for index, param in enumerate(self._masters())
                if param in self.optimizer.state
            }
            saved["fp32_flat_groups"] = [self._on_disk(param, param) for param in self.fp32_partitioned_groups_flat]
            saved["optimizer_state_dict"] = saved["optimizer_state_dict"] | {"state": states}
            return saved

        def _masters(self) -> list[torch.Tensor]:
            """Return the float32 vectors in the order in which the optimizer's own state numbers them."""
            self._set_fp32_optimizer_param_groups()
            masters = [param for group in self.optimizer.param_groups for param in group["params"]]
            self._clear_fp32_optimizer_param_groups()
            return masters

        def _on_disk(self, param: torch.Tensor, value):
            """Return what a swapped tensor holds, mapped from its file, and anything else as it is."""
            swapped = self.optimizer_swapper.swap_params_info.get(param.ds_id)
            for context in swapped.tensors if swapped is not None else ():
                if context.compute_tensor is value:
                    return read_mapped(Path(context.swap_path), swapped.numel(), swapped.dtype())
            return value

        # ---- loading ----

        def _rigid_load_state_dict(self, saved: dict, load_optimizer_states: bool = True) -> None:
            if not self.swap_optimizer:
                super()._rigid_load_state_dict(saved, load_optimizer_states)
                return
            self._check_placement(saved)
            for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
                setattr(self, name, saved[name])
            states = {}
            if load_optimizer_states:
                masters = self._masters()
                states = {masters[i].ds_id: state for i, state in saved["optimizer_state_dict"]["state"].items()}
                self._load_settings(saved["optimizer_state_dict"]["param_groups"])
            for group, (param, fp32) in enumerate(
                zip(self.fp32_partitioned_groups_flat, saved["fp32_flat_groups"], strict=True)
            ):
                self._put(group, fp32, states.get(param.ds_id, {}))
            self.reset_swap_buffers()

        def _check_placement(self, saved: dict) -> None:
            placement = saved.get("ds_zero_partition_groups")
            if placement is not None and placement != self._zero3_partition_group_metadata():
                raise RuntimeError("the parameters of the checkpoint lie on other ranks")

        def _load_settings(self, groups: list[dict]) -> None:
            for own, saved in zip(self.optimizer.param_groups, groups, strict=True):
                own.update({key: value for key, value in saved.items() if key != "params"})

        def load_hp_checkpoint_state_from_checkpoint_dir_stage3(self, checkpoint_dir) -> None:
            """As DeepSpeed's, which would slice the empty tensors of what is on NVMe."""
            if not self.swap_optimizer:
                super().load_hp_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir)
                return
            folder = Path(checkpoint_dir) / "zero"
            common = torch.load(folder / "optimizer_state.pt", weights_only=True)
            self._load_global_state_stage3(common)
            step = common["optimizer_state_dict"]["state"][0]["step"]
            for group, params in enumerate(self.fp16_groups):
                fp32, *moments = (
                    torch.cat([self._own_slice(folder, key, param) for param in params]) for key in ("fp32", *_MOMENTS)
                )
                self._put(group, fp32, dict(zip(_MOMENTS, moments, strict=True)) | {"step": step.clone()})
            self.reset_swap_buffers()

        def _own_slice(self, folder: Path, key: str, param: nn.Parameter) -> torch.Tensor:
            return self.load_hp_checkpoint_state(str(folder / self.param_names[param]), key, param=param)

        def _put(self, group: int, fp32: torch.Tensor, states: dict) -> None:
            """Give one group its float32 weights and optimizer states, on NVMe if that is where they rest."""
            param = self.fp32_partitioned_groups_flat[group]
            if fp32.numel() != self.fp16_partitioned_groups_flat_numel[group]:
                raise RuntimeError(f"group {group} of the optimizer has {fp32.numel()} weights")
            if not self._swappable_optimizer_subgroup(group):
                param.data.copy_(fp32)
                # Copies, because what was loaded may be a file that is about to be closed.
                self.optimizer.state[param] = {
                    key: value.clone() if torch.is_tensor(value) else value for key, value in states.items()
                }
                return
            swapper = self.optimizer_swapper
            swapped = swapper.swap_params_info[param.ds_id]
            swapped.tensors, swapped.has_state_tensors = swapped.tensors[:1], False
            # As large as what they stand for, but without memory of their own.
            self.optimizer.state[param] = {key: _stand_in(value) for key, value in states.items()}
            swapper._update_param_state_info(swapped, param)
            values = {f"{key}-{param.ds_id}": value for key, value in states.items()} | {param.ds_id: fp32}
            length = swapper._io_aligned_numel(swapped.numel())
            for context in swapped.tensors:
                write_swap_file(Path(context.swap_path), values[context.compute_tensor.ds_id], length)
            swapped.release_memory()

    NvmeOptimizer.__name__ = base.__name__
    return NvmeOptimizer


def _stand_in(value):
    if not torch.is_tensor(value):
        return value
    return value.new_zeros(()).expand(value.shape) if value.dim() else value.clone()
