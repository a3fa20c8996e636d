"""Floor 2: rewrites of the ONNX graph. A pass applies what calibration decided and never chooses a number."""

if __name__ == "passes":
    raise ImportError("'passes' is part of dq_export: import it as 'dq_export.passes'")
