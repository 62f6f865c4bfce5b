"""As `worker.py`, with weights put together that ranks share, and a check that what they repeat is the same."""

import torch
import torch.distributed as dist
import worker
from deepspeed import zero
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.utils import groups

from moe_hf import MoEForCausalLM


def assemble_weights(model) -> dict[str, torch.Tensor] | None:
    """Return all weights and buffers on rank 0, by their Hugging Face names."""
    names = {id(parameter): name.replace(".mlp.router.", ".mlp.gate.") for name, parameter in model.named_parameters()}
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in MoEForCausalLM(model.config).named_parameters()}

    def read(parameter: torch.nn.Parameter) -> torch.Tensor:
        with zero.GatheredParameters([parameter]):
            own = parameter.detach().clone()
        name = names[id(parameter)]
        if name not in shapes:
            return own  # one rank's experts
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        if own.shape == shapes[name]:
            assert all(torch.equal(own, other) for other in everyone), f"{name} differs over ranks"
            return own
        size = groups.get_tensor_model_parallel_world_size()
        first = dist.get_rank() // size * size
        dim = next(d for d, (part, whole) in enumerate(zip(own.shape, shapes[name], strict=True)) if part != whole)
        return torch.cat(everyone[first : first + size], dim=dim)

    return worker.assemble(model, read)


def main() -> None:
    """Run the cases, each as if there had been none before: DeepSpeed remembers the dtype of the first."""
    build = worker.build_trainer

    def build_anew(argv, relay):
        init_utils._TP_MODEL_INIT_ARGS = None
        return build(argv, relay)

    worker.build_trainer, worker.assemble_weights = build_anew, assemble_weights
    worker.main()


if __name__ == "__main__":
    main()
