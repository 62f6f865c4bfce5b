"""As `worker.py`, and rank 0 keeps what the forward passes of training save for their backward passes."""

import json

import torch
import torch.distributed as dist
import worker


class SavedBytes:
    """Counts what autograd keeps of a forward pass, each memory once and weights not at all."""

    def __init__(self, trainer) -> None:
        self._compute_loss = trainer.compute_loss
        self._weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        self.by_step: list[int] = []
        trainer.compute_loss = self

    def __call__(self, *args, **kwargs):
        sizes = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._compute_loss(*args, **kwargs)
        self.by_step.append(sum(sizes.values()))
        return loss


def main() -> None:
    build, record = worker.build_trainer, worker.record
    watched = []

    def build_watched(argv, relay):
        trainer = build(argv, relay)
        watched.append(SavedBytes(trainer))
        return trainer

    def record_bytes(trainer, metrics, error, folder) -> None:
        record(trainer, metrics, error, folder)
        if dist.get_rank() == 0:
            (folder / "saved_bytes.json").write_text(json.dumps(watched[-1].by_step))

    worker.build_trainer, worker.record = build_watched, record_bytes
    worker.main()


if __name__ == "__main__":
    main()
