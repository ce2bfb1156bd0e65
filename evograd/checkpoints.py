"""Checkpoints: written whole or not at all, loaded without running code."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .records import replacing


def save(path: str | Path, content: dict) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts. If that fails, an earlier checkpoint stays as it was."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | Path) -> dict:
    """The content of a checkpoint, on the CPU; FileNotFoundError or ValueError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint, or not whole: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or "config" not in content:
        raise ValueError(f"{path} is no checkpoint of this project")
    return content


def check_writable(path: str | Path) -> None:
    """Raise OSError now, not after hours, if a checkpoint cannot be written at `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"--checkpoint {path} is a folder")
    probe = path.with_name(f"{path.name}.tmp{os.getpid()}")
    probe.touch()
    probe.unlink()
