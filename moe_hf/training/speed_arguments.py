"""Arguments that concern the speed of training, beyond those that `TrainingArguments` has."""

import json
from dataclasses import dataclass, field

from ..errors import ConfigError
from .compiling import check_compilation
from .liger import check_liger
from .telemetry.profiler import parse_steps


@dataclass
class SpeedArguments:
    """What is compiled, and which steps are looked at more closely."""

    profile_steps: str | None = field(
        default=None,
        metadata={
            "help": "Trace these steps with torch.profiler: 10:13 are the steps 10, 11 and 12. Each process writes "
            "output_dir/profile/rankN.json.gz."
        },
    )
    liger_kernel_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "What --use_liger_kernel puts in, as JSON: rms_norm, swiglu, rope and fused_linear_cross_entropy, "
            "each true or false; all by default."
        },
    )

    def check_speed_arguments(self) -> None:
        """Raise `ConfigError` with one sentence for a value that is wrong or does not work on this machine."""
        if self.profile_steps is not None:
            steps = parse_steps(self.profile_steps)
            if 0 < self.max_steps < steps.start:
                raise ConfigError(
                    f"profile_steps={self.profile_steps} begins after the last step; max_steps is {self.max_steps}."
                )
        compiles = self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None
        if compiles:
            check_compilation(self.torch_compile_backend, self.torch_compile_mode)
        if isinstance(self.liger_kernel_config, str):
            self.liger_kernel_config = _read_settings(self.liger_kernel_config)
        if self.use_liger_kernel:
            check_liger(self.liger_kernel_config, compiles=compiles)


def _read_settings(written: str) -> dict:
    try:
        settings = json.loads(written)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"liger_kernel_config={written} must be JSON, like '{{\"rope\": false}}'.")
    return settings
