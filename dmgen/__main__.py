"""`python -m dmgen` is the command `dmgen`."""

from dmgen.cli.app import main

if __name__ == "__main__":
    main(prog_name="dmgen")
