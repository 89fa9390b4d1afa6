"""`python -m infermesh.cli`: the same as the console script."""

from infermesh.cli import main

main()
