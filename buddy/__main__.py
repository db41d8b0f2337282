"""`python -m buddy`, and so `torchrun … -m buddy …`."""

from buddy.cli import main

if __name__ == "__main__":
    main()
