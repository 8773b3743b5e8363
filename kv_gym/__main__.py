"""`python -m kv_gym` is `kv-gym`."""

from kv_gym.cli import main

if __name__ == "__main__":
    main()
