"""`python -m opennemo`, and `torchrun ... -m opennemo`."""

from opennemo.cli import main

if __name__ == "__main__":
    main()
