"""The words of the product, numpy only: scales, grids, recipes, artifacts, and what a network is."""
