"""The judges: what an encoder's features are worth.

`features` extracts them, each image exactly once; `knn` and `linear` judge features and labels alone; `confidence`
says how far a figure can be trusted; `health` needs no labels.
"""
