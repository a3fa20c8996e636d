"""Search for the best recipe: how each input is quantized."""
