"""Weights of another architecture, converted once and kept in the cache, for a model of ours to load."""

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from ..checkpoint.convert import convert
from ..checkpoint.source import read_native_config
from ..data.corpus import default_cache_dir

logger = logging.get_logger(__name__)

# Raise this when conversion gives other files, or users get those of the old code.
_CACHE_VERSION = 1

_SAMPLES, _SAMPLE_BYTES = 16, 65_536


def loadable_folder(folder: str | Path, cache_dir: str | None = None) -> Path:
    """Return a `moe_hf` folder with the weights of a model: its own, or one in the cache that is converted from it.

    Of several processes that convert at the same time each writes for itself, and the first to finish wins.

    Args:
        folder: with a model of any known architecture.
        cache_dir: keeps converted models; `corpus.default_cache_dir()` when missing.

    Raises:
        ConfigError: the model cannot be said in our architecture.
        CheckpointError: it is not whole, or the cache cannot be written.
    """
    folder = Path(folder)
    if read_native_config(folder)[1] is None:
        return folder
    cache = Path(cache_dir or default_cache_dir())
    target = cache / f"converted-{_identity(folder)}"
    if not target.is_dir():
        logger.warning(f"Converting {folder} once into {target}.")
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as private:
            convert(folder, Path(private, "model"), show_progress=True)
            try:
                os.replace(Path(private, "model"), target)
            except OSError:
                if not target.is_dir():  # refused because another process was faster: nothing is lost
                    raise
    return target


def _identity(folder: Path) -> str:
    """Digest what tells one model from another: all of the configuration, and of the weights as little as will do."""
    digest = hashlib.sha256(f"{_CACHE_VERSION}\0".encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        # Times alone do not tell models apart where whatever unpacked them has set all of them alike.
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(status.st_size * i // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
