"""The report of an export: its data, its page and its verdict."""
