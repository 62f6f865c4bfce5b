"""What a person sees while training: one line for each log entry, and a table of the routers for each evaluation."""

from transformers import PrinterCallback, ProgressCallback

from .loads import LatestLoads, Loads

MAX_TABLE_ROWS = 20


class ConsoleCallback(ProgressCallback):
    """Progress bars, and each log entry as text that a person can read.

    Args:
        loads: from which the table of an evaluation takes the most loaded experts.
    """

    def __init__(self, loads: LatestLoads) -> None:
        super().__init__()
        self._loads = loads

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            text = format_entry(state.global_step, state.max_steps, logs, self._loads)
            if self.training_bar is not None:
                self.training_bar.write(text)
            else:
                print(text, flush=True)


class PlainConsoleCallback(PrinterCallback):
    """The same text without progress bars (`--disable_tqdm`).

    Args:
        loads: as for `ConsoleCallback`.
    """

    def __init__(self, loads: LatestLoads) -> None:
        self._loads = loads

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            print(format_entry(state.global_step, state.max_steps, logs, self._loads), flush=True)


def format_entry(step: int, max_steps: int, logs: dict[str, float], loads: LatestLoads) -> str:
    """Return the line of a log entry, and below that of an evaluation of a sparse model the table of its routers."""
    line = format_logs(step, max_steps, logs)
    table = format_router_table(logs, loads.of(logs) or {})
    return f"{line}\n{table}" if table else line


def format_logs(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """Return one line such as `step 20/400 | loss 7.1301 | ce 7.1180 | aux 2.120 | z 0.500 | MaxVio 0.42 | …`.

    Its length does not depend on the number of layers: router losses are sums over them, MaxVio and dropped
    assignments means, dead experts (shown when there are some) a count.
    """
    shown = [f"step {step}/{max_steps}"]
    if "eval_loss" in logs:
        shown += _formatted(logs, _EVALUATION)
    elif "loss" in logs:
        shown += _formatted(logs, _TRAINING)
    else:
        shown += [f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, (int, float))]
    return " | ".join(shown)


_EVALUATION = {"eval_loss": "eval loss {:.4f}", "eval_perplexity": "perplexity {:.2f}"}
_TRAINING = {
    "loss": "loss {:.4f}",
    "ce_loss": "ce {:.4f}",
    "output_z_loss": "output z {:.3f}",
    "aux_loss": "aux {:.3f}",
    "z_loss": "z {:.3f}",
    "max_vio": "MaxVio {:.2f}",
    "dead_experts": "dead {:.0f}",
    "dropped_fraction": "dropped {:.1%}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "skipped_steps": "skipped {:.0f}",
}
_SHOWN_WHEN_ANY = ("dead_experts", "skipped_steps")


def _formatted(logs: dict[str, float], forms: dict[str, str]) -> list[str]:
    values = {key: logs[key] for key in forms if logs.get(key) is not None}
    return [forms[key].format(float(value)) for key, value in values.items() if value or key not in _SHOWN_WHEN_ANY]


def format_router_table(logs: dict[str, float], loads: Loads) -> str:
    """Return one row for each sparse layer that an evaluation has measured; the empty string if there is none.

    Args:
        logs: the entry of the evaluation.
        loads: by `layer_N`.

    Where there are more than `MAX_TABLE_ROWS` layers, those with the largest MaxVio are shown, and the last line says
    how many are not.
    """
    prefix = "eval_max_vio/layer_"
    layers = sorted(int(key.removeprefix(prefix)) for key in logs if key.startswith(prefix))
    if not layers:
        return ""
    worst = sorted(layers, key=lambda layer: -logs[f"{prefix}{layer}"])[:MAX_TABLE_ROWS]
    header = ("layer", "MaxVio", "CV", "load entropy", "dead", "most loaded expert (share)")
    lines = _aligned([header] + [_row(layer, logs, loads) for layer in sorted(worst)])
    if num_hidden := len(layers) - len(worst):
        lines.append(f"{num_hidden} more layers, none with a larger MaxVio, are not shown.")
    return "\n".join(lines)


def _row(layer: int, logs: dict[str, float], loads: Loads) -> tuple[str, ...]:
    columns = {"max_vio": "{:.2f}", "load_cv": "{:.3f}", "load_entropy": "{:.3f}", "dead_experts": "{:.0f}"}
    values = [(logs.get(f"eval_{name}/layer_{layer}"), form) for name, form in columns.items()]
    cells = ["-" if value is None else form.format(value) for value, form in values]
    load = loads.get(f"layer_{layer}")
    most = "-" if load is None else f"{load.index(max(load))} ({max(load):.1%})"
    return (str(layer), *cells, most)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
