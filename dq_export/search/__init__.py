"""Search for a recipe: which granularity each input gets."""
