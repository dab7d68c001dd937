"""The run-time type checker of the tests: beartype, with ints accepted for floats as type checkers do (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
