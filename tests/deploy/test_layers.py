"""The list of layers that a builder prints."""

from __future__ import annotations

import pytest

from dq_export.deploy.tensorrt.layers import Layer, kernel_of, read_layers


def test_a_list_of_layers_of_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 'Layer 1 is a gemm'"):
        read_layers("Layers:\nLayer 1 is a gemm")


def test_a_gemm_in_parts_is_as_good_as_its_worst() -> None:
    parts = (
        Layer(name="a", kind="gemm", operands=("Int8", "Int8"), nodes=("n",)),
        Layer(name="b", kind="gemm", operands=("Half", "Half"), nodes=("n",)),
        Layer(name="c", kind="kgen", operands=("Half",), nodes=("n",)),
    )
    assert kernel_of(parts, "n") == ("gemm HalfxHalf", "")
    assert kernel_of(parts[:1], "n") == ("gemm Int8xInt8", "Int8")
    assert kernel_of(parts, "other") == ("not found", "")
