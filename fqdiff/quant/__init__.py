"""Number formats and what turns tensors into them and back: pure tensor functions."""
