"""Model families, one readable file each; ``build`` turns a stored architecture into a network."""
