"""`python -m fxquant`."""

from fxquant.cli import main

if __name__ == "__main__":
    main()
