"""How Fisher information is measured: per-sample gradients, which samples are drawn, and what is kept of their squares."""
