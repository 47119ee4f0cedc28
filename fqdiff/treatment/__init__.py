"""How a plan is carried out: which stages, with which settings, in which order, and what a published method asks of it."""
