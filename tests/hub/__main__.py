"""`python -m tests.hub --root DIR`: a Hub in a process of its own; see process.py."""

import sys

from tests.hub.process import main

if __name__ == "__main__":
    main(sys.argv[1:])
