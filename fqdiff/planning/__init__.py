"""Plans that fit a budget: what every choice costs and does, and the best choices for the bytes there are."""
