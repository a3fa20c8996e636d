"""Rewrites from the exported float graph to the canonical Q/DQ graph, one per file."""
