"""Rewrites from the canonical Q/DQ graph to the form that a backend runs, one a file."""
