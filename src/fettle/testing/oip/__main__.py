"""`python -m fettle.testing.oip`."""

import sys

from fettle.testing.oip.run import main

if __name__ == "__main__":
    sys.exit(main())
