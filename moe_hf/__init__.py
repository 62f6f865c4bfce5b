"""Train mixture-of-experts language models with DeepSpeed and keep them as Hugging Face models.

Importing the package registers the `moe_hf` architecture with Transformers' `Auto*` classes.
"""

from .import_noise import silence

silence()

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from .configuration_moe import MoEConfig  # noqa: E402
from .kernels import experts as _  # noqa: E402, F401  registers experts_implementation="moe_hf"
from .modeling_moe import MoEForCausalLM, MoEModel  # noqa: E402

__version__ = "0.1.0"

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)

# A saved folder carries these classes' source, so that it loads with trust_remote_code where moe_hf is not installed.
MoEConfig.register_for_auto_class()
MoEModel.register_for_auto_class("AutoModel")
MoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoEConfig", "MoEForCausalLM", "MoEModel", "__version__"]
