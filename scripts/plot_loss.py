"""Draw the loss curves of a run from its metrics.jsonl (as the README shows it).

python scripts/plot_loss.py runs/quickstart docs/images/quickstart_loss.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run_dir: Path, image: Path) -> None:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    x = [entry["step"] for entry in steps]

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    top.plot(x, [entry["ce_loss"] for entry in steps], color="tab:blue", label="training cross-entropy")
    top.plot(
        [entry["step"] for entry in evaluations],
        [entry["eval_loss"] for entry in evaluations],
        "o",
        color="tab:red",
        label="evaluation",
    )
    for entry in evaluations:
        text = f"{entry['eval_loss']:.3f}"
        top.annotate(text, (entry["step"], entry["eval_loss"]), (-8, -4), textcoords="offset points", ha="right")
    top.set_ylabel("cross-entropy (nats per token)")
    top.legend(frameon=False)
    for name in sorted(key for key in steps[-1] if key.startswith("aux_loss/")):
        layer = name.rsplit("_", 1)[1]
        bottom.plot(x, [entry[name] for entry in steps], label=f"layer {layer}")
    bottom.axhline(1.0, color="gray", linewidth=0.8, linestyle="--")
    bottom.set_ylabel("balancing loss\n(1 is perfect)")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
