"""Floor 1: what is measured on the float model and what is decided from it (scales, bins, equivalent scaling)."""

if __name__ == "calibration":
    raise ImportError("'calibration' is part of dq_export: import it as 'dq_export.calibration'")
