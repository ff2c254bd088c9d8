"""Makes a synthetic log with a known truth: related domains that help one another, and one that nothing else helps.

    python launch/synthesize.py --output logs --users 2000 --items 2000 --domains 4 --mean-length 40 --seed 0

It writes Parquet files for launch/prepare.py, and truth.json, which says which domains are related.
"""

import argparse
import dataclasses

from trainer.data.synthetic import SyntheticConfig, synthesize
from trainer.errors import exit_on_input_error


@exit_on_input_error
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet or is empty")
    for field in dataclasses.fields(SyntheticConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    config = SyntheticConfig(**arguments)
    count = synthesize(output, config)
    print(f"{output}: {count:,} interactions of {config.users:,} users in {config.domains} domains")


if __name__ == "__main__":
    main()
