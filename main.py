"""The published program's command line (docs/reference.md)."""

from caco.reference.main import main

if __name__ == "__main__":
    raise SystemExit(main())
