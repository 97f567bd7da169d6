"""`python -m keepless.cli`."""

from keepless.cli import main

if __name__ == "__main__":
    main()
