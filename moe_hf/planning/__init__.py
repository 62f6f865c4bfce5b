"""What a setting needs and how fast it may be, before it runs: formulas over the model and the DeepSpeed JSON."""
