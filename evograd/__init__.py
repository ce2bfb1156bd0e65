"""First-order hypergradients: EvoGrad (Bohdal, Yang, Hospedales, NeurIPS 2021), what goes beyond it, and baselines."""

from . import baselines
from .comparison import check, compare
from .guided import guided
from .host.result import Hypergradient
from .hypergradient import hypergradient
from .mixed_mode import mixed_mode
from .radius import Radius
from .trajectory import Trajectory

__all__ = ["Hypergradient", "Radius", "Trajectory", "baselines", "check", "compare", "guided", "hypergradient", "mixed_mode"]
__version__ = "0.1.0"
