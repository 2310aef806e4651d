"""How annotations are enforced in tests: shapes and types by beartype, with whole numbers accepted for floats."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
