"""3 × 3 convolutions with a quarter of the multiplications, on CPUs: Winograd's minimal filtering, F(4 × 4, 3 × 3).

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks": a tile of 4 × 4 outputs is
Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A of a 6 × 6 input tile d and a 3 × 3 filter g, which takes 36 products instead of 144. With
stride 2 it is 81: there the filter falls apart into what meets even places and what meets odd ones.

`network` puts it into a network; `convolution` is what torch sees, with its gradient; `residual` is a whole block, whose
batch norms and ReLUs are done as the convolutions read and write. The others are compiled (numba): `passes` takes some
images through `tiles`, which transforms what `strips` cuts out, and products of matrices (`cpu_kernels/`); `filters`
transforms filters; `transforms` has the formulas; `joins` is the end of a block.
"""
