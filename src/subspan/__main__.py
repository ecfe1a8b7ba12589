"""`python -m subspan` is the command `subspan`; so torchrun can start it."""

from subspan.cli import main

if __name__ == "__main__":
    main()
