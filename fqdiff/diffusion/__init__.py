"""The diffusion process itself: noise schedules and samplers. Knows no model, no file, no quantization."""
