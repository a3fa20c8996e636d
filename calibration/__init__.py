"""Floor 1: measures the float model, and decides scales, bins and equivalent scalings."""

if __name__ == "calibration":
    raise ImportError("'calibration' is part of dq_export: import it as 'dq_export.calibration'")
