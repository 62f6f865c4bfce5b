"""`moe-hf plan`: what a setting needs, before it runs: does it fit, what moves, how long may a step take?

With `--json` one object is printed; fields may be added, none changes its meaning. With `--deepspeed`: `fits` (bool),
`gpus`, `gpu_memory_bytes`, `usable_bytes`, `peak_bytes` and `host_bytes` (of the fullest rank), `setting`, `hardware`,
`parameters` ({`total`, `active`, `in_matrices`}), `flops_per_token` ({`matmul`, `attention`, `total`}), `memory` (each
{`kind`, `name`, `bytes`, `place` (`"gpu"`, `"host"` or `"nvme"`), `when` (`"always"`, `"computing"` or `"stepping"`)}),
`messages` of one optimizer step (each {`operation`, `purpose`, `ranks`, `stride`, `message` (bytes handed in, as
DeepSpeed's comms_logger counts), `waits`, `sent` (bytes over links), `seconds`}) and `step` ({`computing`, `waiting`,
`beside`, `stepping`, `seconds`, `tokens`, `tokens_per_second`}). Without it: `fits`, and `candidates`, each such a plan
with `deepspeed` (its JSON), the best first.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError

# Settings that are printed; all are in the JSON.
_MOST_ROWS = 15


def add_parser(commands) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "plan",
        help="tell whether a setting fits the GPUs, what it sends and how long a step takes, or find one that fits",
        description="Tell what a setting needs before it runs; without --deepspeed, find the settings that fit. "
        "The exit code is 0 if it fits, 1 if it does not, 2 after a mistake.",
    )
    _add_model(parser)
    machines = parser.add_argument_group("machines")
    _flag(machines, "gpus", type=_positive, required=True, metavar="N", help="GPUs of the run, one process each")
    _flag(machines, "gpus_per_node", type=_positive, default=8, metavar="N", help="GPUs of one machine (default: 8)")
    _flag(machines, "hardware", default="H100-80GB", help="GPU by name (default: H100-80GB)")
    _flag(machines, "gpu_memory", type=_number, metavar="GB", help="memory of one GPU in 10⁹ bytes, if not the usual")
    _flag(machines, "efficiency", type=_number, metavar="SHARE", help="share of the peak that computation reaches")
    output = parser.add_argument_group("output")
    _flag(output, "json", action="store_true", help="print one JSON object instead of tables")
    _flag(output, "output", type=Path, metavar="FILE", help="without --deepspeed, write the best setting's JSON here")
    parser.set_defaults(run=_plan)


def _add_model(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run, as run_clm_moe.py has it")
    _flag(run, "config_name", required=True, metavar="NAME", help="a preset, or a configuration file")
    _flag(run, "config_overrides", metavar="NAME=VALUE,…", help="other values of its fields")
    _flag(run, "deepspeed", metavar="JSON", help="the DeepSpeed JSON; without it settings are searched for")
    _flag(run, "block_size", type=_positive, metavar="TOKENS", help="tokens of a sequence (default: the model's most)")
    names = ("per_device_train_batch_size", "micro_batch")
    _flag(run, *names, type=_positive, metavar="N", help="sequences of a GPU in one pass (default: 1)")
    _flag(
        run,
        "gradient_accumulation_steps",
        type=_positive,
        default=1,
        metavar="N",
        help="passes for one optimizer step (default: 1); in a search of micro-batches of one sequence",
    )
    _flag(run, "gradient_checkpointing", type=_switch, default=True, metavar="BOOL", help="(default: True)")
    _flag(run, "precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of training (default: bf16)")
    for name in ("expert_parallel_size", "tensor_parallel_size"):
        _flag(run, name, type=int, metavar="N", help="instead of what the DeepSpeed JSON says")


def _flag(group, *names: str, **settings) -> None:
    """Add an argument that may be spelt with dashes or with underscores."""
    spellings = dict.fromkeys(f"--{form}" for name in names for form in (name, name.replace("_", "-")))
    group.add_argument(*spellings, dest=names[0], **settings)


def _plan(arguments: argparse.Namespace) -> None:
    from ..planning.hardware import hardware_called
    from ..planning.plan import EFFICIENCY
    from ..training.arguments import ModelArguments
    from ..training.model_config import build_config

    given = {"config_name": arguments.config_name, "config_overrides": arguments.config_overrides}
    config = build_config(ModelArguments(**given))
    hardware = hardware_called(arguments.hardware)
    arguments.efficiency = arguments.efficiency or EFFICIENCY
    if arguments.efficiency > 1:
        raise ConfigError(f"--efficiency {arguments.efficiency:g} must be a share of the peak, at most 1.")
    length = arguments.block_size or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"--block_size {length} is more than the model's max_position_embeddings={config.max_position_embeddings}."
        )
    batch = {
        "sequence_length": length,
        "checkpointing": arguments.gradient_checkpointing,
        "gpus_per_node": arguments.gpus_per_node,
    }
    if arguments.deepspeed is None:
        fits = _search(arguments, config, hardware, batch)
    else:
        fits = _one(arguments, config, hardware, batch)
    sys.stdout.flush()
    if not fits:
        sys.exit(1)


def _one(arguments: argparse.Namespace, config, hardware, batch: dict) -> bool:
    from ..parallel.deepspeed_config import read_deepspeed_json, with_expert_parallel_size
    from ..parallel.parallel_sizes import with_parallel_sizes
    from ..planning.plan import make_plan
    from ..planning.search import check_setting
    from ..planning.setting import read_setting

    if arguments.output is not None:
        raise ConfigError("--output is for the setting that a search finds; leave --deepspeed out, or --output.")
    deepspeed_json = read_deepspeed_json(arguments.deepspeed)
    if arguments.expert_parallel_size is not None:
        deepspeed_json = with_expert_parallel_size(deepspeed_json, arguments.expert_parallel_size)
    deepspeed_json = with_parallel_sizes(deepspeed_json, tensor=arguments.tensor_parallel_size)
    micro_batch, accumulation = arguments.per_device_train_batch_size or 1, arguments.gradient_accumulation_steps
    check_setting(deepspeed_json, config, arguments.gpus, arguments.precision, micro_batch, accumulation)
    setting = read_setting(
        deepspeed_json,
        config.hidden_size,
        arguments.gpus,
        arguments.precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        **batch,
    )
    plan = make_plan(config, setting, hardware, arguments.gpu_memory, arguments.efficiency)
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        print("\n".join(_lines(arguments.config_name, plan)))
    return plan.fits


def _search(arguments: argparse.Namespace, config, hardware, batch: dict) -> bool:
    from ..planning.search import search

    for flag in ("expert_parallel_size", "tensor_parallel_size"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag} overrides a DeepSpeed JSON; add --deepspeed, or leave it to the search.")
    candidates = search(
        config,
        arguments.gpus,
        hardware,
        arguments.gpu_memory,
        arguments.precision,
        sequences_per_step=arguments.gpus
        * (arguments.per_device_train_batch_size or 1)
        * arguments.gradient_accumulation_steps,
        micro_batch=arguments.per_device_train_batch_size,
        efficiency=arguments.efficiency,
        **batch,
    )
    if arguments.output is not None and candidates:
        try:
            arguments.output.write_text(json.dumps(candidates[0].config, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--output {arguments.output} cannot be written: {error.strerror or error}.") from None
    if arguments.json:
        found = [candidate.plan.as_json() | {"deepspeed": candidate.config} for candidate in candidates]
        print(json.dumps({"fits": bool(found), "candidates": found}, indent=2))
    else:
        print("\n".join(_ranked(arguments, candidates)))
    return bool(candidates)


def _lines(name: str, plan) -> Iterator[str]:
    """Yield what is printed of one plan: facts with a title each, then tables."""
    setting, time = plan.setting, plan.time
    yield f"model       {name}: {plan.parameters.total:,} parameters, {plan.parameters.active:,} for one token"
    yield (
        f"FLOPs       {plan.flops.total:,} for one token: {plan.flops.matmul:,} in matrices, "
        f"{plan.flops.attention:,} in attention"
    )
    yield f"setting     {_describe(setting)}"
    yield (
        f"batch       {setting.micro_batch} x {setting.sequence_length} tokens a GPU, {setting.accumulation} times: "
        f"{setting.tokens_per_step:,} tokens a step"
    )
    yield ""
    yield from _table("GB of the fullest rank", ("gpu", "host", "nvme"), _memory(plan))
    yield ""
    yield from _table("GB of a step, each rank", ("message", "sent", "ranks", "seconds"), _messages(plan))
    yield ""
    yield (
        f"step        {time.seconds:.3g} s on {plan.hardware.name}, estimated: {time.computing:.2g} computing beside "
        f"{time.beside:.3g} of messages, {time.waiting:.2g} waiting, {time.stepping:.2g} optimizer"
    )
    speed = time.tokens_per_second
    yield f"speed       {speed:,.0f} tokens/s, {speed / setting.world_size:,.0f} a GPU"
    yield f"memory      {_gb(plan.peak)} of {_gb(plan.usable)} GB at the fullest, of GPUs with {plan.gpu_memory:g} GB"
    yield _verdict(plan.fits)


def _verdict(fits: bool) -> str:
    return f"fits: {'yes' if fits else 'no'}"


def _describe(setting) -> str:
    parts = [f"{setting.world_size} GPUs", f"ZeRO {setting.zero.stage}"]
    parts.append(f"EP {setting.ep_size}" if setting.ep_size else "EP off")
    if setting.tp_size > 1:
        parts.append(f"TP {setting.tp_size}")
    for name in ("optimizer", "param"):
        if (device := getattr(setting.zero, f"offload_{name}")) != "none":
            parts.append(f"{name} on {device}")
    return ", ".join([*parts, f"gradient checkpointing {'on' if setting.checkpointing else 'off'}"])


def _memory(plan) -> Iterator[tuple[str, ...]]:
    times = {"always": "", "computing": ", computing", "stepping": ", in the step"}
    places = ("gpu", "host", "nvme")
    for amount in sorted(plan.amounts, key=lambda a: list(times).index(a.when)):
        cells = (_gb(amount.bytes) if amount.place == place else "" for place in places)
        yield f"{amount.kind}: {amount.name}{times[amount.when]}", *cells
    yield "at the fullest", _gb(plan.peak), *(_gb(plan.peak_in(place)) for place in places[1:])


def _messages(plan) -> Iterator[tuple[str, ...]]:
    for message in sorted(plan.messages, key=lambda m: -m.sent):
        beside = "" if message.waits else ", beside computation"
        cells = _gb(message.message), _gb(message.sent), str(message.ranks), f"{plan.seconds_of(message):.3f}"
        yield f"{message.operation}: {message.purpose}{beside}", *cells


def _ranked(arguments: argparse.Namespace, candidates: list) -> Iterator[str]:
    if not candidates:
        yield "No setting fits; take more GPUs, shorter sequences, or offload the optimizer and plan with that JSON."
        yield _verdict(False)
        return
    rows = []
    for candidate in candidates[:_MOST_ROWS]:
        plan, setting = candidate.plan, candidate.plan.setting
        ep = setting.ep_size or "off"
        sizes = (setting.zero.stage, ep, setting.tp_size, setting.micro_batch, setting.accumulation)
        speed = f"{plan.time.tokens_per_second:,.0f}"
        rows.append((f"{len(rows) + 1}", *map(str, sizes), _gb(plan.peak), f"{plan.time.seconds:.3g}", speed))
    columns = ("ZeRO", "EP", "TP", "micro-batch", "accumulation", "GB", "s a step", "tokens/s")
    yield from _table("", columns, rows)
    best = candidates[0].plan.setting
    yield f"{len(candidates)} settings fit; the first {len(rows)} are shown, by estimated time per token."
    if arguments.output is not None:
        yield (
            f"Train with: --deepspeed {arguments.output} --per_device_train_batch_size {best.micro_batch} "
            f"--gradient_accumulation_steps {best.accumulation}"
        )
    yield _verdict(True)


def _table(title: str, columns: tuple[str, ...], rows) -> Iterator[str]:
    table = [(title, *columns), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        numbers = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *numbers]).rstrip()


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"
