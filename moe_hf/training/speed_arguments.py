"""Arguments that concern the speed of training, beyond those that `TrainingArguments` has."""

from dataclasses import dataclass, field

from ..errors import ConfigError
from .compiling import check_compilation
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

    def check_speed_arguments(self) -> None:
        """Raise `ConfigError` with one sentence for a value that is wrong or does not work on this machine."""
        if self.profile_steps is not None:
            steps = parse_steps(self.profile_steps)
            if 0 < self.max_steps < steps.start:
                raise ConfigError(
                    f"profile_steps={self.profile_steps} begins after the last step; max_steps is {self.max_steps}."
                )
        if self.torch_compile or self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            check_compilation(self.torch_compile_backend, self.torch_compile_mode)
