"""`python -m dq_export`."""

from dq_export.cli import main

if __name__ == "__main__":
    main()
