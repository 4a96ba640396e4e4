"""Reads a text file of the user's, whole."""

from __future__ import annotations

from pathlib import Path

from errors import ConfigError


def read_text(path: Path) -> str:
    """Raises ConfigError, with what is wrong."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
