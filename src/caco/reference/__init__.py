"""The published programs (`main.py`, `linear.py`) and their checkpoints, on the same code as everything else."""
