"""An images endpoint in front of a repository's server, copied beside its models."""
