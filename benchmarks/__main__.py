"""`python -m benchmarks [NAME ...]` runs benchmarks, prints their figures and writes one JSON per result."""
import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import frame, import_rate, input_rate, prepare_rate, step_time  # noqa: F401  (importing an entry registers it)
from hawk_jax.config import ConfigError, HawkError


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures the project against its peers, side by side.",
                                epilog="example: python -m benchmarks input --repeats 5")
    p.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    p.add_argument("--list", action="store_true", help="what there is")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    p.add_argument("--repeats", type=int, default=3, help="times each figure is measured")
    return p.parse_args()


def _file_name(result: dict) -> str:
    """One file per benchmark and kind of machine; git keeps the older results."""
    where = f"{result['machine']['accelerator']} {result['machine']['cores']} cores"
    return f"{result['name']}.{re.sub('[^a-z0-9]+', '-', where.lower())}.json"


def _print(result: dict) -> None:
    print(f"\n{result['name']}: {result['about']}   (load {result['load_average']['before']:.1f})")
    for name, f in (result["figures"] | result["ratios"]).items():
        print(f"  {name:36s} {f['median']:10.3f}  ({f['min']:.3f} .. {f['max']:.3f})  {f['unit']}, {f['better']} is better")


def _run(args: argparse.Namespace) -> None:
    unknown = [name for name in args.names if name not in frame.REGISTRY]
    if unknown or args.repeats < 1:
        raise ConfigError(f"unknown benchmark {unknown[0]!r}; there is: {', '.join(frame.REGISTRY)}" if unknown
                          else f"--repeats {args.repeats}: must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or frame.REGISTRY:
        with tempfile.TemporaryDirectory(prefix="hawk-bench-") as folder:
            result = frame.run(frame.REGISTRY[name], Path(folder), args.repeats)
        _print(result)
        path = args.out / _file_name(result)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"  -> {path}")


def main() -> int:
    args = _arguments()
    if args.list:
        for bench in frame.REGISTRY.values():
            print(f"{bench.name:12s} {bench.about}")
        return 0
    try:
        _run(args)
    except HawkError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
