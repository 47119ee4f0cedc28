"""Copying results out of the store."""

import shutil
from pathlib import Path

from fqdiff.errors import ConfigError


def copy_out(source: Path, target: Path) -> None:
    """Copy a payload file to ``target``; nothing is overwritten."""
    if target.exists():
        raise ConfigError(f"{target} exists", "choose another --output")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}", "choose another --output") from None
