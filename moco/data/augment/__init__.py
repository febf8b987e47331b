"""One set of operations on images, four back ends: by_pil (the definition), by_numpy, by_torch, by_triton."""
