"""The stages of an export."""
