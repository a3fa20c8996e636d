"""The data types of the product, with numpy only: scales, grids, recipes, artifacts, and the interface of a network."""
