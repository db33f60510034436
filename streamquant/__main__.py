"""`python -m streamquant` is the command line."""

from streamquant.cli.app import main

if __name__ == "__main__":
    main()
