"""What a model meets while it samples, and what quantization learns from it."""
