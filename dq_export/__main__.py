"""`python -m dq_export`."""

from .cli.app import main

if __name__ == "__main__":
    main()
