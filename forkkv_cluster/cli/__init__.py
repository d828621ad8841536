"""Commands that talk to a running cluster, or to none: ``status``, ``generate``, ``config``. ``serve`` is in __main__."""
