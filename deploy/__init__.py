"""Floor 3: backends that build and run the graph, the audit of their kernels, parity and benchmarks."""

if __name__ == "deploy":
    raise ImportError("'deploy' is part of dq_export: import it as 'dq_export.deploy'")
