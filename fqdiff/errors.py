"""Typed errors. Each says what happened, the values involved, and the next move."""


class FqdiffError(Exception):
    """Base of every error a user can act on; the command line prints it as one line and a hint."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(FqdiffError):
    """A setting is unknown, of the wrong type, or out of range."""

    exit_code = 2


class GroupsError(ConfigError):
    """A block-group text such as ``12/345/6`` is malformed."""


class ArtifactNotFound(FqdiffError):
    """No artifact answers to a reference."""


class AmbiguousRef(FqdiffError):
    """Several artifacts answer to a reference."""


class ArtifactCorrupt(FqdiffError):
    """A stored file is damaged, incomplete or not what its manifest says."""


class LineageError(FqdiffError):
    """Two artifacts do not belong together, or one is still needed by another."""


class DataError(FqdiffError):
    """A data set or image folder is missing or malformed."""


class QuantizationError(FqdiffError):
    """A tensor cannot be stored in the asked format."""


class NumericalError(FqdiffError):
    """A computation produced NaN or infinity."""


def require(condition: bool, message: str, hint: str = "") -> None:
    """Raise ConfigError unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message, hint)
