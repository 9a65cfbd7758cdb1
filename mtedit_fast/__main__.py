"""`python -m mtedit_fast`, which torchrun and accelerate launch start: the `mtedit-fast` command."""

from mtedit_fast.cli import main

if __name__ == "__main__":
    main()
