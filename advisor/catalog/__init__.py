"""Names and files to specs; the only reader of ``profiles/``."""
