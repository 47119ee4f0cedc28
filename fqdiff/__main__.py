"""``python -m fqdiff``."""

from fqdiff.cli.app import main

main()
