"""The workshop: Triton kernels. Tensors and ints enter, nothing else; each file holds its reference, kernel and launch."""
