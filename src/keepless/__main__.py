"""`python -m keepless`: the command line."""

from keepless.cli import main

if __name__ == "__main__":
    main()
