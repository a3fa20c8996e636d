"""What is found in an exported float graph: its linears with their roles, its sites, and where each site's scaling goes."""
