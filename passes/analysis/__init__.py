"""What an export knows of a network from its float graph: linears and their roles, sites, and where their scalings go."""
