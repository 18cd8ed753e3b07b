"""Models as lists of layer specs over megatron-core's tensor-parallel modules.

Shapes in this package: b micro batch, s sequence, t tensor-parallel size, h hidden, f ffn, n heads, g query groups,
d head width, v padded vocabulary. Hidden states are [b, s, h] without sequence parallelism, which saves attention its
transposes, and [s/t, b, h] with it, since megatron-core gathers and scatters along the first dimension.
"""
