"""`python -m onecard`, for where the command itself is not on the path."""

from onecard.cli import main

if __name__ == "__main__":
    main()
