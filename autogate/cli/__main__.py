"""`python -m autogate.cli`."""

from autogate.cli import app

if __name__ == "__main__":
    app()
