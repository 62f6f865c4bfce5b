"""`moe-hf inspect`: what is in a model folder, a training checkpoint or the output folder of a run, and is it whole?

With `--json` one object is printed, of one of three kinds; fields may be added, none changes its meaning.

Of every kind: `kind` (`"model"`, `"checkpoint"` or `"run"`), `path`, `whole` (bool), `problems` (sentences).

`"model"`: `format` (`"moe_hf"` or `"transformers"`), `model_type`, `size`, `weight_files` (name: bytes), `bytes`,
`tensors_by_dtype` (dtype: count), `names_checked` (whether all names and shapes were compared with the configuration),
`tokenizer` (bool), `pickles` (names of files that were not opened), and with `--tensors`
`tensors` (name: {`dtype`, `shape`}).

`"checkpoint"`: `step`, `topology` ({`world_size`, `expert_parallel_size` (0: off), `zero_stage` (-1: no DeepSpeed),
`dtype`, `routers` (`"shared"`, `"own"` or `"frozen"`: their group of the optimizer), `optimizer` (`"adamw"`, …),
`tensor_parallel_size`, `sequence_parallel_size`, `pipeline_parallel_size`}), `progress` (step, samples and skipped
steps), `weights_only`, `resumable`, `size`, `files` (name: bytes), `bytes`, `checksums_verified`, `export` (a
`"model"` or null), and with `--tensors` `tensors` (name: {`shape`}) and `tensor_states` (what is stored of each that
was trained: `"fp32"`, `"exp_avg"`, …). Without a readable manifest `step`, `topology`, `progress`, `weights_only` and
`size` are null.

`"run"`: `checkpoints` (each a `"checkpoint"`, the one written last first), `newest_resumable` (its name, or null),
`export` (a `"model"` or null), `leftovers` (names of folders that a run which was killed had not finished).

`size` is {`parameters`, `active_parameters`, `layers`, `sparse_layers`, `experts`, `experts_per_token`}, or null where
the architecture is not known.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "inspect",
        help="say what is in a model folder, a checkpoint or a run, and whether it is whole",
        description="Say what is in a model folder, a checkpoint-N folder or OUTPUT_DIR of a run, and whether it is "
        "whole. Nothing in it is executed. The exit code is 0 when all of it is whole, otherwise 2.",
    )
    parser.add_argument("path", type=Path, help="a model folder, a checkpoint-N folder, or OUTPUT_DIR of a run")
    parser.add_argument("--tensors", action="store_true", help="list the name, dtype and shape of every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--no_checksums",
        "--no-checksums",
        dest="checksums",
        action="store_false",
        help="compare a checkpoint's files by their sizes only",
    )
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm
    from transformers import logging as transformers_logging

    from ..checkpoint.run_description import bytes_to_verify, describe

    transformers_logging.set_verbosity_error()
    total = bytes_to_verify(arguments.path) if arguments.checksums else 0
    # On a terminal only, and gone before the table comes.
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Checksums", leave=False, disable=None if total else True)
    with bar:
        description = describe(
            arguments.path, checksums=arguments.checksums, tensors=arguments.tensors, on_bytes=bar.update
        )
    if arguments.json:
        print(json.dumps(description.as_json(arguments.tensors), indent=2))
    else:
        print("\n".join(_lines(description, arguments.tensors)))
    sys.stdout.flush()
    if problems := description.problems:
        more = f" (and {len(problems) - 1} more, listed above)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)


def _lines(description, tensors: bool) -> Iterator[str]:
    """Yield what is printed: facts with a title each, then tables."""
    if description.kind == "model":
        rows, tables = _model_rows(description), []
    elif description.kind == "checkpoint":
        rows, tables = _checkpoint_rows(description), [_files(description)]
    else:
        rows, tables = _run_rows(description), [_checkpoints(description)]
    if tensors and description.kind != "run":
        tables.append(_tensors(description))
    yield from (f"{title:<13} {text}" for title, text in rows)
    yield from (f"{'problem':<13} {problem}" for problem in description.problems)
    for table in tables:
        yield from ("", *_aligned(table))


def _model_rows(model) -> Iterator[tuple[str, str]]:
    checked = "all names and shapes as the configuration has them" if model.names_checked else "names not checked"
    yield "model", str(model.path)
    yield "whole", "no" if model.problems else f"yes, {checked}"
    yield "format", model.format if model.format == model.model_type else f"{model.format} ({model.model_type})"
    yield from _size_rows(model.size)
    dtypes = ", ".join(f"{dtype} ({_count(count, 'tensor')})" for dtype, count in model.tensors_by_dtype.items())
    yield (
        "weights",
        f"{_count(len(model.weight_files), 'file')}, {_bytes(model.weight_files)}, {dtypes or 'none can be read'}",
    )
    yield "tokenizer", "yes" if model.has_tokenizer else "no"
    if model.pickles:
        yield "not opened", ", ".join(model.pickles)


def _size_rows(size) -> Iterator[tuple[str, str]]:
    if size is None:
        return
    yield "parameters", f"{size.parameters:,} in all, {size.active_parameters:,} for one token"
    yield "layers", f"{size.layers}, of which {size.sparse_layers} are sparse"
    if size.sparse_layers:
        yield "experts", f"{size.experts} in each sparse layer, {size.experts_per_token} for one token"


def _checkpoint_rows(checkpoint) -> Iterator[tuple[str, str]]:
    manifest = checkpoint.manifest
    yield "checkpoint", str(checkpoint.path)
    yield "whole", _wholeness(checkpoint)
    if manifest:
        yield "step", f"{manifest.progress.step:,}, after {manifest.progress.samples_seen:,} samples"
        yield "written by", manifest.topology.describe()
        if manifest.weights_only:
            yield "resumable", "no, weights only (--save_only_model)"
    yield from _size_rows(checkpoint.size)
    yield "on disk", f"{_count(len(checkpoint.files), 'file')}, {_bytes(checkpoint.files)}"
    if checkpoint.states:
        yield "state", f"{', '.join(checkpoint.states)} of each parameter"
    yield "export", _export(checkpoint)


def _run_rows(run) -> Iterator[tuple[str, str]]:
    newest = run.newest_resumable
    yield "run", str(run.path)
    yield "checkpoints", str(len(run.checkpoints))
    yield "resumes from", newest.path.name if newest else "none, it would start again"
    yield "export", _export(run)
    if run.leftovers:
        yield "unfinished", ", ".join(run.leftovers)


def _wholeness(checkpoint) -> str:
    if checkpoint.problems:
        return "no, but a run can resume from it" if checkpoint.resumable else "no"
    return "yes, checksums verified" if checkpoint.checksums else "yes, by the sizes of its files"


def _export(parent) -> str:
    if (export := parent.export) is None:
        return "none"
    return f"hf, {export.format}, {'torn' if export.problems else 'whole'}, {_bytes(export.weight_files)}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _bytes(files: dict[str, int]) -> str:
    from tqdm import tqdm

    return tqdm.format_sizeof(sum(files.values()), "B")


def _checkpoints(run) -> list[tuple[str, ...]]:
    rows = [
        (c.path.name, c.manifest.topology.describe() if c.manifest else "", _bytes(c.files), _wholeness(c))
        for c in run.checkpoints
    ]
    return [("checkpoint", "written by", "size", "whole"), *rows]


def _files(checkpoint) -> list[tuple[str, ...]]:
    return [("file", "bytes"), *((name, f"{size:,}") for name, size in checkpoint.files.items())]


def _tensors(description) -> list[tuple[str, ...]]:
    from transformers.core_model_loading import dot_natural_key

    from ..checkpoint.description import dtype_name

    shapes, dtypes = description.shapes, getattr(description, "dtypes", {})
    names = sorted(shapes, key=dot_natural_key)
    rows = [(name, str(shapes[name]), dtype_name(dtypes[name]) if dtypes else "") for name in names]
    return [("tensor", "shape", "dtype" if dtypes else ""), *rows]


def _aligned(table: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
