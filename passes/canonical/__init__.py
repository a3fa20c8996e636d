"""Rewrites from the exported float graph to the canonical Q/DQ graph, one a file."""
