"""`python -m opennemo.cli`."""

from opennemo.cli import main

if __name__ == "__main__":
    main()
