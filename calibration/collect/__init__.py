"""Statistics of every site's input, collected on disk while the float reference samples pictures."""
