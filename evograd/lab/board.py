"""Curves of a run that lasts, for TensorBoard: the flag --tensorboard DIR of the training scripts."""

from __future__ import annotations

from pathlib import Path


def open_board(folder: str | None, name: str, step: int):
    """A torch.utils.tensorboard.SummaryWriter for folder/name, or None if `folder` is; what it has after `step` is left out.

    ValueError if the package is missing, OSError if nothing can be written there.
    """
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"
        ) from error
    path = Path(folder) / name
    path.mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(path), purge_step=step + 1)  # what was written in `step` itself is not written again
