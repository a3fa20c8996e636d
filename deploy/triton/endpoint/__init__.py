"""An images endpoint in front of a repository's server. It is copied into the repository."""
