"""`python -m gpuopt`."""

from gpuopt.cli.app import main

if __name__ == "__main__":
    main()
