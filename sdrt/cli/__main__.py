"""`python -m sdrt.cli`: the same as the `sdrt` command."""

from sdrt.cli import app

if __name__ == "__main__":
    app()
