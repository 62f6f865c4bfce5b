"""The only room that touches DeepSpeed's private names: AutoEP, ZeRO, its JSON and its process groups."""
