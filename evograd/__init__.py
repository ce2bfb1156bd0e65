"""First-order hypergradients: EvoGrad (Bohdal, Yang, Hospedales, NeurIPS 2021), what goes beyond it, and baselines."""

from . import baselines
from .comparison import compare
from .hypergradient import hypergradient
from .mixed_mode import mixed_mode
from .host.problem import Hypergradient

__all__ = ["Hypergradient", "baselines", "compare", "hypergradient", "mixed_mode"]
__version__ = "0.1.0"
