"""`python -m pipeline`: the list of commands."""

from pipeline.cli import COMMANDS

if __name__ == "__main__":
    print("Meta-learning for few-shot image classification.\n")
    for name, what in COMMANDS.items():
        print(f"  python -m pipeline.{name:<10} {what}")
    print("\nEach answers to --help.")
