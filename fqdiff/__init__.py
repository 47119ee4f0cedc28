"""fqdiff makes diffusion models smaller, with evidence."""

__version__ = "0.1.0"
