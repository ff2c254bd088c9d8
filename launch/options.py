"""What the scripts that take a finished run have in common on their command lines."""

import argparse


def of_a_run(about, told) -> argparse.ArgumentParser:
    """A parser with --run, --data and --json; what the DeepSpeed launcher appends is taken and ignored.

    about: the script's docstring; told: what --json prints.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # torchrun takes --run for the beginning of an option of its own, wherever it stands.
    parser.add_argument(
        "--run",
        "--of",
        required=True,
        help="the folder of a finished run; under torchrun write --of",
    )
    parser.add_argument(
        "--data", help="the prepared dataset, where it is not where the run found it"
    )
    parser.add_argument("--json", action="store_true", help=f"print {told}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser
