"""Keep optional packages quiet that Transformers imports by itself, on machines that have nothing for them to use.

Without a GPU torchao and bitsandbytes complain at every start of the kernels that they cannot load, and DeepSpeed says
on standard output, where others expect a command's answer, that it computes on the CPU.
"""

import logging


def silence() -> None:
    """Let through what these packages report as errors only."""
    for name in ("torchao", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    # Of torchao's enumerations, which torch 2.13 would register by itself.
    logging.getLogger("torch.utils._pytree").addFilter(
        lambda record: "register_constant() on Enum" not in record.getMessage()
    )
