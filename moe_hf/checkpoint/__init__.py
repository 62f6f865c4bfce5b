"""What is on disk: Hugging Face exports of live models, and the topology of DeepSpeed checkpoints."""
