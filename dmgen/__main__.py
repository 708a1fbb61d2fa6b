"""`python -m dmgen` is the command `dmgen`."""

from dmgen.cli import main

if __name__ == "__main__":
    main(prog_name="dmgen")
