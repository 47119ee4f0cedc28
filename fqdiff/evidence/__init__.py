"""Evidence in four steps: images -> features -> statistics -> distance. Tensors in, numbers out."""
