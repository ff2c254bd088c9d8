"""Makes a synthetic log with a known truth: related domains that help one another, and one that nothing else helps.

    python launch/synthesize.py --output logs --users 2000 --items 2000 --domains 4 --mean-length 40 --seed 0
    python launch/synthesize.py --output logs --users 12000000 --items 1000000 --domains 9 --mean-length 60
    python launch/synthesize.py … --first-user 3000000 --last-user 6000000    the same rows, of these users alone

It writes Parquet files for launch/prepare.py, and truth.json, which says which domains are related.
"""

import argparse
import dataclasses

from trainer.data.synthetic import SyntheticConfig, synthesize
from trainer.errors import exit_on_input_error


@exit_on_input_error
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet or is empty",
    )
    for field in dataclasses.fields(SyntheticConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=field.type, default=field.default
        )
    parser.add_argument(
        "--first-user",
        type=int,
        default=0,
        metavar="A",
        help="write the users [A, B) alone",
    )
    parser.add_argument(
        "--last-user",
        type=int,
        metavar="B",
        help="the number of users where it is not given",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="how many write; one for every core where it is not given",
    )
    arguments = vars(parser.parse_args())
    own = {
        name: arguments.pop(name)
        for name in ("output", "first_user", "last_user", "processes")
    }
    config = SyntheticConfig(**arguments)
    count = synthesize(config=config, **own)
    users = (config.users if own["last_user"] is None else own["last_user"]) - own[
        "first_user"
    ]
    print(
        f"{own['output']}: {count:,} interactions of {users:,} users in {config.domains} domains"
    )


if __name__ == "__main__":
    main()
