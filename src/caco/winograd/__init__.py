"""3 × 3 convolutions with a quarter of the multiplications, on CPUs: Winograd's minimal filtering, F(4 × 4, 3 × 3).

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks": a tile of 4 × 4 outputs is
Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A of a 6 × 6 input tile d and a 3 × 3 filter g, which takes 36 products instead of 144.
`tiles` has the transforms of inputs and outputs, compiled (numba); `convolution` is what torch sees, with its gradient;
`network` puts it into a network.
"""
