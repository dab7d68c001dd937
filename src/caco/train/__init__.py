"""The run: the loop, its checkpoints, and what it writes down."""
