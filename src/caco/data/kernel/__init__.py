"""The pixels of random views on CPUs: one compiled function (numba) that takes an image to its normalised view.

The same mathematics as `data/render.py`, which is its oracle, arranged so that inner loops run over contiguous float32
and touch little memory: source rows are mixed to one row, that row is resampled into three planes (`resize`), and
colours, blur and the final scaling work on planes (`colours`, `blur`). `views` puts them together.
"""
