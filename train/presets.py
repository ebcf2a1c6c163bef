"""Configurations shipped as data, by name or by path."""

from pathlib import Path
from typing import Any

import yaml

from ..modeling.errors import ConfigError, did_you_mean


def names(folder: Path) -> list[str]:
    """Return the names of the configurations in a folder."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read(name: str, folder: Path, missing: str) -> tuple[Path, dict[str, Any]]:
    """Return a configuration's file and its keys and values.

    Args:
        name: Name of a shipped configuration, or path of a YAML file.
        folder: Folder of the shipped configurations.
        missing: Error message for a missing file. The nearest name is appended to it.

    Raises:
        ConfigError: The file does not exist or is not a YAML mapping.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    if not path.exists():
        raise ConfigError(f"{missing}, {did_you_mean(name, names(folder))}")
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(document).__name__}")
    return path, document
