"""Configurations that ship as data, by name or by path."""

from pathlib import Path
from typing import Any

import yaml

from ..modeling.errors import ConfigError, did_you_mean


def names(folder: Path) -> list[str]:
    """What ships in a folder."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read(name: str, folder: Path, missing: str) -> tuple[Path, dict[str, Any]]:
    """The file and its keys and values, by the name of a shipped one or by a path.

    Args:
        name: of either.
        folder: of the shipped ones.
        missing: what is said, before the nearest name, where there is no such file.

    Raises:
        ConfigError: there is none, or it is no YAML mapping.
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
