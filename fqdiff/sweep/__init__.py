"""Sweeps: a grid of cells over the store, each a chain of steps from a plan to a comparison with full precision."""
