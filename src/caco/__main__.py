"""`python -m caco`."""

from caco.cli import main

raise SystemExit(main())
