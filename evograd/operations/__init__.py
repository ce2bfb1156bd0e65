"""Operations of PyTorch, told otherwise for the length of a block: kinks, forward mode, recomputation."""
