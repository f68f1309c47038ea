"""`python -m alignfast` is the command `alignfast`."""

from alignfast.cli import main

if __name__ == "__main__":
    main()
