"""Ways to write quantized operators, each as a small graph that the checker judges and the runtimes build."""

from .attention import ATTENTION
from .convolutions import CONVOLUTIONS
from .elsewhere import ELSEWHERE
from .gemms import GEMMS
from .matmuls import MATMULS
from .operators import OPERATORS
from .results import RESULTS
from .sketch import Form, Sketch
from .spellings import SPELLINGS
from .weights import WEIGHTS

FORMS: tuple[Form, ...] = (
    *MATMULS, *WEIGHTS, *ATTENTION, *GEMMS, *CONVOLUTIONS, *RESULTS, *SPELLINGS, *OPERATORS, *ELSEWHERE,
)  # fmt: skip

__all__ = ["FORMS", "Form", "Sketch"]
