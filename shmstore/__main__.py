"""``python -m shmstore``: the command line."""

from shmstore.cli import main

if __name__ == "__main__":
    main(prog_name="shmstore")
