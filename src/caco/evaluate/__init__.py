"""The judges: what an encoder's features are worth.

`encoder` opens what is judged; `features` extracts its features, each image exactly once; `knn` and `linear` judge features
and labels alone; `reference_probe` is the published linear protocol; `confidence` says how far a figure can be trusted;
`health` needs no labels.
"""
