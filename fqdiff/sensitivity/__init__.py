"""What quantizing a tensor does to a network, and the scores that claim to foresee it."""
