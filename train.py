"""Trains an RWKV language model; `python train.py --help` shows examples and all settings."""

import sys

from rwkv_train.cli.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
