"""Questions that passes ask of a graph."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from dq_export.core.qtypes import QUANT_TYPES, QuantType
from dq_export.passes.base import GraphError
from dq_export.passes.match import element_type


@pytest.mark.parametrize("qtype", QUANT_TYPES, ids=lambda qtype: qtype.name)
def test_every_type_of_codes_has_an_element_type(qtype: QuantType) -> None:
    expected = ir.DataType.INT8 if qtype.name == "int6" else ir.DataType[qtype.name.replace("_", "").upper()]
    assert element_type(qtype) == expected


def test_an_unknown_type_is_an_error_and_not_float8() -> None:
    with pytest.raises(GraphError, match="codes of type 'float4_e2m1fn': expected one of int8, int6, uint8, int4, float8_e4m3fn"):
        element_type(QuantType(name="float4_e2m1fn", bits=4, qmin=-6, qmax=6, mantissa=1))
