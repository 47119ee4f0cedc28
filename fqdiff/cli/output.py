"""Copying results out of the store."""

import shutil
from pathlib import Path

from fqdiff.errors import ConfigError


def check_output(target: Path | None) -> None:
    """Raise ConfigError where there is a file already, or no folder for it: before there is work that would be for nothing."""
    if target is not None and target.exists():
        raise ConfigError(f"{target} exists", "choose another --output")
    if target is not None and not target.parent.is_dir():
        raise ConfigError(f"cannot write {target}: no such folder", "choose another --output")


def copy_out(source: Path, target: Path) -> None:
    """Copy a payload file to ``target``; nothing is overwritten."""
    check_output(target)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}", "choose another --output") from None
