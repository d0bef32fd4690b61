"""`python -m tuner`."""

from .cli.main import main

main()
