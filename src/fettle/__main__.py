"""`python -m fettle`."""

from fettle.cli import main

if __name__ == "__main__":
    main()
