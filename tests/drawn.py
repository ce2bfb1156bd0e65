"""Imported by the server that test_torchrun's processes are forked from: each of them finds the glyphs drawn."""

import torch

from cross_domain_fewshot.data import GLYPH_FONTS, draw_glyphs

torch.set_num_threads(1)  # other threads would not be there after a fork
for font in GLYPH_FONTS:
    draw_glyphs(font, "novel" if font == "serif" else "base", 28)
