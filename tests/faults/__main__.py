"""Command line of the fault injection, see the package."""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.faults import io_errors, power_cuts, special_files
from tests.faults.process import Server
from tests.faults.verbs import VERBS, Workshop

MODULES = {"errors": io_errors, "power": power_cuts, "files": special_files}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("faults", choices=list(MODULES))
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=f"of {', '.join(VERBS)}")
    parser.add_argument("--every", type=int, default=1, help="only every n-th call")
    parser.add_argument("--all_errors", action="store_true", help="each call with each error")
    parser.add_argument("--distinct", action="store_true", help="numbers in names aside")
    parser.add_argument("--part", default="0/1", help="i/n for one of n processes")
    args = parser.parse_args()
    cases: list = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args, cases)
    finally:
        # Also after Ctrl-C or SIGTERM.
        print(MODULES[args.faults].table(cases))
    sys.exit(0 if all(case.is_good for case in cases) else 1)


def run(args: argparse.Namespace, cases: list) -> None:
    """Add all cases to the list, and print those that are not as promised."""
    with Server() as server, tempfile.TemporaryDirectory(prefix="faults") as folder:
        workshop = Workshop(server, Path(folder))
        for name in args.verbs or VERBS:
            verb = VERBS[name]
            if args.faults == "errors":
                chosen = (args.every, args.all_errors, args.distinct, args.part)
                sweep = io_errors.sweep(workshop, verb, *chosen)
            elif args.faults == "files":
                sweep = special_files.sweep(workshop, verb, args.every, args.distinct, args.part)
            else:
                sweep = power_cuts.sweep(workshop, verb, args.every, args.part)
            for case in sweep:
                cases.append(case)
                if len(cases) % 100 == 0:
                    print(f"{len(cases)} cases, {name}", file=sys.stderr, flush=True)
                if not case.is_good or case.outcome == "advice":
                    print(case, case.stderr[:2000], sep="\n", flush=True)


if __name__ == "__main__":
    main()
