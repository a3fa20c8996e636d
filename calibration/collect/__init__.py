"""Statistics of every site's input, gathered on disk while the float reference samples pictures."""
