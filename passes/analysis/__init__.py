"""Analysis of a network's float graph: linears and their roles, sites, and the places that absorb their scalings."""
