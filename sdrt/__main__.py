"""`python -m sdrt` is the `sdrt` command."""

from sdrt.cli.app import app

if __name__ == "__main__":
    app(prog_name="python -m sdrt")
