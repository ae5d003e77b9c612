"""`python -m xraygpt_lite` is the command `xraygpt-lite`."""

from xraygpt_lite.cli import main

if __name__ == "__main__":
    main()
