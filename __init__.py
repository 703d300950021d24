"""planish: a compiler for compressed neural networks."""
