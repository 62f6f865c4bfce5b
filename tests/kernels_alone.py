"""Import this first in a process that needs nothing of the package but `moe_hf.kernels`: the rest takes seconds."""

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("moe_hf")
package.__path__ = [str(Path(__file__).parents[1] / "moe_hf")]
sys.modules.setdefault("moe_hf", package)
