"""`python -m server` is `mhr`."""

from server.cli import main

main()
